"""Class activation maps, where the class is how differently a frozen network sees observed and expected."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.errors import ConfigError, nearest_names
from blemish.perceptual import INSTALLED, LAYERS, Backbone, length
from blemish.scores.contracts import NO_GRADIENTS, ExplainedScore, gradient, gradients

KINDS = ("cam", "hires")


class GradCamScore(ExplainedScore):
    """Which activations make a frozen network see observed and expected differently, and where they lie.

    Sources: Selvaraju et al., Grad-CAM, ICCV 2017, arXiv 1610.02391; Draelos and Carin, HiResCAM, arXiv 2011.08891.
    In place of a class, the gradient is that of the squared distance between observed and expected activations of one
    layer, summed over the tile's places; each place's activations are divided by their length over channels plus the
    mean length of the expected ones, so that places of little contrast count little. The gradient weighs not the
    observed activations, as there, but by how much they exceed the expected ones: ReLU(sum over channels of
    gradient * (observed - expected)), enlarged bilinearly. The observed ones alone light up where both agree, too: on
    pairs of printed circuit boards (DeepPCB) they told defects hardly better than chance.

    What a model calls invalid counts as equal. A model's spread is in pixel values, which activations are not, and is
    not used.

    Args:
        backbone, weights: as in `blemish.perceptual.Backbone`.
        layer: 0 to 4; later ones see more of the picture, and place it less well.
        kind: hires, weights from each place, or cam, their mean over the tile, which told defects less well.

    Raises:
        ConfigError: an argument is out of range, no weights, or (in use) the model is not in pixel space.
    """

    unexportable = NO_GRADIENTS

    def __init__(self, backbone: str = "alex", weights: str = INSTALLED, layer: int = 1, kind: str = "hires") -> None:
        super().__init__()
        if layer not in range(LAYERS):
            raise ConfigError(f"Expected score.layer to be a whole number from 0 to {LAYERS - 1}, found {layer}.")
        if kind not in KINDS:
            raise ConfigError(f"Unknown score.kind '{kind}': {nearest_names(kind, KINDS)}")
        self.backbone = Backbone(backbone, weights)
        self.layer, self.kind = layer, kind

    def explain(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            output = model(x)
            observed = output.observed
            if output.valid is not None:
                # Before the network looks, whose neighbouring places would see the edge of what is missing.
                observed = torch.where(output.valid, observed, output.expected)
            seen, wanted = (self._activations(image) for image in (observed, output.expected))
        with gradients():
            seen, wanted = seen.clone().requires_grad_(), wanted.clone()
            usual = length(wanted).mean(dim=(2, 3), keepdim=True)
            apart = seen / (length(seen) + usual) - wanted / (length(wanted) + usual)
            slope = gradient(self, apart.square().sum(), seen)
            if self.kind == "cam":
                slope = slope.mean(dim=(2, 3), keepdim=True)
            score = (slope * (seen.detach() - wanted)).sum(dim=1, keepdim=True).relu()
        score = F.interpolate(score, observed.shape[-2:], mode="bilinear", align_corners=False)
        return score if output.valid is None else score * output.valid, output.expected

    def _activations(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K, h, w) of the layer."""
        activations: Tensor = self.backbone(image.float(), self.layer + 1)[-1]
        return activations

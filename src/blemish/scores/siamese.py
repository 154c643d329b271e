"""Are these two the same? The distance of two embeddings, at each place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.errors import ConfigError
from blemish.models.run_encoder import RunEncoder
from blemish.scores.contracts import ExplainedScore, compared, enlarged


class SiameseScore(ExplainedScore):
    """How differently a trained run's encoder sees observed and expected: (1 - cosine) / 2 of their codes, in [0, 1].

    For `blemish diff`, where what is expected is another picture. The encoder is that of `models.siamese`, which has
    learned what is the same in another light, and what is not; any run of a model that is `Encoding` will do. Codes are
    compared place by place, and the distances enlarged bilinearly. Sides that an encoder cannot halve are lengthened by
    their last pixel. What a model calls invalid counts as equal.

    Args:
        run: folder that `blemish train` made.

    Raises:
        ConfigError: no run, or one without an encoder, or (in use) the model is not in pixel space, or the images have
            other channels than the run's. CheckpointError: the run cannot be loaded.
    """

    def __init__(self, run: str | None) -> None:
        super().__init__()
        if run is None:
            raise ConfigError(
                "strategy.run is not set: name the folder of a trained run, such as one of model=siamese."
            )
        self.encoder = RunEncoder(run)

    @torch.inference_mode()
    def explain(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        output = model(x)
        observed = output.observed
        if output.valid is not None:
            # Before the encoder looks, whose neighbouring places would see the edge of what is missing.
            observed = torch.where(output.valid, observed, output.expected)
        step = self.encoder.step
        seen, wanted = (self.encoder(_lengthened(image.float(), step)) for image in (observed, output.expected))
        height, width = observed.shape[-2:]
        distance = (1 - F.cosine_similarity(seen, wanted)[:, None]).clamp(min=0) / 2
        return compared(enlarged(distance, _lengthened(observed, step))[..., :height, :width], output), output.expected


def _lengthened(x: Tensor, step: int) -> Tensor:
    """(B, C, H, W) with its last row and column repeated, until both sides are multiples of `step`."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % step, 0, -height % step), mode="replicate")

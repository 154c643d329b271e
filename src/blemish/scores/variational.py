"""Scores that ask a latent code: how far it lies from what was expected of it, what else it could have become."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.models.contracts import Latent
from blemish.residuals import Residual
from blemish.scores.contracts import (
    NO_RANDOM_NUMBERS,
    ExplainedScore,
    check_counts,
    check_not_negative,
    latents_of,
    residual_tile,
)

_AS_IN_EVALUATION = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)


def kl_map(latents: Sequence[Latent], observed: Tensor, x: Tensor) -> Tensor:
    """KL divergence, in nats per value of `observed`, where it arises: (B, 1, H, W) for tiles x (B, C, H, W).

    `observed`, (B, D, h, w), is what the model compares: the tiles themselves, or features. Summed over latent
    dimensions and levels; each level's grid is enlarged bilinearly, a flat code makes a constant plane. The mean over
    the tile is the KL term of training.
    """
    total = torch.zeros_like(x[:, :1])
    for latent in latents:
        kl = latent.kl().float()
        kl = kl if kl.ndim == 4 else kl[:, :, None, None]
        # A cell's KL is shared by the values that it stands for.
        share = kl.shape[-2] * kl.shape[-1] / observed[0].numel()
        grid = kl.sum(dim=1, keepdim=True) * share
        total = total + F.interpolate(grid, x.shape[-2:], mode="bilinear", align_corners=False)
    return total.clamp(min=0)  # rounding may leave less than nothing


class KlScore(ExplainedScore):
    """The KL map alone: where the code differs from the prior, see `kl_map`; with a flat code the same everywhere.

    Raises:
        ConfigError: (in use) the model has no latent distribution.
    """

    @torch.inference_mode()
    def explain(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        output = model(x)
        return kl_map(latents_of(output, self), output.observed, x), output.expected


class ElboScore(ExplainedScore):
    """The negative evidence lower bound, pixel by pixel: residual + beta * KL map.

    Source: Kingma and Welling, arXiv 1312.6114. Its mean over a tile is what training minimises, if `residual` and
    `beta` are those of the objective; a flat code adds the same to every pixel.

    Args:
        residual: the per-pixel distance.
        beta: weight of the KL map, >= 0.

    Raises:
        ConfigError: beta is negative, or (in use) the model has no latent distribution.
    """

    def __init__(self, residual: Residual, beta: float = 0.01) -> None:
        super().__init__()
        check_not_negative(beta=beta)
        self.residual, self.beta = residual, beta

    @torch.inference_mode()
    def explain(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        output = model(x)
        kl = kl_map(latents_of(output, self), output.observed, x)
        return residual_tile(self.residual, output, x) + self.beta * kl, output.expected


class MonteCarloScore(ExplainedScore):
    """Mean residual over decodings of codes that are drawn from the latent distribution.

    Source: An and Cho, Variational autoencoder based anomaly detection using reconstruction probability, 2015. Every
    tile sees the same noise, whatever its batch; another device or memory format makes other noise.

    Args:
        residual: the per-pixel distance.
        draws: codes per tile. seed: of the noise.

    Raises:
        ConfigError: draws is below 1, or (in use) the model has no latent distribution.
    """

    unexportable = NO_RANDOM_NUMBERS

    def __init__(self, residual: Residual, draws: int = 8, seed: int = 0) -> None:
        super().__init__()
        check_counts(draws=draws)
        self.residual, self.draws, self.seed = residual, draws, seed

    @torch.inference_mode()
    def explain(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        latents_of(model(x[:1]), self)
        scores, expected = [], []
        with sampling(model):
            for tile in torch.split(x, 1):
                with seeded(self.seed, x.device):
                    output = model(torch.cat([tile] * self.draws))
                scores.append(residual_tile(self.residual, output, tile).mean(dim=0, keepdim=True))
                expected.append(output.expected.mean(dim=0, keepdim=True))
        return torch.cat(scores), torch.cat(expected)


@contextmanager
def sampling(model: nn.Module) -> Iterator[None]:
    """The model draws codes as in training, while normalisation and dropout stay as they are; modes are restored."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            if not isinstance(module, _AS_IN_EVALUATION):
                module.training = True
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers on the CPU and on `device` follow from `seed`; afterwards the generators are as they were."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield

"""What training minimises."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from blemish.errors import ConfigError
from blemish.models.contracts import Output
from blemish.residuals import Residual


class Loss(NamedTuple):
    """`total` is minimised; all are scalars, `kl` in nats per pixel value and 0 for models without a latent."""

    total: Tensor
    reconstruction: Tensor
    kl: Tensor


class ReconstructionObjective(nn.Module):
    """Mean residual, plus beta times the KL divergence for models with a latent distribution.

    The KL term is divided by the number of pixel values of the tile, like the mean residual. With the l1
    residual this is the negative ELBO, up to constants, of a Laplace likelihood of scale beta; with l2, of a
    Gaussian of variance beta / 2. beta is thus in units of the noise that the model need not explain.

    Sources: Kingma and Welling, arXiv 1312.6114; beta: Higgins et al., ICLR 2017; warm-up: Bowman et al.,
    arXiv 1511.06349; free bits: Kingma et al., arXiv 1606.04934.

    Args:
        residual: the per-pixel distance.
        beta: weight of the KL term, >= 0.
        warmup_steps: over which beta grows linearly from 0.
        free_bits: nats per latent dimension (batch mean) that cost nothing.

    Raises:
        ConfigError: an argument is negative.
    """

    def __init__(self, residual: Residual, beta: float = 0.01, warmup_steps: int = 0, free_bits: float = 0.0) -> None:
        super().__init__()
        if min(beta, warmup_steps, free_bits) < 0:
            raise ConfigError(
                f"Expected objective.beta, warmup_steps and free_bits >= 0, found {beta}, {warmup_steps}, {free_bits}."
            )
        self.residual = residual
        self.beta, self.warmup_steps, self.free_bits = beta, warmup_steps, free_bits

    def forward(self, output: Output, target: Tensor, step: int) -> Loss:
        """`target`: the clean tiles (B, C, H, W); `step`: optimiser steps done."""
        reconstruction = self.residual(target, output.expected).mean()
        if output.latent is None:
            return Loss(reconstruction, reconstruction, reconstruction.new_zeros(()))
        per_dimension = output.latent.kl().float().mean(dim=0)
        kl = per_dimension.clamp(min=self.free_bits).sum() / target[0].numel()
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return Loss(reconstruction + self.beta * warm * kl, reconstruction, kl)

"""Scores that follow gradients back to the input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blemish.errors import ConfigError, nearest_names
from blemish.residuals import Residual
from blemish.scores.contracts import (
    NO_GRADIENTS,
    ExplainedScore,
    bounded,
    check_counts,
    check_not_negative,
    expected_tile,
    gradient,
    gradients,
    latents_of,
    residual_tile,
)
from blemish.scores.variational import kl_map

LOSSES = ("residual", "kl", "elbo")


class InputGradientScore(ExplainedScore):
    """How strongly each pixel pulls at the loss: |d loss / dx|, mean over channels, loss summed over the tile's pixels.

    Sources: Zimmerer et al., Context-encoding variational autoencoder, arXiv 1812.05941, and A case for the score,
    arXiv 1912.00003; of="kl" with times_residual=true is that of their Unsupervised anomaly localization, 1907.02796.

    Args:
        residual: the per-pixel distance.
        of: the loss: residual; kl; or elbo, which is residual + beta * kl. The last two need a latent distribution.
        beta: weight of the KL term in the ELBO, >= 0.
        times_residual: multiply by the residual; alone, gradients are large on flat areas, too, with some residuals.

    Raises:
        ConfigError: unknown loss, negative beta, or (in use) the model has no latent distribution or no gradient.
    """

    unexportable = NO_GRADIENTS

    def __init__(
        self, residual: Residual, of: str = "residual", beta: float = 0.01, times_residual: bool = True
    ) -> None:
        super().__init__()
        if of not in LOSSES:
            raise ConfigError(f"Unknown score.of '{of}': {nearest_names(of, LOSSES)}")
        check_not_negative(beta=beta)
        self.residual, self.of, self.beta, self.times_residual = residual, of, beta, times_residual

    def explain(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        with gradients():
            x = x.clone().requires_grad_()
            output = model(x)
            residual = residual_tile(self.residual, output, x)
            loss = x.new_zeros(()) if self.of == "kl" else residual.sum()
            if self.of != "residual":
                kl = kl_map(latents_of(output, self), output.observed, x)
                loss = loss + (1 if self.of == "kl" else self.beta) * kl.sum()
            slope = gradient(self, loss, x)[:, : output.observed.shape[1]]  # of a pair, the reference has no slope
            score = slope.abs().mean(dim=1, keepdim=True)
        if self.times_residual:
            score = score * residual.detach()
        return score if output.valid is None else score * output.valid, output.expected.detach()


class ProjectionScore(ExplainedScore):
    """Residual between the tile and the nearest one that the model knows, found by gradient descent on the tile.

    Source: Dehaene et al., Iterative energy-based projection on a normal data manifold, arXiv 2002.03734. The energy is
    residual(x, model(x)) + weight * |x - tile|, and the gradient is multiplied by (x - expected)^2, so that only what
    the model does not know is changed. Sums run over pixel values, not means, so that `rate` suits every tile size.
    Unlike there, a tile's rate grows by half after each step that lowers its energy, and is halved after one that would
    raise it, which is taken back: squares of small differences are far smaller than any one rate suits.

    Args:
        residual: the per-pixel distance.
        steps: of descent. rate: length of a step, to begin with. weight: of the distance to the tile, >= 0.

    Raises:
        ConfigError: a number is out of range, or (in use) the model is not in pixel space or has no gradient.
    """

    unexportable = NO_GRADIENTS

    def __init__(self, residual: Residual, steps: int = 20, rate: float = 0.2, weight: float = 0.05) -> None:
        super().__init__()
        check_counts(steps=steps)
        check_not_negative(rate=rate, weight=weight)
        self.residual, self.steps, self.rate, self.weight = residual, steps, rate, weight

    def explain(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        projected = self.project(model, x)
        with torch.inference_mode():
            return self.residual(x, projected), projected

    def project(self, model: nn.Module, tile: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> the same, with no more energy."""
        with gradients():
            tile = tile.clone()
            x = nearest = tile
            direction = torch.zeros_like(tile)
            lowest, rate = (torch.full_like(tile[:, :1, :1, :1], value) for value in (torch.inf, self.rate))
            for _ in range(self.steps + 1):
                x = x.clone().requires_grad_()
                output = model(x)
                expected = expected_tile(output, x, self).detach()
                distance = self.residual(output.observed, output.expected) * tile.shape[1]
                slope = gradient(self, distance.sum(), x)
                x = x.detach()
                way = x - tile
                energy = distance.detach().sum((1, 2, 3), True) + self.weight * way.abs().sum((1, 2, 3), True)
                better = energy < lowest
                nearest = torch.where(better, x, nearest)
                direction = torch.where(better, (slope + self.weight * way.sign()) * (x - expected).square(), direction)
                grown = torch.where(lowest.isinf(), rate, rate * 1.5)  # no step led to the tile itself
                lowest, rate = torch.where(better, energy, lowest), torch.where(better, grown, rate / 2)
                x = bounded(nearest - rate * direction, tile)
        return nearest

"""What every model returns, in training and in use alike."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gaussian(NamedTuple):
    """A diagonal normal distribution over a latent code; both tensors of shape (B, D) or (B, D, h, w)."""

    mean: Tensor
    log_variance: Tensor

    def sample(self) -> Tensor:
        """A draw that gradients pass through (Kingma and Welling, arXiv 1312.6114, the reparametrisation trick)."""
        return self.mean + torch.exp(0.5 * self.log_variance) * torch.randn_like(self.mean)

    def kl(self, prior: Gaussian | None = None) -> Tensor:
        """KL divergence to the prior (None: the standard normal), per latent dimension, in nats; shape of `mean`."""
        if prior is None:
            return 0.5 * (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance)
        spread = self.log_variance - prior.log_variance
        distance = (self.mean - prior.mean).square() * torch.exp(-prior.log_variance)
        return 0.5 * (distance + spread.exp() - 1 - spread)


class Latent(NamedTuple):
    """One level of a latent code: what the encoder says of it, and what was expected of it before looking.

    prior: None for the standard normal; a hierarchical model has one that depends on the level above.
    """

    posterior: Gaussian
    prior: Gaussian | None = None

    def kl(self) -> Tensor:
        """KL divergence from prior to posterior, per latent dimension, in nats: (B, D) or (B, D, h, w)."""
        return self.posterior.kl(self.prior)


class Output(NamedTuple):
    """Observed against expected.

    observed, expected: (B, D, h, w); for models in pixel space D = C and h, w are the tile's.
    latents: the levels of the code's distribution, for models that have one.
    penalty: a scalar >= 0 that the model wants minimised beside the residual, for models that have one.
    repaired: (B, 1, h, w) logits of the model's own belief that it repaired a pixel, for models that have one.
    """

    observed: Tensor
    expected: Tensor
    latents: tuple[Latent, ...] = ()
    penalty: Tensor | None = None
    repaired: Tensor | None = None

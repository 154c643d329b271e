"""What every model returns, in training and in use alike."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gaussian(NamedTuple):
    """A diagonal normal distribution over the latent code; both tensors of shape (B, D) or (B, D, h, w)."""

    mean: Tensor
    log_variance: Tensor

    def sample(self) -> Tensor:
        """A draw that gradients pass through (Kingma and Welling, arXiv 1312.6114, the reparametrisation trick)."""
        return self.mean + torch.exp(0.5 * self.log_variance) * torch.randn_like(self.mean)

    def kl(self) -> Tensor:
        """KL divergence to the standard normal, per latent dimension, in nats; same shape as `mean`."""
        return 0.5 * (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance)


class Output(NamedTuple):
    """Observed against expected.

    observed, expected: (B, D, h, w); for models in pixel space D = C and h, w are the tile's.
    latent: the code's distribution, for models that have one.
    """

    observed: Tensor
    expected: Tensor
    latent: Gaussian | None = None

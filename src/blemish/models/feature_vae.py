"""A variational autoencoder on the features of a frozen network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blemish.errors import ConfigError
from blemish.models.contracts import FeatureSource, Latent, Output
from blemish.models.feature_ae import FeatureAutoencoder
from blemish.models.vae import read_gaussian


class FeatureVariationalAutoencoder(FeatureAutoencoder):
    """A feature autoencoder whose latents at each place are a distribution; in evaluation the mean is decoded.

    Source: Kingma and Welling, arXiv 1312.6114; trained in `fit` as `FeatureAutoencoder`, minimising the mean squared
    residual plus beta times the KL divergence, which is divided by the number of features. That is the negative ELBO,
    up to constants, of a Gaussian likelihood of variance beta / 2, in squared deviations of a feature.

    Args:
        beta: see above, >= 0.
        arguments: those of `FeatureAutoencoder`.

    Raises:
        ConfigError: an argument is out of range.
    """

    numbers_per_latent = 2  # mean and log variance

    def __init__(self, backbone: FeatureSource, beta: float = 0.1, **arguments: Any) -> None:
        super().__init__(backbone, **arguments)
        if not beta >= 0:
            raise ConfigError(f"Expected model.beta >= 0, found {beta}.")
        self.beta = beta

    def loss(self, observed: Tensor, generator: torch.Generator) -> Tensor:
        posterior = read_gaussian(self.encoder(observed))
        noise = torch.randn(posterior.mean.shape, generator=generator).to(observed)
        expected = self.decoder(posterior.mean + torch.exp(0.5 * posterior.log_variance) * noise)
        kl = posterior.kl().sum(dim=1).mean() / self.dimensions
        loss: Tensor = (expected - observed).square().mean() + self.beta * kl
        return loss

    def expect(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        return observed, self.decoder(read_gaussian(self.encoder(observed)).mean)

    def forward(self, x: Tensor) -> Output:
        """(B, 1 or 3, H, W) in [0, 1] -> observed and expected (B, D, h, w), and the latent distribution."""
        with torch.autocast(x.device.type, enabled=False):
            observed = self.observe(x)
            posterior = read_gaussian(self.encoder(observed))
            code = posterior.sample() if self.training else posterior.mean
            return Output(observed, self.decoder(code), (Latent(posterior),))

"""The variational autoencoder."""

from __future__ import annotations

from torch import Tensor

from blemish.models.autoencoder import ConvAutoencoder
from blemish.models.blocks import check_tile
from blemish.models.contracts import Gaussian, Latent, Output


class VariationalAutoencoder(ConvAutoencoder):
    """An autoencoder whose code is a distribution; in evaluation the mean is decoded, so that results repeat.

    Source: Kingma and Welling, Auto-encoding variational Bayes, arXiv 1312.6114. The weight of the KL term, its
    warm-up and the free bits belong to the objective (`objective.beta`, `.warmup_steps`, `.free_bits`).

    Args: those of `ConvAutoencoder`.
    """

    numbers_per_dimension = 2  # mean and log variance

    def forward(self, x: Tensor) -> Output:
        """(B, C, H, W) in [0, 1] -> observed = x, expected (B, C, H, W), and the latent distribution."""
        check_tile(x.shape[-2], x.shape[-1], self.depth)
        mean, log_variance = self.into_code(self.encoder(x)).chunk(2, dim=1)
        # The bounds keep exp() finite in reduced precision; they lie far from any trained value.
        latent = Gaussian(mean, log_variance.clamp(-12.0, 12.0))
        code = latent.sample() if self.training else latent.mean
        return Output(x, self.decoder(self.from_code(code)), (Latent(latent),))

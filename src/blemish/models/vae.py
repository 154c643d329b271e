"""The variational autoencoder."""

from __future__ import annotations

from torch import Tensor

from blemish.models.autoencoder import ConvAutoencoder
from blemish.models.blocks import check_tile
from blemish.models.contracts import Gaussian, Latent, Output


class VariationalAutoencoder(ConvAutoencoder):
    """An autoencoder whose code is a distribution; in evaluation the mean is decoded, so that results repeat.

    Source: Kingma and Welling, Auto-encoding variational Bayes, arXiv 1312.6114. The weight of the KL term (the beta
    of a beta-VAE), its warm-up and the free bits belong to the objective (`objective.beta`, `.warmup_steps`,
    `.free_bits`).

    Args: those of `ConvAutoencoder`.
    """

    numbers_per_dimension = 2  # mean and log variance

    def forward(self, x: Tensor) -> Output:
        """(B, C, H, W) in [0, 1] -> observed = x, expected (B, C, H, W), and the latent distribution."""
        check_tile(x.shape[-2], x.shape[-1], self.depth)
        posterior = read_gaussian(self.into_code(self.encoder(x)))
        code = posterior.sample() if self.training else posterior.mean
        return Output(x, self.decoder(self.from_code(code)), (Latent(posterior),))


def read_gaussian(numbers: Tensor) -> Gaussian:
    """The first half of dimension 1 is the mean, the second the log variance: (B, 2 D, ...) -> 2 x (B, D, ...)."""
    mean, log_variance = numbers.chunk(2, dim=1)
    # The bounds keep exp() finite in reduced precision; they lie far from any trained value.
    return Gaussian(mean, log_variance.clamp(-12.0, 12.0))

"""The variational autoencoder."""

from __future__ import annotations

from torch import Tensor, nn

from blemish.models.blocks import Decoder, Encoder, FromCode, IntoCode, check_architecture, check_tile, level_widths
from blemish.models.contracts import Gaussian, Output


class VariationalAutoencoder(nn.Module):
    """An autoencoder whose code is a distribution; in evaluation the mean is decoded, so that results repeat.

    Source: Kingma and Welling, Auto-encoding variational Bayes, arXiv 1312.6114. The weight of the KL term, its
    warm-up and the free bits belong to the objective (`objective.beta`, `.warmup_steps`, `.free_bits`).

    Args: as for `ConvAutoencoder`.
    """

    def __init__(
        self,
        channels: int = 1,
        width: int = 16,
        depth: int = 4,
        latent_dim: int = 64,
        latent: str = "spatial",
        normalisation: str = "batch",
        activation: str = "silu",
        tile_size: int | None = None,
    ) -> None:
        super().__init__()
        check_architecture(channels, width, depth, latent_dim)
        self.depth = depth
        features = level_widths(width, depth)[-1]
        grid = tile_size // 2**depth if tile_size else None
        self.encoder = Encoder(channels, width, depth, normalisation, activation)
        self.into_code = IntoCode(features, 2 * latent_dim, latent, grid)
        self.from_code = FromCode(latent_dim, features, latent, grid)
        self.decoder = Decoder(channels, width, depth, normalisation, activation)

    def forward(self, x: Tensor) -> Output:
        """(B, C, H, W) in [0, 1] -> observed = x, expected (B, C, H, W), and the latent distribution."""
        check_tile(x.shape[-2], x.shape[-1], self.depth)
        mean, log_variance = self.into_code(self.encoder(x)).chunk(2, dim=1)
        # The bounds keep exp() finite in reduced precision; they lie far from any trained value.
        latent = Gaussian(mean, log_variance.clamp(-12.0, 12.0))
        code = latent.sample() if self.training else latent.mean
        return Output(x, self.decoder(self.from_code(code)), latent)

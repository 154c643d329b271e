"""The convolutional autoencoder."""

from __future__ import annotations

from torch import Tensor, nn

from blemish.models.blocks import Decoder, Encoder, FromCode, IntoCode, check_architecture, check_tile, level_widths
from blemish.models.contracts import Output


class ConvAutoencoder(nn.Module):
    """Compresses a tile to a code and rebuilds it; what it rebuilds is what it has learned to expect.

    Source: Masci et al., Stacked convolutional auto-encoders, ICANN 2011, with strided convolutions.

    Args:
        channels: 1 (grey) or 3 (colour).
        width: channels of the first level; they double per level, up to 8 times.
        depth: number of halvings; tile sides must be multiples of 2^depth.
        latent_dim: size of the code, per position if spatial.
        latent: "spatial" keeps an (H / 2^depth, W / 2^depth) grid of codes, "flat" has one for the tile.
        normalisation: batch, instance, group or none. activation: silu, relu, leaky_relu or gelu.
        tile_size: side of the tiles, needed for a flat latent only.

    Raises:
        ConfigError: an argument is out of range, or (in `forward`) the tile's sides do not fit the depth.
    """

    numbers_per_dimension = 1  # that the encoder gives for each dimension of the code

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
        self.into_code = IntoCode(features, self.numbers_per_dimension * latent_dim, latent, grid)
        self.from_code = FromCode(latent_dim, features, latent, grid)
        self.decoder = Decoder(channels, width, depth, normalisation, activation)

    def encode(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> the code, of a distribution its mean: (B, D, h, w), or (B, D) if flat."""
        check_tile(x.shape[-2], x.shape[-1], self.depth)
        numbers: Tensor = self.into_code(self.encoder(x))
        return numbers.chunk(self.numbers_per_dimension, dim=1)[0]

    def forward(self, x: Tensor) -> Output:
        """(B, C, H, W) in [0, 1] -> observed = x and expected, both (B, C, H, W)."""
        return self.rebuilt(x)[0]

    def rebuilt(self, x: Tensor) -> tuple[Output, Tensor]:
        """What `forward` gives here, and the code: (B, D, H / 2^depth, W / 2^depth) if spatial, (B, D) if flat."""
        check_tile(x.shape[-2], x.shape[-1], self.depth)
        code: Tensor = self.into_code(self.encoder(x))
        return Output(x, self.decoder(self.from_code(code))), code

"""The variational autoencoder with two levels of codes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.errors import ConfigError
from blemish.models.arguments import check_counts
from blemish.models.blocks import Decoder, Encoder, check_architecture, check_tile, conv_block, level_widths
from blemish.models.contracts import Gaussian, Latent, Output
from blemish.models.vae import read_gaussian


class HierarchicalVariationalAutoencoder(nn.Module):
    """A coarse code says what the tile is about; what is expected of the finer code depends on it.

    Source: Sønderby et al., Ladder variational autoencoders, arXiv 1602.02282. The coarse code z2 has a standard
    normal prior. On the way down it gives the prior of the fine code z1, on a grid twice as fine; the posterior of z1
    is that prior times what the encoder saw, each weighted by its precision. Unlike there, the decoder sees the state
    that z2 led to as well as z1, so that z2 is of use even while z1 tells nothing. In evaluation the means are
    decoded, so that results repeat. The weight of the KL terms is `objective.beta`.

    Args:
        channels: 1 (grey) or 3 (colour).
        width: channels of the first level; they double per level, up to 8 times.
        depth: number of halvings, at least 2; tile sides must be multiples of 2^depth.
        latent_dim: size of the coarse code at each position of the (H / 2^depth, W / 2^depth) grid.
        fine_dim: size of the fine code at each position of a grid twice as fine.
        normalisation: batch, instance, group or none. activation: silu, relu, leaky_relu or gelu.

    Raises:
        ConfigError: an argument is out of range, or (in `forward`) the tile's sides do not fit the depth.
    """

    def __init__(
        self,
        channels: int = 1,
        width: int = 16,
        depth: int = 4,
        latent_dim: int = 64,
        fine_dim: int = 16,
        normalisation: str = "batch",
        activation: str = "silu",
    ) -> None:
        super().__init__()
        check_architecture(channels, width, depth, latent_dim)
        if depth < 2:
            raise ConfigError(f"Expected model.depth of at least 2, one for each level of codes, found {depth}.")
        check_counts(fine_dim=fine_dim)
        self.depth = depth
        style: Any = (normalisation, activation)
        fine, coarse = level_widths(width, depth)[-2:]
        self.encoder = Encoder(channels, width, depth, *style)
        self.coarse_posterior = nn.Conv2d(coarse, 2 * latent_dim, 1)
        self.from_coarse = nn.Conv2d(latent_dim, coarse, 1)
        self.down = nn.Sequential(
            conv_block(coarse, coarse, 1, *style),
            nn.Upsample(scale_factor=2, mode="nearest"),
            conv_block(coarse, fine, 1, *style),
        )
        self.fine_prior = nn.Conv2d(fine, 2 * fine_dim, 1)
        self.fine_evidence = nn.Conv2d(fine, 2 * fine_dim, 1)
        self.from_fine = nn.Conv2d(fine_dim, fine, 1)
        self.decoder = Decoder(channels, width, depth - 1, *style)

    def forward(self, x: Tensor) -> Output:
        """(B, C, H, W) in [0, 1] -> observed = x, expected (B, C, H, W), and the latents, the coarse one first."""
        check_tile(x.shape[-2], x.shape[-1], self.depth)
        levels = self.encoder.levels(x)
        coarse = read_gaussian(self.coarse_posterior(levels[-1]))
        state = self.down(self.from_coarse(self._code(coarse)))
        prior = read_gaussian(self.fine_prior(state))
        fine = product(prior, read_gaussian(self.fine_evidence(levels[-2])))
        expected = self.decoder(state + self.from_fine(self._code(fine)))
        return Output(x, expected, (Latent(coarse), Latent(fine, prior)))

    def _code(self, latent: Gaussian) -> Tensor:
        return latent.sample() if self.training else latent.mean


def product(first: Gaussian, second: Gaussian) -> Gaussian:
    """The normal distribution whose density is proportional to the product of both: precisions add up."""
    weight = torch.sigmoid(first.log_variance - second.log_variance)  # of the second: its share of the precision
    mean = torch.lerp(first.mean, second.mean, weight)
    # Minus the logarithm of the sum of precisions, in a form that neither overflows nor needs float32.
    return Gaussian(mean, first.log_variance - F.softplus(first.log_variance - second.log_variance))

"""The generator that has learned normal tiles, and the encoder that looks for a tile among what it can make."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.errors import ConfigError
from blemish.models.arguments import check_positive
from blemish.models.autoencoder import ConvAutoencoder
from blemish.models.blocks import check_tile, level_widths
from blemish.models.contracts import Judgement, Output, Pair, Round
from blemish.models.discriminator import of_tiles


class FastAnoGan(ConvAutoencoder):
    """A generator learns to make normal tiles from noise, and is frozen; then an encoder learns to find their codes.

    Source: Schlegl et al., f-AnoGAN, Medical Image Analysis 54, 2019: its izi_f training of the encoder, with
    `Output.penalty` the distance between what the discriminator sees in the tile and in what the generator makes of
    the tile's code (`Output.features`). `score=f_anogan` adds the same distance to the residual, as in the paper. The
    paper's generator learns by a Wasserstein distance with a penalty on gradients; here the discriminator's slope is
    bounded by its spectral norms, which costs no second derivative.

    Args:
        channels, width, depth, latent_dim, latent, normalisation, activation, tile_size: those of `ConvAutoencoder`.
        gan_share: share of the training that belongs to the generator, between 0 and 1; the rest is the encoder's.
        kappa: weight of the distance between the discriminator's features in the encoder's training, > 0.
        discriminator_rate: learning rate of the discriminator, in units of the generator's, > 0.

    Raises:
        ConfigError: an argument is out of range, or (in `forward`) the tile's sides do not fit the depth.
    """

    def __init__(
        self,
        channels: int = 1,
        width: int = 16,
        depth: int = 4,
        latent_dim: int = 128,
        latent: str = "flat",
        gan_share: float = 0.6,
        kappa: float = 1.0,
        discriminator_rate: float = 1.0,
        normalisation: str = "batch",
        activation: str = "silu",
        tile_size: int | None = None,
    ) -> None:
        super().__init__(channels, width, depth, latent_dim, latent, normalisation, activation, tile_size)
        check_positive(kappa=kappa, discriminator_rate=discriminator_rate)
        if not 0 < gan_share < 1:
            raise ConfigError(f"Expected model.gan_share between 0 and 1, found {gan_share}.")
        self.kappa, self.discriminator_rate = kappa, discriminator_rate
        self.stages = (gan_share, 1 - gan_share)
        self.spatial, self.latent_dim = latent == "spatial", latent_dim
        self.discriminator = of_tiles(channels, level_widths(width, depth))

    def forward(self, x: Tensor) -> Output:
        """(B, C, H, W) in [0, 1] -> observed = x, expected (B, C, H, W), what the discriminator sees in both."""
        output, _ = self.rebuilt(x)
        seen = Pair(self.discriminator(x).features, self.discriminator(output.expected).features)
        return output._replace(penalty=self.kappa * F.mse_loss(seen.expected, seen.observed), features=seen)

    def play(self, given: Tensor, target: Tensor, stage: int) -> Round:
        """As `Adversarial`: first what noise becomes against tiles, then the encoder alone."""
        for part in (self.from_code, self.decoder, self.discriminator):
            part.train(self.training and stage == 0)  # frozen statistics, too
        if stage == 1:
            return Round(_parameters(self.encoder, self.into_code), self(given))
        check_tile(target.shape[-2], target.shape[-1], self.depth)
        shape = [len(target), self.latent_dim]
        if self.spatial:
            shape += [side // 2**self.depth for side in target.shape[-2:]]
        fake = self.decoder(self.from_code(torch.randn(shape, device=target.device)))
        return Round(_parameters(self.from_code, self.decoder), None, target, fake)

    def persuasion(self, real: Judgement, fake: Judgement) -> Tensor:
        """As `Adversarial`: what noise becomes should be taken for tiles."""
        return -fake.logits.mean()


def _parameters(*parts: nn.Module) -> list[nn.Parameter]:
    return [parameter for part in parts for parameter in part.parameters()]

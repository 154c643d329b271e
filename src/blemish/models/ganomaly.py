"""The autoencoder that encodes a second time what it has rebuilt."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from blemish.models.arguments import check_positive
from blemish.models.autoencoder import ConvAutoencoder
from blemish.models.blocks import Encoder, IntoCode, level_widths
from blemish.models.contracts import Judgement, Output, Pair, Round
from blemish.models.discriminator import of_tiles, parameters_beside


class Ganomaly(ConvAutoencoder):
    """Tile to code to tile to code; a defect's code is not found again in what was rebuilt.

    Source: Akcay et al., GANomaly: semi-supervised anomaly detection via adversarial training, arXiv 1805.06725. The
    paper weighs adversarial, contextual and encoding loss 1 : 50 : 1, here as 0.02 : 1 : 0.02; the contextual loss is
    the objective's residual, and the encoding loss `Output.penalty`. The adversarial one is the paper's feature
    matching, divided by the variance of the features, whose unit the discriminator chooses. `Output.features` are the
    two codes: `score=ganomaly` is their distance, the paper's score, at each place. Codes are spatial by default, where
    the paper has one for the tile.

    Args:
        channels, width, depth, latent_dim, latent, normalisation, activation, tile_size: those of `ConvAutoencoder`.
        adversarial_weight: of the game beside the reconstruction, > 0.
        code_weight: of the mean squared distance of the two codes, > 0.
        discriminator_rate: learning rate of the discriminator, in units of the others', > 0.

    Raises:
        ConfigError: an argument is out of range, or (in `forward`) the tile's sides do not fit the depth.
    """

    stages = (1.0,)

    def __init__(
        self,
        channels: int = 1,
        width: int = 16,
        depth: int = 4,
        latent_dim: int = 64,
        latent: str = "spatial",
        adversarial_weight: float = 0.02,
        code_weight: float = 0.02,
        discriminator_rate: float = 0.25,
        normalisation: str = "batch",
        activation: str = "silu",
        tile_size: int | None = None,
    ) -> None:
        super().__init__(channels, width, depth, latent_dim, latent, normalisation, activation, tile_size)
        check_positive(
            adversarial_weight=adversarial_weight, code_weight=code_weight, discriminator_rate=discriminator_rate
        )
        self.adversarial_weight, self.code_weight = adversarial_weight, code_weight
        self.discriminator_rate = discriminator_rate
        widths = level_widths(width, depth)
        self.second_encoder = Encoder(channels, width, depth, normalisation, activation)
        grid = tile_size // 2**depth if tile_size else None
        self.into_second_code = IntoCode(widths[-1], latent_dim, latent, grid)
        self.discriminator = of_tiles(channels, widths)

    def forward(self, x: Tensor) -> Output:
        """(B, C, H, W) in [0, 1] -> observed = x, expected (B, C, H, W), both codes, and their weighted distance."""
        output, code = self.rebuilt(x)
        again = self.into_second_code(self.second_encoder(output.expected))
        penalty = self.code_weight * F.mse_loss(again.float(), code.float())
        codes = Pair(*(each.float() if each.ndim == 4 else each.float()[:, :, None, None] for each in (code, again)))
        return output._replace(penalty=penalty, features=codes)

    def play(self, given: Tensor, target: Tensor, stage: int) -> Round:
        """As `Adversarial`: tiles against what was rebuilt of them."""
        output = self(given)
        return Round(parameters_beside(self, self.discriminator), output, target, output.expected)

    def persuasion(self, real: Judgement, fake: Judgement) -> Tensor:
        """As `Adversarial`: the discriminator should see the same in both, in units of how tiles differ."""
        seen = real.features.detach()
        spread = seen.var(dim=(0, 2, 3), unbiased=False).mean().clamp(min=1e-6)
        return self.adversarial_weight * F.mse_loss(fake.features, seen) / spread

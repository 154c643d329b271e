"""The autoencoder whose codes cannot be told from draws of a prior."""

from __future__ import annotations

import torch
from torch import Tensor

from blemish.models.arguments import check_positive
from blemish.models.autoencoder import ConvAutoencoder
from blemish.models.contracts import Judgement, Round
from blemish.models.discriminator import of_codes, parameters_beside


class AdversarialAutoencoder(ConvAutoencoder):
    """Rebuilds a tile from a code; a discriminator sees to it that codes are distributed like the standard normal.

    Source: Makhzani et al., Adversarial autoencoders, arXiv 1511.05644. What a variational autoencoder reaches by a
    KL term, this reaches by a game, with a code that is not random. With a spatial latent, the code at each place is
    held against the prior on its own, so that neighbours may still agree. One optimiser has the reconstruction and
    the game, weighted, where the paper takes turns.

    Args:
        channels, width, depth, latent_dim, latent, normalisation, activation, tile_size: those of `ConvAutoencoder`.
        adversarial_weight: of the game beside the reconstruction, > 0.
        discriminator_rate: learning rate of the discriminator, in units of the autoencoder's, > 0.

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
        adversarial_weight: float = 0.1,
        discriminator_rate: float = 0.25,
        normalisation: str = "batch",
        activation: str = "silu",
        tile_size: int | None = None,
    ) -> None:
        super().__init__(channels, width, depth, latent_dim, latent, normalisation, activation, tile_size)
        check_positive(adversarial_weight=adversarial_weight, discriminator_rate=discriminator_rate)
        self.adversarial_weight, self.discriminator_rate = adversarial_weight, discriminator_rate
        self.discriminator = of_codes(latent_dim)

    def play(self, given: Tensor, target: Tensor, stage: int) -> Round:
        """As `Adversarial`: codes against draws from the prior."""
        output, code = self.rebuilt(given)
        return Round(parameters_beside(self, self.discriminator), output, torch.randn_like(code), code)

    def persuasion(self, real: Judgement, fake: Judgement) -> Tensor:
        """As `Adversarial`: codes should be taken for draws from the prior."""
        return -self.adversarial_weight * fake.logits.mean()

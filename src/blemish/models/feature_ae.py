"""An autoencoder of few latents on the features of a frozen network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm import tqdm

from blemish.errors import ConfigError
from blemish.models.arguments import check_counts, check_positive
from blemish.models.contracts import FeatureSource
from blemish.models.feature_cache import FeatureCache
from blemish.models.features import FeatureModel

_SIDE = 8  # of the parts of a grid that larger kernels are trained on


class FeatureAutoencoder(FeatureModel):
    """Expects at each place the features that few latents give back.

    Source: Shi, Yang and Qi, Unsupervised anomaly segmentation via deep feature reconstruction (DFR), Neurocomputing
    2021. Two layers to the latents and two back, trained in `fit` by Adam on random patches, with a rate that falls
    along a cosine.

    Args:
        backbone, projection, dimensions, cache_gb, seed: those of `FeatureModel`.
        latent_dim: number of latents at each place.
        width: of the hidden layers; None takes as many as there are features.
        kernel: of the first and the last layer, odd: 1 sees each place on its own.
        steps, batch_size: of the training; a batch is of so many patches. learning_rate: at its start.

    Raises:
        ConfigError: an argument is out of range.
    """

    numbers_per_latent = 1

    def __init__(
        self,
        backbone: FeatureSource,
        latent_dim: int = 8,
        width: int | None = None,
        kernel: int = 1,
        steps: int = 3000,
        batch_size: int = 1024,
        learning_rate: float = 0.002,
        projection: str = "none",
        dimensions: int | None = None,
        cache_gb: float = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, projection, dimensions, cache_gb, seed)
        width = self.dimensions if width is None else width
        check_counts(latent_dim=latent_dim, width=width, kernel=kernel, steps=steps, batch_size=batch_size)
        if kernel % 2 == 0:
            raise ConfigError(f"Expected model.kernel to be odd, found {kernel}.")
        check_positive(learning_rate=learning_rate)
        self.kernel, self.steps, self.batch_size, self.learning_rate = kernel, steps, batch_size, learning_rate

        def layer(inputs: int, outputs: int, side: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, side, padding="same", padding_mode="replicate")

        self.encoder = nn.Sequential(
            layer(self.dimensions, width, kernel),
            nn.SiLU(),
            layer(width, latent_dim * self.numbers_per_latent, 1),
        )
        self.decoder = nn.Sequential(
            layer(latent_dim, width, 1),
            nn.SiLU(),
            layer(width, self.dimensions, kernel),
        )

    def learn(self, cache: FeatureCache) -> None:
        generator = self.generator()
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        optimizer = torch.optim.Adam(parameters, self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        with torch.enable_grad(), tqdm(range(self.steps), "autoencoder", unit="step", leave=False) as bar:
            for _ in bar:
                loss = self.loss(self._batch(cache, generator), generator)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
        optimizer.zero_grad(set_to_none=True)

    def _batch(self, cache: FeatureCache, generator: torch.Generator) -> Tensor:
        """Normal patches: (1, D, 1, `batch_size`) for a kernel of 1, else parts of grids (B, D, s, s)."""
        if self.kernel == 1:
            return self.prepared(cache.draw(self.batch_size, generator))[None, None].movedim(-1, 1)
        windows = cache.windows(max(1, self.batch_size // _SIDE**2), _SIDE, generator)
        return self.prepared(windows.movedim(1, -1)).movedim(-1, 1)

    def loss(self, observed: Tensor, generator: torch.Generator) -> Tensor:
        """What is minimised: a scalar. Features (B, D, h, w); the generator, on the CPU, is for what is drawn."""
        _, expected = self.expect(observed)
        loss: Tensor = (expected - observed).square().mean()
        return loss

    def expect(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        return observed, self.decoder(self.encoder(observed))

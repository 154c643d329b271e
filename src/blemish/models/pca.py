"""The subspace in which normal features vary."""

from __future__ import annotations

import torch
from torch import Tensor

from blemish.errors import ConfigError
from blemish.models.contracts import FeatureSource
from blemish.models.feature_cache import FeatureCache
from blemish.models.features import FeatureModel


class PrincipalSubspace(FeatureModel):
    """Expects at each place the features' projection on the first principal components of normal ones.

    Source: Jackson and Mudholkar, Control procedures for residuals associated with principal component analysis,
    Technometrics 1979. The components are those of all normal patches, read part by part.

    Args:
        backbone, cache_gb, seed: those of `FeatureModel`.
        components: how many, a whole number; or the share of the variance that they explain, between 0 and 1.

    Raises:
        ConfigError: an argument is out of range.
    """

    centre: Tensor
    axes: Tensor

    def __init__(self, backbone: FeatureSource, components: float = 0.95, cache_gb: float = 4.0, seed: int = 0) -> None:
        super().__init__(backbone, "none", None, cache_gb, seed)
        d, counted = self.dimensions, isinstance(components, int)
        if not (1 <= components <= d if counted else 0 < components < 1):
            raise ConfigError(
                f"Expected model.components from 1 to the backbone's {d}, or a share between 0 and 1, found "
                f"{components}."
            )
        self.components = components
        self.register_buffer("centre", torch.zeros(d))
        # A share has as many rows as there could be: those that it does not need are 0.
        self.register_buffer("axes", torch.zeros(int(components) if counted else d, d))

    def learn(self, cache: FeatureCache) -> None:
        mean, covariance = self.moments(cache)
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1).T
        count = len(self.axes)
        if not isinstance(self.components, int):
            explained = values.cumsum(0) / values.sum().clamp(min=1e-12)
            count = min(int((explained <= self.components).sum()) + 1, count)
        self.centre.copy_(mean)
        self.axes.zero_()
        self.axes[:count] = vectors[:count].to(self.axes)

    def expect(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        apart = observed.movedim(1, -1) - self.centre
        expected = self.centre + (apart @ self.axes.T) @ self.axes
        return observed, expected.movedim(-1, 1)

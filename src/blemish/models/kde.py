"""The density of normal features, by kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blemish.errors import ConfigError
from blemish.models.contracts import FeatureSource
from blemish.models.densities import Density, squared_distances
from blemish.models.features import in_parts

SCOTT = "scott"


class KernelDensity(Density):
    """Judges each place by the negative log density of its features, by Gaussian kernels on normal ones.

    Sources: Parzen, Annals of Mathematical Statistics 1962; Scott, Multivariate density estimation, 1992. Evidence, in
    nats, is log K(0) - log density, where log K(0) = -D / 2 * log(2 pi bandwidth^2) is the highest that a density of
    these kernels can be. The more features, the more it is the distance to the nearest patch alone: kernels suit few
    dimensions, such as a bottleneck's, or those that a projection leaves. Equals scikit-learn's, and needs none of it.

    Args:
        backbone, samples, projection, dimensions, cache_gb, seed: those of `Density`.
        bandwidth: of the kernels, in the units of prepared features, which vary by about 1; or scott, N^(-1 / (D + 4)).

    Raises:
        ConfigError: an argument is out of range.
    """

    fitted_by = None
    growing = ("points",)
    points: Tensor
    width: Tensor

    def __init__(
        self,
        backbone: FeatureSource,
        bandwidth: float | str = SCOTT,
        samples: int = 5000,
        projection: str = "none",
        dimensions: int | None = None,
        cache_gb: float = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, samples, projection, dimensions, cache_gb, seed)
        if bandwidth != SCOTT and (isinstance(bandwidth, str) or not bandwidth > 0):
            raise ConfigError(f"Expected model.bandwidth > 0, or scott, found {bandwidth}.")
        self.bandwidth = bandwidth
        self.register_buffer("points", torch.zeros(1, self.dimensions))
        self.register_buffer("width", torch.ones(()))

    def estimate(self, patches: Tensor) -> None:
        count, d = patches.shape
        width = count ** (-1 / (d + 4)) if self.bandwidth == SCOTT else float(self.bandwidth)
        self.points = patches.clone()
        self.fill(width=width, highest=-d / 2 * math.log(2 * math.pi * width**2))

    def score_samples(self, places: Tensor) -> Tensor:
        return in_parts(self._log_density, places, len(self.points))

    def _log_density(self, places: Tensor) -> Tensor:
        exponents = squared_distances(places, self.points) / (-2 * self.width.square())
        return exponents.logsumexp(dim=1) - math.log(len(self.points)) + self.highest

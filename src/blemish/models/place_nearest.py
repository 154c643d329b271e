"""The nearest of the normal features that were seen at the same place."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from blemish.models.arguments import check_counts
from blemish.models.contracts import FeatureSource
from blemish.models.feature_cache import FeatureCache
from blemish.models.gaussian import PlaceGaussian

_MOST_VALUES = 2**24  # of normal features that are whitened at once
_IN_CACHE = 2**20  # values of banks compared at once, which a CPU's cache holds as float32: 9 times as fast


class PlaceNearest(PlaceGaussian):
    """Expects at each place the nearest of what normal tiles showed there, by the distance of `PlaceGaussian`.

    A normal distribution (PaDiM, arXiv 2011.08785) says how features vary together at a place, but has one middle; a
    bank (PatchCore, arXiv 2106.08265) has as many as it holds, but knows neither places nor what varies. Here each
    place has a bank of its own, and its covariance measures distances. With residual=l2, a score is the squared
    distance / D.

    Args:
        backbone, size, projection, dimensions, cache_gb, seed: those of `PlaceGaussian`.
        shrinkage: as there; the larger it is, the more distances are those of the features as they are.
        bank: how many normal tiles each place remembers, evenly spread; where there are fewer, some are kept twice. A
            place costs 2 * bank * (D + 2) bytes beside 4 * D^2.

    Raises:
        ConfigError: an argument is out of range, or (in `forward`) the tile has another size.
    """

    bank: Tensor
    lengths: Tensor

    def __init__(
        self,
        backbone: FeatureSource,
        size: int = 256,
        bank: int = 500,
        shrinkage: float = 0.1,
        projection: str = "random",
        dimensions: int | None = 100,
        cache_gb: float = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, size, shrinkage, projection, dimensions, cache_gb, seed)
        check_counts(bank=bank)
        places = self.centre.shape[0] * self.centre.shape[1]
        self.register_buffer("bank", torch.zeros(places, bank, self.dimensions, dtype=torch.float16))
        self.register_buffer("lengths", torch.zeros(places, bank))  # squared, of what is in the bank

    def learn(self, cache: FeatureCache) -> None:
        super().learn(cache)
        places, size, d = self.bank.shape
        kept = torch.linspace(0, cache.tiles - 1, size).round().long()
        centre, whitening = self.centre.reshape(places, 1, d), self.whitening.reshape(places, d, d)
        step = max(1, _MOST_VALUES // (max(cache.tiles, size) * len(self.mean)))
        for first in tqdm(range(0, places, step), "bank", unit="part", leave=False):
            part = slice(first, first + step)
            features = self.prepared(cache.places(first, first + step)[kept]).transpose(0, 1)  # (places, bank, D)
            self.bank[part] = (features - centre[part]) @ whitening[part].transpose(1, 2)
            self.lengths[part] = self.bank[part].float().square().sum(dim=2)

    def expect(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        seen, mean = super().expect(observed)
        apart = seen - mean
        places = apart.flatten(2).permute(2, 0, 1)  # (places, B, D)
        if torch.compiler.is_compiling():  # a graph with a number of parts would be one for a number of tiles
            found = _nearest(places, self.bank, self.lengths)
        else:
            step = max(1, _IN_CACHE // (self.bank.shape[1] * (self.dimensions + len(apart))))
            parts = zip(*(torch.split(each, step) for each in (places, self.bank, self.lengths)), strict=True)
            found = torch.cat([_nearest(*part) for part in parts])
        return apart, found.permute(1, 2, 0).reshape(apart.shape)


def _nearest(queries: Tensor, bank: Tensor, lengths: Tensor) -> Tensor:
    """The nearest of `bank` (P, N, D), of squared `lengths` (P, N), to each of `queries` (P, B, D): (P, B, D)."""
    bank = bank.float()
    # A query's own length is the same for all of the bank.
    distances = lengths[:, None] - 2 * queries @ bank.transpose(1, 2)
    found = distances.argmin(dim=2)[..., None].expand(-1, -1, bank.shape[2])
    return bank.gather(1, found)

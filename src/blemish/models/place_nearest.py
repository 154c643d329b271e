"""The nearest of the normal features that were seen at the same place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from blemish.models.arguments import check_counts
from blemish.models.contracts import FeatureSource
from blemish.models.gaussian import PlaceGaussian
from blemish.models.places import Places, nearest_of_places


class PlaceNearest(PlaceGaussian):
    """Expects at each place the nearest of what normal tiles showed there, by the distance of `PlaceGaussian`.

    A normal distribution (PaDiM, arXiv 2011.08785) says how features vary together at a place, but has one middle; a
    bank (PatchCore, arXiv 2106.08265) has as many as it holds, but knows neither places nor what varies. Here each
    place has a bank of its own, and its covariance measures distances. With residual=l2, a score is the squared
    distance / D.

    Args:
        backbone, size, projection, dimensions, cache_gb, seed: those of `PlaceGaussian`.
        shrinkage: as there; the larger it is, the more distances are those of the features as they are.
        bank: how many normal tiles each place remembers, evenly spread, or as many as there are. A place costs
            2 * bank * (D + 2) bytes beside 4 * D^2.

    Raises:
        ConfigError: an argument is out of range, or (in `forward`) the tile has another size.
    """

    remembers_tiles = True
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
        self.most = bank
        places = self.centre.shape[0] * self.centre.shape[1]
        self.register_buffer("bank", torch.zeros(places, 1, self.dimensions, dtype=torch.float16))
        self.register_buffer("lengths", torch.zeros(places, 1))  # squared, of what is in the bank

    def keep(self, places: Places) -> None:
        super().keep(places)
        self.bank, self.lengths = places.bank.to(self.centre.device), places.lengths.to(self.centre)

    def expect(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        seen, mean = super().expect(observed)
        apart = seen - mean
        return apart, nearest_of_places(apart, self.bank, self.lengths)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        found = state_dict.get(prefix + "bank")
        if isinstance(found, Tensor) and found.ndim == 3:  # the number of tiles alone is the state's to say
            self.bank = self.bank.new_zeros(self.bank.shape[0], found.shape[1], self.dimensions)
            self.lengths = self.lengths.new_zeros(self.bank.shape[:2])
        super()._load_from_state_dict(state_dict, prefix, *arguments)

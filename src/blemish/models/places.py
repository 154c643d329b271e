"""What normal tiles show at each place of a grid of features: a normal distribution, and a bank of what was seen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from blemish.errors import ConfigError
from blemish.models.feature_cache import FeatureCache

_MOST_VALUES = 2**24  # of what is read, inverted or whitened at once
_IN_CACHE = 2**20  # values of banks compared at once, which a CPU's cache holds as float32: 9 times as fast


def whitener(covariance: Tensor, shrinkage: float) -> Tensor:
    """(..., D, D) -> W of the same shape, float32, W^T W the inverse of covariance + shrinkage * identity.

    Raises:
        ConfigError: there is none.
    """
    d = covariance.shape[-1]
    identity = torch.eye(d, dtype=torch.float64, device=covariance.device)
    try:
        lower = torch.linalg.cholesky(covariance.double() + shrinkage * identity)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ConfigError(
            f"The covariance of a place cannot be inverted with a shrinkage of {shrinkage:g}: set a larger one, such "
            "as 0.1."
        ) from error
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
    return inverse.float()


def gaussians_of_places(
    cache: FeatureCache, prepared: Callable[[Tensor], Tensor], dimensions: int, shrinkage: float
) -> tuple[Tensor, Tensor]:
    """Mean (places, D) and whitening matrix (places, D, D) of normal tiles' features at each place, float32.

    prepared: from features (N, places, K), as the cache holds them, to those that are judged, (N, places, D).
    """
    count = cache.values.shape[1] * cache.values.shape[2]
    centre, whitening = torch.empty(count, dimensions), torch.empty(count, dimensions, dimensions)
    step = max(1, _MOST_VALUES // max(cache.tiles * cache.values.shape[3], dimensions**2))
    for first in tqdm(range(0, count, step), "covariances", unit="part", leave=False):
        features = prepared(cache.places(first, first + step)).transpose(0, 1)  # (places, N, D)
        middle = features.mean(dim=1)
        apart = (features - middle[:, None]).double()  # so that a small shrinkage is not lost in rounding
        covariance = apart.transpose(1, 2) @ apart / max(1, cache.tiles - 1)
        centre[first : first + step] = middle
        whitening[first : first + step] = whitener(covariance, shrinkage)
    return centre, whitening


def banks_of_places(
    cache: FeatureCache, prepared: Callable[[Tensor], Tensor], centre: Tensor, whitening: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """What `size` normal tiles, evenly spread, showed at each place, whitened: (places, size, D) float16; and the
    squared length of each, (places, size) float32.

    Args:
        cache, prepared: as for `gaussians_of_places`, of which `centre` and `whitening` come.
        size: at most `cache.tiles`.
    """
    places, dimensions = centre.shape
    bank = torch.empty(places, size, dimensions, dtype=torch.float16, device=centre.device)
    lengths = torch.empty(places, size, device=centre.device)
    kept = torch.linspace(0, cache.tiles - 1, size).round().long()
    step = max(1, _MOST_VALUES // (cache.tiles * cache.values.shape[3]))
    for first in tqdm(range(0, places, step), "bank", unit="part", leave=False):
        part = slice(first, first + step)
        features = prepared(cache.places(first, first + step)[kept]).transpose(0, 1)  # (places, size, D)
        bank[part] = (features.to(centre) - centre[part, None]) @ whitening[part].transpose(1, 2)
        lengths[part] = bank[part].float().square().sum(dim=2)
    return bank, lengths


def nearest_of_places(apart: Tensor, bank: Tensor, lengths: Tensor) -> Tensor:
    """The nearest of each place's bank to what tiles show there.

    Args:
        apart: whitened features less their mean, (B, D, h, w).
        bank, lengths: as `banks_of_places` gives them; places are counted row by row.

    Returns:
        (B, D, h, w).
    """
    places = apart.flatten(2).permute(2, 0, 1)  # (places, B, D)
    if torch.compiler.is_compiling():  # a graph with a number of parts would be one for a number of tiles
        found = _nearest(places, bank, lengths)
    else:
        step = max(1, _IN_CACHE // (bank.shape[1] * (bank.shape[2] + len(apart))))
        parts = zip(*(torch.split(each, step) for each in (places, bank, lengths)), strict=True)
        found = torch.cat([_nearest(*part) for part in parts])
    return found.permute(1, 2, 0).reshape(apart.shape)


def _nearest(queries: Tensor, bank: Tensor, lengths: Tensor) -> Tensor:
    """The nearest of `bank` (P, N, D), of squared `lengths` (P, N), to each of `queries` (P, B, D): (P, B, D)."""
    bank = bank.float()
    # A query's own length is the same for all of the bank.
    distances = lengths[:, None] - 2 * queries @ bank.transpose(1, 2)
    found = distances.argmin(dim=2)[..., None].expand(-1, -1, bank.shape[2])
    return bank.gather(1, found)

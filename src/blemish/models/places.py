"""What normal tiles show at each place of a grid of features: a normal distribution, and a bank of what was seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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


class Places(NamedTuple):
    """What normal tiles show at each place of a grid, places counted row by row.

    centre: the mean, (places, D) float32. whitening: as `whitener` gives it, (places, D, D) float32. bank: what N of
    the tiles showed, less the mean and whitened, (places, N, D) float16. lengths: squared, of what is in the bank,
    (places, N) float32.
    """

    centre: Tensor
    whitening: Tensor
    bank: Tensor
    lengths: Tensor


def places_of(
    cache: FeatureCache, prepared: Callable[[Tensor], Tensor], dimensions: int, shrinkage: float, bank: int = 0
) -> Places:
    """Learn the places of the tiles in `cache`, in one pass, on the device of what is `prepared`; they come on the CPU.

    Args:
        prepared: from features (N, places, K), as the cache holds them, to those that are judged, (N, places, D).
        dimensions: D. shrinkage: as in `whitener`.
        bank: how many tiles a place remembers, evenly spread, or as many as there are.

    Raises:
        ConfigError: as `whitener`.
    """
    count, kept = cache.values.shape[1] * cache.values.shape[2], min(bank, cache.tiles)
    chosen = torch.linspace(0, cache.tiles - 1, kept).round().long()
    found = Places(
        torch.empty(count, dimensions),
        torch.empty(count, dimensions, dimensions),
        torch.empty(count, kept, dimensions, dtype=torch.float16),
        torch.empty(count, kept),
    )
    step = max(1, _MOST_VALUES // max(cache.tiles * cache.values.shape[3], dimensions**2))
    for first in tqdm(range(0, count, step), "places", unit="part", leave=False):
        part = slice(first, first + step)
        features = prepared(cache.places(first, first + step)).transpose(0, 1)  # (places, N, D)
        middle = features.mean(dim=1)
        apart = features - middle[:, None]
        precise = apart.double()  # so that a small shrinkage is not lost in rounding
        covariance = precise.transpose(1, 2) @ precise / max(1, cache.tiles - 1)
        whitening = whitener(covariance, shrinkage)
        found.centre[part], found.whitening[part] = middle, whitening
        if kept:
            found.bank[part] = (apart[:, chosen] @ whitening.transpose(1, 2)).half()
            found.lengths[part] = found.bank[part].float().square().sum(dim=2)
    return found


def nearest_of_places(apart: Tensor, bank: Tensor, lengths: Tensor) -> Tensor:
    """The nearest of each place's bank to what tiles show there.

    Args:
        apart: whitened features less their mean, (B, D, h, w).
        bank, lengths: those of `Places`.

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

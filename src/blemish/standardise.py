"""Bringing tiles to one brightness and contrast, so that a model need not learn the light.

Used alike in training and scoring: a model sees, and is compared in, standardised tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEVEL, SPREAD = 0.5, 0.2
"""Mean and standard deviation of a standardised tile, so that values lie around [0, 1], as residuals expect."""
_LEAST_SPREAD = 0.02  # of a tile in [0, 1]: noise on an even surface is not blown up further


def tile_mean(x: Tensor) -> Tensor:
    """The mean of each tile over all its pixels and channels: (B, C, H, W) -> (B, 1, 1, 1).

    One axis after the other: some engines add up thousands of float32 numbers one by one, and the light of a tile
    would be 1e-5 off, where this leaves 1e-7.
    """
    # A sum between two means: OpenVINO joins neighbouring means into one.
    return (x.mean(dim=3, keepdim=True).sum(dim=2, keepdim=True) / x.shape[2]).mean(dim=1, keepdim=True)


def standardised(x: Tensor) -> Tensor:
    """Tiles (B, C, H, W) in [0, 1], each brought to `LEVEL` and `SPREAD`."""
    return Light.of(x).remove(x)


class Light(NamedTuple):
    """Mean and standard deviation of each tile over all its pixels and channels, both (B, 1, 1, 1)."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Light:
        """Of tiles (B, C, H, W)."""
        mean = tile_mean(x)
        values = x.shape[1] * x.shape[2] * x.shape[3]
        variance = tile_mean((x - mean).square()) * (values / max(values - 1, 1))
        return cls(mean, variance.sqrt().clamp(min=_LEAST_SPREAD))

    def relative_to(self, standardised: Light) -> Light:
        """The light to remove from tiles that were changed after they had been standardised, and then had that light.

        A tile with less contrast than `_LEAST_SPREAD` had been left with little, and would be again: its contrast
        stays. (One with hardly more, and less now, is taken for one with more: what it was cannot be known.)
        """
        little = standardised.std < 0.999 * SPREAD
        return Light(self.mean, torch.where(little, torch.full_like(self.std, SPREAD), self.std))

    def remove(self, x: Tensor) -> Tensor:
        """Tiles (B, C, H, W) in [0, 1] to standardised ones, around [0, 1]."""
        return (x - self.mean) * (SPREAD / self.std) + LEVEL

    def restore(self, x: Tensor) -> Tensor:
        """The way back."""
        return (x - LEVEL) * (self.std / SPREAD) + self.mean

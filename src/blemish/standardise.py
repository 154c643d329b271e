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
        std, mean = torch.std_mean(x, dim=(1, 2, 3), keepdim=True)
        return cls(mean, std.clamp(min=_LEAST_SPREAD))

    def remove(self, x: Tensor) -> Tensor:
        """Tiles (B, C, H, W) in [0, 1] to standardised ones, around [0, 1]."""
        return (x - self.mean) * (SPREAD / self.std) + LEVEL

    def restore(self, x: Tensor) -> Tensor:
        """The way back."""
        return (x - LEVEL) * (self.std / SPREAD) + self.mean

"""Cutting images of any size into overlapping tiles and blending the score tiles back. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blemish.data.images import FloatArray, Pixels, to_unit
from blemish.errors import ConfigError

TileScorer = Callable[[FloatArray], FloatArray]
"""(b, C, t, t) in [0, 1] -> (b, t, t), raw scores >= 0, higher is worse. Preprocessing for the model is inside."""


@dataclass(frozen=True)
class Tiling:
    """Square tiles of `size` pixels; neighbours share at least the fraction `overlap` of their side.

    (Or all but one pixel, if the fraction leaves less than that.)

    `batch` is the number of tiles scored at once. With `standardise`, every tile is brought to one brightness and
    contrast before the model sees it (`standardise.py`): for light that changes from image to image.

    Raises:
        ConfigError: a value is out of range.
    """

    size: int = 128
    overlap: float = 0.25
    batch: int = 8
    standardise: bool = False

    def __post_init__(self) -> None:
        if (
            None in (self.size, self.overlap, self.batch)
            or self.size < 1
            or self.batch < 1
            or not 0 <= self.overlap < 1
        ):
            raise ConfigError(
                f"Expected tiling.size >= 1, tiling.batch >= 1 and tiling.overlap in [0, 1), found {self.size}, "
                f"{self.batch} and {self.overlap}."
            )

    def starts(self, length: int) -> list[int]:
        """Where tiles begin along an axis of `length` pixels: evenly spread, the last one ends at the border."""
        if length <= self.size:
            return [0]
        stride = max(1, math.floor(self.size * (1 - self.overlap)))
        count = math.ceil((length - self.size) / stride) + 1
        return [round(i * (length - self.size) / (count - 1)) for i in range(count)]

    def count(self, height: int, width: int) -> int:
        """The number of tiles that cover an image."""
        return len(self.starts(height)) * len(self.starts(width))


def pad_to_tile(images: npt.NDArray[np.generic], size: int) -> npt.NDArray[np.generic]:
    """Extend (N, H, W, C) by reflection at the bottom and right, until each side is at least `size`."""
    height, width = images.shape[1:3]
    if height >= size and width >= size:
        return images
    return np.pad(images, ((0, 0), (0, max(0, size - height)), (0, max(0, size - width)), (0, 0)), mode="reflect")


def apply_tiled(scorer: TileScorer, images: Pixels, tiling: Tiling) -> FloatArray:
    """Score images of one size tile by tile: (N, H, W, C) pixels -> (N, H, W) float32."""
    return blend_tiles(lambda tiles: scorer(tiles)[:, None], images, tiling)[..., 0]


def blend_tiles(function: TileScorer, images: Pixels, tiling: Tiling) -> FloatArray:
    """Apply a function from tiles (b, C, t, t) to tiles (b, K, t, t): (N, H, W, C) pixels -> (N, H, W, K) float32.

    Tiles are blended with weights that fall towards their borders. Sums are kept in float64 for one row of
    tiles at a time: the blend of equal values is that very float32 value, and beyond the images and the result
    memory grows with the tile's size times the image's width.
    """
    n, height, width = images.shape[:3]
    images = pad_to_tile(images, tiling.size)
    size = tiling.size
    tops, lefts = tiling.starts(images.shape[1]), tiling.starts(images.shape[2])
    ramp = _ramp(size)
    weight = np.outer(ramp, ramp)
    result, sums = np.empty(0, dtype=np.float32), np.empty(0)  # until the first tiles say how many channels
    weights = np.zeros((size, images.shape[2]))
    for top, following in zip(tops, [*tops[1:], images.shape[1]], strict=True):
        for where, tiles in _tile_batches(images, top, lefts, tiling):
            blended = function(to_unit(tiles).transpose(0, 3, 1, 2))
            if not sums.size:
                result = np.empty((n, blended.shape[1], *images.shape[1:3]), dtype=np.float32)
                sums = np.zeros((n, blended.shape[1], size, images.shape[2]))
            for (image, left), tile in zip(where, blended, strict=True):
                sums[image, :, :, left : left + size] += weight * tile
        for left in lefts:
            weights[:, left : left + size] += weight
        done = following - top  # rows that no later tile touches
        np.divide(sums[:, :, :done], weights[:done], out=result[:, :, top:following], casting="same_kind")
        sums[:, :, : size - done], sums[:, :, size - done :] = sums[:, :, done:].copy(), 0.0
        weights[: size - done], weights[size - done :] = weights[done:].copy(), 0.0
    cut: FloatArray = result[:, :, :height, :width].transpose(0, 2, 3, 1)
    return cut


def _ramp(size: int) -> npt.NDArray[np.float64]:
    """A triangle that stays above 0, so that a pixel seen by one tile only still has a weight."""
    distance = np.minimum(np.arange(size), np.arange(size)[::-1]) + 1.0
    ramp: npt.NDArray[np.float64] = distance / distance.max()
    return ramp


def _tile_batches(
    images: Pixels, top: int, lefts: list[int], tiling: Tiling
) -> Iterator[tuple[list[tuple[int, int]], Pixels]]:
    """Batches of the tiles in one row: their (image, left) positions and their pixels (b, t, t, C)."""
    where = [(image, left) for image in range(len(images)) for left in lefts]
    for first in range(0, len(where), tiling.batch):
        batch = where[first : first + tiling.batch]
        rows = slice(top, top + tiling.size)
        yield batch, np.stack([images[image, rows, left : left + tiling.size] for image, left in batch])

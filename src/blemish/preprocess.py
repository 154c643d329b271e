"""What happens to an image before it is cut into tiles: channels and size. The same in training and use."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from blemish.data.images import Pixels
from blemish.errors import ConfigError


@dataclass(frozen=True)
class Preprocess:
    """Convert to `channels` (1 grey, 3 RGB) and, if asked, to another size. The dtype is kept.

    Args:
        channels: 1 or 3.
        short_side: shrink images whose shorter side is longer than this many pixels, aspect kept; none is enlarged.
        max_side: the same for the longer side.
        size: stretch or shrink every image to a square of this many pixels: parts that fill their picture then lie
            in the same place, whatever their size.
        square: beside `short_side`: an image whose longer side is at most so many times the shorter becomes a square of
            its shorter side, so that one tile shows it whole; at least 1.

    Shrinking averages areas.

    Raises:
        ConfigError: `channels` is not 1 or 3, a size is not positive, or more than one is set; `square` is below 1.
    """

    channels: int
    max_side: int | None = None
    short_side: int | None = None
    size: int | None = None
    square: float | None = None

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ConfigError(f"Expected channels 1 (grey) or 3 (colour), found {self.channels}.")
        sizes = {"max_side": self.max_side, "short_side": self.short_side, "size": self.size}
        for name, value in sizes.items():
            if value is not None and not (isinstance(value, int) and value > 0):
                raise ConfigError(f"Expected image.{name} to be a positive whole number or null, found '{value}'.")
        if len(given := [f"image.{name}={value}" for name, value in sizes.items() if value is not None]) > 1:
            raise ConfigError(f"Expected one way to size images, found {' and '.join(given)}: set all but one to null.")
        if self.square is not None and not (isinstance(self.square, (int, float)) and self.square >= 1):
            raise ConfigError(f"Expected image.square to be a number of at least 1, or null, found '{self.square}'.")

    def __call__(self, pixels: Pixels) -> Pixels:
        """(H, W, 1 or 3) -> (H', W', channels), same dtype."""
        if pixels.shape[2] == 3 and self.channels == 1:
            pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None]  # luma of ITU-R BT.601
        elif pixels.shape[2] == 1 and self.channels == 3:
            pixels = np.repeat(pixels, 3, axis=2)
        height, width = self.scored_size(pixels.shape[0], pixels.shape[1])
        smaller = (min(height, pixels.shape[0]), min(width, pixels.shape[1]))
        for (rows, columns), method in ((smaller, cv2.INTER_AREA), ((height, width), cv2.INTER_LINEAR)):
            if (rows, columns) != pixels.shape[:2]:
                pixels = cv2.resize(pixels, (columns, rows), interpolation=method).reshape(rows, columns, self.channels)
        return pixels

    def scored_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after preprocessing."""
        if self.size is not None:
            return self.size, self.size
        if self.square and self.short_side and max(height, width) <= self.square * min(height, width):
            side = min(height, width, self.short_side)
            return side, side
        extreme, bound = (max, self.max_side) if self.max_side is not None else (min, self.short_side)
        scale = 1.0 if bound is None else bound / extreme(height, width)
        if scale >= 1:
            return height, width
        return max(1, round(height * scale)), max(1, round(width * scale))

"""What happens to an image before it is cut into tiles: channels and size. The same in training and use."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from blemish.data.images import Pixels
from blemish.errors import ConfigError


@dataclass(frozen=True)
class Preprocess:
    """Convert to `channels` (1 grey, 3 RGB) and, if `max_side` is set, shrink so that no side is longer.

    Shrinking keeps the aspect ratio and averages areas; images are never enlarged. The dtype is kept.

    Raises:
        ConfigError: `channels` is not 1 or 3, or `max_side` is not positive.
    """

    channels: int
    max_side: int | None = None

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ConfigError(f"Expected channels 1 (grey) or 3 (colour), found {self.channels}.")
        if self.max_side is not None and not (isinstance(self.max_side, int) and self.max_side > 0):
            raise ConfigError(
                f"Expected image.max_side to be a positive whole number or null, found '{self.max_side}'."
            )

    def __call__(self, pixels: Pixels) -> Pixels:
        """(H, W, 1 or 3) -> (H', W', channels), same dtype."""
        if pixels.shape[2] == 3 and self.channels == 1:
            pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None]  # luma of ITU-R BT.601
        elif pixels.shape[2] == 1 and self.channels == 3:
            pixels = np.repeat(pixels, 3, axis=2)
        height, width = pixels.shape[:2]
        longest = max(height, width)
        if self.max_side is not None and longest > self.max_side:
            scale = self.max_side / longest
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            resized = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
            pixels = resized.reshape(size[1], size[0], self.channels)
        return pixels

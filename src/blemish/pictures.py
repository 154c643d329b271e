"""Pictures of score maps on one fixed colour scale, so that a perfect part stays calm."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np
import numpy.typing as npt

from blemish.data.images import FloatArray, Pixels, to_unit
from blemish.postprocess import Mask

Picture = npt.NDArray[np.uint8]
"""(H, W, 3) RGB."""

# The scale runs from 0 to twice the threshold: below half of it nothing is painted, at the threshold the colour
# is opaque enough to read. Inferno rises evenly in lightness, which colour-blind eyes see as well.
_SCALE_END = 2.0
_RELATIVE = np.linspace(0.0, _SCALE_END, 256)
_LEVELS = np.arange(256, dtype=np.uint8)[:, None]
_COLOUR = cv2.applyColorMap(_LEVELS, cv2.COLORMAP_INFERNO).reshape(256, 3)[:, ::-1].astype(np.float32)
_OPACITY = (0.75 * np.clip((_RELATIVE - 0.5) / 0.5, 0.0, 1.0)).astype(np.float32)[:, None]
_OUTLINE = (0, 255, 255)
_STRIPE = 12  # pixels from one stripe of a hatching to the next
_HATCH_LIGHT, _HATCH_DARK = np.uint8(170), np.uint8(110)
_ROWS = 256  # painted at once, so that memory stays small for huge images


def colour(score_map: FloatArray, threshold: float) -> Picture:
    """(H, W) -> the map alone, on the colour scale of `heat_map`."""
    return _COLOUR[_level(score_map, threshold)].astype(np.uint8)


def _level(score_map: FloatArray, threshold: float) -> npt.NDArray[np.uint8]:
    per_level = 255.0 / (_SCALE_END * max(threshold, 1e-30))  # a threshold of 0 paints all that is above it
    level: npt.NDArray[np.uint8] = np.clip(score_map * np.float32(per_level), 0, 255).astype(np.uint8)
    return level


def as_rgb(pixels: Pixels) -> Picture:
    """(H, W, 1 or 3) pixels of any supported dtype -> (H, W, 3) uint8."""
    grey_or_rgb = pixels if pixels.dtype == np.uint8 else (to_unit(pixels) * 255).round().astype(np.uint8)
    return np.broadcast_to(grey_or_rgb, (*pixels.shape[:2], 3))


def heat_map(score_map: FloatArray, threshold: float, pixels: Pixels, mask: Mask | None = None) -> Picture:
    """Lay a score map over its image, coloured relative to `threshold`; outline `mask` in cyan."""
    picture = np.empty((*score_map.shape, 3), dtype=np.uint8)
    mixtures = _mixtures()
    for first in range(0, len(score_map), _ROWS):
        rows = slice(first, first + _ROWS)
        level = _level(score_map[rows], threshold).astype(np.uint16) << 8
        shown = as_rgb(pixels[rows])
        for channel, mixed in enumerate(mixtures):
            np.take(mixed, level | shown[..., channel], out=picture[rows, :, channel], mode="clip")
    if mask is not None and mask.any():
        outlines, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, outlines, -1, _OUTLINE, thickness=max(1, min(mask.shape) // 400))
    return picture


@cache
def _mixtures() -> npt.NDArray[np.uint8]:
    """(3, 256 * 256): what a channel's pixel value becomes under each level of the scale, level by level."""
    values = np.arange(256, dtype=np.float32)
    mixed = values * (1 - _OPACITY) + (_COLOUR * _OPACITY).T[..., None]
    return np.ascontiguousarray(mixed.round().astype(np.uint8).reshape(3, -1))


def hatched(picture: Picture, valid: Mask) -> Picture:
    """Stripes over (H, W, 3) where nothing was compared; the picture itself where everything was."""
    if valid.all():
        return picture
    rows, columns = np.ogrid[: valid.shape[0], : valid.shape[1]]
    stripes = (rows + columns) % _STRIPE < _STRIPE // 2
    return np.where(valid[..., None], picture, np.where(stripes[..., None], _HATCH_LIGHT, _HATCH_DARK))

"""Undo differences in brightness and contrast between a reference and a query, before they are compared.

The reference is changed, not the query: what the query shows keeps its contrast. Only `clahe` changes both.
"""

from __future__ import annotations

from typing import Literal, get_args

import cv2
import numpy as np
import numpy.typing as npt

from blemish.alignment.motion import BoolArray
from blemish.data.images import FloatArray
from blemish.errors import ConfigError, nearest_names

Illumination = Literal["none", "global", "blocks", "clahe"]
ILLUMINATIONS: tuple[Illumination, ...] = get_args(Illumination)

_GAINS = (0.2, 5.0)
_CLIP_LIMIT, _TILES = 2.0, 8  # of CLAHE, as in Zuiderveld, Contrast limited adaptive histogram equalization, 1994
_FLAT = 0.02**2  # variance below which a block says little of contrast
_ENOUGH = 400**2  # pixels to fit from: of larger images, every second row and column
_ROUNDS = 3  # of fitting, each without the pixels that the last one could not explain

Grid = npt.NDArray[np.float64]


def compensate(
    reference: FloatArray, query: FloatArray, valid: BoolArray, how: Illumination, block: int = 64
) -> tuple[FloatArray, FloatArray]:
    """Two aligned (H, W, C) images in [0, 1] -> the same, as alike in illumination as defects and noise let them be.

    Args:
        valid: (H, W), where both show something.
        how: `none`; `global`, one gain and one offset a channel, by least squares without outliers; `blocks`, a gain
            and an offset that vary smoothly over the image, from blocks of `block` pixels a side; `clahe`, the
            histograms of both equalised, with a limit on contrast, and then `global`.

    Raises:
        ConfigError: unknown `how`, or `block` below 8.
    """
    check_illumination(how, block)
    if how == "none" or not valid.any():
        return reference, query
    if how == "clahe":
        reference, query = equalise(reference), equalise(query)
    rows, columns = valid.shape
    step = 2 if valid.size > _ENOUGH else 1
    seen = np.ascontiguousarray(valid[::step, ::step])
    grid = (max(1, round(rows / block)), max(1, round(columns / block))) if how == "blocks" else (1, 1)
    adjusted = np.empty_like(reference)
    for channel in range(reference.shape[2]):
        expected, observed = (np.ascontiguousarray(image[::step, ::step, channel]) for image in (reference, query))
        gain, offset = _fit(expected, observed, seen, grid)
        np.multiply(reference[..., channel], _spread(gain, valid.shape), out=adjusted[..., channel])
        adjusted[..., channel] += _spread(offset, valid.shape)
    return np.clip(adjusted, 0, 1, out=adjusted), query


def check_illumination(how: str, block: int) -> None:
    """Raises ConfigError for an unknown way to compensate or blocks too small for it."""
    if how not in ILLUMINATIONS:
        raise ConfigError(f"Unknown alignment.illumination '{how}': {nearest_names(how, ILLUMINATIONS)}")
    if block < 8:
        raise ConfigError(f"Expected alignment.block of at least 8 pixels, found {block}.")


def equalise(image: FloatArray) -> FloatArray:
    """(H, W, C) in [0, 1] -> the same, by contrast-limited adaptive histogram equalisation of every channel."""
    equaliser = cv2.createCLAHE(_CLIP_LIMIT, (_TILES, _TILES))
    deep = np.rint(image * 65535).astype(np.uint16)
    channels = [equaliser.apply(np.ascontiguousarray(deep[..., channel])) for channel in range(image.shape[2])]
    return np.asarray(np.stack(channels, axis=-1) / np.float32(65535), np.float32)


def _fit(
    expected: FloatArray, observed: FloatArray, valid: BoolArray, grid: tuple[int, int]
) -> tuple[FloatArray, FloatArray]:
    """Gain and offset, each of the grid's shape, with gain * expected + offset near observed wherever no defect is."""
    weight = valid.astype(np.float32)
    gain, offset = np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)
    for turn in range(_ROUNDS):
        if turn:
            error = np.abs(observed - expected * _spread(gain, valid.shape) - _spread(offset, valid.shape))
            sample = error[::2, ::2][valid[::2, ::2]]
            # Beyond three robust standard deviations; on clean images that is next to 0, and rounding is no defect.
            limit = 3 * 1.4826 * float(np.median(sample)) + 1 / 255 if sample.size else np.inf
            kept = (valid & (error <= limit)).astype(np.float32)
            if float(kept.mean()) < 0.5 * float(valid.mean()):
                break  # so many are no outliers
            weight = kept
        gain, offset = _moments(expected, observed, weight, grid)
    return gain, offset


def _spread(values: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """From a grid to all pixels, linear between the middles of the blocks; a single value stays one."""
    if values.size == 1:
        return values
    return np.asarray(cv2.resize(values, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR), np.float32)


def _moments(
    expected: FloatArray, observed: FloatArray, weight: FloatArray, grid: tuple[int, int]
) -> tuple[FloatArray, FloatArray]:
    """Least squares for every block of a grid, leaning on the neighbours and on the whole where a block is flat."""
    size = (grid[1], grid[0])
    seen = weight * expected
    parts = (weight, seen, weight * observed, seen * expected, seen * observed)
    if grid == (1, 1):
        means = [np.full((1, 1), cv2.mean(part)[0]) for part in parts]
    else:
        means = [cv2.resize(part, size, interpolation=cv2.INTER_AREA).astype(np.float64) for part in parts]
    whole = _line(*(np.full((1, 1), each.mean()) for each in means), prior=1.0, strength=1e-8)
    if grid == (1, 1):
        return _bounded(*whole)
    near = [
        np.asarray(cv2.GaussianBlur(each, (3, 3), 0, borderType=cv2.BORDER_REPLICATE), np.float64) for each in means
    ]
    return _bounded(*_line(*near, prior=float(whole[0][0, 0]), strength=_FLAT, fallback=float(whole[1][0, 0])))


def _line(
    count: Grid, x: Grid, y: Grid, xx: Grid, xy: Grid, *, prior: float, strength: float, fallback: float = 0.0
) -> tuple[Grid, Grid]:
    """Slope and intercept from weighted means; the slope is drawn to `prior` where x hardly varies."""
    safe = np.maximum(count, 1e-9)
    x, y, xx, xy = x / safe, y / safe, xx / safe, xy / safe
    slope = (xy - x * y + strength * prior) / (np.maximum(xx - x * x, 0) + strength)
    slope = np.clip(slope, *_GAINS)
    enough = count > 0.05  # of a block's pixels
    return np.where(enough, slope, prior), np.where(enough, y - slope * x, fallback)


def _bounded(gain: Grid, offset: Grid) -> tuple[FloatArray, FloatArray]:
    return gain.astype(np.float32), offset.astype(np.float32)

"""Synthetic defects to measure with, on whole images, in NumPy and OpenCV: never to train with.

They are made otherwise than the corruption of training (`data/corruption.py`, random shapes with random fills), so that
a model is not measured by what it has practised. Each kind paints a window around its place and leaves the rest as it
is, bit for bit; the mask is where the painted image differs visibly from the clean one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from blemish.data.images import FloatArray, Pixels, to_unit
from blemish.errors import ImageError

Mask = npt.NDArray[np.bool_]

SMALLEST_SIDE = 16
_SMALLEST, _LARGEST = 0.015, 0.25  # size of a defect, as a share of the image's short side
_TRIES = 8  # of each kind, before another takes its place
_VISIBLE = 0.012  # least change of a pixel that counts, in [0, 1]: 3 grey levels of 8 bits


class Defect(NamedTuple):
    """image: as the clean one, in shape and dtype. mask: (H, W) bool, never empty. kind: one of KINDS."""

    image: Pixels
    mask: Mask
    kind: str


def add_defect(pixels: Pixels, other: Pixels, kind: str, rng: np.random.Generator) -> Defect:
    """Paint one defect on a copy of a normal image (H, W, C) of uint8, uint16 or float32 in [0, 1].

    What cannot be seen is drawn again, larger and larger; where a kind never shows (a warp of an even image), another
    one takes its place, and the result says so.

    Args:
        other: another normal image, of any size.
        kind: one of KINDS.

    Raises:
        ImageError: the image is smaller than SMALLEST_SIDE.
    """
    if min(pixels.shape[:2]) < SMALLEST_SIDE:
        raise ImageError(
            f"Expected at least {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels for a synthetic defect, found "
            f"{pixels.shape[1]} x {pixels.shape[0]}."
        )
    # The spread of an image with two levels, part and background, says little of the contrast within the part.
    contrast = float(np.clip(to_unit(pixels).std(), 0.04, 0.2))
    for name in [kind, *rng.permutation([name for name in KINDS if name != kind])]:
        for attempt in range(_TRIES):
            defect = _draw(pixels, other, str(name), contrast, attempt / _TRIES, rng)
            if defect is not None:
                return defect
    raise ImageError("No synthetic defect can be seen on this image.")  # a crack always can, light or dark


def _draw(
    pixels: Pixels, other: Pixels, kind: str, contrast: float, least: float, rng: np.random.Generator
) -> Defect | None:
    """One attempt, none of the smallest share `least` of all sizes; None if it cannot be seen."""
    short = min(pixels.shape[:2])
    low, high = max(5.0, _SMALLEST * short), max(6.0, _LARGEST * short)
    size = _log_uniform(rng, low * (high / low) ** least, high)
    half = min(math.ceil(0.8 * size) + 4, (short - 1) // 2)
    top, left = (int(rng.integers(side - 2 * half + 1)) for side in pixels.shape[:2])
    inside = np.s_[top : top + 2 * half, left : left + 2 * half]
    clean = pixels[inside]
    before = to_unit(clean)
    source = to_unit(_window_of(other, clean.shape, rng))
    painted = KINDS[kind](before, source, min(size, 2 * half - 8), contrast, rng)
    after = _like(painted, clean)
    difference = to_unit(after) - before
    # Blurred a little: one grain of noise for another is no change that shows.
    change = np.abs(cv2.GaussianBlur(difference, (0, 0), 0.8).reshape(before.shape)).max(axis=2)
    level = max(_VISIBLE, 0.12 * contrast)
    seen = (change > level) & np.any(difference != 0, axis=2)
    # A defect's pixels that happen to look as before belong to it where its visible pixels enclose them.
    closed = cv2.morphologyEx(np.pad(seen, 4).astype(np.uint8), cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
    mask_here = closed[4:-4, 4:-4].astype(bool) & np.any(difference != 0, axis=2)
    if np.count_nonzero(seen) < 6 or np.quantile(change[seen], 0.75) < 2 * level:
        return None
    image, mask = pixels.copy(), np.zeros(pixels.shape[:2], dtype=bool)
    image[inside], mask[inside] = after, mask_here
    return Defect(image, mask, kind)


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _sign(rng: np.random.Generator) -> float:
    return 1.0 if rng.random() < 0.5 else -1.0


def _like(painted: FloatArray, clean: Pixels) -> Pixels:
    """From [0, 1] back to the dtype of `clean`; what was not painted stays as it was."""
    if np.issubdtype(clean.dtype, np.floating):
        return painted.clip(0, 1).astype(clean.dtype)
    top = np.iinfo(clean.dtype).max
    return np.rint(painted.clip(0, 1).astype(np.float64) * top).astype(clean.dtype)


def _window_of(other: Pixels, shape: tuple[int, ...], rng: np.random.Generator) -> Pixels:
    """A random window of `shape` from another image, enlarged if that is too small; with as many channels."""
    height, width, channels = shape
    scale = max(height / other.shape[0], width / other.shape[1])
    if scale > 1:
        enlarged = (math.ceil(other.shape[1] * scale), math.ceil(other.shape[0] * scale))
        other = cv2.resize(other, enlarged, interpolation=cv2.INTER_LINEAR).reshape(*enlarged[::-1], -1)
    top, left = int(rng.integers(other.shape[0] - height + 1)), int(rng.integers(other.shape[1] - width + 1))
    window = other[top : top + height, left : left + width]
    if window.shape[2] != channels:
        window = cv2.cvtColor(window, cv2.COLOR_RGB2GRAY)[..., None] if channels == 1 else np.repeat(window, 3, axis=2)
    return window


def _outline(side: int, size: float, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """A filled polygon or superellipse, `size` long, in the middle of (side, side): 255 inside."""
    turn = rng.uniform(0, 2 * math.pi)
    if rng.random() < 0.5:
        corners = int(rng.integers(4, 10))
        angles = (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * 2 * math.pi / corners
        radii = rng.uniform(0.45, 1, corners)
        x, y = radii * np.cos(angles), radii * np.sin(angles)
    else:
        angles = np.linspace(0, 2 * math.pi, 64, endpoint=False)
        power = _log_uniform(rng, 1, 5)
        x = np.sign(np.cos(angles)) * np.abs(np.cos(angles)) ** (2 / power)
        y = np.sign(np.sin(angles)) * np.abs(np.sin(angles)) ** (2 / power) * rng.uniform(0.35, 1)
        x, y = x / np.hypot(x, y).max(), y / np.hypot(x, y).max()
    points = np.stack([math.cos(turn) * x - math.sin(turn) * y, math.sin(turn) * x + math.cos(turn) * y], axis=1)
    filled = np.zeros((side, side), np.uint8)
    cv2.fillPoly(filled, [np.rint(points * size / 2 + (side - 1) / 2).astype(np.int32)], 255)
    return filled


def _grid(side: int) -> tuple[FloatArray, FloatArray]:
    """Rows and columns of (side, side), counted from the middle."""
    y, x = np.mgrid[:side, :side].astype(np.float32) - np.float32((side - 1) / 2)
    return y, x


# --- the kinds: each maps a window (h, h, C) in [0, 1], another normal window, size in pixels and contrast to a window


def _patch(
    window: FloatArray, source: FloatArray, size: float, contrast: float, rng: np.random.Generator
) -> FloatArray:
    """Another normal image blended in without a seam (Pérez et al., SIGGRAPH 2003; NSA, Schlüter et al., ECCV 2022)."""
    inside = _outline(len(window), size, rng)
    inside[:5], inside[-5:], inside[:, :5], inside[:, -5:] = 0, 0, 0, 0
    inside = np.asarray(
        cv2.dilate(inside, np.ones((7, 7), np.uint8)), np.uint8
    )  # OpenCV takes 3 pixels off where the image may change
    left, top, width, height = cv2.boundingRect(inside)
    if not width:
        return window
    base, foreign = (
        np.rint(part * 255).astype(np.uint8).repeat(3 // part.shape[2], axis=2) for part in (window, source)
    )
    if rng.random() < 0.5:
        foreign = np.ascontiguousarray(np.rot90(foreign, int(rng.integers(1, 4))))
    how = cv2.NORMAL_CLONE if rng.random() < 0.7 else cv2.MIXED_CLONE
    middle = (left + width // 2, top + height // 2)
    blended = cv2.seamlessClone(foreign, base, inside.copy(), middle, how)  # which writes to the mask
    change = (blended.astype(np.float32) - base)[..., : window.shape[2]] / 255  # keeps the depth of 16 bits
    painted: FloatArray = np.where(inside[..., None] > 0, window + change, window)
    return painted


def _warp(window: FloatArray, source: FloatArray, size: float, contrast: float, rng: np.random.Generator) -> FloatArray:
    """The surface twisted, or pulled to or from a point."""
    y, x = _grid(len(window))
    radius = max(size, 8.0) / 2
    near = np.clip(1 - np.hypot(x, y) / radius, 0, 1) ** 2
    if rng.random() < 0.5:
        angle = _sign(rng) * rng.uniform(0.8, 3) * near
        from_x, from_y = np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y
    else:
        pull = 1 + rng.choice([-0.75, 1.5]) * rng.uniform(0.5, 1) * near
        from_x, from_y = x * pull, y * pull
    middle = (len(window) - 1) / 2
    moved = cv2.remap(
        window,
        (from_x + middle).astype(np.float32),
        (from_y + middle).astype(np.float32),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT_101,
    ).reshape(window.shape)
    painted: FloatArray = np.where(near[..., None] > 0, moved, window)
    return painted


def _crack(
    window: FloatArray, source: FloatArray, size: float, contrast: float, rng: np.random.Generator
) -> FloatArray:
    """A thin random walk, dark or light, that tapers off."""
    side = len(window)
    steps = max(6, round(1.5 * size / 2))
    heading = rng.uniform(0, 2 * math.pi) + np.cumsum(rng.normal(0, 0.35, steps))
    walk = np.cumsum(2 * np.stack([np.cos(heading), np.sin(heading)], axis=1), axis=0)
    walk += (side - 1) / 2 - (walk.min(axis=0) + walk.max(axis=0)) / 2
    widest = rng.uniform(1, 4)
    line = np.zeros((side, side), np.uint8)
    for step in range(steps - 1):
        width = max(1, round(widest * (1 - step / steps)))
        ends = [(round(float(x) * 16), round(float(y) * 16)) for x, y in walk[step : step + 2]]
        cv2.line(line, ends[0], ends[1], 255, width, cv2.LINE_AA, shift=4)
    strength = contrast * rng.uniform(0.8, 2.5)
    level = float(window[line > 0].mean()) if line.any() else 0.5
    direction = -1.0 if rng.random() < 0.7 else 1.0
    if not 0 <= level + direction * strength <= 1:
        direction = 1.0 if level < 0.5 else -1.0  # where there is room
    return np.asarray(window + direction * strength * (line / np.float32(255))[..., None], np.float32)


def _stain(
    window: FloatArray, source: FloatArray, size: float, contrast: float, rng: np.random.Generator
) -> FloatArray:
    """More or less light comes back, with a soft border; in colour images, of another tint."""
    soft = cv2.GaussianBlur(_outline(len(window), size, rng).astype(np.float32) / 255, (0, 0), 0.5 + 0.08 * size)
    level = max(float((window * soft[..., None]).sum() / (soft.sum() * window.shape[2])), 0.05)
    share = min(contrast * rng.uniform(0.5, 2) / level, 0.85)
    tint = rng.uniform(0.3, 1, 3) if window.shape[2] == 3 else np.ones(1)
    factor = 1 + _sign(rng) * share * (tint / np.max(tint)) * soft[..., None]
    return np.asarray(window * factor, np.float32)


def _dent(window: FloatArray, source: FloatArray, size: float, contrast: float, rng: np.random.Generator) -> FloatArray:
    """A bump or a dent, lit from one side: the slope of a Gaussian hill, light here and dark there."""
    y, x = _grid(len(window))
    turn, light = rng.uniform(0, math.pi), rng.uniform(0, 2 * math.pi)
    across, along = math.cos(turn) * x + math.sin(turn) * y, math.cos(turn) * y - math.sin(turn) * x
    across, along = across / (size / 4), along / (size / 4 * rng.uniform(0.4, 1))
    height = np.exp(-(across**2 + along**2) / 2)
    down, right = np.gradient(height)
    slope = math.cos(light) * right + math.sin(light) * down
    shade = contrast * rng.uniform(0.5, 2) * slope / np.abs(slope).max()
    shade[height < 0.02] = 0  # so that it ends somewhere
    return np.asarray(window + shade[..., None], np.float32)


def _strip(
    window: FloatArray, source: FloatArray, size: float, contrast: float, rng: np.random.Generator
) -> FloatArray:
    """A strip is missing (its sides are joined) or doubled (it shows what its neighbour shows)."""
    turned = rng.random() < 0.5
    painted = window.transpose(1, 0, 2).copy() if turned else window.copy()
    side = len(window)
    long, thin = max(5, round(size)), max(3, round(size * rng.uniform(0.15, 0.4)))
    top, left = (side - long) // 2, (side - thin) // 2
    here = np.s_[top : top + long, left : left + thin]
    if rng.random() < 0.5:
        before, after = painted[top : top + long, left - 1, None], painted[top : top + long, left + thin, None]
        share = (np.arange(1, thin + 1, dtype=np.float32) / (thin + 1))[None, :, None]
        painted[here] = before + share * (after - before)
    else:
        step = min(thin, left) * (1 if rng.random() < 0.5 else -1)
        painted[here] = painted[top : top + long, left + step : left + step + thin].copy()
    return np.asarray(painted.transpose(1, 0, 2) if turned else painted)


KINDS: dict[str, Callable[[FloatArray, FloatArray, float, float, np.random.Generator], FloatArray]] = {
    "patch": _patch,
    "warp": _warp,
    "crack": _crack,
    "stain": _stain,
    "dent": _dent,
    "strip": _strip,
}


def deal_kinds(images: int, most: int) -> list[tuple[int, str]]:
    """(image, kind) pairs, at most `most`: each image once, then each again with another kind; kinds come evenly."""
    names = list(KINDS)
    rounds = min(len(names), max(1, most // max(1, images)))
    pairs = [(image, names[(image + turn) % len(names)]) for turn in range(rounds) for image in range(images)]
    return pairs[:most]

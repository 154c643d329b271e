"""Bring a reference onto a query: motion, illumination, and a check that it helped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import cv2
import numpy as np

from blemish.alignment.illumination import Illumination, check_illumination, compensate
from blemish.alignment.motion import KINDS, BoolArray, Kind, Matrix, Motion, warp
from blemish.alignment.refine import coarse_to_fine, ecc, features, levels_of, plausible, pyramid, remainder
from blemish.alignment.translation import CONFIDENT, cross_correlation, phase_correlation
from blemish.alignment.verdict import Verdict, judge
from blemish.data.images import FloatArray, Pixels, check_pixels, to_unit
from blemish.errors import ConfigError, ImageError, nearest_names

MotionChoice = Literal["none", "translation", "euclidean", "affine", "homography", "auto"]
Start = Literal["correlation", "phase", "features"]
MOTIONS: tuple[MotionChoice, ...] = get_args(MotionChoice)
STARTS: tuple[Start, ...] = get_args(Start)

_LEAST_SIDE = 16
_START_PIXELS = 200**2  # of the level on which the first shift is sought
_FINE_PIXELS = 450**2  # of the finest level: below it, coarser pixels cost hundredths of a pixel of accuracy
_FEATURE_PIXELS = 700**2
_REMAINS = 0.03  # pixels of the finest level, twice as many with each coarser one: what resampling alone leaves
_STANDS_OUT = 10.0  # F ratio of 8 and many degrees of freedom: by chance once in 10^14
_SURE = 2.0  # standard deviations of a sum over blocks, by which a freer motion must lower the residual
_NUDGES = (0.5, 0.25, 0.12)  # pixels


@dataclass(frozen=True, eq=False)
class Aligned:
    """A reference on the grid of its query, ready to be compared with it.

    reference, query: (H, W, C) in [0, 1], illumination compensated. The query is as it was given but for `clahe`.
    valid: (H, W) bool, False where the reference has nothing to compare with.
    motion: from the query's pixels to those of the reference as it was given.
    verdict: what the motion that was found did, against none; "worse" if it was therefore dropped for the identity.
    """

    reference: FloatArray
    query: FloatArray
    valid: BoolArray
    motion: Motion
    verdict: Verdict


@dataclass(frozen=True)
class Alignment:
    """How references are aligned with queries. Images without features stay where they are.

    Args:
        motion: the freedom of the motion; `auto` starts with a translation and moves on, kind by kind, while the
            residual says that something remains. `none` compares the images as they lie.
        start: where the search begins. `correlation` or `phase`: a shift, found even in strong noise, and features if
            no shift stands out; `features`: SIFT matches, for large turns and scales, which noise defeats.
        illumination: see `compensate`.
        max_shift: the largest shift sought along each axis, as a fraction of the query's side.
        block: side of the blocks of `illumination=blocks`, in pixels.
        refine_by_verdict: try small changes of the motion, and keep those whose verdict is "improved". Slow.

    Raises:
        ConfigError: a setting is unknown or out of range.
    """

    motion: MotionChoice = "auto"
    start: Start = "correlation"
    illumination: Illumination = "global"
    max_shift: float = 0.1
    block: int = 64
    refine_by_verdict: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (("motion", self.motion, MOTIONS), ("start", self.start, STARTS)):
            if value not in known:
                raise ConfigError(f"Unknown alignment.{name} '{value}': {nearest_names(str(value), known)}")
        check_illumination(self.illumination, self.block)
        if not 0 < self.max_shift <= 0.5:
            raise ConfigError(f"Expected alignment.max_shift above 0 and at most 0.5, found {self.max_shift}.")

    def __call__(self, reference: Pixels, query: Pixels) -> Aligned:
        """(h, w, C) and (H, W, C), any kind of pixels -> the reference on the query's grid.

        Raises:
            ImageError: not images, different channels, or a side below 16 pixels with something to align.
        """
        reference, query = to_unit(check_pixels(reference)), to_unit(check_pixels(query))
        if reference.shape[2] != query.shape[2]:
            raise ImageError(
                f"Expected reference and query with the same channels, found {reference.shape[2]} and "
                f"{query.shape[2]}: set image.channels."
            )
        shape = (query.shape[0], query.shape[1])
        still, still_valid = warp(reference, Motion.identity(), shape)
        motion = self.find(_grey(reference), _grey(query))
        warped, valid = (still, still_valid) if motion.kind == "identity" else warp(reference, motion, shape)
        verdict = self._judge(query, warped, still, valid & still_valid)
        if verdict.overall == "worse":
            motion, warped, valid = Motion.identity(), still, still_valid
        warped, query = compensate(warped, query, valid, self.illumination, self.block)
        return Aligned(warped, query, valid, motion, verdict)

    def find(self, reference: FloatArray, query: FloatArray) -> Motion:
        """The motion from a query to a reference, both (H, W) grey in [0, 1]; not yet held against the identity.

        Raises:
            ImageError: a side is below 16 pixels.
        """
        if self.motion == "none":
            return Motion.identity()
        short = min(*reference.shape, *query.shape)
        if short < _LEAST_SIDE:
            raise ImageError(
                f"Expected images of at least {_LEAST_SIDE} pixels a side to align, found {short}: set "
                "alignment.motion=none."
            )
        levels = levels_of(reference.shape, query.shape)
        references, queries = pyramid(reference, levels), pyramid(query, levels)
        finest = _level(queries, _FINE_PIXELS)
        bright = references[finest], queries[finest]
        if self.illumination in ("blocks", "clahe"):
            references, queries = (
                [*each[:finest], *pyramid(flatten(each[finest]), levels - finest)] for each in (references, queries)
            )
        start = self._start(references, queries)
        if start is None:
            return Motion.identity()
        if self.motion == "auto":
            motion = _auto(references, queries, start, finest)
        else:
            kind = KINDS[KINDS.index(self.motion)]
            motion = coarse_to_fine(references, queries, start, kind, finest)
        motion = motion.halved(finest)
        if self.illumination in ("blocks", "clahe"):
            motion = _polish(*bright, motion)
        if self.refine_by_verdict:
            motion = nudge(references[finest], queries[finest], motion)
        motion = motion.halved(-finest)
        return motion if plausible(motion, query.shape, reference.shape) else Motion.identity()

    def _start(self, references: Sequence[FloatArray], queries: Sequence[FloatArray]) -> Motion | None:
        """A rough motion between full-sized images, or None where nothing stands out."""
        if self.start != "features":
            both = (cross_correlation, phase_correlation)
            level = _level(queries, _START_PIXELS)
            for correlate in both if self.start == "correlation" else both[::-1]:
                shift = correlate(references[level], queries[level], self.max_shift)
                if shift.confidence >= CONFIDENT:
                    return shift.motion.halved(-level)
        kind: Kind = "homography" if self.motion == "auto" else KINDS[KINDS.index(self.motion)]
        level = _level(queries, _FEATURE_PIXELS)
        motion = features(references[level], queries[level], kind)
        return None if motion is None else motion.halved(-level)

    def _judge(self, query: FloatArray, warped: FloatArray, still: FloatArray, valid: BoolArray) -> Verdict:
        grey, moved, unmoved = _grey(query), _grey(warped), _grey(still)
        if self.illumination in ("blocks", "clahe"):
            grey, moved, unmoved = flatten(grey), flatten(moved), flatten(unmoved)
        elif self.illumination == "global" and valid.any():
            # One gain and offset for both, from moments alone: no motion gains by it.
            (mean, spread), (target, wide) = _moments(moved, valid), _moments(grey, valid)
            gain = min(5.0, wide / spread) if spread > 1e-6 else 1.0
            moved, unmoved = ((image - mean) * np.float32(gain) + target for image in (moved, unmoved))
        return judge(grey, moved, unmoved, valid)


def _auto(references: Sequence[FloatArray], queries: Sequence[FloatArray], start: Motion, finest: int) -> Motion:
    """Coarse to fine as `coarse_to_fine`, with a freer kind wherever the residual of the present one asks for it."""
    kind = KINDS[max(1, KINDS.index(start.kind))]
    motion = start.halved(len(queries) - 1)
    for level in range(len(queries) - 1, finest - 1, -1):
        one, two = references[level], queries[level]
        motion = ecc(one, two, motion, kind)
        while kind != KINDS[-1]:
            rest = remainder(one, two, motion)
            if rest.pixels <= _REMAINS * 2 ** (level - finest) or rest.ratio <= _STANDS_OUT:
                break
            kind = KINDS[KINDS.index(kind) + 1]
            motion = ecc(one, two, motion, kind)
        motion = motion.halved(-1 if level > finest else 0)
    # Little to see, or defects, can make a freer motion fit that little and miss the rest: it has to prove itself.
    fine, targets = references[finest : finest + 2], queries[finest : finest + 2]
    while kind != KINDS[1]:
        kind = KINDS[KINDS.index(kind) - 1]
        simpler = coarse_to_fine(fine, targets, motion.simplified(kind, targets[0].shape), kind)
        if _improves(fine[0], targets[0], motion, simpler):
            break
        motion = simpler
    return motion.halved(-finest)


def _improves(reference: FloatArray, query: FloatArray, motion: Motion, simpler: Motion) -> bool:
    """Whether the residual is smaller with `motion`, in too many blocks for chance or a defect."""
    shape = (query.shape[0], query.shape[1])
    reference, query = _standard(reference), _standard(query)
    (warped, valid), (other, other_valid) = (warp(reference, each, shape) for each in (motion, simpler))
    both = valid & other_valid
    if judge(query, warped, other, both, block=16).overall == "improved":
        return True
    # Steps of a fraction of a pixel stay below the verdict's tolerance, but add up.
    gain = (np.abs(other - query) - np.abs(warped - query)) * both
    blocks = cv2.resize(gain, (max(1, shape[1] // 16), max(1, shape[0] // 16)), interpolation=cv2.INTER_AREA)
    return float(blocks.sum()) > _SURE * float(np.sqrt(np.square(blocks).sum()))


def _polish(reference: FloatArray, query: FloatArray, motion: Motion) -> Motion:
    """The motion once more, now that an uneven illumination can be taken out of grey (H, W) images it aligns."""
    shape = (query.shape[0], query.shape[1])
    if motion.kind == "identity":
        return motion
    warped, valid = warp(reference, motion, shape)
    adjusted, _ = compensate(warped[..., None], query[..., None], valid, "blocks")
    adjusted[~valid] = query[~valid][:, None]  # what repeats the border is nothing to align with
    step = ecc(adjusted[..., 0], query, Motion.translation(0, 0), motion.kind)
    return motion @ step


def flatten(image: FloatArray) -> FloatArray:
    """(H, W) -> (H, W), less its slow changes of brightness and of contrast: those over a twelfth of its side."""
    size = (max(1, image.shape[1] // 8), max(1, image.shape[0] // 8))
    mean, square = (
        cv2.GaussianBlur(
            cv2.resize(each, size, interpolation=cv2.INTER_AREA), (0, 0), max(size) / 12, borderType=cv2.BORDER_REFLECT
        )
        for each in (image, image * image)
    )
    variance = np.maximum(square - mean * mean, 0)
    gain = 1 / np.sqrt(variance + variance.mean() + 1e-6)  # where nothing is to be seen, noise stays small
    mean, gain = (cv2.resize(each, image.shape[1::-1], interpolation=cv2.INTER_LINEAR) for each in (mean, gain))
    return np.asarray((image - mean) * gain, np.float32)


def nudge(reference: FloatArray, query: FloatArray, motion: Motion) -> Motion:
    """Move along each freedom of a motion's kind by fractions of a pixel while the verdict says "improved".

    reference, query: (H, W) grey, of the same illumination but for one gain and offset.
    """
    shape = (query.shape[0], query.shape[1])
    reference, query = _standard(reference), _standard(query)
    warped, valid = warp(reference, motion, shape)
    for size in _NUDGES:
        for direction in _freedoms(motion.kind, shape):
            for sign in (1.0, -1.0):
                step = Motion(motion.kind, _exact(motion.kind, np.eye(3) + sign * size * direction))
                trial = motion @ step
                if not plausible(trial, shape, reference.shape):
                    continue
                moved, moved_valid = warp(reference, trial, shape)
                if judge(query, moved, warped, valid & moved_valid).overall == "improved":
                    motion, warped, valid = trial, moved, moved_valid
                    break
    return motion


def _freedoms(kind: Kind, shape: tuple[int, int]) -> list[Matrix]:
    """Directions in which a motion can change, each about one pixel at the image's border, about its middle."""
    span = max(shape) / 2
    to_middle = np.array([[1, 0, -(shape[1] - 1) / 2], [0, 1, -(shape[0] - 1) / 2], [0, 0, 1]])
    back = np.linalg.inv(to_middle)

    def unit(*entries: tuple[int, int, float]) -> Matrix:
        matrix = np.zeros((3, 3))
        for row, column, value in entries:
            matrix[row, column] = value
        return np.asarray(back @ matrix @ to_middle)

    found = [unit((0, 2, 1)), unit((1, 2, 1))]
    if kind == "euclidean":
        found += [unit((0, 1, -1 / span), (1, 0, 1 / span))]
    elif kind in ("affine", "homography"):
        found += [unit((row, column, 1 / span)) for row in (0, 1) for column in (0, 1)]
    if kind == "homography":
        found += [unit((2, column, 1 / span**2)) for column in (0, 1)]
    return found if kind != "identity" else []


def _exact(kind: Kind, matrix: Matrix) -> Matrix:
    """A small step of a turn, made a turn."""
    if kind == "euclidean":
        matrix = matrix.copy()
        matrix[:2, :2] /= np.sqrt(np.linalg.det(matrix[:2, :2]))
    return matrix


def _level(levels: Sequence[FloatArray], pixels: int) -> int:
    """The first level of a pyramid with at most this many pixels, or the last."""
    return next((place for place, image in enumerate(levels) if image.size <= pixels), len(levels) - 1)


def _grey(image: FloatArray) -> FloatArray:
    """(H, W, 1 or 3) -> (H, W)."""
    if image.shape[2] == 1:
        return image[..., 0]
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.float32)


def _standard(image: FloatArray) -> FloatArray:
    """(H, W) of any values -> mean 0.5 and standard deviation 0.1, so that gains and offsets are alike."""
    mean, spread = cv2.meanStdDev(image)
    return np.asarray((image - np.float32(mean[0, 0])) * np.float32(0.1 / max(spread[0, 0], 1e-6)) + 0.5, np.float32)


def _moments(image: FloatArray, valid: BoolArray) -> tuple[np.float32, float]:
    """Mean and standard deviation over the valid pixels."""
    mean, spread = cv2.meanStdDev(image, mask=valid.view(np.uint8))
    return np.float32(mean[0, 0]), float(spread[0, 0])

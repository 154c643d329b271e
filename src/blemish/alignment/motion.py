"""How a query's pixels map to a reference's, and bringing the reference onto the query's grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import cv2
import numpy as np
import numpy.typing as npt

from blemish.data.images import FloatArray
from blemish.errors import ConfigError, nearest_names

Kind = Literal["identity", "translation", "euclidean", "affine", "homography"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""From the simplest to the freest; each holds all before it, and is closed under composition and inverse."""

Matrix = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

_TOLERANCE = 1e-6  # pixels, and entries of a matrix: float rounding, not a motion


@dataclass(frozen=True, eq=False)
class Motion:
    """Maps pixel coordinates (x, y) of the query to those of the reference.

    Args:
        kind: what freedom the motion has; `matrix` must keep to it.
        matrix: (3, 3), in pixels, the centre of the first pixel being (0, 0). Scaled so that its last entry is 1.

    Raises:
        ConfigError: unknown kind, or a matrix that is no such motion or has no inverse.
    """

    kind: Kind
    matrix: Matrix

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"Unknown kind of motion '{self.kind}': {nearest_names(self.kind, KINDS)}")
        matrix = np.array(self.matrix, np.float64)
        if matrix.shape != (3, 3) or not np.isfinite(matrix).all() or abs(matrix[2, 2]) < 1e-12:
            raise ConfigError(f"Expected a finite 3 x 3 matrix of a motion, found {self.matrix!r}.")
        matrix /= matrix[2, 2]
        if abs(np.linalg.det(matrix)) < 1e-12 or not _keeps_to(self.kind, matrix):
            raise ConfigError(f"Expected an invertible matrix of kind {self.kind}, found {matrix.tolist()}.")
        matrix.flags.writeable = False
        object.__setattr__(self, "matrix", matrix)

    @classmethod
    def identity(cls) -> Motion:
        return cls("identity", np.eye(3))

    @classmethod
    def translation(cls, x: float, y: float) -> Motion:
        """The query's pixel (0, 0) shows the reference's (x, y)."""
        return cls("translation", np.array([[1, 0, x], [0, 1, y], [0, 0, 1]], np.float64))

    def __matmul__(self, first: Motion) -> Motion:
        """`first`, and then this one."""
        return Motion(max(self.kind, first.kind, key=KINDS.index), self.matrix @ first.matrix)

    def inverse(self) -> Motion:
        """From the reference's coordinates back to the query's."""
        return Motion(self.kind, np.asarray(np.linalg.inv(self.matrix), np.float64))

    def apply(self, points: npt.ArrayLike) -> Matrix:
        """(N, 2) points (x, y) of the query -> (N, 2) of the reference."""
        moved = np.asarray(points, np.float64) @ self.matrix[:, :2].T + self.matrix[:, 2]
        return np.asarray(moved[:, :2] / moved[:, 2:])

    def displacement(self, other: Motion, shape: tuple[int, ...]) -> tuple[float, float]:
        """Mean and largest distance in pixels between where two motions send the pixels of a (height, width) query.

        Taken over at most 65 x 65 points spread evenly, corners included.
        """
        rows, columns = (np.linspace(0, side - 1, min(side, 65)) for side in shape[:2])
        points = np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2)
        distances = np.linalg.norm(self.apply(points) - other.apply(points), axis=1)
        return float(distances.mean()), float(distances.max())

    def simplified(self, kind: Kind, shape: tuple[int, ...]) -> Motion:
        """The motion of a simpler kind that comes close to this one over a (height, width) query."""
        if KINDS.index(kind) >= KINDS.index(self.kind):
            return Motion(kind, self.matrix)
        if kind == "identity":
            return Motion.identity()
        rows, columns = (np.linspace(0, side - 1, 9) for side in shape[:2])
        points = np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2)
        moved = self.apply(points)
        if kind == "translation":
            return Motion.translation(*(moved - points).mean(axis=0))
        linear = np.linalg.lstsq(np.column_stack([points, np.ones(len(points))]), moved, rcond=None)[0].T
        if kind == "euclidean":
            left, _, right = np.linalg.svd(linear[:, :2])
            turn = left @ np.diag([1, np.linalg.det(left @ right)]) @ right
            linear = np.column_stack([turn, moved.mean(axis=0) - turn @ points.mean(axis=0)])
        return Motion(kind, np.vstack([linear, [0, 0, 1]]))

    def halved(self, levels: int = 1) -> Motion:
        """The same motion between images shrunk `levels` times by 2; enlarged if `levels` is negative."""
        scale = 2.0**-levels
        shrink = np.array([[scale, 0, (scale - 1) / 2], [0, scale, (scale - 1) / 2], [0, 0, 1]])
        return Motion(self.kind, shrink @ self.matrix @ np.linalg.inv(shrink))


def warp(reference: FloatArray, motion: Motion, shape: tuple[int, int]) -> tuple[FloatArray, BoolArray]:
    """Bring a reference (h, w) or (h, w, C) in [0, 1] onto the grid of a query of `shape` (height, width).

    Returns:
        warped: (height, width[, C]) with warped[p] = reference[motion(p)], cubic, in [0, 1]. Where the reference has
            nothing, its border pixels are repeated: zeros would darken what is smoothed later.
        valid: (height, width) bool, False there. A pixel is valid if its exact place lies between the centres of
            the reference's first and last pixels.
    """
    height, width = shape
    if motion.kind == "identity" and reference.shape[:2] == shape:
        return reference.copy(), np.ones(shape, np.bool_)
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    border = cv2.BORDER_REPLICATE
    if motion.kind == "homography":
        warped = cv2.warpPerspective(reference, motion.matrix, (width, height), flags=flags, borderMode=border)
    else:
        warped = cv2.warpAffine(reference, motion.matrix[:2], (width, height), flags=flags, borderMode=border)
    clipped = np.clip(warped, 0, 1, dtype=np.float32).reshape(shape + reference.shape[2:])  # cubic kernels overshoot
    return clipped, overlap(motion, shape, reference.shape)


def overlap(motion: Motion, shape: tuple[int, ...], reference: tuple[int, ...]) -> BoolArray:
    """(height, width) bool: which pixels of a query of `shape` the motion sends into a reference of that shape."""
    x, y = np.arange(shape[1], dtype=np.float64), np.arange(shape[0], dtype=np.float64)[:, None]
    (a, b, c), (d, e, f), (g, h, _) = motion.matrix
    right, bottom = reference[1] - 1 + _TOLERANCE, reference[0] - 1 + _TOLERANCE
    to_x, to_y = (a * x + c) + b * y, (d * x + f) + e * y
    if motion.kind == "homography":
        depth = (g * x + 1) + h * y
        ahead = depth > 1e-9  # what lies behind the camera is nowhere
        depth = np.where(ahead, depth, 1)
        to_x, to_y = np.where(ahead, to_x / depth, -1), to_y / depth
    valid: BoolArray = (to_x >= -_TOLERANCE) & (to_x <= right) & (to_y >= -_TOLERANCE) & (to_y <= bottom)
    return valid


def _keeps_to(kind: Kind, matrix: Matrix) -> bool:
    if kind == "homography":
        return True
    if not np.allclose(matrix[2], (0, 0, 1), atol=_TOLERANCE):
        return False
    if kind == "affine":
        return True
    if kind == "euclidean":
        turn = matrix[:2, :2]
        return bool(np.allclose(turn @ turn.T, np.eye(2), atol=1e-4) and np.linalg.det(turn) > 0)
    if kind == "translation":
        return bool(np.allclose(matrix[:2, :2], np.eye(2), atol=_TOLERANCE))
    return bool(np.allclose(matrix, np.eye(3), atol=_TOLERANCE))

"""From a rough motion to an exact one: coarse to fine by the enhanced correlation coefficient (ECC), or by features.

Sources: Evangelidis and Psarakis, Parametric image alignment using enhanced correlation coefficient maximization,
IEEE TPAMI 2008; Lowe, Distinctive image features from scale-invariant keypoints, IJCV 2004; Barath et al., MAGSAC++,
CVPR 2020. Brightness and contrast of a whole image have no influence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from blemish.alignment.motion import KINDS, Kind, Motion, overlap
from blemish.data.images import FloatArray

_ECC = {
    "translation": cv2.MOTION_TRANSLATION,
    "euclidean": cv2.MOTION_EUCLIDEAN,
    "affine": cv2.MOTION_AFFINE,
    "homography": cv2.MOTION_HOMOGRAPHY,
}
_SMALLEST = 32  # pixels: the shorter side of the coarsest level
_LEAST_OVERLAP = 0.25  # of the query
_FARTHEST = 0.1  # of the longer side: what lies farther off, ECC finds by accident only
_MOST_FEATURES = 1500
_LEAST_INLIERS = 12  # random matches agree on a homography in 4, with luck in 6 or 7


def pyramid(image: FloatArray, levels: int) -> list[FloatArray]:
    """The image and its halves, finest first; pixels that no whole square of 2 x 2 covers are left out."""
    found = [image]
    for _ in range(levels):
        above = found[-1]
        even = above[: above.shape[0] // 2 * 2, : above.shape[1] // 2 * 2]
        half = cv2.resize(even, (even.shape[1] // 2, even.shape[0] // 2), interpolation=cv2.INTER_AREA)
        found.append(np.asarray(half, np.float32))
    return found


def levels_of(*shapes: tuple[int, ...]) -> int:
    """How often images of these shapes can be halved and still show something."""
    short = min(min(shape[:2]) for shape in shapes)
    return max(0, int(np.floor(np.log2(max(short, 1) / _SMALLEST))))


def ecc(
    reference: FloatArray, query: FloatArray, start: Motion, kind: Kind, iterations: int = 30, change: float = 1e-5
) -> Motion:
    """The motion of `kind` near `start` that correlates (H, W) grey images best; `start` where there is none.

    Stops after `iterations`, or when the correlation gains less than `change`.
    """
    criteria = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, iterations, change)
    matrix = start.matrix.astype(np.float32)
    matrix = matrix if kind == "homography" else matrix[:2].copy()
    try:
        _, refined = cv2.findTransformECC(query, reference, matrix, _ECC[kind], criteria, None, 5)  # type: ignore[call-overload]
    except cv2.error:  # it does not converge, or the images hold too little
        return start
    found = _as_motion(kind, refined)
    if found is None or not plausible(found, query.shape, reference.shape):
        return start
    return found if found.displacement(start, query.shape)[0] <= _FARTHEST * max(query.shape) else start


def coarse_to_fine(
    references: Sequence[FloatArray], queries: Sequence[FloatArray], start: Motion, kind: Kind, finest: int = 0
) -> Motion:
    """Refine `start` to a motion of `kind` by ECC on every level of two pyramids, down to level `finest`.

    `start` and the motion returned are those of full-sized images.
    """
    kinds = KINDS[max(1, KINDS.index(start.kind)) : KINDS.index(kind) + 1]
    motion = start.halved(len(queries) - 1)
    for level in range(len(queries) - 1, finest - 1, -1):
        for each in kinds if level == len(queries) - 1 else (kind,):
            motion = ecc(references[level], queries[level], motion, each)
        motion = motion.halved(-1 if level else 0)
    return motion if finest == 0 else motion.halved(-(finest - 1))


@dataclass(frozen=True)
class Remainder:
    """What one more step of least squares would change.

    pixels: the root mean square of the displacement along the gradient, weighted by its square: what lies where
        nothing can be seen does not count.
    ratio: F, of the variance that the step explains to the noise; about 1 if nothing remains.
    """

    pixels: float
    ratio: float


def remainder(reference: FloatArray, query: FloatArray, motion: Motion) -> Remainder:
    """How far a homography would still move grey images of (H, W) that `motion` aligns, judged by their residual.

    The residual is explained by the gradient of the warped reference, linearly: by what a small homography would
    change there, once a gain and an offset are taken out.
    """
    shape = (query.shape[0], query.shape[1])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    warped = cv2.warpPerspective(reference, motion.matrix, shape[::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)
    blurred, target = (cv2.GaussianBlur(image, (5, 5), 0, borderType=cv2.BORDER_REFLECT) for image in (warped, query))
    inside = cv2.erode(overlap(motion, shape, reference.shape).view(np.uint8), np.ones((5, 5), np.uint8), borderValue=0)
    count = int(np.count_nonzero(inside))
    if count < 64:
        return Remainder(0.0, 0.0)
    span = max(shape) / 2
    x = ((np.arange(shape[1]) - (shape[1] - 1) / 2) / span).astype(np.float32)
    y = (((np.arange(shape[0]) - (shape[0] - 1) / 2) / span).astype(np.float32))[:, None]
    steps = np.empty((10, *shape), np.float32)
    steps[9] = inside
    np.multiply(blurred, steps[9], out=steps[8])
    for place, (right, down) in enumerate(((1, 0), (0, 1))):
        np.multiply(cv2.Sobel(blurred, cv2.CV_32F, right, down, scale=1 / 8), steps[9], out=steps[place])
    for place, (factor, gradient) in enumerate(((x, 0), (y, 0), (x, 1), (y, 1)), start=2):
        np.multiply(factor, steps[gradient], out=steps[place])
    radial = steps[2] + steps[5]
    np.multiply(x, radial, out=steps[6])
    np.multiply(y, radial, out=steps[7])
    flat = steps.reshape(10, -1)
    normal = (flat @ flat.T).astype(np.float64)
    wanted = (flat @ target.ravel()).astype(np.float64)
    energy = float(np.square(target[inside > 0], dtype=np.float64).sum())
    step = np.linalg.lstsq(normal, wanted, rcond=1e-10)[0]
    plain = np.linalg.lstsq(normal[8:, 8:], wanted[8:], rcond=1e-10)[0]
    visible = normal[0, 0] + normal[1, 1]
    if step[8] < 1e-3 or visible <= 0:  # brightness does not even go the same way, or there is no edge
        return Remainder(0.0, 0.0)
    left = max(energy - float(wanted @ step), 1e-9 * energy)
    explained = max(energy - float(wanted[8:] @ plain) - left, 0.0)
    moved = step[:8] / step[8]
    along = float(moved @ normal[:8, :8] @ moved) / visible
    return Remainder(float(np.sqrt(max(along, 0.0))), (explained / 8) / (left / max(count - 10, 1)))


def features(reference: FloatArray, query: FloatArray, kind: Kind) -> Motion | None:
    """A motion of `kind` from SIFT features and MAGSAC, for large turns and scales; None if too few agree.

    reference, query: (H, W) grey in [0, 1]. A motion that needs a change of scale cannot be Euclidean: then None.
    """
    detector = cv2.SIFT_create(nfeatures=_MOST_FEATURES)  # type: ignore[attr-defined]
    found = [detector.detectAndCompute(np.rint(image * 255).astype(np.uint8), None) for image in (reference, query)]
    (first_points, first), (second_points, second) = found
    if min(len(first_points), len(second_points)) < _LEAST_INLIERS:
        return None
    near = cv2.BFMatcher(cv2.NORM_L2).knnMatch(second, first, k=2)
    matches = [pair[0] for pair in near if len(pair) == 2 and pair[0].distance < 0.8 * pair[1].distance]
    if len(matches) < _LEAST_INLIERS:
        return None
    source = np.array([second_points[match.queryIdx].pt for match in matches])
    target = np.array([first_points[match.trainIdx].pt for match in matches])
    matrix, inliers = _estimate(source, target, kind)
    motion = None if matrix is None else _as_motion(kind, matrix)
    # Repeated structures and noise match at random: a share of the matches must agree, and not only on one spot.
    if motion is None or np.count_nonzero(inliers) < max(_LEAST_INLIERS, 0.15 * len(matches)):
        return None
    return motion if plausible(motion, query.shape, reference.shape) else None


def _estimate(
    source: npt.NDArray[np.float64], target: npt.NDArray[np.float64], kind: Kind
) -> tuple[npt.NDArray[np.float64] | None, npt.NDArray[np.bool_]]:
    """The matrix of `kind` that most pairs of points agree on within 3 pixels, and which do."""
    found, agree = _robust(source, target, kind)
    if found is None or not np.isfinite(found).all():
        return None, np.zeros(len(source), np.bool_)
    matrix, inliers = np.asarray(found, np.float64), np.asarray(agree.ravel() > 0)
    if kind in ("translation", "euclidean"):
        scale = float(np.sqrt(abs(np.linalg.det(matrix[:, :2]))))
        if not 0.9 < scale < 1.1:
            return None, inliers
        turn = matrix[:, :2] / scale if kind == "euclidean" else np.eye(2)
        middle_source, middle_target = source[inliers].mean(axis=0), target[inliers].mean(axis=0)
        matrix = np.column_stack([turn, middle_target - turn @ middle_source])
    return matrix, inliers


def _robust(source: npt.NDArray[np.float64], target: npt.NDArray[np.float64], kind: Kind) -> tuple[Any, Any]:
    if kind == "homography":
        return cv2.findHomography(source, target, cv2.USAC_MAGSAC, 3.0, maxIters=2000)
    if kind == "affine":
        return cv2.estimateAffine2D(source, target, method=cv2.USAC_MAGSAC, ransacReprojThreshold=3.0)
    return cv2.estimateAffinePartial2D(source, target, method=cv2.RANSAC, ransacReprojThreshold=3.0)


def plausible(motion: Motion, shape: tuple[int, ...], reference: tuple[int, ...]) -> bool:
    """Whether a camera could have done it: no mirror, no scale beyond 3, and some overlap."""
    right, bottom = shape[1] - 1, shape[0] - 1
    corners = np.array([[0, 0], [right, 0], [right, bottom], [0, bottom]], np.float64)
    depth = corners @ motion.matrix[2, :2] + 1
    if (depth < 0.2).any():
        return False
    moved = motion.apply(corners)
    sides = np.roll(moved, -1, axis=0) - moved
    turns = sides[:, 0] * np.roll(sides[:, 1], -1) - sides[:, 1] * np.roll(sides[:, 0], -1)
    area = float(turns.sum()) / 4  # of a convex figure: each of its corner triangles counts half
    if (turns <= 0).any() or not 1 / 9 < area / max(right * bottom, 1) < 9:
        return False
    rows, columns = (np.linspace(0, side, 17) for side in (bottom, right))
    places = motion.apply(np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2))
    inside = (places >= 0).all(axis=1) & (places <= (reference[1] - 1, reference[0] - 1)).all(axis=1)
    return float(inside.mean()) >= _LEAST_OVERLAP


def _as_motion(kind: Kind, matrix: npt.NDArray[np.floating]) -> Motion | None:
    full = np.eye(3)
    full[: len(matrix)] = matrix
    if not np.isfinite(full).all() or abs(full[2, 2]) < 1e-12 or abs(np.linalg.det(full / full[2, 2])) < 1e-9:
        return None
    return Motion(kind, full)

"""What a difference map goes through before its threshold: a chain of filters, each known by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from blemish.data.images import FloatArray
from blemish.difference.filters import WIDEST, check_chain
from blemish.errors import ConfigError
from blemish.postprocess import Mask, Smoothing

_LARGEST_FAST = 5  # OpenCV's median of float32 stops here


@dataclass(frozen=True)
class MapFilters:
    """A chain of filters of difference maps (H, W) >= 0; no pixel that is not valid has a say in one that is.

    Args:
        chain: in this order, any of: identity; median; gaussian; opening, which removes what is bright and smaller
            than a disc; closing, which fills what is dark and smaller than one; top_hat, what opening removes, so that
            wide differences, of illumination say, go and small ones stay.
        kernel: side of median's window, in pixels; odd. Above 5 it is slow.
        sigma: of gaussian, in pixels.
        radius: of the disc of opening, closing and top_hat, in pixels.

    All but identity change the law of the noise, on which `MapThreshold(kind="noise")` relies.

    Sources: Serra, Image analysis and mathematical morphology, 1982; Knutsson and Westin, Normalized and differential
    convolution, CVPR 1993 (gaussian where pixels are not valid).

    Raises:
        ConfigError: unknown names, or a number out of range.
    """

    chain: Sequence[str] = ()
    kernel: int = 3
    sigma: float = 1.0
    radius: int = 2

    def __post_init__(self) -> None:
        check_chain("postprocessing.chain", self.chain, MAP_FILTERS)
        if not isinstance(self.kernel, int) or not 1 <= self.kernel <= WIDEST or self.kernel % 2 == 0:
            raise ConfigError(
                f"Expected postprocessing.kernel to be an odd number of pixels up to {WIDEST}, found {self.kernel}."
            )
        if not 0 < self.sigma <= WIDEST:
            raise ConfigError(f"Expected postprocessing.sigma above 0 and at most {WIDEST}, found {self.sigma}.")
        if not isinstance(self.radius, int) or not 1 <= self.radius <= WIDEST:
            raise ConfigError(f"Expected postprocessing.radius to be 1 to {WIDEST} whole pixels, found {self.radius}.")

    def __call__(self, score_map: FloatArray, valid: Mask) -> FloatArray:
        """(H, W) >= 0 and where it is defined -> (H, W) >= 0, 0 where it is not defined."""
        score_map = _only(score_map, valid)
        if valid.any():
            for name in self.chain:
                score_map = _only(MAP_FILTERS[name](self, score_map, valid), valid)
        return score_map


def _only(score_map: FloatArray, valid: Mask, otherwise: float = 0.0) -> FloatArray:
    return np.where(valid, score_map, np.float32(otherwise))


def _median(settings: MapFilters, score_map: FloatArray, valid: Mask) -> FloatArray:
    if not valid.all():
        nearest = ndimage.distance_transform_edt(~valid, return_distances=False, return_indices=True)
        score_map = np.ascontiguousarray(score_map[tuple(nearest)])
    if settings.kernel <= _LARGEST_FAST:
        return np.asarray(cv2.medianBlur(score_map, settings.kernel), np.float32)
    return np.asarray(ndimage.median_filter(score_map, settings.kernel, mode="nearest"), np.float32)


def _gaussian(settings: MapFilters, score_map: FloatArray, valid: Mask) -> FloatArray:
    smooth = Smoothing(settings.sigma)
    if valid.all():
        return smooth(score_map)
    weight = smooth(valid.astype(np.float32))
    return np.divide(smooth(score_map), weight, out=np.zeros_like(score_map), where=valid)


def _disc(radius: int) -> npt.NDArray[np.uint8]:
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return np.asarray(x * x + y * y <= radius * radius, np.uint8)


# Beyond the image and where a map is not valid, each step sees what changes no result: the largest value where it takes
# the smallest, 0 where it takes the largest.


def _erode(settings: MapFilters, score_map: FloatArray, valid: Mask) -> FloatArray:
    return np.asarray(cv2.erode(_only(score_map, valid, score_map.max()), _disc(settings.radius)), np.float32)


def _dilate(settings: MapFilters, score_map: FloatArray, valid: Mask) -> FloatArray:
    return np.asarray(cv2.dilate(_only(score_map, valid), _disc(settings.radius)), np.float32)


def _opening(settings: MapFilters, score_map: FloatArray, valid: Mask) -> FloatArray:
    return _dilate(settings, _erode(settings, score_map, valid), valid)


def _closing(settings: MapFilters, score_map: FloatArray, valid: Mask) -> FloatArray:
    return _erode(settings, _dilate(settings, score_map, valid), valid)


MAP_FILTERS: dict[str, Callable[[MapFilters, FloatArray, Mask], FloatArray]] = {
    "identity": lambda settings, score_map, valid: score_map,
    "median": _median,
    "gaussian": _gaussian,
    "opening": _opening,
    "closing": _closing,
    "top_hat": lambda settings, score_map, valid: score_map - _opening(settings, score_map, valid),
}

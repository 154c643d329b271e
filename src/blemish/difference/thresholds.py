"""What counts as different, without a calibration: a fixed value, a histogram's, or what noise alone would exceed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from skimage import filters

from blemish.data.images import FloatArray
from blemish.errors import ConfigError, nearest_names
from blemish.noise import noise_level, robust_sigma
from blemish.postprocess import Mask

_HISTOGRAM: dict[str, Callable[[npt.NDArray[np.floating]], float]] = {
    "otsu": filters.threshold_otsu,
    "li": filters.threshold_li,
    "triangle": filters.threshold_triangle,
    "hysteresis": filters.threshold_otsu,
}
KINDS = ("noise", "fixed", *_HISTOGRAM)


@dataclass(frozen=True)
class MapThreshold:
    """From a difference map to a mask of the pixels above a threshold.

    Args:
        kind: noise, above what white Gaussian noise exceeds at a pixel with probability 1 - confidence, and above a
            share `visible` of the reference's contrast; fixed, above `value`; otsu, li or triangle, from the map's
            histogram: these always find something; hysteresis, above half of otsu's where connected (8 neighbours)
            with something above it.
        value: of the map, for fixed.
        confidence: in (0, 1), for noise.
        visible: in [0, 1], for noise: what two good prints of a pattern differ by at its edges grows with its
            contrast, and not with the noise.
        least: of all but fixed: a map that does not rise above this shows nothing. The default is above one grey
            level of 8 bits, which is what rounding alone can make of equal images.

    `noise` takes the noise's standard deviation from the median of the pixels' differences (see `blemish.noise`), so it
    assumes residual=l1, a map that is no larger than these, and, in colour, independent noise of one strength in all
    three channels: a grey picture saved in colour, whose channels are equal, is one channel. Where it does not hold:

    - Between images of whole grey levels, scores are whole steps of 1 / 255, and the share of flagged pixels is that of
      noise above the threshold, give or take half a step: where the difference has a standard deviation of 5 grey
      levels, 0.07 to 0.14 % instead of 0.1. Their estimate is up to 3 % off at two grey levels and 12 % at one.
    - If more than half of the map is exactly 0, there is no noise to estimate, and `least` alone decides. That is as
      it should be for binary images; noise whose difference has a standard deviation below about 0.7 grey levels,
      however, is flagged wherever it exceeds 1.5 of them, whatever the confidence: up to 4 % of the pixels.

    Sources: Otsu, IEEE SMC 1979; Li and Tam, Pattern Recognition Letters 1998; Zack et al., Journal of Histochemistry
    and Cytochemistry 1977 (triangle); Canny, IEEE PAMI 1986 (hysteresis).

    Raises:
        ConfigError: unknown kind, or a number out of range.
    """

    kind: str = "noise"
    value: float = 0.1
    confidence: float = 0.999
    visible: float = 0.0
    least: float = 1.5 / 255

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"Unknown threshold.kind '{self.kind}': {nearest_names(self.kind, KINDS)}")
        finite = 0 <= self.value < math.inf and 0 <= self.least < math.inf
        if not (0 < self.confidence < 1 and 0 <= self.visible <= 1 and finite):
            raise ConfigError(
                "Expected threshold.confidence between 0 and 1, threshold.visible in [0, 1], and threshold.value and "
                "threshold.least finite and >= 0, found "
                f"{self.confidence}, {self.visible}, {self.value} and {self.least}."
            )

    def __call__(
        self,
        score_map: FloatArray,
        valid: Mask,
        channels: int = 1,
        differences: FloatArray | None = None,
        contrast: float = 0.0,
    ) -> tuple[Mask, float]:
        """(H, W) >= 0 and where it is defined -> the mask, and the value above which pixels are in it.

        Args (for `noise`):
            channels: of the images that were compared, as the map is their mean.
            differences: (N,) differences of pixels, the channels' mean; None if the map is made of these.
            contrast: of the reference, in units of the map.

        Raises:
            ConfigError: `noise`, with neither 1 nor 3 channels.
        """
        threshold = self.of(score_map[valid], channels, differences, contrast)
        mask = valid & (score_map > threshold)
        if self.kind == "hysteresis":
            mask = _connected(valid & (score_map > _single(max(threshold / 2, self.least))), mask)
        return mask, threshold

    def of(
        self,
        values: FloatArray,
        channels: int = 1,
        differences: FloatArray | None = None,
        contrast: float = 0.0,
    ) -> float:
        """The threshold for these pixels (N,) of a map; a float32, like the pixels, so that ties are ties."""
        if self.kind == "fixed":
            return _single(self.value)
        if not values.size:
            return _single(self.least)
        if self.kind == "noise":
            sigma = robust_sigma(values if differences is None else differences, channels)
            found = max(self.visible * contrast, sigma * noise_level(1 - self.confidence, channels))
        else:
            # In float32, a map that is constant but for rounding has no room for a histogram's bins.
            found = float(_HISTOGRAM[self.kind](values.astype(np.float64)))
        return _single(max(self.least, found))


def _single(value: float) -> float:
    return float(np.float32(value))


def _connected(candidates: Mask, seeds: Mask) -> Mask:
    """Those regions (8 neighbours) of the candidates that hold a seed; every seed is a candidate."""
    _, labels = cv2.connectedComponents(candidates.view(np.uint8), connectivity=8)
    return np.asarray(np.isin(labels, np.unique(labels[seeds])), np.bool_)

"""What counts as different, without a calibration: a fixed value, a histogram's, or what noise alone would exceed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats
from skimage import filters

from blemish.data.images import FloatArray
from blemish.errors import ConfigError, nearest_names
from blemish.postprocess import Mask

_HISTOGRAM: dict[str, Callable[[npt.NDArray[np.floating]], float]] = {
    "otsu": filters.threshold_otsu,
    "li": filters.threshold_li,
    "triangle": filters.threshold_triangle,
}
KINDS = ("noise", "fixed", *_HISTOGRAM, "hysteresis")
_MEDIAN = float(stats.halfnorm.median())


@dataclass(frozen=True)
class MapThreshold:
    """From a difference map to a mask.

    Args:
        kind: noise, above what white Gaussian noise exceeds at a pixel with probability 1 - confidence, its standard
            deviation estimated from the map's own median (see `blemish.noise`); fixed, above `value`; otsu, li or
            triangle, from the map's histogram: these always find something; hysteresis, above half of otsu's where
            connected with something above it.
        value: of the map, for fixed.
        confidence: in (0, 1), for noise.
        least: of all but fixed: a map that does not rise above this shows nothing.

    Sources: Otsu, IEEE SMC 1979; Li and Tam, Pattern Recognition Letters 1998; Zack et al. (triangle), 1977.

    Raises:
        ConfigError: unknown kind, or a number out of range.
    """

    kind: str = "noise"
    value: float = 0.1
    confidence: float = 0.999
    least: float = 1 / 255

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"Unknown threshold.kind '{self.kind}': {nearest_names(self.kind, KINDS)}")
        if not 0 < self.confidence < 1 or self.value < 0 or self.least < 0:
            raise ConfigError(
                "Expected threshold.confidence between 0 and 1, threshold.value >= 0 and threshold.least >= 0, found "
                f"{self.confidence}, {self.value} and {self.least}."
            )

    def __call__(self, score_map: FloatArray, valid: Mask) -> tuple[Mask, float]:
        """(H, W) >= 0 and where it is defined -> the mask, and the value above which pixels are in it."""
        seen = score_map[valid]
        if not seen.size:
            return np.zeros_like(valid), self.value if self.kind == "fixed" else self.least
        threshold = self.of(seen)
        mask = score_map > np.float32(threshold)
        if self.kind == "hysteresis":
            mask = filters.apply_hysteresis_threshold(score_map, max(threshold / 2, self.least), threshold)
        return mask & valid, threshold

    def of(self, values: npt.NDArray[np.float32]) -> float:
        """The threshold for these pixels of a map."""
        if self.kind == "fixed":
            return self.value
        if self.kind == "noise":
            sigma = float(np.median(values)) / _MEDIAN
            return max(self.least, sigma * float(stats.norm.isf((1 - self.confidence) / 2)))
        if values.min() == values.max():
            return max(self.least, float(values.max()))
        return max(self.least, float(_HISTOGRAM["otsu" if self.kind == "hysteresis" else self.kind](values)))

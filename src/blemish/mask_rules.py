"""Mask rules: what a mask may show of a normal image, each as one score per score map.

A rule's score is the smallest threshold at which the mask (the pixels above the threshold) keeps the rule. So a mask
breaks the rule if and only if the score exceeds the threshold, and the conformal rank of such scores turns the rule
into a promise. NumPy and OpenCV only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from blemish.data.images import FloatArray
from blemish.errors import CalibrationError, ConfigError
from blemish.postprocess import Mask, bounds

MASK_RULES = ("any_pixel", "area_fraction", "region", "parametric_noise")
_MORE = 4  # times as many of the largest scores, where those looked at hold no region
SETTINGS = {"area_fraction": "tau", "region": "region_area"}
"""The setting that matters for a rule."""


@dataclass(frozen=True)
class MaskRule:
    """What the mask of a normal image should keep.

    Args:
        name: "any_pixel": nothing is flagged. "area_fraction": at most the share `tau` of the pixels is flagged.
            "region": no region (8 neighbours) of `region_area` or more pixels is flagged. "parametric_noise": nothing
            is flagged, with a threshold that assumes Gaussian noise (see `noise.py`) instead of a conformal one.
        tau: share of the image's pixels, in [0, 1).
        region_area: in pixels of the image, at least 1.

    Raises:
        ConfigError: unknown name, or a value out of range.
    """

    name: str = "any_pixel"
    tau: float = 0.001
    region_area: int = 16

    def __post_init__(self) -> None:
        if self.name not in MASK_RULES:
            raise ConfigError(
                f"Expected calibration.mask_rule to be one of {', '.join(MASK_RULES)}, found '{self.name}'."
            )
        if not (isinstance(self.tau, (int, float)) and 0 <= self.tau < 1):
            raise ConfigError(f"Expected calibration.tau in [0, 1), found {self.tau}.")
        if not isinstance(self.region_area, int) or self.region_area < 1:
            raise ConfigError(f"Expected calibration.region_area >= 1, found {self.region_area}.")

    @property
    def smallest_region(self) -> int:
        """The area in pixels below which a region does not break the rule and is no part of a mask."""
        return self.region_area if self.name == "region" else 1

    def check_size(self, pixels: int, path: Path) -> None:
        """Raise CalibrationError if no mask of an image of so many pixels could break the rule."""
        if self.smallest_region > pixels:
            raise CalibrationError(
                f"{path} has {pixels} pixels, fewer than calibration.region_area = {self.region_area}: no mask could "
                "ever break the rule; lower it."
            )

    def score(self, score_map: FloatArray, pixels: int | None = None) -> float:
        """The smallest threshold >= 0 at which the mask of this map keeps the rule.

        Args:
            score_map: (H, W) float32, finite, >= 0.
            pixels: of the whole image, if the map is a part of it with nothing elsewhere.
        """
        if self.name == "area_fraction":
            return _exceeded_by(score_map, math.floor(Fraction(repr(float(self.tau))) * (pixels or score_map.size)))
        if self.name == "region":
            return _largest_level_with_region(score_map, self.region_area)
        return float(score_map.max())

    def score_of_region(self, part: FloatArray, inside: Mask, pixels: int) -> float:
        """The score of an image of so many pixels that shows nothing but one region: `part` where `inside` is True."""
        return self.score(np.where(inside, part, np.float32(0)) if self.name == "region" else part[inside], pixels)

    def to_dict(self) -> dict[str, Any]:
        """The name, and the setting that matters for it."""
        setting = SETTINGS.get(self.name)
        return {"name": self.name} | ({setting: getattr(self, setting)} if setting else {})

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> MaskRule:
        """Read what `to_dict` wrote."""
        return cls(**content)

    def in_words(self) -> str:
        """What counts as a false alarm, to follow "with ..."."""
        if self.name == "area_fraction":
            return f"more than {100 * self.tau:g} % of the image flagged"
        if self.name == "region":
            return f"a flagged region of {self.region_area} or more pixels"
        return "any pixel flagged"


def _exceeded_by(score_map: FloatArray, count: int) -> float:
    """The smallest threshold >= 0 that at most `count` pixels exceed: the (count + 1)-th largest value."""
    if count >= score_map.size:
        return 0.0
    place = score_map.size - 1 - count
    return max(0.0, float(np.partition(score_map, place, axis=None)[place]))


def _largest_level_with_region(score_map: FloatArray, area: int) -> float:
    """The largest value v for which {map >= v} has a region of `area` or more pixels; 0 if the map is smaller.

    Whether there is such a region can only change from yes to no as v grows, so bisection over the map's own values,
    with regions found by OpenCV's union-find, is exact (docs/decisions/0007). Where scores are smooth, the value is
    among the few largest: more and more of these are looked at until it is.
    """
    if area > score_map.size:
        return 0.0
    if area == 1:
        return max(0.0, float(score_map.max()))
    # A region of that size needs as many pixels at its level, so the level is no larger than this.
    highest = _exceeded_by(score_map, area - 1)
    count, lowest = area, highest
    while count < score_map.size and not _has_region(score_map >= lowest, area):
        count = min(_MORE * count, score_map.size)
        lowest = _exceeded_by(score_map, count - 1)
    values = np.unique(score_map[(score_map >= lowest) & (score_map <= highest)])
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if _has_region(score_map >= values[middle], area):
            low = middle
        else:
            high = middle - 1
    return max(0.0, float(values[low]))


def _has_region(mask: np.ndarray[Any, np.dtype[np.bool_]], area: int) -> bool:
    _, _, boxes, _ = cv2.connectedComponentsWithStats(mask[bounds(mask)].view(np.uint8), connectivity=8)
    return bool((boxes[1:, cv2.CC_STAT_AREA] >= area).any())

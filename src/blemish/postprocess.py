"""From a raw map to a smooth one, from a mask to regions. NumPy and OpenCV only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from blemish.data.images import FloatArray
from blemish.errors import ConfigError

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Region:
    """A connected part of a mask (8 neighbours): its box in pixels, its area in pixels, its largest score.

    p_value: the chance that a normal image shows as bad a region, in (0, 1]; None without a calibration.
    """

    left: int
    top: int
    width: int
    height: int
    area: int
    score: float
    p_value: float | None = None


@dataclass(frozen=True)
class Smoothing:
    """Gaussian smoothing of a score map, `sigma` in pixels of the scored image; 0 leaves the map as it is."""

    sigma: float = 2.0

    def __post_init__(self) -> None:
        if self.sigma < 0:
            raise ConfigError(f"Expected smoothing.sigma >= 0, found {self.sigma}.")

    def __call__(self, score_map: FloatArray) -> FloatArray:
        """(H, W) -> (H, W). Borders reflect: with zeros the map would sink there."""
        if self.sigma == 0:
            return score_map
        return np.asarray(cv2.GaussianBlur(score_map, (0, 0), self.sigma, borderType=cv2.BORDER_REFLECT), np.float32)


@dataclass(frozen=True)
class Cleaning:
    """Removes regions below `min_area` pixels from a mask. It can only lower the false-alarm rate."""

    min_area: int = 1

    def __post_init__(self) -> None:
        if self.min_area < 1:
            raise ConfigError(f"Expected cleaning.min_area >= 1, found {self.min_area}.")

    def __call__(
        self, mask: Mask, score_map: FloatArray, p_value: Callable[[FloatArray, Mask], float] | None = None
    ) -> tuple[Mask, list[Region]]:
        """(H, W) bool -> the cleaned mask and its regions, largest score first.

        `p_value` takes the part of the map in a region's box, and which of its pixels are the region's.
        """
        if not mask.any():
            return mask, []
        window = bounds(mask)  # labelling costs more than finding where there is something to label
        count, labels, boxes, _ = cv2.connectedComponentsWithStats(mask[window].view(np.uint8), connectivity=8)
        kept = np.flatnonzero(boxes[:, cv2.CC_STAT_AREA] >= self.min_area)
        kept = kept[kept > 0]  # 0 is the background
        if len(kept) < count - 1:
            mask = np.zeros_like(mask)
            mask[window] = np.isin(labels, kept)
        scores, regions = score_map[window], []
        for label in kept:
            left, top, width, height, area = (int(value) for value in boxes[label])
            box = slice(top, top + height), slice(left, left + width)
            part, inside = scores[box], labels[box] == label
            p = p_value(part, inside) if p_value else None
            left, top = left + window[1].start, top + window[0].start
            regions.append(Region(left, top, width, height, area, float(part[inside].max()), p))
        return mask, sorted(regions, key=lambda region: -region.score)


def bounds(mask: Mask) -> tuple[slice, slice]:
    """The smallest window that holds all of a mask (H, W) that is not empty."""
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask[rows[0] : rows[-1] + 1].any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)

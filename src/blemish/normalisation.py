"""Spatial normalisation: how far a score map is from what normal images show at that very pixel. NumPy only.

For aligned parts: where normal images always score high (an edge, a print), a high score says little. Location and
scale come from training or validation images, never from the calibration images: these would then fit their own
statistics better than a new image does, and the promise would be gone.
"""

from __future__ import annotations

import math
import tempfile
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from blemish.data.images import FloatArray
from blemish.errors import ConfigError, ImageError

KINDS = ("none", "robust", "mean_std")
SOURCES = ("validation", "train")
_MAD_TO_STD = 1.4826  # for normally distributed values
_BLOCK = 2**22  # values sorted at once


@dataclass(frozen=True)
class NormalisationSettings:
    """Which statistics normalise the score maps, and whose.

    Args:
        kind: "none"; "robust": median and median absolute deviation; "mean_std": mean and standard deviation.
        source: the part whose normal images they come from, "validation" or "train".
        images: at most so many of them, spread evenly over the part.

    Raises:
        ConfigError: a value is unknown or out of range.
    """

    kind: str = "none"
    source: Literal["validation", "train"] = "validation"
    images: int = 200

    def __post_init__(self) -> None:
        for name, value, known in (("kind", self.kind, KINDS), ("source", self.source, SOURCES)):
            if value not in known:
                raise ConfigError(f"Expected normalisation.{name} to be one of {', '.join(known)}, found '{value}'.")
        if self.images < 2:
            raise ConfigError(f"Expected normalisation.images >= 2, found {self.images}.")

    def choose(self, items: Sequence[Any]) -> list[Any]:
        """At most `images` of the items, evenly spread."""
        count = min(self.images, len(items))
        return [items[place] for place in np.linspace(0, len(items) - 1, count).round().astype(int)]


@dataclass(frozen=True, eq=False)
class SpatialNormalisation:
    """(map - location) / scale, at least 0, for maps of one size; `location`, `scale` (H, W) float32, scale > 0.

    `scale` is the spread at a pixel plus the median spread of all: otherwise, the largest of many quotients is that of
    a pixel which hardly varied in the few images seen (Tusher et al., PNAS 2001, add a constant for that reason).
    """

    location: FloatArray
    scale: FloatArray

    def __call__(self, score_map: FloatArray) -> FloatArray:
        """(H, W) -> (H, W) >= 0, in units of the spread of normal images.

        Raises:
            ImageError: the map has another size.
        """
        self.check(score_map.shape)
        normalised: FloatArray = np.maximum((score_map - self.location) / self.scale, np.float32(0))
        return normalised

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ImageError if maps of this size cannot be normalised."""
        if shape != self.location.shape:
            raise _other_size(shape, self.location.shape)

    @classmethod
    def fit(cls, score_maps: Iterable[FloatArray], kind: str) -> SpatialNormalisation:
        """Statistics over the maps (H, W) of normal images; they are kept on disk, not in memory.

        Raises:
            ImageError: the maps differ in size. ConfigError: there are fewer than two.
        """
        with tempfile.TemporaryFile() as file:
            shape: tuple[int, ...] | None = None
            count = 0
            for score_map in score_maps:
                if shape not in (None, score_map.shape):
                    raise _other_size(score_map.shape, shape)
                shape = score_map.shape
                file.write(np.ascontiguousarray(score_map, np.float32).tobytes())
                count += 1
            if shape is None or count < 2:
                raise ConfigError(
                    f"Spatial normalisation needs at least two normal images, found {count}: set "
                    "normalisation.kind=none, or a larger split.validation."
                )
            file.flush()
            maps = np.memmap(file, np.float32, "r", shape=(count, math.prod(shape)))
            location, scale = (np.empty(maps.shape[1], np.float32) for _ in range(2))
            step = max(1, _BLOCK // count)
            for first in range(0, maps.shape[1], step):
                block = slice(first, first + step)
                location[block], scale[block] = _statistics(np.array(maps[:, block]), kind)
            del maps
        common = float(np.median(scale))
        # Where most pixels never varied, there is nothing to compare with: no quotient may grow.
        scale = scale + np.float32(common) if common > 0 else np.full_like(scale, max(float(scale.max()), 1.0))
        return cls(location.reshape(shape), scale.reshape(shape))


class MapRecorder:
    """Stands where a normalisation will stand, and keeps the maps that it will be given."""

    def __init__(self) -> None:
        self.maps: deque[FloatArray] = deque()

    def check(self, shape: tuple[int, ...]) -> None:
        """Any size will do: `SpatialNormalisation.fit` compares them."""

    def __call__(self, score_map: FloatArray) -> FloatArray:
        self.maps.append(score_map)
        return score_map


def _statistics(values: FloatArray, kind: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """(N, pixels) -> location and scale of each pixel."""
    if kind == "mean_std":
        return values.mean(0, dtype=np.float64), values.std(0, ddof=1, dtype=np.float64)
    location = np.median(values, axis=0)
    return location, _MAD_TO_STD * np.median(np.abs(values - location), axis=0)


def _other_size(found: tuple[int, ...], expected: tuple[int, ...] | None) -> ImageError:
    expected = expected or ()
    return ImageError(
        f"Spatial normalisation expects score maps of one size, {' x '.join(map(str, expected))}, found "
        f"{' x '.join(map(str, found))}: give aligned images of equal size, or set normalisation.kind=none."
    )

"""Several detectors as one: score maps in units of what normal images show, joined pixel by pixel. No torch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from blemish.data.images import FloatArray, Pixels, check_pixels, probe
from blemish.detector import PIXELS_AT_ONCE, Detector, ScoredImage
from blemish.errors import ConfigError, DataError, nearest_names
from blemish.postprocess import Cleaning
from blemish.scoring import score_files
from blemish.streaming import grouped

JOINS: dict[str, np.ufunc] = {"mean": np.add, "max": np.maximum}
UNIT_QUANTILE = 0.999
_UNIT_IMAGES = 200  # at most, to learn a unit from
_IMAGES_AT_ONCE = 32  # shown to one member after the other, so that each is decoded once and batches are full


@dataclass(frozen=True)
class Ensemble(Detector):
    """The mean or maximum, pixel by pixel, of its members' score maps, each divided by the member's unit.

    A member makes its map as it always does, with its own image size, tiling and score, at the image's own size; it
    needs no calibration. What was expected is told by the first member that tells it. An ensemble tells no classes, be
    there members that do: it is calibrated as one.

    Args:
        members: two or more. units: of each, > 0 (see `learn_units`). join: mean or max.

    Raises:
        ConfigError: fewer than two members, two that are the same, an unknown join, or a unit that is none.
    """

    members: Sequence[Detector]
    units: Sequence[float]
    join: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_members(self.members)
        check_join(self.join)
        if len(self.units) != len(self.members) or not all(0 < unit < math.inf for unit in self.units):
            raise ConfigError(
                f"Expected a positive unit for each of {len(self.members)} members, found {list(self.units)}."
            )

    @classmethod
    def of(
        cls,
        members: Sequence[Detector],
        units: Sequence[float],
        join: str,
        cleaning: Cleaning,
        about: Mapping[str, Any] | None = None,
    ) -> Ensemble:
        """With its fingerprint: the SHA-256 over all that shapes its maps, the members' fingerprints, units, join."""
        digest = hashlib.sha256(f"ensemble {join}".encode())
        for member, unit in zip(members, units, strict=True):
            digest.update(f" {member.fingerprint} {float(unit).hex()}".encode())
        return cls(
            tuple(members), tuple(units), join, cleaning=cleaning, fingerprint=digest.hexdigest(), about=about or {}
        )

    def score_batches(self, images: Iterable[Pixels], explain: bool = False) -> Iterator[list[ScoredImage]]:
        """As `Detector`; `images` is gone through once, and some are held at a time."""

        def full(some: Sequence[Pixels], image: Pixels) -> bool:
            pixels = sum(one.shape[0] * one.shape[1] for one in (*some, image))
            return len(some) == _IMAGES_AT_ONCE or pixels > PIXELS_AT_ONCE

        for some in grouped(map(check_pixels, images), full):
            yield self._score(some, explain)

    def _score(self, images: Sequence[Pixels], explain: bool) -> list[ScoredImage]:
        joined: list[FloatArray] = []
        expected: list[FloatArray | None] = [None] * len(images)
        for number, (member, unit) in enumerate(zip(self.members, self.units, strict=True)):
            wanted = explain and any(one is None for one in expected)
            for place, scored in enumerate(chain.from_iterable(member.score_batches(images, wanted))):
                score_map = scored.score_map / np.float32(unit)
                if number:
                    JOINS[self.join](joined[place], score_map, out=joined[place])
                else:
                    joined.append(score_map)
                if expected[place] is None:
                    expected[place] = scored.expected
        if self.join == "mean":
            joined = [score_map / np.float32(len(self.members)) for score_map in joined]
        return [ScoredImage(score_map, one, None) for score_map, one in zip(joined, expected, strict=True)]

    def check_size(self, image: Pixels) -> None:
        """As `Detector`, for every member."""
        for member in self.members:
            member.check_size(image)


def check_join(join: str) -> None:
    """Raise ConfigError if maps cannot be joined so."""
    if join not in JOINS:
        raise ConfigError(
            f"Expected join to be one of {', '.join(JOINS)}, found '{join}'. {nearest_names(join, JOINS)}"
        )


def check_number(runs: int) -> None:
    """Raise ConfigError if there are fewer than two."""
    if runs < 2:
        raise ConfigError(f"Expected two or more runs to combine, found {runs}: name them, as in runs=[A,B].")


def check_members(members: Sequence[Detector]) -> None:
    """Raise ConfigError if there are fewer than two, or two that score alike."""
    check_number(len(members))
    fingerprints = [member.fingerprint for member in members]
    for number, fingerprint in enumerate(fingerprints):
        first = fingerprints.index(fingerprint)
        if first < number:
            raise ConfigError(
                f"Expected runs that differ, found the same detector as number {first + 1} and number {number + 1}: "
                "name each once."
            )


def learn_units(members: Sequence[Detector], paths: Sequence[Path], progress: bool = True) -> list[float]:
    """What each member's score map reaches in one of a thousand pixels of normal images: the unit to count it in.

    Args:
        paths: of normal images that no member was fitted to, since maps of these are lower, and that do not calibrate.

    Raises:
        ConfigError: there is none, or a member's maps are 0 nearly everywhere. DataError: an image cannot be read, or
            a map has NaN or infinite values.
    """
    if not paths:
        raise ConfigError(
            "Expected validation images that no run was fitted to, to learn the units of the score maps from, found "
            "none: train the runs with the same data, seed and split, or give other normal images by data.root=DIR."
        )
    most = min(_UNIT_IMAGES, len(paths))
    chosen = [paths[place] for place in np.linspace(0, len(paths) - 1, most).round().astype(int)]
    units = []
    for number, member in enumerate(members, start=1):
        maps = tqdm(
            _maps(member, chosen), f"unit {number}", len(chosen), unit="image", disable=not progress, leave=False
        )
        unit = high_quantile(maps, sum(info.width * info.height for info in map(probe, chosen)), UNIT_QUANTILE)
        if unit <= 0:
            raise ConfigError(
                f"Run number {number} scores {UNIT_QUANTILE:.1%} of the pixels of {len(chosen)} normal images as 0, so "
                "that there is no unit to count its scores in: leave it out."
            )
        units.append(unit)
    return units


def _maps(detector: Detector, paths: Sequence[Path]) -> Iterator[FloatArray]:
    for scored in score_files(detector, paths):
        if scored.score_map is None:
            raise DataError(f"A normal image cannot be used. {scored.error}")
        if not np.isfinite(scored.score_map).all():
            raise DataError(
                f"The score map of {scored.path} has NaN or infinite values: a model diverged; train it again."
            )
        yield scored.score_map


def high_quantile(maps: Iterable[FloatArray], values: int, share: float) -> float:
    """The `share` quantile over all values of maps of any shape, exact: a value that occurs, rounded up.

    Only the largest `1 - share` of the values are kept in memory.

    Args:
        values: how many there are in all. share: in [0, 1].
    """
    kept = values - math.ceil(share * (values - 1))
    largest = np.empty(0, np.float32)
    for one in maps:
        largest = np.concatenate([largest, one.ravel()])
        if len(largest) > kept:
            largest = np.partition(largest, -kept)[-kept:]
    return float(largest.min())

"""Whether two detectors say the same of the same images. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from blemish.detector import Detector
from blemish.errors import DataError, ExportError
from blemish.scoring import ScoredFile, score_files

TOLERANCE = 1e-4
"""Of the largest score: engines add up float32 numbers in other orders, which leaves 1e-7 to 2e-5 of it, the most where
a score takes a root near 0 or a difference of near-equal squares. What left more, so far, was a mean of thousands of
values that engines add up one by one (see `standardise.tile_mean`)."""


@dataclass(frozen=True)
class Parity:
    """How far two detectors are apart, at most, over some images.

    score_map, image_score: in units of `unit`, the largest value in the first one's maps. p_value: a probability; an
    image that calibrated has its own score among those it is compared with, so that rounding may cost it one rank.
    decisions: how many images are anomalous to one detector only.
    """

    images: int
    unit: float
    score_map: float
    image_score: float
    p_value: float
    decisions: int

    def in_words(self) -> str:
        return (
            f"on {self.images} images, of a largest score of {self.unit:.4g}: score maps differ by at most "
            f"{self.score_map:.1e} of it, image scores by {self.image_score:.1e}, p-values by {self.p_value:.2g}, "
            f"decisions on {self.decisions} images"
        )

    def check(self, name: str) -> None:
        """Raise ExportError if what differs is no rounding."""
        if not (self.score_map <= TOLERANCE and self.image_score <= TOLERANCE):
            raise ExportError(
                f"{name} does not score as the run does ({self.in_words()}; {TOLERANCE:g} are allowed), so it is not "
                "kept: predict with engine=torch, or choose another format, model or score."
            )


def compare(first: Detector, second: Detector, paths: Sequence[Path], progress: bool = True) -> Parity:
    """Both detectors, calibrated, on the same files.

    Raises:
        DataError: there is no file, or one cannot be read or scored.
    """
    if not paths:
        raise DataError("Expected calibration images to compare the exported file on, found none: give data.root=DIR.")
    unit = maps = scores = p_values = 0.0
    decisions = 0
    pairs = zip(score_files(first, paths), score_files(second, paths), strict=True)
    for a, b in tqdm(pairs, "comparing", len(paths), unit="image", disable=not progress, leave=False):
        for scored in (a, b):
            if scored.score_map is None or not np.isfinite(scored.score_map).all():
                raise DataError(f"{_who(scored)}: give other images by data.root=DIR, or train again.")
        assert a.score_map is not None and b.score_map is not None
        one, other = first.decide(a.score_map, a.label), second.decide(b.score_map, b.label)
        unit = max(unit, float(a.score_map.max()))
        maps = max(maps, float(np.abs(a.score_map - b.score_map).max()))
        scores = max(scores, abs(one.image_score - other.image_score))
        p_values = max(p_values, abs(one.p_value - other.p_value))
        decisions += one.is_anomalous != other.is_anomalous
    scale = unit or 1.0
    return Parity(len(paths), unit, maps / scale, scores / scale, p_values, decisions)


def _who(scored: ScoredFile) -> str:
    return scored.error or f"The score map of {scored.path} has NaN or infinite values"

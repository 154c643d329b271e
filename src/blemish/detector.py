"""The one code path from an image to a score map and a decision: calibration, evaluation and prediction use it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from blemish.calibration import Calibration
from blemish.data.images import FloatArray, Pixels, check_pixels, read_pixels
from blemish.errors import CalibrationError, NotCalibrated
from blemish.normalisation import MapRecorder, SpatialNormalisation
from blemish.postprocess import Cleaning, Mask, Region, Smoothing
from blemish.preprocess import Preprocess
from blemish.streaming import grouped
from blemish.tiling import TileScorer, Tiling, apply_tiled, blend_tiles

PIXELS_AT_ONCE = 2**24
"""Of images at their own size, beyond a single one: scored at once, each with its map."""

_Prepared = tuple[Pixels, tuple[int, int]]  # as it is scored, and its own height and width


@dataclass(frozen=True)
class Prediction:
    """What a detector says of one image.

    score_map: (H, W) float32 at the image's own size, >= 0, higher is worse. mask: (H, W) bool.
    image_score: the smallest threshold at which the mask keeps the calibrated mask rule; for "any_pixel" the map's
    maximum. p_value: the chance of so high a score on a normal image, in (0, 1]. is_anomalous: image_score is above the
    calibrated `threshold`, so that the mask breaks the rule (before `cleaning`, which may still empty it). regions: of
    the mask, worst first. label: the class of part that the image shows, if the model tells; with a calibration by
    class, p_value and threshold are those of this class.
    """

    score_map: FloatArray
    image_score: float
    p_value: float
    is_anomalous: bool
    mask: Mask
    regions: list[Region]
    threshold: float
    label: str | None = None


class ScoredImage(NamedTuple):
    """What a scorer says of one image.

    score_map: (H, W) float32 at the image's own size. expected: what a defect-free image would have shown, (h, w, C)
    float32 at the size that is scored; None if not asked for, or if the model does not say it in pixels. label: the
    class of part that it shows; None if the scorer tells none.
    """

    score_map: FloatArray
    expected: FloatArray | None
    label: str | None


@dataclass(frozen=True, kw_only=True)
class Detector(ABC):
    """From images to score maps, which is a subclass's part, and from score maps to decisions.

    `fingerprint` names everything that shapes the scores; a calibration made for another one is refused.
    `about` says how the detector was made (config, version, seed, data fingerprint).

    Raises:
        CalibrationError: the calibration belongs to another detector.
    """

    cleaning: Cleaning
    fingerprint: str
    calibration: Calibration | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.calibration is not None and self.calibration.fingerprint != self.fingerprint:
            raise CalibrationError(
                f"The calibration was made for another detector (fingerprint {self.calibration.fingerprint[:12]}, "
                f"this one has {self.fingerprint[:12]}): run `blemish calibrate` again."
            )

    def calibrated(self, calibration: Calibration) -> Detector:
        return replace(self, calibration=calibration)

    @property
    def classes(self) -> Sequence[str]:
        """The classes of parts that it tells apart; none, for most."""
        return ()

    @property
    def card(self) -> Calibration:
        """The calibration. Raises NotCalibrated if there is none."""
        if self.calibration is None:
            raise NotCalibrated("The detector has no calibration: run `blemish calibrate run=RUN data.root=NORMALS`.")
        return self.calibration

    def score_map(self, image: Pixels) -> FloatArray:
        """(H, W), (H, W, 1) or (H, W, 3) pixels -> (H, W) float32 at the image's own size.

        Raises:
            ImageError: wrong shape, dtype or values.
        """
        return next(self.score_maps([image]))

    def score_maps(self, images: Iterable[Pixels]) -> Iterator[FloatArray]:
        """Score maps of many images, in order; batches may round otherwise than `score_map` in the last bits."""
        for batch in self.score_batches(images):
            yield from (scored.score_map for scored in batch)

    def explain(self, image: Pixels) -> tuple[FloatArray, FloatArray | None]:
        """The score map of one image, and what a defect-free one would have shown (see `score_batches`)."""
        scored = next(self.score_batches([image], explain=True))[0]
        return scored.score_map, scored.expected

    @abstractmethod
    def score_batches(self, images: Iterable[Pixels], explain: bool = False) -> Iterator[list[ScoredImage]]:
        """Score many images, in order, in the batches that were scored at once.

        With `explain`, each map comes with what was expected, if the model says it.
        """

    @abstractmethod
    def check_size(self, image: Pixels) -> None:
        """Raise ImageError if maps are normalised pixel by pixel and the image has not the size for it."""

    def decide(self, score_map: FloatArray, label: str | None = None) -> Prediction:
        """Turn a score map, of an image of the class `label`, into a decision.

        Raises:
            NotCalibrated: there is no calibration yet. CalibrationError: the map has NaN or infinite values, or the
                calibration is by class and knows no such class.
        """
        card = self.card.of(label)
        if not np.isfinite(score_map).all():
            raise CalibrationError("The score map has NaN or infinite values: no decision is possible.")
        score = card.mask_rule.score(score_map)
        mask, regions = mask_by_card(card, self.cleaning, score_map)
        return Prediction(
            score_map=score_map,
            image_score=score,
            p_value=card.p_value(score),
            is_anomalous=score > card.threshold,
            mask=mask,
            regions=regions,
            threshold=card.threshold,
            label=label,
        )

    def __call__(self, image: Pixels | str | Path) -> Prediction:
        """Predict one image: pixels (see `score_map`) or the path of a file.

        Raises:
            NotCalibrated, ImageError.
        """
        pixels = read_pixels(image) if isinstance(image, (str, Path)) else image
        scored = next(self.score_batches([pixels]))[0]
        return self.decide(scored.score_map, scored.label)


@dataclass(frozen=True)
class TileDetector(Detector):
    """A tile scorer with all that turns its tiles into score maps."""

    scorer: TileScorer
    preprocess: Preprocess
    tiling: Tiling
    smoothing: Smoothing
    normalisation: SpatialNormalisation | MapRecorder | None = None

    @property
    def classes(self) -> Sequence[str]:
        """As `Detector`; of a scorer that tells any. An image is then one tile."""
        classes: Sequence[str] = getattr(self.scorer, "classes", ())
        return classes

    def score_batches(self, images: Iterable[Pixels], explain: bool = False) -> Iterator[list[ScoredImage]]:
        """As `Detector`. Neighbours of equal size share batches of up to `tiling.batch` tiles and PIXELS_AT_ONCE."""

        def prepared(image: Pixels) -> _Prepared:
            pixels = check_pixels(image)
            return self.preprocess(pixels), (pixels.shape[0], pixels.shape[1])

        def full(waiting: Sequence[_Prepared], image: _Prepared) -> bool:
            first, scored = waiting[0][0], image[0]
            return (
                scored.shape != first.shape
                or scored.dtype != first.dtype
                or len(waiting) * self.tiling.count(*scored.shape[:2]) >= self.tiling.batch
                or sum(height * width for _, (height, width) in (*waiting, image)) > PIXELS_AT_ONCE
            )

        for waiting in grouped(map(prepared, images), full):
            yield self._score(waiting, explain)

    def _score(self, waiting: Sequence[_Prepared], explain: bool) -> list[ScoredImage]:
        images = waiting[0][0][None] if len(waiting) == 1 else np.stack([pixels for pixels, _ in waiting])
        labels: list[str | None] = []

        def classify(tiles: FloatArray) -> FloatArray:
            explained: FloatArray
            explained, found = self.scorer.classify(tiles)  # type: ignore[attr-defined]
            labels.extend(found)
            return explained

        explainer = classify if self.classes else getattr(self.scorer, "explain", None) if explain else None
        if explainer:  # the score, and after it the channels of what was expected, if there are any
            blended = blend_tiles(explainer, images, self.tiling)
            scored, expected = np.ascontiguousarray(blended[..., 0]), blended[..., 1:]
        else:
            scored, expected = apply_tiled(self.scorer, images, self.tiling), np.empty((len(images), 0), np.float32)
        results: list[ScoredImage] = []
        labels = labels or [None] * len(waiting)
        for score_map, picture, label, (_, (height, width)) in zip(scored, expected, labels, waiting, strict=True):
            smooth = self.smoothing(score_map)
            if self.normalisation:
                smooth = self.normalisation(smooth)
            if smooth.shape != (height, width):
                enlarged = cv2.resize(smooth, (width, height), interpolation=cv2.INTER_LINEAR)
                smooth = np.asarray(enlarged, np.float32)
            results.append(ScoredImage(smooth, picture if explain and picture.size else None, label))
        return results

    def check_size(self, image: Pixels) -> None:
        """As `Detector`."""
        if self.normalisation:
            self.normalisation.check(self.preprocess.scored_size(*check_pixels(image).shape[:2]))


def mask_by_card(card: Calibration, cleaning: Cleaning, score_map: FloatArray) -> tuple[Mask, list[Region]]:
    """The pixels of (H, W) above a card's threshold, cleaned as its mask rule allows, and their regions' p-values."""

    def p_value(part: FloatArray, inside: Mask) -> float:
        return card.p_value(card.mask_rule.score_of_region(part, inside, score_map.size))

    cleaning = Cleaning(max(cleaning.min_area, card.mask_rule.smallest_region))
    return cleaning(score_map > card.threshold, score_map, p_value)

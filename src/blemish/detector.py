"""The one code path from an image to a score map and a decision: calibration, evaluation and prediction use it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from blemish.calibration import Calibration
from blemish.data.images import FloatArray, Pixels, check_pixels, read_pixels
from blemish.errors import CalibrationError, NotCalibrated
from blemish.postprocess import Cleaning, Mask, Region, Smoothing
from blemish.preprocess import Preprocess
from blemish.tiling import TileScorer, Tiling, apply_tiled


@dataclass(frozen=True)
class Prediction:
    """What a detector says of one image.

    score_map: (H, W) float32 at the image's own size, >= 0, higher is worse. mask: (H, W) bool.
    image_score: the map's maximum. p_value: the chance of so high a score on a normal image, in (0, 1].
    is_anomalous: image_score above the calibrated threshold. regions: of the mask, worst first.
    """

    score_map: FloatArray
    image_score: float
    p_value: float
    is_anomalous: bool
    mask: Mask
    regions: list[Region]


def image_score(score_map: FloatArray) -> float:
    """One number for a map: its maximum, so that an image is anomalous if and only if a pixel is."""
    return float(score_map.max())


@dataclass(frozen=True)
class Detector:
    """A tile scorer with all that turns its tiles into decisions.

    `fingerprint` names everything that shapes the scores; a calibration made for another one is refused.
    `about` says how the detector was made (config, version, seed, data fingerprint).

    Raises:
        CalibrationError: the calibration belongs to another detector.
    """

    scorer: TileScorer
    preprocess: Preprocess
    tiling: Tiling
    smoothing: Smoothing
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
            yield from batch

    def score_batches(self, images: Iterable[Pixels]) -> Iterator[list[FloatArray]]:
        """Score maps of many images, in order, in the batches that were scored at once.

        Neighbours of equal size share batches of up to `tiling.batch` tiles.
        """
        waiting: list[tuple[Pixels, tuple[int, int]]] = []
        for image in images:
            pixels = check_pixels(image)
            scored = self.preprocess(pixels)
            if waiting and (
                scored.shape != waiting[0][0].shape
                or scored.dtype != waiting[0][0].dtype
                or len(waiting) * self.tiling.count(*scored.shape[:2]) >= self.tiling.batch
            ):
                yield self._score(waiting)
                waiting = []
            waiting.append((scored, (pixels.shape[0], pixels.shape[1])))
        if waiting:
            yield self._score(waiting)

    def _score(self, waiting: list[tuple[Pixels, tuple[int, int]]]) -> list[FloatArray]:
        images = waiting[0][0][None] if len(waiting) == 1 else np.stack([pixels for pixels, _ in waiting])
        maps = []
        scored = apply_tiled(self.scorer, images, self.tiling)
        for score_map, (_, (height, width)) in zip(scored, waiting, strict=True):
            smooth = self.smoothing(score_map)
            if smooth.shape != (height, width):
                enlarged = cv2.resize(smooth, (width, height), interpolation=cv2.INTER_LINEAR)
                smooth = np.asarray(enlarged, np.float32)
            maps.append(smooth)
        return maps

    def decide(self, score_map: FloatArray) -> Prediction:
        """Turn a score map into a decision.

        Raises:
            NotCalibrated: there is no calibration yet. CalibrationError: the map has NaN or infinite values.
        """
        card = self.card
        score = image_score(score_map)
        if not np.isfinite(score_map).all():
            raise CalibrationError("The score map has NaN or infinite values: no decision is possible.")
        mask, regions = self.cleaning(score_map > card.mask.value, score_map)
        return Prediction(
            score_map=score_map,
            image_score=score,
            p_value=card.image.p_value(score),
            is_anomalous=score > card.image.value,
            mask=mask,
            regions=regions,
        )

    def __call__(self, image: Pixels | str | Path) -> Prediction:
        """Predict one image: pixels (see `score_map`) or the path of a file.

        Raises:
            NotCalibrated, ImageError.
        """
        pixels = read_pixels(image) if isinstance(image, (str, Path)) else image
        return self.decide(self.score_map(pixels))

"""From predictions and truth to figures: over all thresholds, and at the calibrated one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from blemish.data.records import NORMAL
from blemish.detector import Prediction
from blemish.evaluation.curves import PixelCurves, RankCurve
from blemish.postprocess import Mask


@dataclass
class Confusion:
    """Counts of a binary decision."""

    hits: int = 0
    false_alarms: int = 0
    misses: int = 0
    passes: int = 0

    def __add__(self, other: Confusion) -> Confusion:
        return Confusion(
            self.hits + other.hits,
            self.false_alarms + other.false_alarms,
            self.misses + other.misses,
            self.passes + other.passes,
        )

    def precision(self) -> float | None:
        return _ratio(self.hits, self.hits + self.false_alarms)

    def recall(self) -> float | None:
        return _ratio(self.hits, self.hits + self.misses)

    def f1(self) -> float | None:
        """Also known as the Dice coefficient."""
        return _ratio(2 * self.hits, 2 * self.hits + self.false_alarms + self.misses)

    def iou(self) -> float | None:
        """Intersection over union, the Jaccard index."""
        return _ratio(self.hits, self.hits + self.false_alarms + self.misses)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def clopper_pearson(events: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Exact confidence interval of a binomial proportion (Clopper and Pearson, Biometrika 1934)."""
    interval = stats.binomtest(events, trials).proportion_ci(level, method="exact")
    return float(interval.low), float(interval.high)


@dataclass
class _Kind:
    scores: list[float] = field(default_factory=list)
    flagged: int = 0
    pixels: PixelCurves = field(default_factory=PixelCurves)
    masks: int = 0
    empty_masks: int = 0
    pixel_decisions: Confusion = field(default_factory=Confusion)


class Evaluation:
    """Collects predictions one by one; memory grows with the number of images only by their scores."""

    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {}

    def add(self, kind: str, prediction: Prediction, truth: Mask | None) -> None:
        """`kind` is "good" or a defect's name; `truth` (H, W) bool, or None where the defect has no mask."""
        entry = self._kinds.setdefault(kind, _Kind())
        entry.scores.append(prediction.image_score)
        entry.flagged += prediction.is_anomalous
        if kind == NORMAL:
            truth = np.zeros(prediction.mask.shape, dtype=bool)
        if truth is None:
            return
        entry.masks += 1
        entry.empty_masks += kind != NORMAL and not truth.any()
        entry.pixels.add(prediction.score_map, truth)
        found = prediction.mask
        both = int(np.count_nonzero(found & truth))
        flagged, defective = int(np.count_nonzero(found)), int(np.count_nonzero(truth))
        entry.pixel_decisions += Confusion(
            both, flagged - both, defective - both, truth.size - flagged - defective + both
        )

    def result(self) -> dict[str, Any]:
        """Figures overall and per defect kind; a figure that is not defined is None (null in JSON)."""
        defects = sorted(kind for kind in self._kinds if kind != NORMAL)
        normals = self._kinds.get(NORMAL, _Kind())
        figures: dict[str, Any] = {
            "overall": self._figures(defects),
            "kinds": {kind: self._figures([kind]) for kind in defects},
        }
        figures["normals"] = {
            "images": len(normals.scores),
            "false_alarms": normals.flagged,
            "false_alarm_rate": _ratio(normals.flagged, len(normals.scores)),
            "false_alarm_rate_interval_95": (
                list(clopper_pearson(normals.flagged, len(normals.scores))) if normals.scores else None
            ),
        }
        return figures

    def curves(self) -> dict[str, Any]:
        """ROC and PRO curves overall and per defect kind, thinned for drawing; one that is undefined is None."""
        defects = sorted(kind for kind in self._kinds if kind != NORMAL)
        return {"overall": self._curves(defects), "kinds": {kind: self._curves([kind]) for kind in defects}}

    def _curves(self, kinds: list[str]) -> dict[str, Any]:
        images, pixels, _ = self._joined(kinds)
        return {"image_roc": images.roc(), "pixel_roc": pixels.curve().roc(), "pro": pixels.pro()}

    def _joined(self, kinds: list[str]) -> tuple[RankCurve, PixelCurves, Confusion]:
        """Images, pixels and pixel decisions of some defect kinds against the normal images."""
        normals = self._kinds.get(NORMAL, _Kind())
        chosen = [self._kinds[kind] for kind in kinds]
        scores = [score for entry in chosen for score in entry.scores]
        images = RankCurve.from_scores(normals.scores + scores, [False] * len(normals.scores) + [True] * len(scores))
        pixels, decisions = PixelCurves(), Confusion()
        for entry in [*chosen, normals] if any(entry.masks for entry in chosen) else []:
            pixels.merge(entry.pixels)
            decisions = decisions + entry.pixel_decisions
        return images, pixels, decisions

    def _figures(self, kinds: list[str]) -> dict[str, Any]:
        normals = self._kinds.get(NORMAL, _Kind())
        chosen = [self._kinds[kind] for kind in kinds]
        images, pixels, pixel_decisions = self._joined(kinds)
        scores = [score for entry in chosen for score in entry.scores]
        flagged = sum(entry.flagged for entry in chosen)
        decisions = Confusion(flagged, normals.flagged, len(scores) - flagged, len(normals.scores) - normals.flagged)
        masks = sum(entry.masks for entry in chosen)
        curve = pixels.curve()
        return {
            "images": len(scores),
            "masks": masks,
            "empty_masks": sum(entry.empty_masks for entry in chosen),
            "image_auroc": images.auroc(),
            "image_ap": images.average_precision(),
            "image_best_f1_over_thresholds": images.best_f1(),
            "pixel_auroc": curve.auroc(),
            "pixel_ap": curve.average_precision(),
            "aupro_0.3": pixels.aupro(0.3),
            "aupro_0.05": pixels.aupro(0.05),
            "calibrated": {
                "image_precision": decisions.precision() if scores else None,
                "image_recall": decisions.recall(),
                "image_f1": decisions.f1() if scores else None,
                "pixel_precision": pixel_decisions.precision(),
                "pixel_recall": pixel_decisions.recall(),
                "pixel_dice": pixel_decisions.f1() if curve.is_defined else None,
                "pixel_iou": pixel_decisions.iou() if curve.is_defined else None,
            },
        }

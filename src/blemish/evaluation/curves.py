"""Curves over all thresholds, from counts per score: exact for images, finely binned for pixels."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from blemish.data.images import FloatArray
from blemish.postprocess import Mask

Counts = npt.NDArray[np.float64]

# A non-negative float32, read as an integer, keeps its order. Dropping its 9 lowest bits leaves bins 2^-14 of
# the score wide: ranks inside a bin tie, all others are exact, and nothing is squashed.
_DROPPED_BITS = 9
# Smaller scores tie: without a floor, a single 0 would stretch the bins over all floats.
_FLOOR = np.float32(2.0**-40)


@dataclass(frozen=True)
class RankCurve:
    """Positives and negatives at each distinct score, from the highest score to the lowest."""

    positives: Counts
    negatives: Counts

    @classmethod
    def from_scores(cls, scores: npt.ArrayLike, is_positive: npt.ArrayLike) -> RankCurve:
        """Exact counts, ties included."""
        values, place = np.unique(np.asarray(scores, dtype=np.float64), return_inverse=True)
        label = np.asarray(is_positive, dtype=bool)
        positives, negatives = (np.bincount(place[chosen], minlength=len(values)) for chosen in (label, ~label))
        return cls(positives[::-1].astype(np.float64), negatives[::-1].astype(np.float64))

    @property
    def is_defined(self) -> bool:
        """Whether there are both positives and negatives."""
        return bool(self.positives.sum() > 0 and self.negatives.sum() > 0)

    def auroc(self) -> float | None:
        """Area under the ROC curve, ties counting half (the Mann-Whitney statistic); None if undefined."""
        if not self.is_defined:
            return None
        above = np.cumsum(self.positives) - self.positives / 2
        return float((self.negatives * above).sum() / (self.positives.sum() * self.negatives.sum()))

    def roc(self) -> dict[str, list[float]] | None:
        """Points of the ROC curve from (0, 0) to (1, 1); None if undefined."""
        if not self.is_defined:
            return None
        false_positive_rate, true_positive_rate = thin(_cumulative(self.negatives), _cumulative(self.positives))
        return {"false_positive_rate": false_positive_rate, "true_positive_rate": true_positive_rate}

    def average_precision(self) -> float | None:
        """Sum of precision over the steps of recall; None if undefined."""
        if not self.is_defined:
            return None
        hits, alarms = np.cumsum(self.positives), np.cumsum(self.negatives)
        return float((self.positives * (hits / np.maximum(hits + alarms, 1))).sum() / hits[-1])

    def best_f1(self) -> float | None:
        """The largest F1 over all thresholds: an upper bound that needs labels; None if undefined."""
        if not self.is_defined:
            return None
        hits, alarms = np.cumsum(self.positives), np.cumsum(self.negatives)
        return float((2 * hits / (hits + alarms + hits[-1])).max())


def thin(x: Counts, y: Counts, most: int = 300) -> tuple[list[float], list[float]]:
    """At most about `most` points of a curve, evenly spread along its length, first and last included."""
    along = np.cumsum(np.abs(np.diff(x, prepend=x[0])) + np.abs(np.diff(y, prepend=y[0])))
    moved = np.diff(along, prepend=-1) > 0  # empty bins are no points of their own
    x, y, along = x[moved], y[moved], along[moved]
    if len(x) <= most:
        return x.tolist(), y.tolist()
    places = np.unique(np.searchsorted(along, np.linspace(0, along[-1], most)).clip(max=len(x) - 1))
    kept = np.unique(np.concatenate([[0], places, [len(x) - 1]]))
    return x[kept].tolist(), y[kept].tolist()


def _cumulative(counts: Counts) -> Counts:
    """The share reached after each count, from 0 to 1."""
    return np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])


class _Histogram:
    """Weights per integer level, over a range that grows as needed."""

    def __init__(self) -> None:
        self._first, self._weights = 0, np.zeros(0)

    def add(self, levels: npt.NDArray[np.int64], weights: npt.NDArray[np.float64] | None = None) -> None:
        if levels.size:
            first = int(levels.min())
            self._merge(first, np.bincount(levels - first, weights).astype(np.float64))

    def _merge(self, first: int, weights: npt.NDArray[np.float64]) -> None:
        start = min(first, self._first) if self._weights.size else first
        end = max(first + weights.size, self._first + self._weights.size if self._weights.size else 0)
        merged = self.over(start, end)
        merged[first - start : first - start + weights.size] += weights
        self._first, self._weights = start, merged

    def merge(self, other: _Histogram) -> None:
        if other._weights.size:
            self._merge(other._first, other._weights)

    @property
    def range(self) -> tuple[int, int]:
        return self._first, self._first + self._weights.size

    def over(self, start: int, end: int) -> npt.NDArray[np.float64]:
        """The weights of the levels start to end - 1."""
        result = np.zeros(end - start)
        if self._weights.size:
            result[self._first - start : self._first - start + self._weights.size] = self._weights
        return result


class PixelCurves:
    """Pixel-level curves over any number of images, in memory that does not grow with them."""

    def __init__(self) -> None:
        self._positives, self._negatives, self._regions = _Histogram(), _Histogram(), _Histogram()
        self._region_count = 0

    def add(self, score_map: FloatArray, truth: Mask) -> None:
        """(H, W) scores >= 0 and the (H, W) mask of true defects."""
        levels = (np.maximum(score_map, _FLOOR).view(np.uint32) >> _DROPPED_BITS).astype(np.int64)
        self._negatives.add(levels[~truth])
        if truth.any():
            self._positives.add(levels[truth])
            count, labels = cv2.connectedComponents(truth.view(np.uint8), connectivity=8)
            inside = labels[truth]
            self._regions.add(levels[truth], 1.0 / np.bincount(inside, minlength=count)[inside])
            self._region_count += count - 1

    def merge(self, other: PixelCurves) -> None:
        self._positives.merge(other._positives)
        self._negatives.merge(other._negatives)
        self._regions.merge(other._regions)
        self._region_count += other._region_count

    def _span(self) -> tuple[int, int]:
        ranges = [h.range for h in (self._positives, self._negatives) if h.range[1] > h.range[0]]
        return min((low for low, _ in ranges), default=0), max((high for _, high in ranges), default=0)

    def curve(self) -> RankCurve:
        start, end = self._span()
        return RankCurve(self._positives.over(start, end)[::-1], self._negatives.over(start, end)[::-1])

    def pro(self) -> dict[str, list[float]] | None:
        """Points of the per-region overlap curve over the false-positive rate; None if undefined (see `aupro`)."""
        curve = self._pro()
        if curve is None:
            return None
        rate, overlap = thin(*curve)
        return {"false_positive_rate": rate, "overlap": overlap}

    def _pro(self) -> tuple[Counts, Counts] | None:
        start, end = self._span()
        negatives = self._negatives.over(start, end)[::-1]
        if not self._region_count or not negatives.sum():
            return None
        overlap = np.concatenate([[0.0], np.cumsum(self._regions.over(start, end)[::-1]) / self._region_count])
        return _cumulative(negatives), overlap

    def aupro(self, limit: float) -> float | None:
        """Area under the per-region overlap curve up to the false-positive rate `limit`, divided by `limit`.

        Source: Bergmann et al., MVTec AD, IJCV 2021. Regions are connected over 8 neighbours; every defect-free
        pixel counts. None if there is no region or no defect-free pixel.
        """
        curve = self._pro()
        if curve is None:
            return None
        rate, overlap = curve
        kept = rate <= limit
        rates, overlaps = rate[kept], overlap[kept]
        if rates[-1] < limit:
            # Straight on to the first point beyond the limit.
            beyond = int(kept.sum())
            share = (limit - rates[-1]) / (rate[beyond] - rates[-1])
            rates = np.append(rates, limit)
            overlaps = np.append(overlaps, overlaps[-1] + share * (overlap[beyond] - overlaps[-1]))
        return float(((overlaps[1:] + overlaps[:-1]) / 2 * np.diff(rates)).sum() / limit)

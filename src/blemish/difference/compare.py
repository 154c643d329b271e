"""Two images compared: aligned, filtered, scored as a pair, and what counts as different marked."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import cv2
import numpy as np

from blemish.alignment import Aligned, Alignment
from blemish.alignment.motion import Motion
from blemish.alignment.verdict import Verdict
from blemish.calibration import Calibration
from blemish.data.images import FloatArray, Pixels, check_pixels, to_unit
from blemish.detector import mask_by_card
from blemish.difference.filters import Filters
from blemish.difference.map_filters import MapFilters
from blemish.difference.thresholds import MapThreshold
from blemish.errors import ImageError
from blemish.postprocess import Cleaning, Mask, Region
from blemish.preprocess import Preprocess
from blemish.tiling import TileScorer, Tiling, apply_tiled

_LEAST_TILE = 64  # pixels; what the networks and the coarse scales of residuals need
_LAG = 6  # pixels, from which on noise smoothed by low_pass is independent
_STRUCTURE = 1.5  # times larger than the noise
STEPS = ("align", "filter", "score", "decide")


@dataclass(frozen=True, eq=False)
class Difference:
    """Where a query differs from its reference; all maps are on the query's grid.

    observed, expected: (H, W, C) in [0, 1], the query and the aligned reference as they were compared. valid: (H, W),
    False where the reference has nothing to compare with. score_map: (H, W) >= 0, 0 where not valid. mask: (H, W),
    its pixels above `threshold`, regions below the smallest area left out; `regions`, largest score first.
    image_score: the map's, by the card's mask rule; its largest value without a card. p_value: None without a card.
    is_different: with a card, by the image's score; without one, whether the mask shows anything.
    motion, verdict: see `Aligned`. seconds: that each of `STEPS` took.
    """

    observed: FloatArray
    expected: FloatArray
    valid: Mask
    score_map: FloatArray
    threshold: float
    mask: Mask
    regions: list[Region]
    image_score: float
    p_value: float | None
    is_different: bool
    motion: Motion
    verdict: Verdict
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Of the pixels that can be compared, those in the mask."""
        return int(np.count_nonzero(self.mask)) / max(1, int(np.count_nonzero(self.valid)))


@dataclass(frozen=True)
class Comparison:
    """How a query is compared with a reference: everything but the two images.

    Args:
        channels: 1 compares grey values, 3 colours; None takes colours where both images have them.
        scorer: makes score tiles of pairs; see `ReferencePair`.
        tolerance: of the scorer's `ReferencePair`: the pixels that an edge may be off.
        tiling: its size is an upper bound: smaller images are one tile.
        threshold: what counts as different; not asked where there is a card.
        card: learned from normal pairs, see `blemish.difference.run.learn`.
    """

    scorer: TileScorer
    tolerance: int = 0
    channels: int | None = None
    alignment: Alignment = field(default_factory=Alignment)
    filters: Filters = field(default_factory=Filters)
    tiling: Tiling = field(default_factory=lambda: Tiling(size=1024, batch=1))
    map_filters: MapFilters = field(default_factory=MapFilters)
    threshold: MapThreshold = field(default_factory=MapThreshold)
    cleaning: Cleaning = field(default_factory=Cleaning)
    card: Calibration | None = None

    def __call__(self, reference: Pixels, query: Pixels) -> Difference:
        """(h, w, C) and (H, W, C), any kinds of pixels -> where they differ.

        Raises:
            ImageError: no images, or of different size and nothing says how one lies on the other, or the residual has
                no finite value somewhere.
        """
        times = [time.perf_counter()]
        aligned = self.align(reference, query)
        valid = _whole_windows(aligned.valid, self.tolerance)
        if not valid.any():
            raise ImageError("Reference and query do not overlap: check that they show the same thing.")
        times.append(time.perf_counter())
        expected = np.where(aligned.valid[..., None], aligned.reference, aligned.query)  # no edge to filter there
        expected, observed = self.filters(expected), self.filters(aligned.query)
        times.append(time.perf_counter())
        pair = np.concatenate([observed, expected, valid[..., None]], axis=2, dtype=np.float32)
        side = min(self.tiling.size, max(_LEAST_TILE, min(pair.shape[:2])))
        score_map = apply_tiled(self.scorer, pair[None], replace(self.tiling, size=side))[0]
        score_map = self.map_filters(score_map, valid)
        if not np.isfinite(score_map).all():
            raise ImageError("The difference map has NaN or infinite values: choose another residual or strategy.")
        times.append(time.perf_counter())
        found = self._decide(score_map, valid, aligned, observed, expected)
        times.append(time.perf_counter())
        return replace(found, seconds=dict(zip(STEPS, np.diff(times).tolist(), strict=True)))

    def align(self, reference: Pixels, query: Pixels) -> Aligned:
        """Both as [0, 1] and with equal channels, the reference on the query's grid. Raises ImageError."""
        images = [check_pixels(image) for image in (reference, query)]
        # A grey picture saved in colour is grey: quicker, and its noise is that of one channel.
        channels = self.channels or (1 if any(_is_grey(image) for image in images) else 3)
        reference, query = (to_unit(Preprocess(channels)(image)) for image in images)
        aligned = self.alignment(reference, query)
        if reference.shape != query.shape and aligned.motion.kind == "identity":
            sizes = [f"{image.shape[1]} x {image.shape[0]}" for image in (reference, query)]
            raise ImageError(
                f"The reference is of {sizes[0]} pixels, the query of {sizes[1]}, and no motion was found that lays "
                "one on the other: resize one of them, or set alignment.motion=homography and alignment.start=features."
            )
        return aligned

    def _decide(
        self, score_map: FloatArray, valid: Mask, aligned: Aligned, observed: FloatArray, expected: FloatArray
    ) -> Difference:
        card = self.card
        if card:
            score, threshold = card.mask_rule.score(score_map), card.threshold
            mask, regions = mask_by_card(card, self.cleaning, score_map)
        else:
            score = float(score_map.max())
            differences, contrast = _noise(observed - expected, valid), _contrast(expected, valid)
            raw, threshold = self.threshold(score_map, valid, observed.shape[2], differences, contrast)
            mask, regions = self.cleaning(raw, score_map)
        return Difference(
            observed=observed,
            expected=expected,
            valid=valid,
            score_map=score_map,
            threshold=threshold,
            mask=mask,
            regions=regions,
            image_score=score,
            p_value=card.p_value(score) if card else None,
            is_different=score > threshold if card else bool(mask.any()),
            motion=aligned.motion,
            verdict=aligned.verdict,
        )


def _noise(difference: FloatArray, valid: Mask) -> FloatArray:
    """Differences (N,) of pixels that tell the noise, the channels' mean; `difference` (H, W, C) is signed.

    Where images of structure lie askew, most pixels differ, which no noise explains: neighbours differ alike then.
    """
    values: FloatArray = np.abs(difference).mean(axis=2)[valid]
    apart = [
        (np.abs(one - other).mean(axis=2) * np.float32(0.5**0.5))[both]
        for one, other, both in (
            (difference[_LAG:], difference[:-_LAG], valid[_LAG:] & valid[:-_LAG]),
            (difference[:, _LAG:], difference[:, :-_LAG], valid[:, _LAG:] & valid[:, :-_LAG]),
        )
    ]
    lagged = np.concatenate(apart)
    is_structure = lagged.size and np.median(values) > _STRUCTURE * np.median(lagged)
    return lagged if is_structure else values


def _whole_windows(valid: Mask, radius: int) -> Mask:
    """Where the reference shows all of the square of `radius` pixels in which an edge may lie."""
    side = 2 * radius + 1
    # Beyond the image's border neither shows anything.
    return cv2.erode(valid.view(np.uint8), np.ones((side, side), np.uint8)).view(np.bool_)


def _contrast(image: FloatArray, valid: Mask) -> float:
    """From dark to bright in (H, W, C), a thousandth of the pixels left out at either end: patterns may be sparse."""
    low, high = np.percentile(image.mean(axis=2)[valid], (0.1, 99.9))
    return float(high - low)


def _is_grey(image: Pixels) -> bool:
    return image.shape[2] == 1 or bool((image == image[..., :1]).all())

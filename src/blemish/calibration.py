"""Conformal calibration: from the scores of held-out normal images to thresholds, p-values and a promise.

The exchangeable unit is the independent image, or the group (part, lot, roll) that images share; never a pixel
or a tile. Sources: Vovk et al., Algorithmic Learning in a Random World, 2005 (marginal rule, p-values);
Bates et al., Testing for outliers with conformal p-values, arXiv 2104.08279 (calibration-conditional rule).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from blemish.errors import CalibrationError, ConfigError

RULES = ("marginal", "pac")
MASK_RULES = ("any_pixel",)
_EXACT = ("units", "rank", "image_threshold", "mask_threshold")


@dataclass(frozen=True)
class Promise:
    """What is promised about the false-alarm rate on new images exchangeable with the calibration images.

    Args:
        alpha: the false-alarm rate, in (0, 1).
        rule: "marginal" promises that the rate is at most alpha on average over calibration sets; "pac" that it
            is at most alpha with probability 1 - delta over the calibration set at hand.
        delta: the probability that "pac" may fail, in (0, 1).

    Raises:
        ConfigError: a value is out of range.
    """

    alpha: float = 0.05
    rule: str = "marginal"
    delta: float = 0.05

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("delta", self.delta)):
            if not (isinstance(value, (int, float)) and 0 < value < 1):
                raise ConfigError(f"Expected calibration.{name} between 0 and 1, found {value}.")
        if self.rule not in RULES:
            raise ConfigError(f"Expected calibration.rule to be one of {', '.join(RULES)}, found '{self.rule}'.")

    @property
    def _exact_alpha(self) -> Fraction:
        """The decimal number that was written: 0.01 is 1/100, so that ranks do not depend on rounding."""
        return Fraction(repr(float(self.alpha)))

    @property
    def needed(self) -> int:
        """The smallest number of calibration units with which the promise can be kept."""
        if self.rule == "marginal":
            return math.ceil(1 / self._exact_alpha - 1)
        # The quotient may come out a hair above a whole number that is exact.
        return max(1, math.ceil(math.log(self.delta) / math.log1p(-self.alpha) * (1 - 1e-12)))

    def smallest_alpha(self, n: int) -> float:
        """The smallest false-alarm rate that n calibration units can promise under this rule (1 if n is 0)."""
        if n == 0:
            return 1.0
        alpha = 1 / (n + 1) if self.rule == "marginal" else -math.expm1(math.log(self.delta) / n)
        while replace(self, alpha=alpha).needed > n:  # rounded down, by a hair
            alpha = math.nextafter(alpha, 1)
        return alpha

    def rank(self, n: int) -> int:
        """The rank k (1 to n, from below) of the calibration score that serves as the threshold.

        Raises:
            CalibrationError: n is too small; says how many are needed and what n can promise.
        """
        if n < self.needed:
            raise CalibrationError(f"{self.shortage(n)} Add normal images, or set calibration.alpha accordingly.")
        if self.rule == "marginal":
            return math.ceil((n + 1) * (1 - self._exact_alpha))
        ranks = np.arange(1, n + 1)
        kept = stats.beta.cdf(self.alpha, n + 1 - ranks, ranks) >= 1 - self.delta
        return int(ranks[kept][0]) if kept.any() else n

    def shortage(self, n: int) -> str:
        """One sentence on why n calibration units are too few, with the figures for both rules."""
        marginal, pac = (Promise(self.alpha, rule, self.delta) for rule in RULES)
        return (
            f"{n} calibration images are too few for alpha = {self.alpha:g} ({self.rule}): it needs {marginal.needed} "
            f"(marginal) or {pac.needed} (pac, delta = {self.delta:g}); {n} can promise alpha = "
            f"{round_up(marginal.smallest_alpha(n))} (marginal) or {round_up(pac.smallest_alpha(n))} (pac)."
        )

    def rate_interval(self, n: int, level: float = 0.95) -> tuple[float, float]:
        """Central interval of the true false-alarm rate, which follows Beta(n + 1 - k, k) for continuous scores."""
        k = self.rank(n)
        low, high = stats.beta.interval(level, n + 1 - k, k)
        return float(low), float(high)


def check_mask_rule(name: str) -> None:
    """Raise ConfigError for an unknown mask rule."""
    if name not in MASK_RULES:
        raise ConfigError(f"Expected calibration.mask_rule to be one of {', '.join(MASK_RULES)}, found '{name}'.")


def round_up(value: float) -> str:
    """A false-alarm rate to four decimals, never smaller than it is."""
    return f"{math.ceil(value * 1e4) / 1e4:g}"


@dataclass(frozen=True)
class Threshold:
    """A conformal threshold: the `rank`-th smallest of the calibration `scores` (ascending)."""

    scores: tuple[float, ...]
    rank: int

    @property
    def value(self) -> float:
        return self.scores[self.rank - 1]

    @cached_property
    def _sorted(self) -> npt.NDArray[np.float64]:
        return np.asarray(self.scores, dtype=np.float64)

    def p_value(self, score: float) -> float:
        """(1 + number of calibration scores >= score) / (n + 1), in [1 / (n + 1), 1].

        Raises:
            CalibrationError: the score is NaN.
        """
        if math.isnan(score):
            raise CalibrationError("A score is NaN: it has no p-value.")
        at_least = len(self.scores) - int(np.searchsorted(self._sorted, score, side="left"))
        return (1 + at_least) / (len(self.scores) + 1)


@dataclass(frozen=True)
class Calibration:
    """The calibration card: thresholds for images and masks, and what they promise.

    An image is anomalous if its score exceeds `image.value`, a pixel if its value exceeds `mask.value`. With the
    mask rule "any_pixel" the score of a map is its maximum, so that at most a share alpha of normal images has
    any pixel flagged.

    `fingerprint` names the model, preprocessing, tiling and smoothing that made the scores; `made` how and when.
    """

    promise: Promise
    image: Threshold
    mask: Threshold
    images: int
    fingerprint: str
    mask_rule: str = "any_pixel"
    made: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        scores: Sequence[float],
        units: Sequence[str],
        promise: Promise,
        fingerprint: str,
        mask_rule: str = "any_pixel",
        made: Mapping[str, Any] | None = None,
    ) -> Calibration:
        """Calibrate on the maxima of the score maps of normal images.

        A unit with several images counts once, with its largest score: the promise then holds for every image of
        a new unit of such a size.

        Raises:
            CalibrationError: too few units, or a score is not finite. ConfigError: unknown mask rule.
        """
        check_mask_rule(mask_rule)
        if not np.isfinite(np.asarray(scores, dtype=np.float64)).all():
            raise CalibrationError("A calibration score is NaN or infinite: the model diverged; train it again.")
        largest: dict[str, float] = {}
        for unit, score in zip(units, scores, strict=True):
            largest[unit] = max(float(score), largest.get(unit, -math.inf))
        threshold = Threshold(tuple(sorted(largest.values())), promise.rank(len(largest)))
        return cls(promise, threshold, threshold, len(scores), fingerprint, mask_rule, made or {})

    def with_promise(self, promise: Promise) -> Calibration:
        """The same calibration scores under another promise. Raises CalibrationError if they are too few."""
        image, mask = (Threshold(t.scores, promise.rank(len(t.scores))) for t in (self.image, self.mask))
        return Calibration(promise, image, mask, self.images, self.fingerprint, self.mask_rule, self.made)

    @property
    def n(self) -> int:
        """The number of exchangeable units."""
        return len(self.image.scores)

    def in_words(self) -> str:
        """The promise as a person would say it."""
        low, high = self.promise.rate_interval(self.n)
        promise = f"of 1000 normal images expect at most {1000 * self.promise.alpha:g} false alarms"
        if self.promise.rule == "pac":
            promise += f", with {100 * (1 - self.promise.delta):g} % confidence in this very calibration"
        else:
            promise += " on average over calibrations"
        return f"{promise}; with {self.n} calibration images the true rate lies in [{low:.2%}, {high:.2%}] (95 %)"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` gives the same object back, bit for bit."""
        low, high = self.promise.rate_interval(self.n)
        return {
            "promise": asdict(self.promise),
            "in_words": self.in_words(),
            "units": self.n,
            "images": self.images,
            "rank": self.image.rank,
            "rate_interval_95": [low, high],
            "image_threshold": self.image.value,
            "mask_threshold": self.mask.value,
            "mask_rule": self.mask_rule,
            "fingerprint": self.fingerprint,
            "made": dict(self.made),
            "image_scores": list(self.image.scores),
            "mask_scores": list(self.mask.scores),
        }

    @classmethod
    def from_dict(cls, card: Mapping[str, Any]) -> Calibration:
        """Read what `to_dict` wrote.

        Raises:
            CalibrationError: the card lacks a field, or contradicts itself.
        """
        try:
            promise = Promise(**card["promise"])
            image, mask = (
                Threshold(tuple(float(score) for score in card[key]), promise.rank(len(card[key])))
                for key in ("image_scores", "mask_scores")
            )
            calibration = cls(
                promise, image, mask, card["images"], card["fingerprint"], card["mask_rule"], card["made"]
            )
            ascending = all(np.isfinite(t.scores).all() and (np.diff(t.scores) >= 0).all() for t in (image, mask))
            # The interval and the sentence are derived, and may be rounded or worded otherwise elsewhere.
            exact = {key: value for key, value in calibration.to_dict().items() if key in _EXACT}
            consistent = (
                ascending
                and card["mask_rule"] in MASK_RULES
                and all(card[key] == value for key, value in exact.items())
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"The calibration card is incomplete or damaged ({type(error).__name__}: {error}): "
                "run `blemish calibrate` again."
            ) from error
        if not consistent:
            raise CalibrationError("The calibration card contradicts its own scores: run `blemish calibrate` again.")
        return calibration

"""Conformal calibration: from the scores of held-out normal images to thresholds, p-values and a promise.

The exchangeable unit is the independent image, or the group (part, lot, roll) that images share; never a pixel
or a tile. Sources: Vovk et al., Algorithmic Learning in a Random World, 2005 (marginal rule, p-values);
Bates et al., Testing for outliers with conformal p-values, arXiv 2104.08279 (calibration-conditional rule).
Calibration by class is Mondrian conformal prediction (Vovk et al., 2005, section 4.5): what class an image is of
depends on the image and the model alone, so that the images of a class are exchangeable with each other.
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
from blemish.mask_rules import MaskRule
from blemish.noise import Noise

RULES = ("marginal", "pac")
_SMALLEST = 1e-9  # of alpha and delta: no one has a thousand million calibration images
_EXACT = ("units", "rank", "threshold")
_OF_CLASS = ("units", "images", "rank", "rate_interval_95", "threshold", "scores")


@dataclass(frozen=True)
class Promise:
    """What is promised about the false-alarm rate on new images exchangeable with the calibration images.

    Args:
        alpha: the false-alarm rate, in (0, 1).
        rule: "marginal" promises that the rate is at most alpha on average over calibration sets; "pac" that it
            is at most alpha with probability 1 - delta over the calibration set at hand.
        delta: the probability that "pac" may fail, in (0, 1).
        by_class: it holds within each class of parts that the model tells apart, instead of over all.

    Raises:
        ConfigError: a value is out of range.
    """

    alpha: float = 0.05
    rule: str = "marginal"
    delta: float = 0.05
    by_class: bool = False

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("delta", self.delta)):
            if not (isinstance(value, (int, float)) and 0 < value < 1):
                raise ConfigError(f"Expected calibration.{name} between 0 and 1, found {value}.")
            if value < _SMALLEST:
                raise ConfigError(f"Expected calibration.{name} of {_SMALLEST:g} or more, found {value}.")
        if self.rule not in RULES:
            raise ConfigError(f"Expected calibration.rule to be one of {', '.join(RULES)}, found '{self.rule}'.")
        if not isinstance(self.by_class, bool):
            raise ConfigError(f"Expected calibration.by_class to be true or false, found {self.by_class}.")

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

    def rank(self, n: int, images: int | None = None) -> int:
        """The rank k (1 to n, from below) of the calibration score that serves as the threshold.

        Args:
            n: calibration units.
            images: in these units, for the message; None if each is one image.

        Raises:
            CalibrationError: n is too small; says how many are needed and what n can promise.
        """
        if n < self.needed:
            raise CalibrationError(
                f"{self.shortage(n, images)} Add normal images, or set calibration.alpha accordingly."
            )
        if self.rule == "marginal":
            return math.ceil((n + 1) * (1 - self._exact_alpha))
        ranks = np.arange(1, n + 1)
        kept = stats.beta.cdf(self.alpha, n + 1 - ranks, ranks) >= 1 - self.delta
        return int(ranks[kept][0]) if kept.any() else n

    @property
    def within_class(self) -> Promise:
        """What is promised for each class on its own."""
        return replace(self, by_class=False)

    def shortage(self, n: int, images: int | None = None) -> str:
        """One sentence on why n calibration units are too few, with the figures for both rules."""
        marginal, pac = (Promise(self.alpha, rule, self.delta) for rule in RULES)
        return (
            f"{count_units(n, images)} are too few for alpha = {self.alpha:g} ({self.rule}): it needs "
            f"{marginal.needed} (marginal) or {pac.needed} (pac, delta = {self.delta:g}); {n} can promise alpha = "
            f"{round_up(marginal.smallest_alpha(n))} (marginal) or {round_up(pac.smallest_alpha(n))} (pac)."
        )

    def rate_interval(self, n: int, level: float = 0.95) -> tuple[float, float]:
        """Central interval of the true false-alarm rate, which follows Beta(n + 1 - k, k) for continuous scores."""
        k = self.rank(n)
        low, high = stats.beta.interval(level, n + 1 - k, k)
        return float(low), float(high)

    def rate_limit(self, n: int, level: float = 0.95) -> float:
        """The true false-alarm rate is at most this with confidence `level` (over calibration sets)."""
        k = self.rank(n)
        return float(stats.beta.ppf(level, n + 1 - k, k))


def read_settings(section: Mapping[str, Any]) -> tuple[Promise, MaskRule]:
    """The section `calibration` of a config: alpha, rule, delta, by_class; mask_rule, tau, region_area.

    Raises:
        ConfigError: an unknown setting, a value out of range, or two that contradict each other.
    """
    rest = dict(section)
    for_promise = {key: rest.pop(key) for key in ("alpha", "rule", "delta", "by_class") if key in rest}
    names = {"mask_rule": "name", "tau": "tau", "region_area": "region_area"}
    for_mask = {name: rest.pop(key) for key, name in names.items() if key in rest}
    if rest:
        raise ConfigError(f"calibration has no setting '{next(iter(rest))}'.")
    promise, mask_rule = Promise(**for_promise), MaskRule(**for_mask)
    if promise.by_class and mask_rule.name == "parametric_noise":
        raise ConfigError(
            "calibration.by_class=true calibrates each class by its own scores, and mask_rule=parametric_noise assumes "
            "one threshold for all: choose one of them."
        )
    return promise, mask_rule


def check_classes(promise: Promise, counts: Mapping[str, int]) -> None:
    """Raise CalibrationError if a class has too few calibration units for the promise; `counts` has them by class."""
    short = {label: n for label, n in counts.items() if n < promise.needed}
    if not short:
        return
    label = min(short, key=lambda one: short[one])
    others = f" (so have {len(short) - 1} of the {len(counts) - 1} others)" if len(short) > 1 else ""
    alpha = promise.smallest_alpha(short[label])
    raise CalibrationError(
        f"{count_units(short[label])} of the class '{label}' are too few for alpha = {promise.alpha:g} "
        f"({promise.rule}) in each class: it needs {promise.needed}{others}; add normal images, train with fewer "
        f"templates or a larger split.calibration, set calibration.alpha"
        f"{f'={round_up(alpha)}' if alpha < 1 else ' higher'}, or calibration.by_class=false."
    )


def q_values(p_values: Sequence[float]) -> list[float]:
    """The smallest false discovery rate at which each image of a batch would be called anomalous.

    Calling anomalous what has q <= Q keeps the expected share of normal images among the called ones at Q or less.
    Source: Benjamini and Hochberg, JRSS B 1995; valid for conformal p-values by Bates et al., arXiv 2104.08279.
    """
    if not len(p_values):
        return []
    adjusted: list[float] = stats.false_discovery_control(p_values, method="bh").tolist()
    return adjusted


def count_units(n: int, images: int | None = None) -> str:
    """ "30 calibration images", or, where several images are one unit, how many of each."""
    if images is None or images == n:
        return f"{n} calibration images"
    return f"{n} independent calibration units ({images} images; a group, or copies of an image, count once)"


def round_up(value: float) -> str:
    """A false-alarm rate to four decimals, never smaller than it is."""
    return f"{math.ceil(value * 1e4) / 1e4:g}"


@dataclass(frozen=True)
class Calibration:
    """The calibration card: the scores of normal images, the threshold that follows, and what it promises.

    The score of an image is that of the mask rule (see `mask_rules.py`): the image is anomalous if it exceeds
    `threshold`, which is so exactly if the mask, the pixels above `threshold`, breaks the rule.

    scores: ascending, the largest of each exchangeable unit. images: in these units. noise: set for the rule
    "parametric_noise" only, whose threshold is an assumption. fingerprint: of the model, preprocessing, tiling,
    smoothing and normalisation that made the scores. made: how and when. classes: a card for each class of parts,
    where the promise is by class; `scores` is then empty, and `of` gives the card that decides on an image.

    Raises:
        CalibrationError: too few scores for the promise, or scores that are not finite and ascending.
    """

    promise: Promise
    scores: tuple[float, ...]
    images: int
    fingerprint: str
    mask_rule: MaskRule = field(default_factory=MaskRule)
    noise: Noise | None = None
    made: Mapping[str, Any] = field(default_factory=dict)
    classes: Mapping[str, Calibration] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.promise.by_class is not bool(self.classes):
            raise CalibrationError("A calibration by class, and no other, needs a card for each class.")
        if self.classes:
            if self.scores or self.noise:
                raise CalibrationError("A calibration by class has the scores of each class, and no others.")
            return
        if not np.isfinite(self._sorted).all():
            raise CalibrationError("A calibration score is NaN or infinite: the model diverged; train it again.")
        if not self.scores or (np.diff(self._sorted) < 0).any():
            raise CalibrationError("Expected one or more calibration scores in ascending order.")
        if (self.noise is None) is (self.mask_rule.name == "parametric_noise"):
            raise CalibrationError("The mask rule parametric_noise, and no other, needs an estimate of the noise.")
        _ = self.rank  # refuses too few

    @classmethod
    def fit(
        cls,
        scores: Sequence[float],
        units: Sequence[str],
        promise: Promise,
        fingerprint: str,
        mask_rule: MaskRule | None = None,
        noise: Noise | None = None,
        made: Mapping[str, Any] | None = None,
    ) -> Calibration:
        """Calibrate on the scores that `mask_rule` gives to the score maps of normal images.

        A unit with several images counts once, with its largest score: the promise then holds for every image of
        a new unit of such a size.

        Raises:
            CalibrationError: too few units, or a score is not finite.
        """
        largest: dict[str, float] = {}
        for unit, score in zip(units, scores, strict=True):
            if not math.isfinite(score):
                raise CalibrationError("A calibration score is NaN or infinite: the model diverged; train it again.")
            largest[unit] = max(float(score), largest.get(unit, -math.inf))
        ascending = tuple(sorted(largest.values()))
        return cls(promise, ascending, len(scores), fingerprint, mask_rule or MaskRule(), noise, made or {})

    @classmethod
    def fit_by_class(
        cls,
        scores: Sequence[float],
        units: Sequence[str],
        labels: Sequence[str | None],
        classes: Sequence[str],
        promise: Promise,
        fingerprint: str,
        mask_rule: MaskRule | None = None,
        made: Mapping[str, Any] | None = None,
    ) -> Calibration:
        """Calibrate each of `classes` on the scores of its own normal images; `labels` says which are whose.

        A unit with images of several classes counts once in each.

        Raises:
            CalibrationError: a class has too few units, or a score is not finite.
        """
        members = {label: [place for place, found in enumerate(labels) if found == label] for label in classes}
        check_classes(promise, {label: len({units[place] for place in some}) for label, some in members.items()})
        cards = {
            label: cls.fit(
                [scores[place] for place in some],
                [units[place] for place in some],
                promise.within_class,
                fingerprint,
                mask_rule,
            )
            for label, some in members.items()
        }
        return cls(promise, (), len(scores), fingerprint, mask_rule or MaskRule(), None, made or {}, cards)

    def with_promise(self, promise: Promise) -> Calibration:
        """The same calibration scores under another promise, by class or not as before.

        Raises:
            CalibrationError: they are too few.
        """
        if self.classes:
            check_classes(promise, {label: card.n for label, card in self.classes.items()})
        cards = {label: card.with_promise(promise.within_class) for label, card in self.classes.items()}
        return replace(self, promise=promise, classes=cards)

    @property
    def parts(self) -> Mapping[str | None, Calibration]:
        """The cards that decide, by class; only itself, under None, if it is not by class."""
        return dict(self.classes.items()) or {None: self}

    def of(self, label: str | None) -> Calibration:
        """The card that decides on images of a class: itself, if it is not by class.

        Raises:
            CalibrationError: it is by class, and knows no such class.
        """
        if not self.classes:
            return self
        if label is None or label not in self.classes:
            found = "none" if label is None else f"'{label}'"
            raise CalibrationError(
                f"The calibration is by class: expected one of its classes ({', '.join(self.classes)}), found {found}."
            )
        return self.classes[label]

    def _check_single(self) -> None:
        if self.classes:
            raise CalibrationError("A calibration by class has no threshold for all: ask `of(label)` for one.")

    @cached_property
    def _sorted(self) -> npt.NDArray[np.float64]:
        return np.asarray(self.scores, dtype=np.float64)

    @property
    def n(self) -> int:
        """The number of exchangeable units; by class, over all classes."""
        return sum(card.n for card in self.classes.values()) if self.classes else len(self.scores)

    @cached_property
    def rank(self) -> int | None:
        """The threshold is the `rank`-th smallest score; None where it rests on an assumption.

        Raises:
            CalibrationError: the calibration is by class (as `threshold` and `p_value`).
        """
        self._check_single()
        return self.promise.rank(self.n, self.images) if self.noise is None else None

    @property
    def threshold(self) -> float:
        """Scores and pixels above it are anomalous."""
        if self.noise is not None:
            return self.noise.threshold(self.promise.alpha)
        assert self.rank is not None
        return self.scores[self.rank - 1]

    @property
    def thresholds(self) -> float | dict[str, float]:
        """The threshold, or that of each class, as JSON holds it."""
        return {label: card.threshold for label, card in self.classes.items()} if self.classes else self.threshold

    def p_value(self, score: float) -> float:
        """(1 + number of calibration scores >= score) / (n + 1), in [1 / (n + 1), 1].

        The chance of so high a score on a normal image exchangeable with the calibration images, whatever the promise.

        Raises:
            CalibrationError: the score is NaN.
        """
        self._check_single()
        if math.isnan(score):
            raise CalibrationError("A score is NaN: it has no p-value.")
        at_least = self.n - int(np.searchsorted(self._sorted, score, side="left"))
        return (1 + at_least) / (self.n + 1)

    def expected_rates(self) -> tuple[float, float]:
        """The expected false-alarm rate for continuous scores; by class, the smallest and the largest."""
        cards = self.parts.values()
        rates = [(card.n + 1 - card.promise.rank(card.n)) / (card.n + 1) for card in cards]
        return min(rates), max(rates)

    def rate_limit(self) -> float:
        """The true false-alarm rate is at most this with 95 % confidence; by class, each class's."""
        return max(card.promise.rate_limit(card.n) for card in self.parts.values())

    def in_words(self) -> str:
        """The promise as a person would say it."""
        alpha, delta = self.promise.alpha, self.promise.delta
        alarm = f"false alarms ({self.mask_rule.in_words()})"
        units = count_units(self.n, self.images)
        if self.noise is not None:
            above = self.n - int(np.searchsorted(self._sorted, self.threshold, side="right"))
            return (
                f"assumed, not promised: if normal score maps are white Gaussian noise, expect {1000 * alpha:g} "
                f"{alarm} in 1000 normal images; of {units}, {above} exceed the threshold"
            )
        if self.promise.rule == "pac":
            limit = f"with {100 * (1 - delta):g} % confidence no more than {1000 * alpha:g}"
        else:
            most = math.ceil(1000 * self.rate_limit())
            limit = f"at most {1000 * alpha:g} on average over calibrations, with 95 % confidence no more than {most}"
        # The rate is that of units: an alarm in any image of a group counts.
        things = "normal images" if self.n == self.images else "normal units (groups of images)"
        things += f" of each class ({len(self.classes)} classes, each with its own threshold)" if self.classes else ""
        expected = " to ".join(dict.fromkeys(f"{1000 * rate:.0f}" for rate in self.expected_rates()))
        return f"of 1000 {things} expect about {expected} {alarm}, {limit}; from {units}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` gives the same object back, bit for bit."""
        if self.classes:
            of_classes = {label: card.to_dict() for label, card in self.classes.items()}
            return {
                "promise": asdict(self.promise),
                "in_words": self.in_words(),
                "units": self.n,
                "images": self.images,
                "mask_rule": self.mask_rule.to_dict(),
                "fingerprint": self.fingerprint,
                "made": dict(self.made),
                "classes": {label: {key: card[key] for key in _OF_CLASS} for label, card in of_classes.items()},
            }
        return {
            "promise": asdict(self.promise),
            "in_words": self.in_words(),
            "units": self.n,
            "images": self.images,
            "rank": self.rank,
            "rate_interval_95": None if self.noise else list(self.promise.rate_interval(self.n)),
            "threshold": self.threshold,
            "mask_rule": self.mask_rule.to_dict(),
            "noise": self.noise.to_dict() if self.noise else None,
            "fingerprint": self.fingerprint,
            "made": dict(self.made),
            "scores": list(self.scores),
        }

    @classmethod
    def from_dict(cls, card: Mapping[str, Any]) -> Calibration:
        """Read what `to_dict` wrote.

        Raises:
            CalibrationError: the card lacks a field, or contradicts itself.
        """
        try:
            promise, mask_rule = Promise(**card["promise"]), MaskRule.from_dict(card["mask_rule"])
            scores: tuple[float, ...] = ()
            noise, classes = None, {}
            if promise.by_class:
                common = {**card, "promise": asdict(promise.within_class), "noise": None, "made": {}}
                classes = {label: cls.from_dict(common | of_class) for label, of_class in card["classes"].items()}
            else:
                scores = tuple(float(score) for score in card["scores"])
                noise = Noise.from_dict(card["noise"]) if card["noise"] else None
            calibration = cls(
                promise, scores, card["images"], card["fingerprint"], mask_rule, noise, card["made"], classes
            )
            # The interval and the sentence are derived, and may be rounded or worded otherwise elsewhere.
            exact = {key: value for key, value in calibration.to_dict().items() if key in _EXACT}
            consistent = all(card[key] == value for key, value in exact.items())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CalibrationError(
                f"The calibration card is incomplete or damaged ({type(error).__name__}: {error}): "
                "run `blemish calibrate` again."
            ) from error
        if not consistent:
            raise CalibrationError("The calibration card contradicts its own scores: run `blemish calibrate` again.")
        return calibration

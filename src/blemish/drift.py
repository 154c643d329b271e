"""Drift: do images believed normal still match the calibration, so that its promise goes on holding?

Two tests of the one assumption the promise rests on, that new images are exchangeable with the calibration images:
Kolmogorov-Smirnov on the images of one input, and a conformal test martingale over all images ever seen, which may be
looked at after every image. A score is that of a unit: where the calibration counts groups, the largest of the group.
Source: Vovk et al., Retrain or not retrain: conformal test martingales for change-point detection, COPA 2021,
arXiv 2102.10439 (online p-values, simple jumper, its mean over jump rates).
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left, bisect_right, insort
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

JUMP_RATES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_BETS = np.array([-1.0, 0.0, 1.0])  # on small p-values, on nothing, on large ones
_RECENT = 4096  # scores kept apart before they are merged


@dataclass(frozen=True)
class KSTest:
    """`statistic` in [0, 1]; `direction`: the batch's scores lie "higher" or "lower" where the gap is largest."""

    statistic: float
    p_value: float
    direction: str


def ks_test(calibration_scores: npt.ArrayLike, batch_scores: npt.ArrayLike) -> KSTest:
    """Two-sample Kolmogorov-Smirnov test, exact up to 10 000 scores a side; ties make it conservative.

    A conformal p-value is a monotone transform of its score, so that this is the test on p-values, without their ties.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", RuntimeWarning
        )  # where the exact p-value overflows, the asymptotic one is given
        result = stats.ks_2samp(calibration_scores, batch_scores)
    # A positive sign: the calibration's distribution function lies above, its scores below.
    direction = "same" if result.statistic == 0 else "higher" if result.statistic_sign > 0 else "lower"
    return KSTest(float(result.statistic), float(result.pvalue), direction)


class _Ranks:
    """A growing multiset of scores that says how many lie above, and how many at, a score."""

    def __init__(self, scores: npt.ArrayLike) -> None:
        self._sorted = np.sort(np.asarray(scores, dtype=np.float64))
        self._recent: list[float] = []  # sorted too; apart, since to insert into an array copies all of it

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)

    def above_and_equal(self, score: float) -> tuple[int, int]:
        below = int(self._sorted.searchsorted(score, "left")) + bisect_left(self._recent, score)
        at_most = int(self._sorted.searchsorted(score, "right")) + bisect_right(self._recent, score)
        return len(self) - at_most, at_most - below

    def add(self, score: float) -> None:
        insort(self._recent, score)
        if len(self._recent) == _RECENT:
            self._sorted = np.sort(np.concatenate([self._sorted, self._recent]), kind="stable")
            self._recent.clear()


class Martingale:
    """The capital, 1 at first, of one who bets fairly against exchangeability: it stays small as long as that holds.

    The t-th score's online p-value p is its rank from above among the calibration scores and the stream up to itself,
    ties broken at random, which makes p-values independent and uniform (Vovk et al.). Each jumper spreads its capital
    over the bets 1 + e (p - 1/2), e in {-1, 0, 1}, and moves the share J of it evenly between them at every step. The
    capital is the mean over jump rates J, and over jumpers on p (scores moved up or down) and on |2p - 1| (scores
    spread out or drew together), uniform as well. P(it ever reaches c) <= 1 / c, by Ville's inequality, over the draw
    of calibration and stream.
    """

    def __init__(self, calibration_scores: npt.ArrayLike, seed: int) -> None:
        self._ranks = _Ranks(calibration_scores)
        self._seed, self._steps = seed, 0
        self._rates = np.array(JUMP_RATES)[:, None]  # (R, 1)
        self._shares = np.full((2, len(JUMP_RATES), 3), 1 / 3)  # of each jumper's capital, by bet
        self._logs = np.zeros((2, len(JUMP_RATES)))  # each jumper's capital: may pass what a float holds

    def add(self, score: float) -> float:
        """Bet on the next score (finite); return its online p-value, in [0, 1)."""
        self._steps += 1
        above, equal = self._ranks.above_and_equal(score)
        theta = np.random.default_rng([self._seed, self._steps]).random()
        p = (above + theta * (1 + equal)) / (len(self._ranks) + 1)
        self._ranks.add(score)
        uniform = np.array([p, abs(2 * p - 1)])[:, None, None]  # (2, 1, 1)
        shares = (1 - self._rates) * self._shares + self._rates / 3
        shares *= 1 + _BETS * (uniform - 0.5)
        gains = shares.sum(axis=-1, keepdims=True)  # (2, R, 1), in [0.5, 1.5]
        self._shares = shares / gains
        self._logs += np.log(gains[..., 0])
        return float(p)

    @property
    def log(self) -> float:
        """The natural logarithm of the capital."""
        largest = self._logs.max()
        return float(largest + np.log(np.exp(self._logs - largest).mean()))


@dataclass(frozen=True)
class Drift:
    """What an input, and the stream it continues, say about the calibration.

    Args:
        images: in the journal, with the `new` ones of this input.
        new, repeats: images of this input added to the journal; those that it knew already.
        batch: different images of this input, new or not: what `false_alarms` and `ks` are about.
        false_alarms: images of the batch above the calibrated threshold.
        alpha: their promised share.
        ks: None for an empty batch.
        log10_martingale, log10_martingale_max: now, and its maximum over the stream (0 at the start).
        crossed_at: the first image at which the martingale reached 2 / level.
        level: the chance of a false verdict on unchanged images, half of it for each test: for the martingale over
            the whole stream, for Kolmogorov-Smirnov in each input anew.
    """

    images: int
    new: int
    repeats: int
    batch: int
    false_alarms: int
    alpha: float
    ks: KSTest | None
    log10_martingale: float
    log10_martingale_max: float
    crossed_at: str | None
    level: float

    @property
    def holds(self) -> bool:
        """False if the images are not exchangeable with the calibration images, at `level`."""
        return self.crossed_at is None and (self.ks is None or self.ks.p_value > self.level / 2)

    @property
    def chance(self) -> float:
        """A bound on the chance of such evidence on unchanged images, in [0, 1]: the smaller of both, times two."""
        ks = self.ks.p_value if self.ks else 1.0
        return min(1.0, 2 * min(10**-self.log10_martingale_max, ks))

    @property
    def rate_interval(self) -> tuple[float, float] | None:
        """95 % interval of the false-alarm rate in this batch (Clopper and Pearson, Biometrika 1934)."""
        if self.batch == 0:
            return None
        interval = stats.binomtest(self.false_alarms, self.batch).proportion_ci(0.95, method="exact")
        return float(interval.low), float(interval.high)

    def in_words(self) -> str:
        """The verdict and its reasons, in one to four sentences."""
        evidence = f"the martingale over all {self.images} images reached {_power(self.log10_martingale_max)}"
        if self.crossed_at is not None:
            evidence += f" (past {2 / self.level:g} at {self.crossed_at})"
        if self.ks:
            evidence += f"; Kolmogorov-Smirnov on this input: p = {self.ks.p_value:.2g}"
        if self.holds:
            said = f"No evidence that normal images have changed since the calibration: {evidence}."
        else:
            said = (
                f"The promise no longer holds: {evidence}. The chance of such evidence on unchanged images is at most "
                f"{_one_in(self.chance)}; recalibrate with `blemish calibrate run=RUN data.root=DIR` on new normal "
                "images."
            )
        if self.ks and self.ks.p_value <= self.level:
            said += f" Scores in this input are {self.ks.direction} than in the calibration"
            more = self.false_alarms > self.alpha * self.batch
            if self.ks.direction == "higher" and more:
                said += ": expect more false alarms"
            elif self.ks.direction == "lower" and not more:  # they may have spread both ways
                said += ": expect fewer false alarms, and more defects missed"
            said += "."
        if self.rate_interval:
            low, high = self.rate_interval
            said += (
                f" Of {self.batch} images {self.false_alarms} are above the threshold: "
                f"{self.false_alarms / self.batch:.1%} (95 %: {low:.1%} to {high:.1%}), where at most "
                f"{100 * self.alpha:g} % is promised."
            )
        return said

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "holds": self.holds,
            "in_words": self.in_words(),
            **asdict(self),
            "expected_false_alarms": self.alpha * self.batch,
            "false_alarm_rate_interval_95": list(self.rate_interval) if self.rate_interval else None,
            "chance": self.chance,
        }


def _power(log10: float) -> str:
    return f"{10**log10:.3g}" if log10 < 5 else f"10^{log10:.1f}"


def _one_in(chance: float) -> str:
    return f"1 in {math.floor(1 / chance)}" if chance > 1e-6 else "1 in a million"

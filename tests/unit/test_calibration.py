"""Conformal calibration: ranks against brute force, and the promise itself by simulation."""

import dataclasses
import json
import math
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from blemish.calibration import Calibration, Promise, Threshold
from blemish.errors import CalibrationError, ConfigError

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=60)
UNLIKELY = 1e-6
hundredths = st.integers(1, 99).map(lambda percent: percent / 100)
tied_scores = st.lists(st.integers(0, 8), min_size=1, max_size=40)


def fit(scores, promise, units=None):
    names = [str(number) for number in range(len(scores))] if units is None else units
    return Calibration.fit(scores, names, promise, "fingerprint")


def exact(alpha):
    return Fraction(str(alpha))


# --- how many are needed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("promise", "needed"),
    [
        (Promise(0.05), 19),
        (Promise(0.01), 99),
        (Promise(0.1), 9),
        (Promise(0.3), 3),
        (Promise(0.5), 1),
        (Promise(0.001), 999),
        (Promise(0.05, "pac", 0.05), 59),
        (Promise(0.01, "pac", 0.05), 299),
        (Promise(0.01, "pac", 0.1), 230),
    ],
)
def test_needed_as_published(promise, needed):
    assert promise.needed == needed


def test_needed_is_the_smallest_n_that_can_promise():
    for percent in range(1, 95):
        alpha = Fraction(percent, 100)
        marginal = Promise(percent / 100).needed
        assert Fraction(1, marginal + 1) <= alpha
        assert marginal == 1 or Fraction(1, marginal) > alpha
        pac = Promise(percent / 100, "pac", 0.05).needed
        assert (1 - alpha) ** pac <= Fraction(5, 100) < (1 - alpha) ** (pac - 1)


@pytest.mark.parametrize("rule", ["marginal", "pac"])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 19, 20, 59, 99, 298, 299, 1000])
def test_smallest_alpha_is_where_n_begins_to_be_enough(rule, n):
    smallest = Promise(0.5, rule).smallest_alpha(n)
    assert Promise(smallest * (1 + 1e-9), rule).needed <= n
    assert Promise(smallest * (1 - 1e-9), rule).needed > n


@pytest.mark.parametrize("rule", ["marginal", "pac"])
def test_no_images_promise_nothing(rule):
    assert Promise(0.5, rule).smallest_alpha(0) == 1
    with pytest.raises(CalibrationError, match=r"^0 calibration images are too few"):
        Promise(0.5, rule).rank(0)


# --- ranks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.001, 0.01, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.29, 0.3, 0.57, 0.7, 0.9, 0.99])
def test_marginal_rank_against_exact_scan(alpha):
    promise = Promise(alpha)
    for n in [*range(promise.needed, promise.needed + 60), 1999]:
        if n >= promise.needed:
            expected = next(k for k in range(1, n + 1) if Fraction(n + 1 - k, n + 1) <= exact(alpha))
            assert promise.rank(n) == expected


@pytest.mark.parametrize(
    ("alpha", "n", "rank"),
    [(0.01, 99, 99), (0.1, 9, 9), (0.1, 29, 27), (0.3, 9, 7), (0.3, 19, 14), (0.7, 9, 3), (0.05, 19, 19)],
)
def test_marginal_rank_where_binary_fractions_round(alpha, n, rank):
    assert Promise(alpha).rank(n) == rank


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("delta", [0.01, 0.05, 0.2])
def test_pac_rank_against_binomial_scan(alpha, delta):
    promise = Promise(alpha, "pac", delta)
    for n in {promise.needed, promise.needed + 1, 2 * promise.needed, 5 * promise.needed, 1000}:
        if n >= promise.needed:
            # The rate exceeds alpha if at most n - k of n draws lie in the upper share alpha.
            expected = next(k for k in range(1, n + 1) if stats.binom.cdf(n - k, n, alpha) <= delta)
            assert promise.rank(n) == expected


@pytest.mark.parametrize("rule", ["marginal", "pac"])
@given(alpha=hundredths, other=hundredths, n=st.integers(1, 400))
@REPEATABLE
def test_rank_falls_as_alpha_grows(rule, alpha, other, n):
    strict, lax = sorted((alpha, other))
    assume(n >= Promise(strict, rule).needed)
    assert Promise(strict, rule).rank(n) >= Promise(lax, rule).rank(n)


@given(alpha=hundredths, n=st.integers(1, 400))
@REPEATABLE
def test_pac_is_never_laxer_than_marginal(alpha, n):
    assume(n >= Promise(alpha, "pac", 0.05).needed)
    assert Promise(alpha, "pac", 0.05).rank(n) >= Promise(alpha).rank(n)


@pytest.mark.parametrize(("rule", "n"), [("marginal", 19), ("marginal", 250), ("pac", 59), ("pac", 400)])
def test_rate_interval_holds_the_level(rule, n):
    promise = Promise(0.05, rule)
    low, high = promise.rate_interval(n, 0.9)
    k = promise.rank(n)
    # The rate lies below r if at least n + 1 - k of n draws lie in the upper share r.
    assert stats.binom.sf(n - k, n, low) == pytest.approx(0.05)
    assert stats.binom.sf(n - k, n, high) == pytest.approx(0.95)


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["marginal", "pac"])
def test_refusal_says_what_is_needed_and_what_is_possible(rule):
    with pytest.raises(CalibrationError) as refusal:
        Promise(0.01, rule).rank(50)
    sentence = str(refusal.value)
    assert f"50 calibration images are too few for alpha = 0.01 ({rule})" in sentence
    assert "needs 99 (marginal) or 299 (pac, delta = 0.05)" in sentence
    assert "50 can promise alpha = 0.0197 (marginal) or 0.0582 (pac)" in sentence


def test_what_the_refusal_offers_is_accepted():
    for n in range(2, 400):
        sentence = Promise(0.0001, "pac").shortage(n)
        offered = re.search(r"can promise alpha = (\S+) \(marginal\) or (\S+) \(pac\)\.$", sentence)
        for rule, alpha in zip(("marginal", "pac"), offered.groups(), strict=True):
            promise = Promise(float(alpha), rule)
            assert promise.needed <= n
            assert 1 <= promise.rank(n) <= n


@pytest.mark.parametrize("rule", ["marginal", "pac"])
def test_fit_refuses_one_unit_too_few(rule):
    promise = Promise(0.1, rule)
    fit(range(promise.needed), promise)
    with pytest.raises(CalibrationError, match=f"needs 9 .* {promise.needed - 1} can promise"):
        fit(range(promise.needed - 1), promise)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(wrong):
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        fit([*range(30), wrong], Promise(0.1))


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, math.nan, "0.05", None])
@pytest.mark.parametrize("name", ["alpha", "delta"])
def test_shares_outside_the_open_unit_interval_are_refused(name, value):
    with pytest.raises(ConfigError, match=rf"calibration\.{name} between 0 and 1, found {value}"):
        Promise(**{name: value})


def test_unknown_rules_are_refused():
    with pytest.raises(ConfigError, match=r"calibration\.rule to be one of marginal, pac, found 'median'"):
        Promise(rule="median")
    with pytest.raises(ConfigError, match=r"calibration\.mask_rule to be one of any_pixel, found 'all'"):
        Calibration.fit(range(30), [str(i) for i in range(30)], Promise(), "fingerprint", mask_rule="all")


# --- p-values and decisions ---------------------------------------------------------------------------------------


@given(scores=tied_scores, score=st.integers(-1, 9))
@REPEATABLE
def test_p_value_against_counting(scores, score):
    threshold = Threshold(tuple(sorted(float(s) for s in scores)), 1)
    assert threshold.p_value(score) == (1 + sum(s >= score for s in scores)) / (len(scores) + 1)


@given(scores=tied_scores, score=st.integers(-1, 9), alpha=hundredths)
@REPEATABLE
def test_beyond_the_threshold_exactly_if_p_value_at_most_alpha(scores, score, alpha):
    promise = Promise(alpha)
    assume(len(scores) >= promise.needed)
    calibration = fit(scores, promise)
    assert (score > calibration.image.value) == (calibration.image.p_value(score) <= alpha)


@given(scores=st.lists(st.integers(0, 50), min_size=9, max_size=40), score=st.integers(-5, 55), alpha=hundredths)
@REPEATABLE
def test_any_increasing_scale_gives_the_same_answers(scores, score, alpha):
    promise = Promise(alpha)
    assume(len(scores) >= promise.needed)

    def stretched(value):
        return float(value**3 + 2 * value - 1000)

    plain, other = fit(scores, promise), fit([stretched(s) for s in scores], promise)
    assert (score > plain.image.value) == (stretched(score) > other.image.value)
    assert plain.image.p_value(score) == other.image.p_value(stretched(score))


@given(scores=st.permutations(range(25)))
@REPEATABLE
def test_order_of_calibration_images_does_not_matter(scores):
    assert fit(scores, Promise(0.1)) == fit(range(25), Promise(0.1))


@pytest.mark.parametrize("rule", ["marginal", "pac"])
@given(scores=st.lists(st.integers(0, 20), min_size=30, max_size=60), alpha=hundredths, other=hundredths)
@REPEATABLE
def test_threshold_falls_as_alpha_grows(rule, scores, alpha, other):
    strict, lax = (Promise(value, rule) for value in sorted((alpha, other)))
    assume(len(scores) >= strict.needed)
    assert fit(scores, strict).image.value >= fit(scores, lax).image.value


@given(scores=tied_scores, alpha=hundredths)
@REPEATABLE
def test_calibration_images_beyond_the_threshold_are_at_most_a_share_alpha(scores, alpha):
    promise = Promise(alpha)
    assume(len(scores) >= promise.needed)
    beyond = sum(score > fit(scores, promise).image.value for score in scores)
    assert Fraction(beyond + 1, len(scores) + 1) <= exact(alpha)


# --- the promise, by simulation -----------------------------------------------------------------------------------

CONTINUOUS = {
    "normal": lambda rng, size: rng.standard_normal(size),
    "heavy tail": lambda rng, size: rng.standard_cauchy(size),
    "tiny scores": lambda rng, size: 1e-9 * rng.random(size),
}
TIED = {
    "coin": lambda rng, size: rng.integers(0, 2, size),
    "few levels": lambda rng, size: rng.integers(0, 12, size),
    "mostly zero": lambda rng, size: rng.poisson(0.1, size),
    "constant": lambda rng, size: np.ones(size),
}
SMALL_AND_LARGE = [(0.5, 1), (0.2, 4), (0.1, 9), (0.1, 13), (0.05, 19), (0.05, 40), (0.3, 50)]


def false_alarms(draw, promise, n, repeats, seed):
    """How often a new image is beyond a threshold of new calibration images."""
    rng = np.random.default_rng(seed)
    count = 0
    for _ in range(repeats):
        *calibration, new = draw(rng, n + 1).tolist()
        count += new > fit(calibration, promise).image.value
    return count


@pytest.mark.parametrize("draw", CONTINUOUS.values(), ids=CONTINUOUS.keys())
@pytest.mark.parametrize(("alpha", "n"), SMALL_AND_LARGE)
def test_false_alarm_rate_is_what_the_rank_says(draw, alpha, n):
    repeats, promise = 1200, Promise(alpha)
    rate = (n + 1 - promise.rank(n)) / (n + 1)
    low, high = stats.binom.ppf([UNLIKELY, 1 - UNLIKELY], repeats, rate)
    assert rate <= alpha
    assert low <= false_alarms(draw, promise, n, repeats, seed=n) <= high


@pytest.mark.parametrize("draw", TIED.values(), ids=TIED.keys())
@pytest.mark.parametrize(("alpha", "n"), SMALL_AND_LARGE)
def test_false_alarm_rate_is_at_most_alpha_with_ties(draw, alpha, n):
    repeats = 1200
    count = false_alarms(draw, Promise(alpha), n, repeats, seed=n)
    assert count <= stats.binom.ppf(1 - UNLIKELY, repeats, alpha)


@pytest.mark.parametrize("size", [2, 5])
def test_promise_holds_for_every_image_of_a_new_group(size):
    rng, promise, n, repeats = np.random.default_rng(size), Promise(0.1), 19, 2000
    rate = (n + 1 - promise.rank(n)) / (n + 1)
    count = 0
    for _ in range(repeats):
        scores = rng.standard_normal((n + 1, 1)) + 0.5 * rng.standard_normal((n + 1, size))
        units = np.repeat(np.arange(n), size).astype(str).tolist()
        calibration = fit(scores[:n].ravel().tolist(), promise, units)
        count += scores[n].max() > calibration.image.value
    low, high = stats.binom.ppf([UNLIKELY, 1 - UNLIKELY], repeats, rate)
    assert low <= count <= high


@pytest.mark.parametrize(
    ("alpha", "delta", "n"), [(0.05, 0.05, 59), (0.1, 0.1, 100), (0.2, 0.3, 12), (0.02, 0.05, 400)]
)
def test_pac_fails_as_rarely_as_delta_says(alpha, delta, n):
    rng, repeats, promise = np.random.default_rng(n), 1200, Promise(alpha, "pac", delta)
    # Of uniform scores, a share 1 - t lies beyond the threshold t.
    failures = sum(1 - fit(rng.random(n).tolist(), promise).image.value > alpha for _ in range(repeats))
    exactly = stats.binom.cdf(n - promise.rank(n), n, alpha)
    low, high = stats.binom.ppf([UNLIKELY, 1 - UNLIKELY], repeats, exactly)
    assert exactly <= delta
    assert low <= failures <= high


@pytest.mark.parametrize("levels", [2, 10, 40])
def test_pac_fails_at_most_as_often_as_delta_says_with_ties(levels):
    rng, repeats, promise = np.random.default_rng(levels), 1200, Promise(0.1, "pac", 0.1)
    rates = [1 - (fit(rng.integers(0, levels, 40).tolist(), promise).image.value + 1) / levels for _ in range(repeats)]
    assert sum(rate > 0.1 + 1e-12 for rate in rates) <= stats.binom.ppf(1 - UNLIKELY, repeats, 0.1)


def test_p_values_of_normal_images_are_not_too_small():
    rng, n, repeats = np.random.default_rng(0), 24, 3000
    p_values = []
    for _ in range(repeats):
        *scores, new = rng.integers(0, 6, n + 1).tolist()
        p_values.append(fit(scores, Promise(0.5)).image.p_value(new))
    for alpha in (0.04, 0.1, 0.2, 0.5, 0.8):
        count = sum(p <= alpha for p in p_values)
        assert count <= stats.binom.ppf(1 - UNLIKELY, repeats, alpha)


# --- units --------------------------------------------------------------------------------------------------------


def test_a_unit_counts_once_with_its_largest_score():
    scores = [3.0, 9.0, 1.0, 5.0, 4.0, -2.0]
    calibration = fit(scores, Promise(0.25), ["a", "b", "a", "c", "c", "a"])
    with_largest = Threshold((3.0, 5.0, 9.0), 3)
    assert calibration.image == with_largest
    assert calibration.n == 3
    assert calibration.images == 6


def test_units_with_negative_scores_keep_them():
    assert fit([-5.0, -7.0, -1.0], Promise(0.5), ["a", "a", "b"]).image.scores == (-5.0, -1.0)


def test_units_are_what_is_counted_against_the_need():
    with pytest.raises(CalibrationError, match=r"^8 calibration images are too few"):
        fit(list(range(80)), Promise(0.1), [str(i % 8) for i in range(80)])


def test_scores_and_units_must_match():
    with pytest.raises(ValueError, match="argument"):
        fit([1.0, 2.0, 3.0], Promise(0.5), ["a", "b"])


# --- the card -----------------------------------------------------------------------------------------------------


def calibrated(promise=None):
    scores = np.random.default_rng(0).random(60, dtype=np.float32).tolist()
    made = {"version": "0.1.0", "seed": 3}
    promise = promise or Promise(0.1)
    return Calibration.fit(scores, [str(i // 2) for i in range(60)], promise, "fingerprint", made=made)


@pytest.mark.parametrize("promise", [Promise(0.1), Promise(0.3, "pac", 0.01)])
def test_card_survives_json_bit_for_bit(promise):
    calibration = calibrated(promise)
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict(), allow_nan=False))) == calibration


@given(scores=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
@REPEATABLE
def test_every_finite_score_survives_json(scores):
    calibration = fit(scores, Promise(0.5))
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration


def test_card_states_what_was_promised():
    calibration = calibrated(Promise(0.3, "pac", 0.01))
    card = calibration.to_dict()
    assert card["promise"] == {"alpha": 0.3, "rule": "pac", "delta": 0.01}
    assert (card["units"], card["images"], card["fingerprint"]) == (30, 60, "fingerprint")
    assert card["rank"] == Promise(0.3, "pac", 0.01).rank(30)
    assert card["image_threshold"] == sorted(card["image_scores"])[card["rank"] - 1]
    assert card["rate_interval_95"] == list(Promise(0.3, "pac", 0.01).rate_interval(30))
    assert "at most 300 false alarms, with 99 % confidence" in card["in_words"]
    assert "with 30 calibration images" in card["in_words"]


def changed(key, change):
    card = json.loads(json.dumps(calibrated().to_dict()))
    card[key] = change(card[key])
    return card


@pytest.mark.parametrize(
    "card",
    [
        changed("image_threshold", lambda value: value * 0.9),
        changed("mask_threshold", lambda value: math.nextafter(value, 1)),
        changed("promise", lambda promise: promise | {"alpha": 0.5}),
        changed("promise", lambda promise: promise | {"rule": "pac", "alpha": 0.5}),
        changed("image_scores", lambda scores: [score / 2 for score in scores]),
        changed("mask_scores", lambda scores: scores[:20]),
        changed("image_scores", lambda scores: scores[::-1]),
        changed("rank", lambda rank: rank - 1),
        changed("units", lambda units: units + 1),
        changed("mask_rule", lambda rule: "none"),
    ],
    ids=[
        "threshold",
        "mask threshold",
        "alpha",
        "rule",
        "scores",
        "fewer scores",
        "order",
        "rank",
        "units",
        "mask rule",
    ],
)
def test_card_that_contradicts_itself_is_refused(card):
    with pytest.raises(CalibrationError, match="contradicts its own scores"):
        Calibration.from_dict(card)


def test_card_with_a_promise_it_cannot_keep_is_refused():
    with pytest.raises(CalibrationError, match="too few"):
        Calibration.from_dict(changed("promise", lambda promise: promise | {"alpha": 0.001}))


@pytest.mark.parametrize(
    "key",
    [
        "promise",
        "image_scores",
        "mask_scores",
        "image_threshold",
        "mask_threshold",
        "mask_rule",
        "fingerprint",
        "images",
    ],
)
def test_card_without_a_field_is_refused(key):
    card = calibrated().to_dict()
    del card[key]
    with pytest.raises(CalibrationError, match=r"incomplete or damaged|contradicts"):
        Calibration.from_dict(card)


def test_card_with_an_unknown_promise_is_refused():
    with pytest.raises(CalibrationError, match="incomplete or damaged"):
        Calibration.from_dict(changed("promise", lambda promise: promise | {"gamma": 1}))


def test_another_promise_from_the_same_scores_is_a_fresh_fit():
    stricter = Promise(0.05, "marginal")
    assert calibrated().with_promise(stricter) == calibrated(stricter)
    with pytest.raises(CalibrationError, match="too few"):
        calibrated().with_promise(Promise(0.01))


def test_calibration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        calibrated().image = Threshold((0.0,), 1)

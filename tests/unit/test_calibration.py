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

from blemish.calibration import Calibration, Promise, q_values, read_settings
from blemish.errors import BlemishError, CalibrationError, ConfigError
from blemish.mask_rules import MaskRule
from blemish.noise import Noise

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=60)
UNLIKELY = 1e-6
hundredths = st.integers(1, 99).map(lambda percent: percent / 100)
tied_scores = st.lists(st.integers(0, 8), min_size=1, max_size=40)
WORDS = ["any pixel flagged", "more than 30 % of the image flagged", "a flagged region of 7 or more pixels"]


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
def test_refusal_of_thirty_images_for_one_percent(rule):
    with pytest.raises(CalibrationError) as refusal:
        fit(range(30), Promise(0.01, rule))
    assert str(refusal.value) == (
        f"30 calibration images are too few for alpha = 0.01 ({rule}): it needs 99 (marginal) or 299 (pac, delta = "
        "0.05); 30 can promise alpha = 0.0323 (marginal) or 0.0951 (pac). Add normal images, or set calibration.alpha "
        "accordingly."
    )


def test_refusal_tells_images_from_units():
    with pytest.raises(CalibrationError, match=r"^3 independent calibration units \(12 images; a group, or copies of"):
        fit(range(12), Promise(0.1), [str(i % 3) for i in range(12)])


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
    with pytest.raises(ConfigError, match=r"calibration\.mask_rule to be one of any_pixel, .*, found 'all'"):
        read_settings({"mask_rule": "all"})


# --- p-values and decisions ---------------------------------------------------------------------------------------


@given(scores=tied_scores, score=st.integers(-1, 9))
@REPEATABLE
def test_p_value_against_counting(scores, score):
    assert fit(scores, Promise(0.5)).p_value(score) == (1 + sum(s >= score for s in scores)) / (len(scores) + 1)


@given(scores=tied_scores, score=st.integers(-1, 9), alpha=hundredths)
@REPEATABLE
def test_beyond_the_threshold_exactly_if_p_value_at_most_alpha(scores, score, alpha):
    promise = Promise(alpha)
    assume(len(scores) >= promise.needed)
    calibration = fit(scores, promise)
    assert (score > calibration.threshold) == (calibration.p_value(score) <= alpha)


@given(scores=st.lists(st.integers(0, 50), min_size=9, max_size=40), score=st.integers(-5, 55), alpha=hundredths)
@REPEATABLE
def test_any_increasing_scale_gives_the_same_answers(scores, score, alpha):
    promise = Promise(alpha)
    assume(len(scores) >= promise.needed)

    def stretched(value):
        return float(value**3 + 2 * value - 1000)

    plain, other = fit(scores, promise), fit([stretched(s) for s in scores], promise)
    assert plain.rank == other.rank
    assert (score > plain.threshold) == (stretched(score) > other.threshold)
    assert plain.p_value(score) == other.p_value(stretched(score))


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
    assert fit(scores, strict).threshold >= fit(scores, lax).threshold


@given(scores=tied_scores, alpha=hundredths)
@REPEATABLE
def test_calibration_images_beyond_the_threshold_are_at_most_a_share_alpha(scores, alpha):
    promise = Promise(alpha)
    assume(len(scores) >= promise.needed)
    beyond = sum(score > fit(scores, promise).threshold for score in scores)
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
        count += new > fit(calibration, promise).threshold
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
        count += scores[n].max() > calibration.threshold
    low, high = stats.binom.ppf([UNLIKELY, 1 - UNLIKELY], repeats, rate)
    assert low <= count <= high


@pytest.mark.parametrize(
    ("alpha", "delta", "n"), [(0.05, 0.05, 59), (0.1, 0.1, 100), (0.2, 0.3, 12), (0.02, 0.05, 400)]
)
def test_pac_fails_as_rarely_as_delta_says(alpha, delta, n):
    rng, repeats, promise = np.random.default_rng(n), 1200, Promise(alpha, "pac", delta)
    # Of uniform scores, a share 1 - t lies beyond the threshold t.
    failures = sum(1 - fit(rng.random(n).tolist(), promise).threshold > alpha for _ in range(repeats))
    exactly = stats.binom.cdf(n - promise.rank(n), n, alpha)
    low, high = stats.binom.ppf([UNLIKELY, 1 - UNLIKELY], repeats, exactly)
    assert exactly <= delta
    assert low <= failures <= high


@pytest.mark.parametrize("levels", [2, 10, 40])
def test_pac_fails_at_most_as_often_as_delta_says_with_ties(levels):
    rng, repeats, promise = np.random.default_rng(levels), 1200, Promise(0.1, "pac", 0.1)
    rates = [1 - (fit(rng.integers(0, levels, 40).tolist(), promise).threshold + 1) / levels for _ in range(repeats)]
    assert sum(rate > 0.1 + 1e-12 for rate in rates) <= stats.binom.ppf(1 - UNLIKELY, repeats, 0.1)


def test_p_values_of_normal_images_are_not_too_small():
    rng, n, repeats = np.random.default_rng(0), 24, 3000
    p_values = []
    for _ in range(repeats):
        *scores, new = rng.integers(0, 6, n + 1).tolist()
        p_values.append(fit(scores, Promise(0.5)).p_value(new))
    for alpha in (0.04, 0.1, 0.2, 0.5, 0.8):
        count = sum(p <= alpha for p in p_values)
        assert count <= stats.binom.ppf(1 - UNLIKELY, repeats, alpha)


# --- by class -----------------------------------------------------------------------------------------------------

CLASSES = ("calm", "wild")


def two_classes(rng, n, share=0.75):
    """Scores and classes of n images: of "wild" ones, the scores are a hundred times as large."""
    labels = ["calm" if calm else "wild" for calm in rng.random(n) < share]
    scores = [float(rng.exponential(1 if label == "calm" else 100)) for label in labels]
    return scores, labels


def fit_by_class(scores, labels, promise, units=None):
    names = [str(number) for number in range(len(scores))] if units is None else units
    return Calibration.fit_by_class(scores, names, labels, CLASSES, promise, "fingerprint", made={"seed": 3})


def by_class(seed=0, n=(60, 25), **promise):
    rng = np.random.default_rng(seed)
    scores = [*rng.exponential(1, n[0]), *rng.exponential(100, n[1])]
    return fit_by_class(scores, ["calm"] * n[0] + ["wild"] * n[1], Promise(0.1, by_class=True, **promise))


def test_by_class_each_class_has_its_alpha_where_one_threshold_gives_all_alarms_to_one_class():
    rng, repeats, n = np.random.default_rng(0), 2000, (57, 23)
    promise = Promise(0.1)
    pooled, own = (dict.fromkeys(CLASSES, 0) for _ in range(2))
    for _ in range(repeats):
        scores = [*rng.exponential(1, n[0]), *rng.exponential(100, n[1])]
        labels = ["calm"] * n[0] + ["wild"] * n[1]
        one, each = fit(scores, promise), fit_by_class(scores, labels, Promise(0.1, by_class=True))
        for label, scale in zip(CLASSES, (1, 100), strict=True):
            new = rng.exponential(scale)
            pooled[label] += new > one.threshold
            own[label] += new > each.of(label).threshold
            assert (new > each.of(label).threshold) == (each.of(label).p_value(new) <= 0.1)
    for label, count in zip(CLASSES, n, strict=True):
        rate = (count + 1 - promise.rank(count)) / (count + 1)
        low, high = stats.binom.ppf([5e-5, 1 - 5e-5], repeats, rate)
        assert low <= own[label] <= high
    assert pooled["calm"] == 0
    assert pooled["wild"] > stats.binom.ppf(1 - 1e-4, repeats, 0.25)


def test_by_class_the_alarms_of_one_calibration_follow_the_beta_binomial_law():
    rng, many = np.random.default_rng(1), 5000
    scores, labels = two_classes(rng, 400)
    card = fit_by_class(scores, labels, Promise(0.1, by_class=True))
    for label, scale in zip(CLASSES, (1, 100), strict=True):
        part = card.of(label)
        assert part.n == labels.count(label)
        low, high = stats.betabinom.ppf([5e-5, 1 - 5e-5], many, part.n + 1 - part.rank, part.rank)
        assert low <= (rng.exponential(scale, many) > part.threshold).sum() <= high


@pytest.mark.parametrize("rule", ["marginal", "pac"])
def test_card_by_class_survives_json(rule):
    card = by_class(n=(80, 40), rule=rule)
    again = Calibration.from_dict(json.loads(json.dumps(card.to_dict())))
    assert again == card and again.to_dict() == card.to_dict()
    assert again.thresholds == {label: card.of(label).threshold for label in CLASSES}
    assert again.n == again.images == 120


def test_cards_from_before_there_were_classes_are_read():
    card = fit(range(30), Promise(0.1))
    old = card.to_dict()
    del old["promise"]["by_class"]
    assert Calibration.from_dict(json.loads(json.dumps(old))) == card
    assert card.of(None) is card and card.of("any") is card and card.parts == {None: card}


@pytest.mark.parametrize("place", ["threshold", "rank", "units"])
def test_card_by_class_that_contradicts_its_scores_is_refused(place):
    content = by_class().to_dict()
    content["classes"]["wild"][place] += 1
    with pytest.raises(CalibrationError, match="contradicts its own scores"):
        Calibration.from_dict(content)


@pytest.mark.parametrize("missing", ["classes", "images", "mask_rule"])
def test_incomplete_card_by_class_is_refused(missing):
    content = by_class().to_dict()
    del content[missing]
    with pytest.raises(CalibrationError, match="incomplete or damaged"):
        Calibration.from_dict(content)


def test_too_few_in_one_class_are_refused_by_name():
    with pytest.raises(CalibrationError) as refusal:
        by_class(n=(60, 7))
    assert str(refusal.value) == (
        "7 calibration images of the class 'wild' are too few for alpha = 0.1 (marginal) in each class: it needs 9; "
        "add normal images, train with fewer templates or a larger split.calibration, set calibration.alpha=0.125, or "
        "calibration.by_class=false."
    )
    with pytest.raises(CalibrationError, match=r"^0 .* 'wild' .* needs 9 \(so have 1 of the 1 others\); .* higher, or"):
        by_class(n=(3, 0))


def test_another_alpha_by_class_needs_the_scores_only():
    card = by_class()
    moved = card.with_promise(Promise(0.05, by_class=True))
    assert all(moved.of(label).scores == card.of(label).scores for label in CLASSES)
    assert all(moved.of(label).threshold == fit(card.of(label).scores, Promise(0.05)).threshold for label in CLASSES)
    with pytest.raises(CalibrationError, match=r"^25 .* 'wild' .* set calibration.alpha=0.0385"):
        card.with_promise(Promise(0.02, by_class=True))
    for calibration, promise in ((card, Promise(0.1)), (fit(range(30), Promise(0.1)), card.promise)):
        with pytest.raises(CalibrationError, match="needs a card for each class"):
            calibration.with_promise(promise)


def test_card_by_class_has_no_threshold_for_all():
    card = by_class()
    for ask in (lambda: card.threshold, lambda: card.rank, lambda: card.p_value(1.0)):
        with pytest.raises(CalibrationError, match="no threshold for all"):
            ask()
    for label, found in (("tame", "'tame'"), (None, "none")):
        with pytest.raises(CalibrationError, match=rf"expected one of its classes \(calm, wild\), found {found}\.$"):
            card.of(label)


def test_a_unit_counts_once_in_each_of_its_classes():
    scores, labels = [1.0, 5.0, 2.0, 9.0, 3.0], ["calm", "wild", "calm", "wild", "wild"]
    card = fit_by_class(scores, labels, Promise(0.5, by_class=True), ["a", "a", "a", "b", "b"])
    assert card.of("calm").scores == (2.0,) and card.of("wild").scores == (5.0, 9.0)
    assert (card.of("calm").images, card.of("wild").images, card.images) == (2, 3, 5)


def test_promise_by_class_in_words_spans_the_classes():
    card = by_class()
    rates = [1000 * (n + 1 - Promise(0.1).rank(n)) / (n + 1) for n in (60, 25)]
    most = math.ceil(1000 * max(Promise(0.1).rate_limit(n) for n in (60, 25)))
    words = card.in_words()
    assert words.startswith(
        "of 1000 normal images of each class (2 classes, each with its own threshold) expect about "
    )
    assert f"about {min(rates):.0f} to {max(rates):.0f} false alarms" in words
    assert words.endswith(f"no more than {most}; from 85 calibration images")


def test_by_class_settings_that_make_no_sense_are_refused():
    assert read_settings({"by_class": True})[0] == Promise(by_class=True)
    with pytest.raises(ConfigError, match=r"calibration\.by_class to be true or false, found 1"):
        Promise(by_class=1)
    with pytest.raises(ConfigError, match="parametric_noise assumes one threshold for all"):
        read_settings({"by_class": True, "mask_rule": "parametric_noise"})


# --- units --------------------------------------------------------------------------------------------------------


def test_a_unit_counts_once_with_its_largest_score():
    scores = [3.0, 9.0, 1.0, 5.0, 4.0, -2.0]
    calibration = fit(scores, Promise(0.25), ["a", "b", "a", "c", "c", "a"])
    assert calibration.scores == (3.0, 5.0, 9.0)
    assert calibration.n == 3
    assert calibration.images == 6


def test_units_with_negative_scores_keep_them():
    assert fit([-5.0, -7.0, -1.0], Promise(0.5), ["a", "a", "b"]).scores == (-5.0, -1.0)


def test_units_are_what_is_counted_against_the_need():
    with pytest.raises(CalibrationError, match=r"^8 independent calibration units \(80 images.*are too few"):
        fit(list(range(80)), Promise(0.1), [str(i % 8) for i in range(80)])


def test_scores_and_units_must_match():
    with pytest.raises(ValueError, match="argument"):
        fit([1.0, 2.0, 3.0], Promise(0.5), ["a", "b"])


@given(
    pairs=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 5)), min_size=1, max_size=40),
    copies=st.lists(st.integers(0, 39), max_size=20),
    alpha=hundredths,
)
@REPEATABLE
def test_further_copies_of_an_image_change_no_decision(pairs, copies, alpha):
    promise = Promise(alpha)
    assume(len({unit for _, unit in pairs}) >= promise.needed)
    doubled = pairs + [pairs[place % len(pairs)] for place in copies]
    plain, more = (fit([s for s, _ in some], promise, [str(u) for _, u in some]) for some in (pairs, doubled))
    assert (more.scores, more.rank, more.threshold) == (plain.scores, plain.rank, plain.threshold)
    assert more.images == len(doubled)


@given(pairs=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 5)), min_size=1, max_size=40))
@REPEATABLE
def test_units_against_grouping_by_hand(pairs):
    expected = sorted(max(s for s, other in pairs if other == unit) for unit in {unit for _, unit in pairs})
    calibration = fit([s for s, _ in pairs], Promise(0.5), [str(unit) for _, unit in pairs])
    assert list(calibration.scores) == expected and calibration.n == len(expected)


# --- settings -----------------------------------------------------------------------------------------------------


def test_settings_make_a_promise_and_a_mask_rule():
    section = {"alpha": 0.1, "rule": "pac", "delta": 0.2, "mask_rule": "region", "tau": 0.5, "region_area": 3}
    assert read_settings(section) == (Promise(0.1, "pac", 0.2), MaskRule("region", 0.5, 3))
    assert read_settings({}) == (Promise(), MaskRule())


def test_unknown_setting_is_refused():
    with pytest.raises(ConfigError, match=r"^calibration has no setting 'gamma'\.$"):
        read_settings({"alpha": 0.1, "gamma": 3})


# --- false discovery rate -----------------------------------------------------------------------------------------

p_values = st.lists(st.integers(1, 20).map(lambda rank: rank / 20), max_size=25)


def stepped_up(values, rate):
    """Benjamini and Hochberg's procedure as they wrote it: the largest k with p_(k) <= k / m * rate, in fractions."""
    ascending = sorted(exact(value) for value in values)
    kept = [p for place, p in enumerate(ascending, 1) if p <= Fraction(place, len(ascending)) * rate]
    return max(kept, default=Fraction(0))


@given(values=p_values, percent=st.integers(1, 99))
@REPEATABLE
def test_q_values_call_what_benjamini_and_hochberg_call(values, percent):
    limit = stepped_up(values, Fraction(percent, 100))
    called = [exact(value) <= limit for value in values]
    found = q_values(values)
    assert len(found) == len(values) and all(0 < q <= 1 for q in found)
    for q, is_called in zip(found, called, strict=True):
        # Away from a tie of q and rate, where the division may round.
        assert (q <= percent / 100) == is_called or q == pytest.approx(percent / 100, rel=1e-12)


@given(values=p_values)
@REPEATABLE
def test_q_values_are_the_smallest_over_larger_p_values(values):
    expected = [
        min(min(1.0, larger * len(values) / sum(v <= larger for v in values)) for larger in values if larger >= p)
        for p in values
    ]
    assert q_values(values) == pytest.approx(expected, rel=1e-12)


def test_q_values_keep_the_false_discovery_rate():
    """Of 40 images per batch 30 are normal; all p-values come from one shared calibration (Bates et al.)."""
    rng, rate, repeats, shares = np.random.default_rng(5), 0.2, 600, []
    for _ in range(repeats):
        calibration = fit(rng.random(60).tolist(), Promise(0.5))
        scores = np.concatenate([rng.random(30), 0.9 + rng.random(10)])
        called = np.array(q_values([calibration.p_value(score) for score in scores])) <= rate
        shares.append(called[:30].sum() / max(1, called.sum()))
    # A mean of shares in [0, 1]: Hoeffding's bound.
    assert np.mean(shares) <= rate + math.sqrt(math.log(1 / UNLIKELY) / (2 * repeats))
    assert np.mean(shares) > 0.05


# --- other libraries ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 9, 37])
def test_p_values_against_crepes(n):
    """crepes' conformal classifier without smoothing, one class, nonconformity = score: its p-value is ours."""
    crepes = pytest.importorskip("crepes")
    rng = np.random.default_rng(n)
    scores, new = rng.integers(0, 12, n).astype(float), np.arange(-1, 14).astype(float)
    classifier = crepes.ConformalClassifier().fit(scores)
    theirs = classifier.predict_p(new[:, None], smoothing=False)[:, 0]
    ours = [fit(scores.tolist(), Promise(0.5)).p_value(score) for score in new]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("alpha", "n"), [(0.5, 2), (0.1, 10), (0.1, 40), (0.05, 25), (0.2, 33), (0.03, 200)])
def test_marginal_threshold_against_mapie(alpha, n):
    """MAPIE's split conformal regression of y = score with a model that predicts 0: its half width is our threshold."""
    regression = pytest.importorskip("mapie.regression")
    dummy = pytest.importorskip("sklearn.dummy")
    scores = np.random.default_rng(n).random(n)
    x = np.zeros((n, 1))
    model = dummy.DummyRegressor(strategy="constant", constant=0.0).fit(x, scores)
    conformal = regression.SplitConformalRegressor(model, confidence_level=1 - alpha, prefit=True).conformalize(
        x, scores
    )
    _, interval = conformal.predict_interval(x[:1])
    assert fit(scores.tolist(), Promise(alpha)).threshold == pytest.approx(interval[0, 1, 0], abs=1e-12)


# --- the card -----------------------------------------------------------------------------------------------------


NOISE = Noise(sigma=0.05 + 0.1, pixels=64 * 64, ks=1 / 3, correlation=0.01, spread=1.1)
MASK_RULES = [MaskRule(), MaskRule("area_fraction", tau=0.1 + 0.2), MaskRule("region", region_area=7)]
every_mask_rule = pytest.mark.parametrize(
    "mask_rule", [*MASK_RULES, MaskRule("parametric_noise")], ids=lambda r: r.name
)


def calibrated(promise=None, mask_rule=None):
    scores = np.random.default_rng(0).random(60, dtype=np.float32).tolist()
    made = {"version": "0.1.0", "seed": 3}
    noise = NOISE if mask_rule and mask_rule.name == "parametric_noise" else None
    units = [str(i // 2) for i in range(60)]
    return Calibration.fit(scores, units, promise or Promise(0.1), "fingerprint", mask_rule, noise, made)


@every_mask_rule
@pytest.mark.parametrize("promise", [Promise(0.1), Promise(0.3, "pac", 0.01)])
def test_card_survives_json_bit_for_bit(promise, mask_rule):
    calibration = calibrated(promise, mask_rule)
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict(), allow_nan=False))) == calibration


@given(scores=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
@REPEATABLE
def test_every_finite_score_survives_json(scores):
    calibration = fit(scores, Promise(0.5))
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration


def test_card_states_what_was_promised():
    calibration = calibrated(Promise(0.3, "pac", 0.01))
    card = calibration.to_dict()
    assert card["promise"] == {"alpha": 0.3, "rule": "pac", "delta": 0.01, "by_class": False}
    assert (card["units"], card["images"], card["fingerprint"]) == (30, 60, "fingerprint")
    assert card["rank"] == Promise(0.3, "pac", 0.01).rank(30)
    assert card["threshold"] == sorted(card["scores"])[card["rank"] - 1]
    assert card["mask_rule"] == {"name": "any_pixel"} and card["noise"] is None
    assert card["rate_interval_95"] == list(Promise(0.3, "pac", 0.01).rate_interval(30))
    expected = 1000 * (31 - card["rank"]) / 31
    assert card["in_words"] == (
        f"of 1000 normal units (groups of images) expect about {expected:.0f} false alarms (any pixel flagged), with "
        "99 % confidence no more than 300; from 30 independent calibration units (60 images; a group, or copies of an "
        "image, count once)"
    )


def test_marginal_promise_in_words():
    limit = stats.beta.ppf(0.95, 2, 18)
    assert fit(range(19), Promise(0.1)).in_words() == (
        "of 1000 normal images expect about 100 false alarms (any pixel flagged), at most 100 on average over "
        f"calibrations, with 95 % confidence no more than {math.ceil(1000 * limit)}; from 19 calibration images"
    )


@pytest.mark.parametrize(
    ("mask_rule", "words"), list(zip(MASK_RULES, WORDS, strict=True)), ids=lambda value: str(value)[:20]
)
def test_a_false_alarm_is_said_in_words(mask_rule, words):
    assert f"false alarms ({words}), at most" in calibrated(mask_rule=mask_rule).in_words()


def test_card_of_assumed_noise_promises_nothing():
    calibration = calibrated(Promise(0.02), MaskRule("parametric_noise"))
    card = calibration.to_dict()
    assert card["rank"] is None and card["rate_interval_95"] is None and card["noise"] == dataclasses.asdict(NOISE)
    assert card["threshold"] == NOISE.threshold(0.02)
    above = sum(score > card["threshold"] for score in card["scores"])
    assert 0 < above < 30
    assert card["in_words"].startswith("assumed, not promised: ")
    assert "expect 20 false alarms (any pixel flagged) in 1000 normal images; of 30 independent" in card["in_words"]
    assert card["in_words"].endswith(f"{above} exceed the threshold")


def test_noise_belongs_to_its_own_rule_only():
    scores, units = range(30), [str(i) for i in range(30)]
    for mask_rule, noise in ((MaskRule("parametric_noise"), None), (MaskRule(), NOISE), (MaskRule("region"), NOISE)):
        with pytest.raises(CalibrationError, match=r"^The mask rule parametric_noise, and no other, needs an estimate"):
            Calibration.fit(scores, units, Promise(), "fingerprint", mask_rule, noise)


def changed(key, change):
    card = json.loads(json.dumps(calibrated().to_dict()))
    card[key] = change(card[key])
    return card


@pytest.mark.parametrize(
    "card",
    [
        changed("threshold", lambda value: value * 0.9),
        changed("threshold", lambda value: math.nextafter(value, 1)),
        changed("promise", lambda promise: promise | {"alpha": 0.5}),
        changed("promise", lambda promise: promise | {"rule": "pac", "alpha": 0.5}),
        changed("scores", lambda scores: [score / 2 for score in scores]),
        changed("scores", lambda scores: scores[:20]),
        changed("rank", lambda rank: rank - 1),
        changed("units", lambda units: units + 1),
        changed("threshold", lambda value: None),
    ],
    ids=["threshold", "next float", "alpha", "rule", "scores", "fewer scores", "rank", "units", "no threshold"],
)
def test_card_that_contradicts_itself_is_refused(card):
    with pytest.raises(CalibrationError, match="contradicts its own scores"):
        Calibration.from_dict(card)


@pytest.mark.parametrize(
    ("card", "sentence"),
    [
        (changed("scores", lambda scores: scores[::-1]), "ascending order"),
        (changed("scores", lambda scores: [*scores[:-1], math.inf]), "NaN or infinite"),
        (changed("scores", lambda scores: []), "ascending order"),
        (changed("mask_rule", lambda rule: {"name": "none"}), "mask_rule to be one of"),
        (changed("mask_rule", lambda rule: {"name": "any_pixel", "size": 3}), "incomplete or damaged"),
        (changed("mask_rule", lambda rule: "any_pixel"), "incomplete or damaged"),
        (changed("mask_rule", lambda rule: {"name": "parametric_noise"}), "needs an estimate of the noise"),
        (changed("noise", lambda noise: dataclasses.asdict(NOISE)), "needs an estimate of the noise"),
        (changed("noise", lambda noise: {"sigma": 1.0}), "incomplete or damaged"),
        (changed("promise", lambda promise: promise | {"alpha": 7}), "alpha between 0 and 1"),
        (changed("scores", lambda scores: ["x"]), "incomplete or damaged"),
    ],
    ids=[
        *("order", "infinite", "no scores", "mask rule", "unknown setting", "no dict", "noise lacks", "noise too many"),
        *("part of noise", "alpha", "text"),
    ],
)
def test_damaged_card_is_refused_in_one_sentence(card, sentence):
    with pytest.raises(BlemishError, match=sentence) as refusal:
        Calibration.from_dict(card)
    assert "\n" not in str(refusal.value)


def test_mask_rule_on_the_card_counts_its_setting():
    card = calibrated(mask_rule=MaskRule("region", region_area=7)).to_dict()
    assert card["mask_rule"] == {"name": "region", "region_area": 7}
    assert Calibration.from_dict(card).mask_rule.region_area == 7


def test_card_with_a_promise_it_cannot_keep_is_refused():
    with pytest.raises(CalibrationError, match="too few"):
        Calibration.from_dict(changed("promise", lambda promise: promise | {"alpha": 0.001}))


@pytest.mark.parametrize(
    "key",
    [
        "promise",
        "scores",
        "threshold",
        "rank",
        "units",
        "mask_rule",
        "noise",
        "made",
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
    for mask_rule in MASK_RULES:
        for other in (Promise(0.05), Promise(0.3, "pac", 0.01), Promise(0.5)):
            again = calibrated(mask_rule=mask_rule).with_promise(other)
            assert again == calibrated(other, mask_rule) and again.to_dict() == calibrated(other, mask_rule).to_dict()
    with pytest.raises(CalibrationError, match="too few"):
        calibrated().with_promise(Promise(0.01))


def test_calibration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        calibrated().scores = (0.0,)

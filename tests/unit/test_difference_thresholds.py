"""Thresholds of difference maps: noise exceeds them as often as promised, and where not, as written."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, signal, stats

from blemish.difference.thresholds import KINDS, MapThreshold
from blemish.errors import ConfigError
from blemish.noise import noise_level, robust_sigma

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=30)
UNLIKELY = 1e-4  # that a test fails by chance, were its seed not fixed
CONFIDENCES = [0.9, 0.95, 0.99, 0.999]
FREE = [kind for kind in KINDS if kind != "fixed"]


def pair(seed, sigma, size, channels=1, both=True):
    """Reference and query (H, W, C) around mid-grey, with independent noise of `sigma` grey levels in one or both."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, sigma / 255, (2, *size, channels))
    return (0.5 + noise * [[[[float(both)]]], [[[1.0]]]]).astype(np.float32)


def l1(reference, query):
    return np.abs(query - reference).mean(axis=2)


def everywhere(score_map):
    return np.ones(score_map.shape, bool)


def flagged(score_map, channels=1, **arguments):
    mask, _ = MapThreshold(**arguments)(score_map, everywhere(score_map), channels)
    return mask


# --- the law of noise ---------------------------------------------------------------------------------------------


@cache
def mean_of_three():
    """Levels, and how often the mean of three half-normal values exceeds them, by convolution of a fine histogram."""
    width = 1e-3
    single = np.diff(stats.halfnorm.cdf(np.arange(0, 9, width)))
    total = signal.fftconvolve(signal.fftconvolve(single, single), single)
    # Each value sits in the middle of its cell, so that cell k of the sum ends at (k + 2) widths.
    return (np.arange(len(total)) + 2) * width / 3, 1 - np.cumsum(total)


def exceeds(level, channels):
    """P(mean over channels of |e| > level) for e standard normal."""
    return stats.halfnorm.sf(level) if channels == 1 else np.interp(level, *mean_of_three())


def exceeded_with(probability, channels):
    """The level exceeded with this probability."""
    if channels == 1:
        return stats.halfnorm.isf(probability)
    levels, shares = mean_of_three()
    return np.interp(-probability, -shares, levels)


def bounds(confidence, channels, clean, defects=0):
    """Smallest and largest count of flagged pixels among the clean ones, and the largest threshold in sigmas.

    The median of all pixels is the order statistic k = (clean + defects) / 2 of the clean ones if each defect lies
    above it; in terms of the law's quantiles, that is a Beta(k, clean + 1 - k) variable. So with probability
    1 - UNLIKELY / 2 sigma is estimated between two known values, and the threshold lies between two known levels. The
    count above a fixed level is binomial, and falls as the level rises: with probability 1 - UNLIKELY, the count
    above the threshold lies between UNLIKELY / 4 quantiles at these two levels.
    """
    k = (clean + defects) / 2
    places = stats.beta.ppf([UNLIKELY / 4, 1 - UNLIKELY / 4], k, clean + 1 - k)
    low, high = (
        exceeded_with(1 - place, channels) / exceeded_with(0.5, channels) * exceeded_with(1 - confidence, channels)
        for place in places
    )
    fewest = stats.binom.ppf(UNLIKELY / 4, clean, exceeds(high, channels))
    most = stats.binom.isf(UNLIKELY / 4, clean, exceeds(low, channels))
    return fewest, most, high


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("both", [True, False], ids=["both", "query"])
@pytest.mark.parametrize("size", [(64, 50), (181, 200), (400, 400)])
@pytest.mark.parametrize("sigma", [1, 5, 20])
def test_noise_is_flagged_as_often_as_promised(sigma, size, both, channels):
    score_map = l1(*pair(0, sigma, size, channels, both))
    for confidence in CONFIDENCES:
        fewest, most, _ = bounds(confidence, channels, score_map.size)
        assert fewest <= flagged(score_map, channels, confidence=confidence, least=0).sum() <= most


def test_the_bounds_of_the_law_are_narrow():
    for confidence, relative in zip(CONFIDENCES, [0.08, 0.11, 0.2, 0.55], strict=True):
        for channels in (1, 3):
            fewest, most, _ = bounds(confidence, channels, 400 * 400)
            promised = (1 - confidence) * 400 * 400
            assert (1 - relative) * promised < fewest < promised < most < (1 + relative) * promised


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("sigma", [3, 20])
def test_single_pixels_of_six_sigma_are_found_and_move_nothing(sigma, confidence, channels):
    reference, query = pair(1, sigma, (300, 300), channels)
    defects = np.zeros(query.shape[:2], bool)
    defects.flat[np.random.default_rng(2).choice(defects.size, defects.size // 100, replace=False)] = True
    query[defects] += np.float32(6 * np.sqrt(2) * sigma / 255)  # sigma of the difference
    mask = flagged(l1(reference, query), channels, confidence=confidence)
    count = int(defects.sum())
    fewest, most, level = bounds(confidence, channels, defects.size - count, count)
    assert fewest <= mask[~defects].sum() <= most
    # The noise of the defect itself takes it below the threshold at times: |mean of 6 + e| > level.
    assert mask[defects].sum() >= stats.binom.ppf(UNLIKELY, count, stats.norm.cdf((6 - level) * np.sqrt(channels)))


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_a_difference_of_six_sigma_is_always_found(confidence):
    score_map = l1(*pair(3, 5, (100, 100), both=False))
    score_map[50, 50] = 6 * 5 / 255
    assert flagged(score_map, confidence=confidence)[50, 50]


def test_equal_channels_are_one_channel():
    score_map = l1(*(np.repeat(image, 3, axis=2) for image in pair(4, 5, (400, 400))))
    fewest, most, _ = bounds(0.999, 1, score_map.size)
    assert fewest <= flagged(score_map).sum() <= most
    assert flagged(score_map, channels=3).sum() > 10 * most  # as the docstring warns


@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("sigma", [1, 2, 5, 10, 20])
def test_whole_grey_levels_keep_the_law_but_for_half_a_step(sigma, confidence):
    reference, query = (np.rint(255 * image + 0.5) for image in pair(5, sigma, (400, 400), both=False))
    score_map = l1(*(np.float32(image / 255) for image in (reference, query)))
    threshold = 255 * MapThreshold(confidence=confidence, least=0).of(score_map.ravel())
    promised = sigma * noise_level(1 - confidence)
    assert threshold == pytest.approx(promised, rel=0.03 if sigma > 1 else 0.12)
    # Rounded noise exceeds the threshold if noise exceeds the next half: within half a step of it.
    half = np.floor(threshold) + 0.5
    fewest, most = stats.binom.interval(1 - UNLIKELY, score_map.size, stats.halfnorm.sf(half / sigma))
    assert fewest <= flagged(score_map, confidence=confidence, least=0).sum() <= most


@pytest.mark.parametrize("sigma", [0.2, 0.5, 0.67])
def test_faint_noise_of_whole_grey_levels_is_up_to_the_least_threshold(sigma):
    reference, query = (np.rint(255 * image + 0.5) for image in pair(6, sigma, (400, 400), both=False))
    score_map = l1(*(np.float32(image / 255) for image in (reference, query)))
    assert robust_sigma(score_map) == 0
    share = 2 * stats.norm.sf(1.5 / sigma)
    for confidence in CONFIDENCES:
        fewest, most = stats.binom.interval(1 - UNLIKELY, score_map.size, share)
        assert fewest <= flagged(score_map, confidence=confidence).sum() <= most <= 0.04 * score_map.size


def test_rounding_alone_shows_nothing():
    levels = np.arange(256, dtype=np.uint8) / np.float32(255)
    assert (np.abs(np.diff(levels)) > np.float32(1 / 255)).any()  # which is why the default is larger
    assert not flagged(np.abs(np.diff(levels))[None], kind="noise").any()


def test_binary_images_that_differ_somewhere_differ_there():
    score_map = np.zeros((60, 60), np.float32)
    score_map[10:20, 10:20] = 1
    for kind in FREE:
        np.testing.assert_array_equal(flagged(score_map, kind=kind), score_map > 0)


# --- noise levels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("probability", [0.9, 0.5, 0.1, 0.01, 1e-3, 1e-6])
def test_levels_against_convolution(probability, channels):
    assert exceeds(noise_level(probability, channels), channels) == pytest.approx(probability, rel=1e-5)


def test_levels_far_out_stay_finite_and_grow():
    for channels in (1, 3):
        levels = [noise_level(10.0**-power, channels) for power in range(1, 200, 20)]
        assert np.isfinite(levels).all() and (np.diff(levels) > 0).all()


def test_two_channels_are_refused():
    with pytest.raises(ConfigError, match="1 or 3 channels, found 2"):
        MapThreshold()(np.ones((4, 4), np.float32), np.ones((4, 4), bool), channels=2)


@pytest.mark.parametrize("channels", [1, 3])
def test_sigma_of_continuous_scores_is_their_scaled_median(channels):
    score_map = l1(*pair(7, 5, (101, 101), channels))
    assert robust_sigma(score_map, channels) == float(np.median(score_map)) / noise_level(0.5, channels)
    assert robust_sigma(score_map, channels) == pytest.approx(5 * np.sqrt(2) / 255, rel=0.03)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("sigma", "relative"), [(1.5, 0.06), (2.2, 0.03), (3.7, 0.02), (7, 0.02)])
def test_sigma_of_whole_grey_levels_is_not_a_step_off(sigma, relative, channels):
    reference, query = (np.rint(255 * image + 0.5) for image in pair(8, sigma, (400, 400), channels, both=False))
    assert robust_sigma(l1(reference, query).astype(np.float32), channels) == pytest.approx(sigma, rel=relative)


def test_sigma_of_few_or_equal_values():
    for values, median in [([0.3] * 9, 0.3), ([0, 0, 0, 1], 0), ([1, 2, 10], 2), ([1, 3], 2), ([5], 5)]:
        assert robust_sigma(np.float32(values)) == pytest.approx(median / noise_level(0.5))


# --- histograms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", [0.6, 0.95, 0.999])
@pytest.mark.parametrize("kind", ["otsu", "hysteresis"])
def test_a_defect_is_found_on_a_map_that_is_mostly_zero(kind, zeros):
    rng = np.random.default_rng(0)
    score_map = np.where(rng.random((200, 200)) < zeros, 0, rng.exponential(0.01, (200, 200))).astype(np.float32)
    score_map[80:96, 80:96] = 0.3
    mask = flagged(score_map, kind=kind)
    assert mask[80:96, 80:96].all()
    assert mask.sum() < 16 * 16 + 0.02 * score_map.size


@pytest.mark.parametrize("zeros", [0.6, 0.95, 0.999])
@pytest.mark.parametrize("kind", ["li", "triangle"])
def test_the_lower_histogram_thresholds_find_the_defect_and_no_zero(kind, zeros):
    rng = np.random.default_rng(0)
    score_map = np.where(rng.random((200, 200)) < zeros, 0, rng.exponential(0.01, (200, 200))).astype(np.float32)
    score_map[80:96, 80:96] = 0.3
    mask = flagged(score_map, kind=kind, least=0)
    assert mask[80:96, 80:96].all()
    assert not mask[score_map == 0].any()


@pytest.mark.parametrize("kind", FREE)
@pytest.mark.parametrize("value", [0.0, 1e-30, 0.3, 1e6])
def test_constant_maps_show_nothing(kind, value):
    for size in [(1, 1), (1, 7), (20, 30)]:
        assert not flagged(np.full(size, value, np.float32), kind=kind).any()


@pytest.mark.parametrize("kind", KINDS)
def test_maps_constant_but_for_rounding_are_no_mistake(kind):
    score_map = np.full((20, 20), 0.3, np.float32)
    score_map[::2] = np.nextafter(np.float32(0.3), np.float32(1))
    _, threshold = MapThreshold(kind)(score_map, everywhere(score_map))
    assert np.isfinite(threshold)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_below_the_least_show_nothing(kind):
    score_map = np.random.default_rng(0).random((20, 20), dtype=np.float32) / 200
    assert not flagged(score_map, kind=kind, least=0.005).any()


# --- masks --------------------------------------------------------------------------------------------------------

kinds = st.sampled_from(KINDS)


@st.composite
def maps(draw):
    """Maps with ties, with many zeros, or with neither, and where they are valid."""
    size = draw(st.tuples(st.integers(1, 24), st.integers(1, 24)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    steps, zeros = draw(st.sampled_from([3, 50, 2**20])), draw(st.sampled_from([0.0, 0.4, 0.9]))
    score_map = np.rint(steps * np.abs(rng.normal(0, 0.2, size))) / steps * (rng.random(size) >= zeros)
    return score_map.astype(np.float32), rng.random(size) >= draw(st.sampled_from([0.0, 0.3, 1.0]))


@given(drawn=maps(), kind=kinds)
@REPEATABLE
def test_only_valid_pixels_are_flagged_and_only_they_have_a_say(drawn, kind):
    score_map, valid = drawn
    mask, threshold = MapThreshold(kind)(score_map, valid)
    assert (mask.shape, mask.dtype) == (score_map.shape, bool)
    assert not (mask & ~valid).any()
    other = np.where(valid, score_map, np.float32(1e9))
    again, same = MapThreshold(kind)(other, valid)
    assert same == threshold
    np.testing.assert_array_equal(again, mask)


@given(drawn=maps(), kind=kinds.filter(lambda kind: kind != "hysteresis"))
@REPEATABLE
def test_the_mask_is_what_lies_above_in_single_and_in_double(drawn, kind):
    score_map, valid = drawn
    mask, threshold = MapThreshold(kind)(score_map, valid)
    assert threshold == np.float32(threshold)
    np.testing.assert_array_equal(mask, valid & (score_map.astype(np.float64) > threshold))


def test_a_tie_is_not_flagged():
    score_map = np.float32([[0.1, np.nextafter(np.float32(0.1), np.float32(1))]])
    np.testing.assert_array_equal(flagged(score_map, kind="fixed", value=0.1), [[False, True]])


@given(drawn=maps(), values=st.tuples(st.floats(0, 1), st.floats(0, 1)))
@REPEATABLE
def test_a_higher_fixed_value_flags_no_more(drawn, values):
    low, high = (MapThreshold("fixed", value=value)(*drawn)[0] for value in sorted(values))
    assert not (high & ~low).any()


@given(
    drawn=maps(), values=st.tuples(st.floats(0.01, 0.9999), st.floats(0.01, 0.9999)), channels=st.sampled_from([1, 3])
)
@REPEATABLE
def test_a_higher_confidence_flags_no_more(drawn, values, channels):
    low, high = (MapThreshold(confidence=value)(*drawn, channels)[0] for value in sorted(values))
    assert not (high & ~low).any()


@given(drawn=maps(), values=st.tuples(st.floats(0, 1), st.floats(0, 1)), kind=kinds)
@REPEATABLE
def test_a_higher_least_flags_no_more(drawn, values, kind):
    low, high = (MapThreshold(kind, least=value)(*drawn)[0] for value in sorted(values))
    assert not (high & ~low).any()


@given(drawn=maps(), kind=st.sampled_from(FREE), power=st.integers(-8, 8))
@REPEATABLE
def test_the_mask_does_not_depend_on_the_unit(drawn, kind, power):
    score_map, valid = drawn
    if not valid.any():
        return
    mask, threshold = MapThreshold(kind, least=0)(score_map, valid)
    again, other = MapThreshold(kind, least=0)(np.ldexp(score_map, power), valid)
    assert other == pytest.approx(np.ldexp(threshold, power), rel=1e-6)
    np.testing.assert_array_equal(again, mask)


@given(drawn=maps())
@REPEATABLE
def test_hysteresis_against_propagation(drawn):
    score_map, valid = drawn
    mask, high = MapThreshold("hysteresis", least=0)(score_map, valid)
    candidates = valid & (score_map > np.float32(high / 2))
    expected = ndimage.binary_propagation(valid & (score_map > high), np.ones((3, 3)), candidates)
    np.testing.assert_array_equal(mask, expected)


def test_hysteresis_follows_a_defect_down_but_not_across_what_is_not_valid():
    score_map = np.zeros((1, 9), np.float32)
    score_map[0, 1:8] = [1, 1, 0.6, 0.6, 0.6, 0, 0.6]
    valid = np.array([[True] * 4 + [False] + [True] * 4])
    mask, threshold = MapThreshold("hysteresis", least=0.4)(score_map, valid)
    assert threshold < 0.6
    score_map[0, 1:3] = 3
    mask, threshold = MapThreshold("hysteresis", least=0.4)(score_map, valid)
    assert 0.6 <= threshold < 1.2
    np.testing.assert_array_equal(mask, [[False] + [True] * 3 + [False] * 5])


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_valid_is_nothing_flagged(kind):
    score_map = np.ones((5, 6), np.float32)
    mask, threshold = MapThreshold(kind, value=0.25, least=0.5)(score_map, np.zeros((5, 6), bool))
    assert not mask.any()
    assert threshold == (0.25 if kind == "fixed" else 0.5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"kind": "ostu"}, r"^Unknown threshold\.kind 'ostu': did you mean 'otsu'\?$"),
        *(({"confidence": value}, rf"threshold\.confidence between 0 and 1.*found {value}") for value in (0, 1, 1.5)),
        *(({name: -0.1}, rf"threshold\.{name} .*>= 0.*-0\.1") for name in ("value", "least")),
        *(({name: np.nan}, "nan") for name in ("value", "least", "confidence")),
    ],
)
def test_settings_out_of_range_are_refused(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence) as refusal:
        MapThreshold(**arguments)
    assert "\n" not in str(refusal.value)

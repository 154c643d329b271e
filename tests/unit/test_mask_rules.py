"""Mask rules: a mask breaks its rule exactly if the rule's score exceeds the threshold, checked by brute force."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage
from skimage.morphology import area_opening

from blemish.errors import ConfigError
from blemish.mask_rules import MASK_RULES, MaskRule

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=60)
sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))
# Few levels make ties, constant maps and maps of zeros common; all are exact in float32.
level_maps = arrays.arrays(np.int64, sizes, elements=st.integers(0, 5)).map(lambda m: (m / 4).astype(np.float32))
rules = st.one_of(
    st.sampled_from([MaskRule(), MaskRule("parametric_noise")]),
    st.one_of(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9]), st.floats(0, 0.999)).map(
        lambda tau: MaskRule("area_fraction", tau=tau)
    ),
    st.integers(1, 90).map(lambda area: MaskRule("region", region_area=area)),
)


def breaks(rule, mask, pixels=None):
    """The rule as its description says it, with regions found by SciPy over 8 neighbours."""
    if rule.name == "area_fraction":
        return mask.sum() > rule.tau * (pixels or mask.size)
    if rule.name == "region":
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        return any((labels == label).sum() >= rule.region_area for label in range(1, count + 1))
    return bool(mask.any())


def levels_around(score_map):
    """0, every value of the map, the floats next to it, and values in between."""
    values = {0.0, *score_map.ravel().tolist()}
    values |= {math.nextafter(value, math.inf) for value in values}
    values |= {math.nextafter(value, 0.0) for value in values}
    ordered = sorted(values)
    return ordered + [(a + b) / 2 for a, b in pairwise(ordered)]


def assert_breaks_exactly_below_its_score(rule, score_map):
    score = rule.score(score_map)
    assert isinstance(score, float) and score >= 0
    for threshold in levels_around(score_map):
        # As in the detector, whose thresholds are scores and so floats of 64 bits.
        mask = score_map.astype(np.float64) > threshold
        assert breaks(rule, mask) == (score > threshold), threshold


def smooth_map(seed, size=(48, 57), sigma=2.0):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=size), sigma)
    return np.maximum(noise, 0).astype(np.float32)


# --- the definition -----------------------------------------------------------------------------------------------


@given(rule=rules, score_map=level_maps)
@settings(REPEATABLE, max_examples=200)
def test_mask_breaks_its_rule_exactly_below_the_score(rule, score_map):
    assert_breaks_exactly_below_its_score(rule, score_map)


@given(rule=rules, score_map=arrays.arrays(np.float32, sizes, elements=st.floats(0, 1e6, width=32)))
@REPEATABLE
def test_mask_of_any_scores_breaks_its_rule_exactly_below_the_score(rule, score_map):
    assert_breaks_exactly_below_its_score(rule, score_map)


@pytest.mark.parametrize("value", [0.0, 0.25, 3e-39, 1e30])
@pytest.mark.parametrize("rule", [MaskRule("area_fraction", tau=0.3), MaskRule("region", region_area=12), MaskRule()])
def test_constant_map_scores_its_value(rule, value):
    score_map = np.full((3, 4), value, np.float32)
    assert rule.score(score_map) == score_map[0, 0]


def test_score_is_one_of_the_maps_own_values_or_zero():
    score_map = smooth_map(0)
    for rule in (MaskRule(), MaskRule("area_fraction", tau=0.02), MaskRule("region", region_area=9)):
        assert np.float32(rule.score(score_map)) in score_map


def test_what_a_rule_lets_pass_scores_zero():
    score_map = np.zeros((10, 10), np.float32)
    score_map[2, 2:6] = 5
    assert MaskRule("area_fraction", tau=0.04).score(score_map) == 0
    assert MaskRule("area_fraction", tau=0.039).score(score_map) == 5
    assert MaskRule("region", region_area=5).score(score_map) == 0
    assert MaskRule("region", region_area=4).score(score_map) == 5


def test_region_grows_over_corners():
    score_map = np.diag(np.arange(1, 9)).astype(np.float32)
    assert [MaskRule("region", region_area=area).score(score_map) for area in (1, 3, 8, 9)] == [8, 6, 1, 0]


def test_two_regions_are_not_one():
    score_map = np.zeros((5, 9), np.float32)
    score_map[1:4, 1:4], score_map[1:4, 5:8] = 2, 3
    score_map[2, 4] = 1  # the bridge
    assert MaskRule("region", region_area=9).score(score_map) == 3
    assert MaskRule("region", region_area=10).score(score_map) == 1


# --- against other implementations --------------------------------------------------------------------------------


def swept(score_map, area):
    """Every distinct value from the highest: the first at which a region is large enough."""
    for value in np.unique(score_map)[::-1]:
        labels, _ = ndimage.label(score_map >= value, structure=np.ones((3, 3)))
        if np.bincount(labels.ravel())[1:].max() >= area:
            return float(value)
    return 0.0


@given(score_map=level_maps, area=st.integers(1, 90))
@REPEATABLE
def test_region_against_a_sweep_over_all_levels(score_map, area):
    assert MaskRule("region", region_area=area).score(score_map) == swept(score_map, area)


def opened(score_map, area):
    """scikit-image's max-tree: the area opening's largest value is the highest level with a region of that area."""
    framed = np.pad(score_map, 1, constant_values=-1)  # scikit-image takes no map of fewer than three rows
    return max(0.0, float(area_opening(framed, area, connectivity=2).max()))


@given(score_map=level_maps, area=st.integers(1, 90))
@REPEATABLE
def test_region_against_the_max_tree_with_ties(score_map, area):
    assert MaskRule("region", region_area=area).score(score_map) == opened(score_map, area)


@pytest.mark.parametrize("area", [1, 2, 16, 60, 500, 48 * 57 - 1, 48 * 57, 48 * 57 + 1])
@pytest.mark.parametrize("sigma", [0.3, 2.0])
def test_region_against_the_max_tree(area, sigma):
    for seed in range(3):
        score_map = smooth_map(seed, sigma=sigma)
        assert MaskRule("region", region_area=area).score(score_map) == opened(score_map, area)


@pytest.mark.parametrize("area", [16, 4000])
def test_region_of_a_large_map_against_the_max_tree(area):
    score_map = smooth_map(7, (300, 400), 3.0)
    assert MaskRule("region", region_area=area).score(score_map) == opened(score_map, area)


@given(score_map=level_maps, tau=st.floats(0, 0.999))
@REPEATABLE
def test_area_fraction_against_sorting(score_map, tau):
    descending = [*sorted(score_map.ravel().tolist(), reverse=True), 0.0]
    allowed = max(count for count in range(score_map.size + 1) if count <= tau * score_map.size)
    assert MaskRule("area_fraction", tau=tau).score(score_map) == descending[allowed]


def test_any_pixel_is_the_maximum_and_so_are_the_others_at_their_strictest():
    score_map = smooth_map(1)
    strictest = [MaskRule(), MaskRule("parametric_noise"), MaskRule("area_fraction", tau=0)]
    for rule in [*strictest, MaskRule("region", region_area=1)]:
        assert rule.score(score_map) == score_map.max()


# --- invariances --------------------------------------------------------------------------------------------------


@given(rule=rules, score_map=level_maps, exponent=st.integers(-20, 20))
@REPEATABLE
def test_another_unit_scales_the_score(rule, score_map, exponent):
    assert rule.score(score_map * np.float32(2.0**exponent)) == rule.score(score_map) * 2.0**exponent


@given(rule=rules, score_map=level_maps, steps=st.lists(st.integers(1, 1000), min_size=5, max_size=5))
@REPEATABLE
def test_any_increasing_scale_carries_the_score_along(rule, score_map, steps):
    scale = np.cumsum([0, *steps]).astype(np.float32)  # 0 stays 0, as it is the floor of every score
    rank = (score_map * 4).astype(int)
    assert rule.score(scale[rank]) == scale[int(rule.score(score_map) * 4)]


@given(rule=rules, score_map=level_maps)
@REPEATABLE
def test_turned_and_mirrored_maps_score_alike(rule, score_map):
    for other in (score_map.T, score_map[::-1], score_map[:, ::-1], np.rot90(score_map)):
        assert rule.score(other) == rule.score(score_map)


@given(rule=rules, score_map=level_maps, worse=level_maps)
@REPEATABLE
def test_a_map_that_is_nowhere_lower_scores_no_lower(rule, score_map, worse):
    rows, columns = (min(sizes) for sizes in zip(score_map.shape, worse.shape, strict=True))
    one, other = score_map[:rows, :columns], worse[:rows, :columns]
    assert rule.score(np.maximum(one, other)) >= max(rule.score(one), rule.score(other))


# --- parts of an image --------------------------------------------------------------------------------------------


@given(rule=rules, score_map=level_maps, data=st.data())
@REPEATABLE
def test_a_part_scores_as_the_image_with_nothing_elsewhere_and_no_more(rule, score_map, data):
    top, left = (data.draw(st.integers(0, side - 1)) for side in score_map.shape)
    bottom = data.draw(st.integers(top + 1, score_map.shape[0]))
    right = data.draw(st.integers(left + 1, score_map.shape[1]))
    alone = np.zeros_like(score_map)
    alone[top:bottom, left:right] = score_map[top:bottom, left:right]
    part = rule.score(score_map[top:bottom, left:right], score_map.size)
    assert part == rule.score(alone) <= rule.score(score_map)


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"name": "nope"},
            r"^Expected calibration\.mask_rule to be one of any_pixel, area_fraction, region, .* 'nope'",
        ),
        *(
            ({"name": "area_fraction", "tau": tau}, rf"^Expected calibration\.tau in \[0, 1\), found {tau}\.$")
            for tau in (1, 2.0, -0.1, math.nan, "x", None)
        ),
        *(
            ({"name": "region", "region_area": area}, rf"^Expected calibration\.region_area >= 1, found {area}\.$")
            for area in (0, -3, 2.5, "x", None)
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence) as refusal:
        MaskRule(**settings)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", MASK_RULES)
def test_rule_survives_being_written(name):
    rule = MaskRule(name, tau=0.25 if name == "area_fraction" else 0.001, region_area=9 if name == "region" else 16)
    assert MaskRule.from_dict(rule.to_dict()) == rule


def test_only_the_setting_that_matters_is_written():
    assert MaskRule().to_dict() == {"name": "any_pixel"}
    assert MaskRule("parametric_noise").to_dict() == {"name": "parametric_noise"}
    assert MaskRule("area_fraction", 0.2, 3).to_dict() == {"name": "area_fraction", "tau": 0.2}
    assert MaskRule("region", 0.2, 3).to_dict() == {"name": "region", "region_area": 3}


def test_only_regions_have_a_smallest_area():
    assert [MaskRule(name, region_area=9).smallest_region for name in MASK_RULES] == [1, 1, 9, 1]

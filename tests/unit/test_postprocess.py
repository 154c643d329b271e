"""Smoothing of score maps, cleaning of masks, regions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from blemish.errors import ConfigError
from blemish.postprocess import Cleaning, Region, Smoothing

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=60)
masks = arrays.arrays(bool, st.tuples(st.integers(1, 16), st.integers(1, 16)))


def scores_for(mask, seed=0):
    return np.random.default_rng(seed).random(mask.shape, dtype=np.float32)


def picture(*rows):
    return np.array([[character == "#" for character in row] for row in rows])


# --- smoothing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.5, 2.0, 7.0])
@pytest.mark.parametrize("size", [(1, 1), (1, 30), (5, 4), (40, 33)])
@pytest.mark.parametrize("value", [1e-6, 0.3, 1e4])
def test_constant_map_stays_constant_up_to_the_border(value, size, sigma):
    smooth = Smoothing(sigma)(np.full(size, value, np.float32))
    np.testing.assert_allclose(smooth, value, rtol=1e-6)


@pytest.mark.parametrize("sigma", [1.0, 2.0, 4.0])
def test_smoothing_against_scipy(sigma):
    score_map = np.random.default_rng(0).random((50, 61), dtype=np.float32)
    expected = ndimage.gaussian_filter(score_map.astype(np.float64), sigma, mode="reflect", truncate=4)
    np.testing.assert_allclose(Smoothing(sigma)(score_map), expected, atol=1e-5)


def test_smoothing_keeps_size_type_sign_and_input():
    score_map = np.random.default_rng(0).random((20, 31), dtype=np.float32)
    before = score_map.copy()
    smooth = Smoothing(1.5)(score_map)
    assert (smooth.shape, smooth.dtype) == ((20, 31), np.float32)
    assert smooth.min() >= 0
    assert smooth.max() <= score_map.max()
    np.testing.assert_array_equal(score_map, before)


def test_no_smoothing_leaves_the_map():
    score_map = np.random.default_rng(0).random((9, 9), dtype=np.float32)
    np.testing.assert_array_equal(Smoothing(0)(score_map), score_map)


def test_negative_sigma_is_refused():
    with pytest.raises(ConfigError, match=r"smoothing\.sigma >= 0, found -1"):
        Smoothing(-1)


# --- cleaning and regions -----------------------------------------------------------------------------------------


def test_regions_have_box_area_and_largest_score():
    mask = picture("##...", ".....", "..###", "..#..")
    scores = np.zeros(mask.shape, np.float32)
    scores[0, 1], scores[3, 2], scores[3, 3] = 0.25, 0.75, 9.0
    _, regions = Cleaning()(mask, scores)
    assert regions == [Region(2, 2, 3, 2, 4, 0.75), Region(0, 0, 2, 1, 2, 0.25)]


def test_score_of_a_region_ignores_a_neighbour_within_its_box():
    mask = picture("####", "#...", "#.#.", "#...")
    scores = np.where(mask, np.float32(0.1), np.float32(0))
    scores[2, 2] = 0.9
    _, regions = Cleaning()(mask, scores)
    assert [(region.area, region.score) for region in regions] == [(1, np.float32(0.9)), (7, np.float32(0.1))]


def test_corners_connect():
    mask = picture("#..", ".#.", "..#")
    _, regions = Cleaning()(mask, scores_for(mask))
    assert [region.area for region in regions] == [3]


def test_regions_below_the_smallest_area_go():
    mask = picture("##.#", "##..", "....", "###.")
    cleaned, regions = Cleaning(min_area=4)(mask, scores_for(mask))
    np.testing.assert_array_equal(cleaned, picture("##..", "##..", "....", "...."))
    assert [region.area for region in regions] == [4]


@pytest.mark.parametrize("min_area", [1, 5])
def test_empty_mask_has_no_region(min_area):
    mask = np.zeros((6, 7), bool)
    cleaned, regions = Cleaning(min_area)(mask, scores_for(mask))
    assert (cleaned.shape, cleaned.any(), regions) == ((6, 7), False, [])


def test_full_mask_is_one_region():
    mask = np.ones((6, 7), bool)
    cleaned, (region,) = Cleaning(42)(mask, scores_for(mask))
    assert cleaned.all()
    assert (region.left, region.top, region.width, region.height, region.area) == (0, 0, 7, 6, 42)


@given(mask=masks, min_area=st.integers(1, 12))
@REPEATABLE
def test_cleaning_only_removes(mask, min_area):
    before = mask.copy()
    cleaned, _ = Cleaning(min_area)(mask, scores_for(mask))
    assert cleaned.dtype == bool
    assert not (cleaned & ~mask).any()
    np.testing.assert_array_equal(mask, before)


@given(mask=masks, min_area=st.integers(1, 12))
@REPEATABLE
def test_cleaning_against_scipy(mask, min_area):
    scores = scores_for(mask)
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    expected = {}
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        part = labels == label
        if part.sum() >= min_area:
            rows, columns = box
            expected[float(scores[part].max())] = (
                columns.start,
                rows.start,
                columns.stop - columns.start,
                rows.stop - rows.start,
                int(part.sum()),
            )
    cleaned, regions = Cleaning(min_area)(mask, scores)
    found = {r.score: (r.left, r.top, r.width, r.height, r.area) for r in regions}
    assert found == expected
    assert len(regions) == len(expected) <= count
    assert [region.score for region in regions] == sorted(expected, reverse=True)
    assert cleaned.sum() == sum(region.area for region in regions)


@given(mask=masks, min_area=st.integers(1, 12))
@REPEATABLE
def test_cleaning_twice_changes_nothing_more(mask, min_area):
    cleaning = Cleaning(min_area)
    once, regions = cleaning(mask, scores_for(mask))
    twice, same = cleaning(once, scores_for(mask))
    np.testing.assert_array_equal(once, twice)
    assert regions == same


@given(mask=masks, area=st.integers(1, 12), other=st.integers(1, 12))
@REPEATABLE
def test_a_larger_smallest_area_removes_more(mask, area, other):
    small, large = sorted((area, other))
    kept_by_small, kept_by_large = (Cleaning(a)(mask, scores_for(mask))[0] for a in (small, large))
    assert not (kept_by_large & ~kept_by_small).any()


@pytest.mark.parametrize("min_area", [0, -3])
def test_area_below_one_is_refused(min_area):
    with pytest.raises(ConfigError, match=rf"cleaning\.min_area >= 1, found {min_area}"):
        Cleaning(min_area)

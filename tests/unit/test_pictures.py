"""Heat maps: one fixed colour scale, and a calm picture where nothing is wrong."""

import numpy as np
import pytest

from blemish.pictures import as_rgb, heat_map

DTYPES = [np.uint8, np.uint16, np.float32]


def image(dtype, channels, size=(20, 30), seed=0):
    rng = np.random.default_rng(seed)
    if dtype == np.float32:
        return rng.random((*size, channels), dtype=np.float32)
    return rng.integers(0, np.iinfo(dtype).max, (*size, channels), dtype=dtype, endpoint=True)


def grey(value=128, size=(20, 30)):
    return np.full((*size, 1), value, np.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3])
def test_rgb_of_every_kind_of_image(dtype, channels):
    pixels = image(dtype, channels)
    rgb = as_rgb(pixels)
    assert (rgb.shape, rgb.dtype) == ((20, 30, 3), np.uint8)
    full_range = {np.uint8: 255, np.uint16: 65535, np.float32: 1}[dtype]
    expected = np.broadcast_to(pixels.astype(np.float64) / full_range * 255, rgb.shape)
    assert np.abs(rgb - expected).max() <= 0.51


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3])
def test_map_of_zeros_leaves_the_image_untouched(dtype, channels):
    pixels = image(dtype, channels)
    picture = heat_map(np.zeros((20, 30), np.float32), 0.1, pixels)
    assert (picture.shape, picture.dtype) == ((20, 30, 3), np.uint8)
    np.testing.assert_array_equal(picture, as_rgb(pixels))


def test_scores_below_half_the_threshold_leave_the_image_untouched():
    pixels = image(np.uint8, 3)
    np.testing.assert_array_equal(heat_map(np.full((20, 30), 0.049, np.float32), 0.1, pixels), pixels)


def test_same_score_same_colour_whatever_else_is_in_the_map():
    score_map = np.full((20, 30), 0.08, np.float32)
    alone = heat_map(score_map, 0.1, grey())
    score_map[10:, :] = np.random.default_rng(0).random((10, 30), dtype=np.float32) * 50
    np.testing.assert_array_equal(heat_map(score_map, 0.1, grey())[:10], alone[:10])


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_colour_depends_on_score_over_threshold(factor):
    score_map = np.linspace(0, 4, 600, dtype=np.float32).reshape(20, 30)
    scaled = heat_map(np.float32(factor) * score_map, factor, grey())
    reference = heat_map(score_map, 1.0, grey())
    # Rounding may move a score by one of 256 levels.
    assert np.abs(scaled.astype(int) - reference).max() <= 6


def test_higher_scores_are_painted_more_strongly():
    score_map = np.array([[0.2, 0.75, 1.0]], np.float32)
    picture = heat_map(score_map, 1.0, grey(size=(1, 3))).astype(int)
    change = np.abs(picture - 128).sum(axis=2)[0]
    assert 0 == change[0] < change[1] < change[2]


def test_scores_beyond_the_scale_keep_its_last_colour():
    colours = heat_map(np.array([[2.0, 3.0, 1e30]], np.float32), 1.0, grey(size=(1, 3)))[0]
    assert len(set(map(tuple, colours.tolist()))) == 1


def test_tall_images_have_no_seam():
    picture = heat_map(np.full((700, 3), 0.9, np.float32), 1.0, grey(size=(700, 3)))
    assert len(set(map(tuple, picture.reshape(-1, 3).tolist()))) == 1


def test_mask_is_outlined_and_its_inside_left():
    mask = np.zeros((20, 30), bool)
    mask[5:15, 8:22] = True
    picture = heat_map(np.zeros((20, 30), np.float32), 1.0, grey(), mask)
    inside = np.zeros_like(mask)
    inside[6:14, 9:21] = True
    np.testing.assert_array_equal((picture != 128).any(axis=2), mask & ~inside)
    assert set(map(tuple, picture[mask & ~inside].tolist())) == {(0, 255, 255)}


def test_empty_mask_draws_nothing():
    score_map = np.full((20, 30), 0.7, np.float32)
    plain = heat_map(score_map, 1.0, grey())
    np.testing.assert_array_equal(heat_map(score_map, 1.0, grey(), np.zeros((20, 30), bool)), plain)


def test_inputs_are_left_as_they_were():
    pixels, score_map, mask = image(np.uint8, 3), np.ones((20, 30), np.float32), np.ones((20, 30), bool)
    before = pixels.copy(), score_map.copy(), mask.copy()
    heat_map(score_map, 0.5, pixels, mask)
    for now, then in zip((pixels, score_map, mask), before, strict=True):
        np.testing.assert_array_equal(now, then)

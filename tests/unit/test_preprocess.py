"""Channels and size of an image before tiling: what each way to size promises, for every dtype."""

from __future__ import annotations

import numpy as np
import pytest

from blemish.errors import ConfigError
from blemish.preprocess import Preprocess

SHAPES = [(40, 60), (60, 40), (41, 97), (300, 31), (30, 30), (31, 31), (1, 90), (90, 1), (1, 1)]
WAYS = ["short_side", "max_side", "size"]


def image(height, width, channels=1, dtype=np.uint8):
    values = np.random.default_rng(0).random((height, width, channels))
    return (values * (1 if dtype is np.float32 else np.iinfo(dtype).max)).astype(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_short_side_is_exact_keeps_the_aspect_and_never_enlarges(shape):
    found = Preprocess(1, short_side=30).scored_size(*shape)
    if min(shape) <= 30:
        assert found == shape
    else:
        assert min(found) == 30
        assert max(found) == pytest.approx(max(shape) * 30 / min(shape), abs=0.5)
        assert (found[0] <= found[1]) == (shape[0] <= shape[1])


@pytest.mark.parametrize("bound", range(1, 200, 7))
def test_short_side_is_exact_for_every_length(bound):
    sizes = [Preprocess(1, short_side=bound).scored_size(side, side + 13) for side in range(bound, 400)]
    assert {height for height, _ in sizes} == {bound}


def test_max_side_bounds_the_longer_side():
    assert Preprocess(1, max_side=30).scored_size(60, 40) == (30, 20)
    assert Preprocess(1, max_side=30).scored_size(20, 30) == (20, 30)
    assert Preprocess(1, max_side=30).scored_size(1, 90) == (1, 30)


def test_a_square_below_one_is_refused():
    with pytest.raises(ConfigError, match=r"image\.square to be a number of at least 1, or null, found '0\.5'"):
        Preprocess(1, short_side=7, square=0.5)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((300, 600), (30, 30)),
        ((600, 300), (30, 30)),
        ((300, 601), (30, 60)),
        ((20, 35), (20, 20)),
        ((20, 60), (20, 60)),
        ((40, 40), (30, 30)),
    ],
)
def test_images_that_are_nearly_square_become_squares_of_their_shorter_side(shape, expected):
    assert Preprocess(1, short_side=30, square=2).scored_size(*shape) == expected
    assert Preprocess(1, square=2).scored_size(*shape) == shape  # which keeps every size
    pixels = np.zeros((*shape, 1), np.uint8)
    assert Preprocess(1, short_side=30, square=2)(pixels).shape == (*expected, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_size_makes_a_square_of_any_image(shape):
    assert Preprocess(1, size=30).scored_size(*shape) == (30, 30)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("given", [1, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_comes_out_as_said_in_its_own_dtype(way, dtype, given, channels):
    preprocess = Preprocess(channels, **{way: 30})
    for shape in SHAPES:
        pixels = image(*shape, given, dtype)
        before = pixels.copy()
        found = preprocess(pixels)
        assert found.shape == (*preprocess.scored_size(*shape), channels)
        assert found.dtype == dtype
        np.testing.assert_array_equal(pixels, before)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("dtype", "value"), [(np.uint8, 201), (np.uint16, 51234), (np.float32, np.float32(0.7))])
def test_an_even_image_keeps_its_value_larger_or_smaller(way, dtype, value):
    for shape in SHAPES:
        found = Preprocess(3, **{way: 30})(np.full((*shape, 3), value, dtype))
        np.testing.assert_allclose(found, value, rtol=1e-6)


def test_shrinking_averages_areas():
    pixels = image(90, 120, 3, np.float32)
    blocks = pixels.reshape(30, 3, 40, 3, 3).mean((1, 3))
    np.testing.assert_allclose(Preprocess(3, short_side=30)(pixels), blocks, atol=1e-6)
    square = image(120, 90, 1, np.float32)
    np.testing.assert_allclose(Preprocess(1, size=30)(square), square.reshape(30, 4, 30, 3, 1).mean((1, 3)), atol=1e-6)


def test_size_keeps_what_lies_where():
    pixels = np.zeros((10, 100, 1), np.uint8)
    pixels[:, 75:] = 200
    found = Preprocess(1, size=40)(pixels)[..., 0]  # four times as high, not half as wide
    assert (found[:, 31:] == 200).all() and (found[:, :29] == 0).all()


def test_an_image_of_the_right_size_is_left_alone():
    pixels = image(30, 30)
    for way in WAYS:
        np.testing.assert_array_equal(Preprocess(1, **{way: 30})(pixels), pixels, strict=True)


@pytest.mark.parametrize(
    ("ways", "sentence"),
    [
        ({"max_side": 5, "short_side": 7}, r"found image\.max_side=5 and image\.short_side=7: set all but one to null"),
        ({"short_side": 7, "size": 9}, r"found image\.short_side=7 and image\.size=9: set all but one to null"),
        ({"max_side": 5, "size": 9}, r"found image\.max_side=5 and image\.size=9: set all but one to null"),
    ],
)
def test_two_ways_to_size_are_one_sentence_that_names_both(ways, sentence):
    with pytest.raises(ConfigError, match=f"^Expected one way to size images, {sentence}\\.$"):
        Preprocess(1, **ways)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [0, -3, 2.5, "large"])
def test_impossible_sizes_are_refused_by_name(way, value):
    with pytest.raises(ConfigError, match=rf"image\.{way} to be a positive whole number or null, found '{value}'"):
        Preprocess(1, **{way: value})


@pytest.mark.parametrize("channels", [0, 2, 4, None])
def test_other_channels_are_refused(channels):
    with pytest.raises(ConfigError, match=r"channels 1 \(grey\) or 3 \(colour\)"):
        Preprocess(channels)

"""Tiling: what is scored tile by tile comes back exact, whatever the sizes."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blemish.data.images import to_unit
from blemish.errors import ConfigError
from blemish.tiling import Tiling, apply_tiled, blend_tiles, pad_to_tile

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=80)
OVERLAPS = [0.0, 0.25, 0.5, 0.9]
SIZES = [(1, 1), (1, 40), (40, 1), (7, 9), (16, 16), (17, 16), (16, 31), (32, 32), (33, 47), (64, 50)]
tilings = st.builds(
    Tiling,
    size=st.integers(1, 17),
    overlap=st.one_of(st.sampled_from(OVERLAPS), st.floats(0, 0.99)),
    batch=st.integers(1, 9),
)


def plus_one(tiles):
    return tiles[:, 0] + np.float32(1)


def random_pixels(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    if dtype == np.float32:
        return rng.random(shape, dtype=np.float32)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def assert_exact(images, tiling):
    expected = to_unit(images)[..., 0] + np.float32(1)
    result = apply_tiled(plus_one, images, tiling)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("size", SIZES)
def test_x_plus_one_comes_back_exactly(size, overlap):
    assert_exact(random_pixels((1, *size, 1), np.float32), Tiling(16, overlap, 5))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_dtype_is_scored_in_the_unit_range(dtype, channels):
    assert_exact(random_pixels((2, 37, 29, channels), dtype), Tiling(12, 0.5, 4))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_images_do_not_mix(count):
    assert_exact(random_pixels((count, 21, 34, 1), np.float32), Tiling(8, 0.25, 3))


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3])),
    tiling=tilings,
    dtype=st.sampled_from([np.uint8, np.uint16, np.float32]),
)
@REPEATABLE
def test_any_size_comes_back_exactly(shape, tiling, dtype):
    assert_exact(random_pixels(shape, dtype), tiling)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3])), tiling=tilings
)
@REPEATABLE
def test_x_plus_one_of_every_channel_comes_back_exactly(shape, tiling):
    images = random_pixels(shape, np.float32)
    result = blend_tiles(lambda tiles: tiles + np.float32(1), images, tiling)
    np.testing.assert_array_equal(result, images + np.float32(1), strict=True)


def test_a_function_may_give_other_channels_than_it_takes():
    images = random_pixels((2, 33, 47, 3), np.float32)
    result = blend_tiles(lambda tiles: np.concatenate([tiles[:, :1], 2 * tiles], axis=1), images, Tiling(16, 0.5, 3))
    np.testing.assert_array_equal(result, np.concatenate([images[..., :1], 2 * images], axis=-1), strict=True)


@pytest.mark.parametrize("value", [1e-30, 1 / 3, 0.1, 12345.678])
def test_a_constant_score_is_that_very_value(value):
    images = np.zeros((1, 45, 52, 1), np.float32)
    result = apply_tiled(
        lambda tiles: np.full(tiles.shape[:1] + tiles.shape[2:], value, np.float32), images, Tiling(16)
    )
    assert (result == np.float32(value)).all()


def test_blend_stays_between_the_tiles_scores():
    levels = iter(range(100))

    def scorer(tiles):
        return np.stack([np.full(tiles.shape[2:], next(levels), np.float32) for _ in tiles])

    result = apply_tiled(scorer, np.zeros((1, 8, 14, 1), np.float32), Tiling(8, 0.25, 1))
    assert (result[:, :, :6] == 0).all()
    assert (result[:, :, 8:] == 1).all()
    assert (np.diff(result[0, 0, 5:9]) > 0).all()


@given(length=st.integers(1, 400), tiling=tilings)
@REPEATABLE
def test_starts_cover_the_axis_in_order(length, tiling):
    starts = tiling.starts(length)
    assert starts[0] == 0
    assert all(a < b for a, b in pairwise(starts))
    assert starts[-1] == max(0, length - tiling.size)
    assert all(b - a <= tiling.size for a, b in pairwise(starts))


@given(length=st.integers(1, 400), tiling=tilings)
@REPEATABLE
def test_neighbours_overlap_at_least_as_asked(length, tiling):
    starts = tiling.starts(length)
    for a, b in pairwise(starts):
        shared = a + tiling.size - b
        # Tiles that move by a single pixel cannot share more.
        assert shared >= tiling.size * tiling.overlap - 1e-9 or b - a == 1


@given(length=st.integers(18, 400), tiling=tilings)
@REPEATABLE
def test_no_more_tiles_than_the_overlap_needs(length, tiling):
    stride = max(1, int(tiling.size * (1 - tiling.overlap)))
    assert len(tiling.starts(length)) - 1 < (length - tiling.size) / stride + 1


@pytest.mark.parametrize(("height", "width", "count"), [(1, 1, 1), (16, 16, 1), (17, 16, 2), (28, 28, 4), (29, 28, 6)])
def test_count_is_the_number_of_tiles_scored(height, width, count):
    tiling, seen = Tiling(16, 0.25, 4), []

    def scorer(tiles):
        seen.append(len(tiles))
        return tiles[:, 0]

    apply_tiled(scorer, np.zeros((1, height, width, 1), np.float32), tiling)
    assert tiling.count(height, width) == count == sum(seen)


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
def test_scorer_sees_at_most_a_batch_of_float32_tiles(batch):
    seen = []

    def scorer(tiles):
        seen.append((tiles.shape, tiles.dtype))
        return tiles[:, 0]

    apply_tiled(scorer, random_pixels((3, 40, 50, 3), np.uint8), Tiling(16, 0.5, batch))
    assert max(shape[0] for shape, _ in seen) <= batch
    assert {shape[1:] for shape, _ in seen} == {(3, 16, 16)}
    assert {dtype for _, dtype in seen} == {np.dtype(np.float32)}


def test_batch_size_does_not_change_scores():
    images = random_pixels((2, 40, 50, 1), np.float32)
    one, many = (apply_tiled(plus_one, images, Tiling(16, 0.5, batch)) for batch in (1, 64))
    np.testing.assert_array_equal(one, many)


def test_input_is_left_as_it_was():
    images = random_pixels((1, 20, 20, 1), np.float32)
    before = images.copy()
    apply_tiled(lambda tiles: np.zeros_like(tiles[:, 0]), images, Tiling(8))
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize("size", [(3, 5), (1, 8), (8, 1), (8, 8), (9, 4)])
def test_padding_keeps_the_image_and_adds_only_its_own_pixels(size):
    images = random_pixels((2, *size, 3), np.uint8)
    padded = pad_to_tile(images, 8)
    assert padded.shape == (2, max(8, size[0]), max(8, size[1]), 3)
    np.testing.assert_array_equal(padded[:, : size[0], : size[1]], images)
    for image, wider in zip(images, padded, strict=True):
        assert set(map(tuple, wider.reshape(-1, 3))) == set(map(tuple, image.reshape(-1, 3)))


def test_padding_reflects():
    row = np.array([0, 1, 2], np.uint8)[None, :, None, None].repeat(6, axis=2)
    assert pad_to_tile(row, 6)[0, :, 0, 0].tolist() == [0, 1, 2, 1, 0, 1]


@pytest.mark.parametrize(
    "wrong", [{"size": 0}, {"size": -8}, {"batch": 0}, {"overlap": -0.1}, {"overlap": 1.0}, {"overlap": float("nan")}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"tiling\.size >= 1, tiling\.batch >= 1 and tiling\.overlap in \[0, 1\)"):
        Tiling(**wrong)

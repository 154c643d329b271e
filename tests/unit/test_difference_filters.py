"""Filters of both images and of their difference map: what each promises, by itself and in a chain."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from blemish.alignment.illumination import equalise
from blemish.difference.filters import FILTERS, Filters
from blemish.difference.map_filters import MAP_FILTERS, MapFilters
from blemish.errors import ConfigError, ImageError
from blemish.postprocess import Smoothing

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=40)
SHAPES = [(40, 33, 1), (41, 64, 3), (6, 7, 1), (6, 200, 3)]


def image(shape=(40, 33, 1), seed=0):
    """(H, W, C) in [0, 1], smooth with noise."""
    rng = np.random.default_rng(seed)
    coarse = ndimage.gaussian_filter(rng.normal(size=shape), (5, 5, 0))
    return (0.5 + coarse / (6 * coarse.std()) + rng.normal(0, 0.02, shape)).clip(0, 1).astype(np.float32)


# --- images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_size_type_range_and_input_are_kept(name, shape):
    before = image(shape)
    given_image = before.copy()
    found = Filters([name])(given_image)
    assert (found.shape, found.dtype) == (shape, np.float32)
    assert found.flags.c_contiguous
    assert found.min() >= 0 and found.max() <= 1
    np.testing.assert_array_equal(given_image, before)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_constant_images_stay_constant(name, value):
    found = Filters([name])(np.full((40, 41, 3), value, np.float32))
    expected = 0.5 if name in ("normalise", "high_pass", "wavelet") else value
    if name == "clahe":
        assert np.ptp(found) == 0
    else:
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", sorted(FILTERS.keys() - {"wavelet"}))
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 30, 3), (2, 2, 1)])
def test_slivers_are_filtered(name, shape):
    found = Filters([name])(np.full(shape, 0.4, np.float32))
    assert found.shape == shape and np.isfinite(found).all()


@pytest.mark.parametrize("name", FILTERS)
def test_any_layout_in_memory(name):
    whole = image((80, 66, 3))
    view = whole[::-2, ::2]
    np.testing.assert_array_equal(Filters([name])(view), Filters([name])(np.ascontiguousarray(view)))


def test_no_filter_and_identity_leave_the_image():
    for chain in ([], ["identity"], ["identity", "identity"]):
        np.testing.assert_array_equal(Filters(chain)(image()), image())


def test_a_chain_is_applied_in_its_order():
    one, other = Filters(["normalise", "low_pass"]), Filters(["low_pass", "normalise"])
    np.testing.assert_array_equal(one(image()), Filters(["low_pass"])(Filters(["normalise"])(image())))
    assert other(image()).std() > one(image()).std() + 0.01  # the last to act decides


def test_normalise_undoes_gain_and_offset():
    found = Filters(["normalise"])(image((40, 33, 3)))
    assert found.mean() == pytest.approx(0.5, abs=5e-3)
    assert found.std() == pytest.approx(0.2, abs=5e-3)
    np.testing.assert_allclose(Filters(["normalise"])(0.4 * image((40, 33, 3)) + np.float32(0.3)), found, atol=1e-5)


def test_normalise_does_not_blow_up_an_even_surface():
    noise = np.random.default_rng(0).normal(0, 1 / 255, (60, 60, 1))
    found = Filters(["normalise"])((0.5 + noise).astype(np.float32))
    assert found.std() == pytest.approx(10 / 255, rel=0.05)


@pytest.mark.parametrize("sigma", [1.0, 4.0])
def test_low_pass_against_scipy(sigma):
    x = image((60, 71, 3))
    expected = ndimage.gaussian_filter(x.astype(np.float64), (sigma, sigma, 0), mode="reflect", truncate=4)
    np.testing.assert_allclose(Filters(["low_pass"], sigma)(x), expected, atol=1e-5)


def test_low_and_high_pass_add_up():
    x = image((60, 71, 3))
    np.testing.assert_allclose(Filters(["low_pass"])(x) + Filters(["high_pass"])(x) - 0.5, x, atol=1e-6)


@pytest.mark.parametrize("wavelet", ["haar", "db2", "sym4", "bior2.2"])
@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("shape", [(64, 64, 1), (61, 80, 3)])
def test_wavelet_details_are_what_the_approximation_leaves_out(wavelet, levels, shape):
    x = image(shape)
    parts = pywt.wavedec2(x.astype(np.float64), wavelet, level=levels, axes=(0, 1))
    smooth = pywt.waverec2([parts[0], *[(None, None, None)] * levels], wavelet, axes=(0, 1))
    expected = (x - smooth[: shape[0], : shape[1]] + 0.5).clip(0, 1)
    np.testing.assert_allclose(Filters(["wavelet"], wavelet=wavelet, levels=levels)(x), expected, atol=1e-5)


@pytest.mark.filterwarnings("error")
def test_wavelet_goes_no_deeper_than_the_image():
    x = image((13, 50, 1))
    for levels in (2, 3, 100):
        np.testing.assert_array_equal(Filters(["wavelet"], levels=levels)(x), Filters(["wavelet"], levels=2)(x))


@pytest.mark.filterwarnings("error")
def test_wavelets_longer_than_the_image_are_refused():
    assert Filters(["wavelet"])(image((6, 6, 1))).shape == (6, 6, 1)
    with pytest.raises(ImageError, match=r"'db2' needs images of at least 6 pixels a side, found 5 x 40: choose"):
        Filters(["wavelet"])(image((5, 40, 1)))


def test_clahe_is_that_of_alignment():
    np.testing.assert_array_equal(Filters(["clahe"])(image((40, 33, 3))), equalise(image((40, 33, 3))))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"chain": ["low_pas"]}, r"^Unknown filter 'low_pas' in preprocessing\.chain: did you mean 'low_pass'"),
        ({"chain": "low_pass"}, r"preprocessing\.chain to be a list of filters, found 'low_pass': write \[low_pass\]"),
        *(({"sigma": value}, rf"preprocessing\.sigma above 0 .*{value}") for value in (0, -1, np.nan, 1e6, np.inf)),
        ({"levels": 0}, r"preprocessing\.levels >= 1, found 4\.0 and 0"),
        ({"chain": ["wavelet"], "wavelet": "db99"}, r"^Unknown preprocessing\.wavelet 'db99'"),
        ({"chain": ["wavelet"], "wavelet": "mexh"}, r"^Unknown preprocessing\.wavelet 'mexh'"),  # not a discrete one
    ],
)
def test_settings_out_of_range_are_refused(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence) as refusal:
        Filters(**arguments)
    assert "\n" not in str(refusal.value)


# --- maps ---------------------------------------------------------------------------------------------------------


def difference_map(size=(40, 33), seed=0):
    return np.abs(np.random.default_rng(seed).normal(0, 0.1, size)).astype(np.float32)


def holes(size=(40, 33), share=0.3, seed=0):
    """True but for a border and some scattered pixels."""
    valid = np.random.default_rng(seed).random(size) >= share
    valid[:, :3] = False
    return valid


def disc(radius):
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return x * x + y * y <= radius * radius


@st.composite
def maps(draw):
    size = draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    seed = draw(st.integers(0, 2**32 - 1))
    valid = np.random.default_rng(seed).random(size) >= draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    return difference_map(size, seed), valid


names = st.sampled_from(sorted(MAP_FILTERS))
sizes = st.fixed_dictionaries(
    {"kernel": st.sampled_from([1, 3, 5, 7]), "sigma": st.floats(0.3, 9), "radius": st.integers(1, 5)}
)


@given(drawn=maps(), name=names, sizes=sizes, other=st.sampled_from([0.0, 1e6, np.nan, np.inf]))
@REPEATABLE
def test_only_valid_pixels_have_a_say(drawn, name, sizes, other):
    score_map, valid = drawn
    before = score_map.copy()
    found = MapFilters([name], **sizes)(score_map, valid)
    assert (found.shape, found.dtype) == (score_map.shape, np.float32)
    assert np.isfinite(found).all() and found.min() >= 0
    assert not found[~valid].any()
    again = MapFilters([name], **sizes)(np.where(valid, score_map, np.float32(other)), valid)
    np.testing.assert_array_equal(again, found)
    np.testing.assert_array_equal(score_map, before)


@given(drawn=maps(), name=names, sizes=sizes, value=st.sampled_from([0.0, 1e-6, 0.3, 1e4]))
@REPEATABLE
def test_constant_maps_stay_constant_up_to_holes_and_borders(drawn, name, sizes, value):
    _, valid = drawn
    found = MapFilters([name], **sizes)(np.full(valid.shape, value, np.float32), valid)
    np.testing.assert_allclose(found[valid], 0 if name == "top_hat" else value, rtol=1e-5)


@given(drawn=maps(), sizes=sizes)
@REPEATABLE
def test_opening_lowers_closing_raises_and_a_second_time_changes_nothing(drawn, sizes):
    score_map, valid = drawn
    opening, closing, top_hat = (MapFilters([name], **sizes) for name in ("opening", "closing", "top_hat"))
    lower, higher = opening(score_map, valid), closing(score_map, valid)
    assert (lower <= score_map)[valid].all() and (score_map <= higher)[valid].all()
    np.testing.assert_array_equal(opening(lower, valid), lower)
    np.testing.assert_array_equal(closing(higher, valid), higher)
    np.testing.assert_array_equal(top_hat(score_map, valid), np.where(valid, score_map - lower, 0))


@pytest.mark.parametrize("radius", [1, 2, 4])
def test_opening_and_closing_against_scipy(radius):
    score_map, valid = difference_map(), holes()

    def erode(x):
        return ndimage.grey_erosion(np.where(valid, x, np.inf), footprint=disc(radius), mode="constant", cval=np.inf)

    def dilate(x):
        return ndimage.grey_dilation(np.where(valid, x, -np.inf), footprint=disc(radius), mode="constant", cval=-np.inf)

    for name, expected in (("opening", dilate(erode(score_map))), ("closing", erode(dilate(score_map)))):
        found = MapFilters([name], radius=radius)(score_map, valid)
        np.testing.assert_array_equal(found, np.where(valid, expected, 0))


@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 11])
def test_median_against_scipy(kernel):
    score_map, valid = difference_map(), np.ones((40, 33), bool)
    expected = ndimage.median_filter(score_map, kernel, mode="nearest")
    np.testing.assert_array_equal(MapFilters(["median"], kernel=kernel)(score_map, valid), expected)


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_median_does_not_sink_towards_holes(kernel):
    valid = holes(share=0.8)
    found = MapFilters(["median"], kernel=kernel)(np.full(valid.shape, 0.3, np.float32), valid)
    assert (found[valid] == np.float32(0.3)).all()


@pytest.mark.parametrize("sigma", [0.7, 2.0])
def test_gaussian_is_the_weighted_mean_of_valid_pixels(sigma):
    score_map, valid = difference_map(), holes()
    found = MapFilters(["gaussian"], sigma=sigma)(score_map, valid)
    total, weight = (
        ndimage.gaussian_filter(x.astype(np.float64), sigma, mode="reflect") for x in (score_map * valid, valid)
    )
    np.testing.assert_allclose(found[valid], (total / weight)[valid], rtol=5e-3)
    np.testing.assert_array_equal(
        MapFilters(["gaussian"], sigma=sigma)(score_map, np.ones_like(valid)), Smoothing(sigma)(score_map)
    )


def test_single_pixels_go_or_stay_as_the_filter_says():
    score_map, valid = np.full((20, 20), 0.1, np.float32), np.ones((20, 20), bool)
    score_map[10, 10], score_map[4, 4] = 1, 0
    peak, hole = (10, 10), (4, 4)
    left = {name: MapFilters([name])(score_map, valid) for name in MAP_FILTERS}
    assert left["median"][peak] == left["opening"][peak] == left["closing"][hole] == np.float32(0.1)
    assert left["top_hat"][peak] == np.float32(1) - np.float32(0.1)
    assert left["closing"][peak] == left["identity"][peak] == 1 and left["opening"][hole] == 0
    assert 0.1 < left["gaussian"][peak] < 0.3


def test_a_chain_of_map_filters_is_applied_in_its_order():
    score_map, valid = difference_map(), holes()
    chain = MapFilters(["median", "identity", "gaussian"])
    first = MapFilters(["median"])(score_map, valid)
    np.testing.assert_array_equal(chain(score_map, valid), MapFilters(["gaussian"])(first, valid))
    assert not np.array_equal(chain(score_map, valid), MapFilters(["gaussian", "median"])(score_map, valid))
    np.testing.assert_array_equal(MapFilters()(score_map, valid), np.where(valid, score_map, 0))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"chain": ["openin"]}, r"^Unknown filter 'openin' in postprocessing\.chain: did you mean 'opening'"),
        ({"chain": "median"}, r"postprocessing\.chain to be a list of filters, found 'median': write \[median\]"),
        *(({"kernel": value}, rf"postprocessing\.kernel to be an odd .* {value}") for value in (0, -3, 4, 3.0)),
        *(({"sigma": value}, rf"postprocessing\.sigma above 0 .*found {value}") for value in (0, -1.5, np.nan, np.inf)),
        *(({"radius": value}, rf"postprocessing\.radius .* 1 to 256 .*found {value}") for value in (0, -1, 1.5)),
    ],
)
def test_map_settings_out_of_range_are_refused(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence) as refusal:
        MapFilters(**arguments)
    assert "\n" not in str(refusal.value)

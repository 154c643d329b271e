"""Spatial normalisation: NumPy's own statistics, whatever the blocks, and whose images keep the promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from blemish import normalisation
from blemish.calibration import Calibration, Promise
from blemish.errors import ConfigError, ImageError
from blemish.mask_rules import MaskRule
from blemish.normalisation import KINDS, NormalisationSettings, SpatialNormalisation

UNLIKELY = 1e-6
STATISTICS = [kind for kind in KINDS if kind != "none"]
every_kind = pytest.mark.parametrize("kind", STATISTICS)


def maps_of(count, size=(11, 13), seed=0):
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0.5, 2, size)
    return [(1 + np.abs(spread * rng.normal(size=size))).astype(np.float32) for _ in range(count)]


def by_numpy(maps, kind):
    stacked = np.stack(maps).astype(np.float64)
    if kind == "mean_std":
        return stacked.mean(0), stacked.std(0, ddof=1)
    return np.median(stacked, 0), stats.median_abs_deviation(stacked, 0, scale="normal")


# --- the statistics -----------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("count", [7, 8, 40])
def test_statistics_against_numpy_and_scipy(kind, count):
    maps = maps_of(count)
    fitted = SpatialNormalisation.fit(iter(maps), kind)
    location, scale = by_numpy(maps, kind)
    # scipy divides by the quantile itself, 0.674490, instead of multiplying by 1.4826.
    np.testing.assert_allclose(fitted.location, location, rtol=1e-6)
    np.testing.assert_allclose(fitted.scale, scale + np.median(scale), rtol=1e-5)
    assert fitted.location.dtype == fitted.scale.dtype == np.float32
    np.testing.assert_allclose(fitted(maps[3]), np.maximum((maps[3] - location) / fitted.scale, 0), atol=1e-4)


@every_kind
@pytest.mark.parametrize("block", [1, 100, 1001])
def test_blocks_change_no_bit(kind, block, monkeypatch):
    maps = maps_of(10)
    whole = SpatialNormalisation.fit(maps, kind)
    monkeypatch.setattr(normalisation, "_BLOCK", block)
    parts = SpatialNormalisation.fit(maps, kind)
    np.testing.assert_array_equal(parts.location, whole.location, strict=True)
    np.testing.assert_array_equal(parts.scale, whole.scale, strict=True)


def test_kinds_differ_where_an_outlier_is():
    maps = maps_of(9)
    maps[0] = maps[0] + np.float32(1000)
    robust, mean_std = (SpatialNormalisation.fit(maps, kind) for kind in ("robust", "mean_std"))
    assert robust.location.max() < 10 < mean_std.location.min()
    assert robust.scale.max() < 10 < mean_std.scale.min()


@every_kind
def test_pixels_that_never_varied_do_not_divide_by_zero(kind):
    maps = maps_of(9)
    for score_map in maps:
        score_map[:3] = 0.5
    fitted = SpatialNormalisation.fit(maps, kind)
    assert fitted.scale.min() > 0
    assert fitted.scale[0, 0] == pytest.approx(np.median(by_numpy(maps, kind)[1]), rel=1e-5)
    assert np.isfinite(fitted(maps[0] + 1)).all()


@every_kind
@pytest.mark.parametrize("varying", [0, 1])
def test_maps_that_hardly_varied_do_not_divide_by_zero(kind, varying):
    maps = [np.full((4, 5), 0.25, np.float32) for _ in range(5)]
    if varying:
        for place, score_map in enumerate(maps):
            score_map[0, 0] = place
    fitted = SpatialNormalisation.fit(maps, kind)
    np.testing.assert_array_equal(fitted(maps[0])[1:], 0)
    above = fitted(maps[0] + np.float32(1))
    assert np.isfinite(above).all() and above[1:].min() > 0


@every_kind
def test_location_scores_zero_and_below_it_too(kind):
    fitted = SpatialNormalisation.fit(maps_of(9), kind)
    np.testing.assert_array_equal(fitted(fitted.location), 0)
    np.testing.assert_array_equal(fitted(fitted.location / 2), 0)
    np.testing.assert_allclose(fitted(fitted.location + 3 * fitted.scale), 3, rtol=1e-5)


@given(seed=st.integers(0, 1000), kind=st.sampled_from(STATISTICS), order=st.permutations(range(6)))
@settings(derandomize=True, deadline=None, max_examples=30)
def test_order_of_images_does_not_matter(seed, kind, order):
    maps = maps_of(6, (3, 4), seed)
    one, other = SpatialNormalisation.fit(maps, kind), SpatialNormalisation.fit([maps[i] for i in order], kind)
    np.testing.assert_allclose(other.location, one.location, rtol=1e-6)
    np.testing.assert_allclose(other.scale, one.scale, rtol=1e-6)


# --- refusals -----------------------------------------------------------------------------------------------------


@every_kind
def test_maps_of_other_sizes_are_refused(kind):
    with pytest.raises(ImageError, match=r"^Spatial normalisation expects score maps of one size, 11 x 13, found 13 x"):
        SpatialNormalisation.fit([*maps_of(3), *maps_of(1, (13, 11))], kind)
    fitted = SpatialNormalisation.fit(maps_of(3), kind)
    for shape in ((11, 14), (13, 11), (1, 13)):
        with pytest.raises(ImageError, match=r"11 x 13, found .*: give aligned images of equal size, or set norm"):
            fitted(np.zeros(shape, np.float32))
        with pytest.raises(ImageError):
            fitted.check(shape)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_are_refused(count):
    with pytest.raises(ConfigError, match=rf"^Spatial normalisation needs at least two normal images, found {count}: "):
        SpatialNormalisation.fit(maps_of(count), "robust")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kind": "x"}, r"^Expected normalisation\.kind to be one of none, robust, mean_std, found 'x'\.$"),
        ({"source": "calibration"}, r"^Expected normalisation\.source to be one of .*, found 'calibration'\.$"),
        ({"images": 1}, r"^Expected normalisation\.images >= 2, found 1\.$"),
        ({"images": -5}, r"^Expected normalisation\.images >= 2, found -5\.$"),
    ],
)
def test_settings_out_of_range_are_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        NormalisationSettings(**settings)


@pytest.mark.parametrize(("count", "most"), [(5, 200), (200, 200), (1000, 7), (3, 2), (2, 2)])
def test_images_are_chosen_evenly(count, most):
    chosen = NormalisationSettings("robust", images=most).choose(range(count))
    assert len(chosen) == len(set(chosen)) == min(count, most)
    assert chosen[0] == 0 and chosen[-1] == count - 1
    assert max(np.diff(chosen)) - min(np.diff(chosen)) <= 1


def test_nothing_to_choose_from_is_nothing_chosen():
    assert NormalisationSettings("robust").choose([]) == []


# --- whose images keep the promise --------------------------------------------------------------------------------


def false_alarms(kind, own, repeats, n=9, alpha=0.1):
    """How often a new image is flagged; `own`: the statistics come from the calibration images themselves."""
    rng, rule, count = np.random.default_rng(17), MaskRule(), 0
    for _ in range(repeats):
        maps = np.abs(rng.normal(size=(2 * n + 1, 6, 8))).astype(np.float32)
        calibration, others, new = maps[:n], maps[n : 2 * n], maps[2 * n]
        normalise = SpatialNormalisation.fit(calibration if own else others, kind)
        scores = [rule.score(normalise(score_map)) for score_map in calibration]
        card = Calibration.fit(scores, [str(i) for i in range(n)], Promise(alpha), "fingerprint")
        count += rule.score(normalise(new)) > card.threshold
    return count, repeats, alpha


@every_kind
def test_promise_holds_if_the_statistics_come_from_other_images(kind):
    count, repeats, alpha = false_alarms(kind, own=False, repeats=400)
    low, high = stats.binom.ppf([UNLIKELY, 1 - UNLIKELY], repeats, alpha)
    assert low <= count <= high


@every_kind
def test_promise_breaks_if_they_come_from_the_calibration_images(kind):
    count, repeats, alpha = false_alarms(kind, own=True, repeats=700)
    assert count > stats.binom.ppf(1 - UNLIKELY, repeats, alpha)

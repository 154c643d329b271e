"""The noise behind `parametric_noise`: recovered where it is Gaussian, called doubtful where it is not."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import ndimage, stats

from blemish.errors import CalibrationError
from blemish.noise import Noise, NoiseEstimator

UNLIKELY = 1e-6
SIZE = (64, 96)


def gaussian(seed, sigma=1.0, size=SIZE):
    """The absolute difference of two pictures that differ by white Gaussian noise."""
    return np.abs(sigma * np.random.default_rng(seed).normal(size=size)).astype(np.float32)


def estimated(maps):
    estimator = NoiseEstimator()
    for score_map in maps:
        estimator.add(score_map)
    return estimator.result()


# --- sigma --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [1e-4, 0.03, 1.0, 250.0])
def test_sigma_is_recovered(sigma):
    # The median of 6144 half-normal values scatters by 1.2 % of sigma, that of 9 of them by 0.5 %.
    noise = estimated(gaussian(seed, sigma) for seed in range(9))
    assert noise.sigma == pytest.approx(sigma, rel=0.02)
    assert noise.pixels == 64 * 96 and 1 <= noise.spread < 1.15 and noise.warnings() == []


def test_sigma_is_the_median_deviation_of_the_signed_noise():
    signed = 0.7 * np.random.default_rng(3).normal(size=SIZE).astype(np.float32)
    expected = stats.median_abs_deviation(signed, axis=None, center=lambda *_args, **_keywords: 0.0, scale="normal")
    assert estimated([np.abs(signed)]).sigma == pytest.approx(expected, rel=1e-6)


def test_sigma_hardly_moves_with_five_percent_of_defects():
    clean = gaussian(0)
    dirty = clean.copy()
    rows = round(0.05 * SIZE[0])
    dirty[:rows] = 100
    assert estimated([dirty]).sigma == pytest.approx(estimated([clean]).sigma, rel=0.08)
    # The root mean square, which a defect does move, would be 20 times too large.
    assert np.sqrt((dirty**2).mean()) > 10


def test_sigma_of_most_images_counts():
    noise = estimated([*(gaussian(seed) for seed in range(8)), gaussian(8, 40.0)])
    assert noise.sigma == pytest.approx(1, rel=0.02) and noise.spread == pytest.approx(40, rel=0.05)


def test_largest_image_sets_the_number_of_pixels():
    assert estimated([gaussian(0, size=(8, 8)), gaussian(1, size=(20, 9)), gaussian(2, size=(3, 5))]).pixels == 180


# --- the threshold ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "pixels"), [(0.05, 1), (0.05, 1000), (0.3, 40), (0.001, 10**6)])
def test_threshold_is_exceeded_by_any_pixel_with_chance_alpha(alpha, pixels):
    threshold = Noise(2.0, pixels, 0, 0, 1).threshold(alpha)
    none_exceeds = stats.halfnorm(scale=2.0).cdf(threshold) ** pixels
    assert 1 - none_exceeds == pytest.approx(alpha, rel=1e-5)
    assert threshold == np.float32(threshold)


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_false_alarm_rate_of_true_noise_is_alpha(alpha):
    repeats, size = 2000, (24, 30)
    # Of so many maps the error of sigma costs little against the band of the simulation.
    threshold = estimated(gaussian(seed, size=size) for seed in range(400)).threshold(alpha)
    rng = np.random.default_rng(11)
    alarms = sum(np.abs(rng.normal(size=size)).max() > threshold for _ in range(repeats))
    low, high = stats.binom.ppf([1e-4, 1 - 1e-4], repeats, [0.85 * alpha, 1.15 * alpha])
    assert low <= alarms <= high


def test_threshold_falls_with_alpha_and_grows_with_sigma_and_pixels():
    noise = Noise(1.0, 1000, 0, 0, 1)
    assert noise.threshold(0.01) > noise.threshold(0.1) > Noise(1.0, 100, 0, 0, 1).threshold(0.1)
    assert Noise(3.0, 1000, 0, 0, 1).threshold(0.1) == pytest.approx(3 * noise.threshold(0.1))


# --- warnings -----------------------------------------------------------------------------------------------------

DOUBTFUL = {
    "smoothed": ([ndimage.gaussian_filter(gaussian(seed), 1.5) for seed in range(4)], "neighbouring pixels"),
    "squared": ([gaussian(seed) ** 2 for seed in range(4)], "not the absolute value of Gaussian noise"),
    "uniform": ([np.random.default_rng(seed).random(SIZE, np.float32) for seed in range(4)], "not the absolute value"),
    "heavy tail": (
        [np.abs(np.random.default_rng(seed).standard_t(2, SIZE)).astype(np.float32) for seed in range(4)],
        "not the absolute value",
    ),
    "shifted": ([gaussian(seed) + np.float32(1) for seed in range(4)], "not the absolute value"),
    "other sigmas": ([gaussian(seed, sigma) for seed, sigma in enumerate((1, 1, 1.2, 1.8))], "differs between images"),
}


@pytest.mark.parametrize(("maps", "sentence"), DOUBTFUL.values(), ids=DOUBTFUL.keys())
def test_maps_that_contradict_the_assumption_are_called_doubtful(maps, sentence):
    warnings = estimated(maps).warnings()
    assert any(sentence in warning for warning in warnings)
    assert all("\n" not in warning for warning in warnings)


def test_correlation_in_either_direction_is_found():
    striped = np.repeat(gaussian(0)[:, ::4], 4, axis=1)
    for score_map in (striped, np.ascontiguousarray(striped.T)):
        noise = estimated([score_map])
        assert noise.correlation > 0.6 and any("not white" in warning for warning in noise.warnings())


def test_correlation_against_numpy():
    score_map = ndimage.gaussian_filter(gaussian(5, size=(300, 400)), (0, 0.7))
    expected = np.corrcoef(score_map[:, 1:].ravel(), score_map[:, :-1].ravel())[0, 1]
    assert estimated([score_map]).correlation == pytest.approx(expected, abs=0.01)


def test_distance_against_scipy():
    score_map = np.random.default_rng(0).random(SIZE, np.float32)
    sigma = float(np.median(score_map)) / stats.halfnorm.median()
    exact = stats.kstest(score_map.ravel() / sigma, stats.halfnorm.cdf).statistic
    assert estimated([score_map]).ks == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
def test_maps_of_one_line_are_taken(size):
    noise = estimated([gaussian(0, size=size)])
    assert np.isfinite([noise.sigma, noise.ks, noise.correlation, noise.spread]).all()


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", [1.0, 0.5])
def test_map_that_is_mostly_zero_is_refused(zeros):
    score_map = gaussian(0, size=(10, 10))
    score_map[: round(10 * zeros) + (zeros < 1)] = 0
    with pytest.raises(
        CalibrationError, match=r"^At least half of a score map is exactly 0.*another calibration\.mask"
    ):
        NoiseEstimator().add(score_map)


def test_no_map_is_refused():
    with pytest.raises(CalibrationError, match="at least one normal image"):
        NoiseEstimator().result()


def test_estimate_survives_json_bit_for_bit():
    noise = estimated([gaussian(0), gaussian(1)])
    assert Noise.from_dict(json.loads(json.dumps(noise.to_dict()))) == noise

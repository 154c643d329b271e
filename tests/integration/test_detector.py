"""The one code path, driven by a NumPy scorer: no torch is needed from image to decision."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from blemish.calibration import Calibration, Promise
from blemish.data.images import check_pixels, to_unit
from blemish.detector import TileDetector
from blemish.errors import BlemishError, CalibrationError, ImageError, NotCalibrated
from blemish.mask_rules import MaskRule
from blemish.noise import Noise
from blemish.normalisation import NormalisationSettings, SpatialNormalisation
from blemish.pipeline import fit_normalisation
from blemish.postprocess import Cleaning, Smoothing
from blemish.preprocess import Preprocess
from blemish.tiling import Tiling


def brightness(tiles):
    """The score of a pixel is its value."""
    return tiles.mean(axis=1)


def detector(channels=1, max_side=None, sigma=0.0, min_area=1, size=16, scorer=brightness, batch=7, overlap=0.25):
    tiling = Tiling(size, overlap, batch)
    return TileDetector(
        scorer,
        Preprocess(channels, max_side),
        tiling,
        Smoothing(sigma),
        cleaning=Cleaning(min_area),
        fingerprint="print",
    )


def calibrated(threshold=0.7, **settings):
    scores = [threshold * (rank + 1) / 9 for rank in range(9)]
    card = Calibration.fit(scores, [str(score) for score in scores], Promise(0.1), "print")
    return detector(**settings).calibrated(card)


def noise(shape, seed=0, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, 200, shape, dtype)


@pytest.mark.parametrize("shape", [(16, 16), (17, 33), (5, 41), (3, 3), (1, 1), (64, 7), (100, 101)])
def test_map_has_the_images_own_size_and_values(shape):
    pixels = noise(shape)
    np.testing.assert_array_equal(detector().score_map(pixels), to_unit(pixels), strict=True)


@pytest.mark.parametrize("shape", [(40, 60), (61, 37), (20, 9)])
def test_shrunk_image_gets_a_map_of_its_own_size(shape):
    score_map = detector(max_side=32).score_map(np.full(shape, 100, np.uint8))
    assert score_map.shape == shape and score_map.dtype == np.float32
    np.testing.assert_allclose(score_map, 100 / 255, rtol=1e-6)


def test_shrunk_map_lies_where_the_image_is_bright():
    pixels = np.zeros((80, 120), np.uint8)
    pixels[20:40, 80:100] = 200
    score_map = detector(max_side=60).score_map(pixels)
    assert score_map[24:36, 84:96].min() > 0.7 and score_map[:, :70].max() == 0 and score_map[50:].max() == 0


def test_every_dtype_gives_the_same_map():
    pixels = noise((20, 30))
    maps = [detector().score_map(p) for p in (pixels, pixels.astype(np.uint16) * 257, to_unit(pixels), pixels / 255)]
    for other in maps[1:]:
        np.testing.assert_allclose(other, maps[0], atol=1e-7)


def test_grey_and_colour_become_what_the_detector_wants():
    grey, colour = noise((20, 30)), noise((20, 30, 3))
    tall = detector(channels=3).score_map(grey)
    np.testing.assert_allclose(tall, to_unit(grey), atol=1e-7)
    luma = cv2.cvtColor(colour, cv2.COLOR_RGB2GRAY)
    np.testing.assert_array_equal(detector(channels=1).score_map(colour), to_unit(luma), strict=True)


def test_smoothing_keeps_the_mean_and_lowers_the_peak():
    pixels = np.zeros((40, 50), np.uint8)
    pixels[20, 25] = 255
    smooth = detector(sigma=2.0).score_map(pixels)
    assert smooth.max() < 0.1
    np.testing.assert_allclose(smooth.sum(), 1.0, rtol=1e-3)


def test_flat_map_stays_flat_at_the_borders():
    smooth = detector(sigma=3.0).score_map(np.full((33, 47), 51, np.uint8))
    np.testing.assert_allclose(smooth, 0.2, rtol=1e-6)


def test_many_images_score_as_one_by_one():
    shapes = [(16, 16), (16, 16), (20, 30), (20, 30), (20, 30, 3), (5, 5), (20, 30), (20, 30), (90, 90)]
    images = [noise(shape, seed) for seed, shape in enumerate(shapes)]
    images += [noise((20, 30), 50, np.uint16), noise((20, 30), 51)]
    for batch in (1, 3, 100):
        one_path = detector(sigma=1.0, batch=batch)
        maps = list(one_path.score_maps(iter(images)))
        assert len(maps) == len(images)
        for image, score_map in zip(images, maps, strict=True):
            np.testing.assert_array_equal(score_map, one_path.score_map(image), strict=True)


def test_large_images_do_not_wait_for_a_full_batch(monkeypatch):
    """They are one tile each when shrunk, but are held, and get their maps, at their own size."""
    monkeypatch.setattr("blemish.detector.PIXELS_AT_ONCE", 3 * 40 * 60)
    drawn, ahead, maps = 0, [], []

    def images():
        nonlocal drawn
        for seed in range(10):
            drawn += 1
            yield noise((40, 60), seed)

    for batch in detector(max_side=16, batch=32).score_batches(images()):
        ahead.append(drawn - len(maps))
        maps += batch
    assert len(maps) == 10 and max(ahead) == 4
    monkeypatch.setattr("blemish.detector.PIXELS_AT_ONCE", 1)
    assert [len(batch) for batch in detector(max_side=16).score_batches(images())] == [1] * 10


def test_tiling_batch_changes_no_value():
    pixels = noise((70, 90))
    np.testing.assert_array_equal(detector(batch=1).score_map(pixels), detector(batch=64).score_map(pixels))


def test_scorer_sees_full_tiles_in_the_unit_interval_and_no_more_than_a_batch():
    seen = []

    def scorer(tiles):
        seen.append((tiles.shape, tiles.dtype, float(tiles.min()), float(tiles.max())))
        return brightness(tiles)

    list(detector(scorer=scorer, batch=4, channels=3).score_maps([noise((50, 60, 3), seed) for seed in range(3)]))
    assert all(shape[0] <= 4 and shape[1:] == (3, 16, 16) for shape, *_ in seen)
    assert all(dtype == np.float32 and low >= 0 and high <= 1 for _, dtype, low, high in seen)


def test_no_images_give_no_maps():
    assert list(detector().score_maps([])) == []


def test_scorer_that_says_no_expectation_explains_with_none():
    pixels = noise((40, 50))
    score_map, expected = detector(sigma=1.0).explain(pixels)
    np.testing.assert_array_equal(score_map, detector(sigma=1.0).score_map(pixels), strict=True)
    assert expected is None


class Darker:
    """Expects every pixel at half its value."""

    def __call__(self, tiles):
        return brightness(tiles)

    def explain(self, tiles):
        return np.concatenate([brightness(tiles)[:, None], tiles / 2], axis=1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(16, 16), (45, 70), (5, 9)])
def test_explained_map_is_the_score_map_with_what_was_expected(channels, shape):
    pixels = noise((*shape, channels))
    one_path = detector(scorer=Darker(), channels=channels, sigma=1.5)
    score_map, expected = one_path.explain(pixels)
    np.testing.assert_array_equal(score_map, one_path.score_map(pixels), strict=True)
    np.testing.assert_array_equal(expected, to_unit(pixels) / 2, strict=True)


def test_expectation_has_the_size_that_is_scored():
    score_map, expected = detector(scorer=Darker(), max_side=30).explain(noise((60, 40)))
    assert score_map.shape == (60, 40) and expected.shape == (30, 20, 1)


# --- normalisation ------------------------------------------------------------------------------------------------


def normalised(shape, **settings):
    statistics = [np.random.default_rng(seed).random(shape, np.float32) for seed in range(3)]
    return replace(detector(**settings), normalisation=SpatialNormalisation(statistics[0], 0.1 + statistics[1]))


def test_maps_are_normalised_after_smoothing():
    pixels, one_path = noise((20, 30)), normalised((20, 30), sigma=2.0)
    np.testing.assert_array_equal(
        one_path.score_map(pixels), one_path.normalisation(detector(sigma=2.0).score_map(pixels)), strict=True
    )


def test_maps_are_normalised_at_the_size_that_is_scored():
    pixels = noise((80, 60))
    with_size = normalised((40, 30), max_side=40)
    with_size.check_size(pixels)
    assert with_size.score_map(pixels).shape == (80, 60)


@pytest.mark.parametrize("kind", ["robust", "mean_std"])
def test_statistics_come_from_the_maps_at_the_size_that_is_scored(kind, tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for number, path in enumerate(paths):
        Image.fromarray(noise((80, 60), number)).save(path)
    judge = detector(max_side=40, sigma=1.0)
    found = fit_normalisation(judge, paths, NormalisationSettings(kind), progress=False)
    small = detector(sigma=1.0)
    maps = np.stack([small.score_map(judge.preprocess(check_pixels(noise((80, 60), number)))) for number in range(5)])
    expected = np.median(maps, 0) if kind == "robust" else maps.mean(0)
    assert found.location.shape == (40, 30)
    np.testing.assert_allclose(found.location, expected, rtol=1e-5)
    assert replace(judge, normalisation=found).score_map(noise((80, 60), 9)).shape == (80, 60)


def test_images_of_another_size_are_refused_if_maps_are_normalised():
    with_size = normalised((20, 30))
    for judge in (with_size.check_size, with_size.score_map):
        with pytest.raises(ImageError, match="20 x 30, found 21 x 30"):
            judge(noise((21, 30)))
    detector().check_size(noise((21, 30)))


# --- mask rules ---------------------------------------------------------------------------------------------------


def ruled(mask_rule, threshold, **settings):
    scores = [threshold * (rank + 1) / 19 for rank in range(19)]
    card = Calibration.fit(scores, [str(score) for score in scores], Promise(0.05), "print", mask_rule)
    return detector(**settings).calibrated(card)


def squares(*sides, shape=(40, 60)):
    """Bright squares of these sides on black, far from each other."""
    pixels = np.zeros(shape, np.uint8)
    for place, side in enumerate(sides):
        pixels[4 : 4 + side, 4 + 14 * place : 4 + 14 * place + side] = 250 - place
    return pixels


def test_area_fraction_flags_images_by_area_and_shows_every_pixel():
    judge = ruled(MaskRule("area_fraction", tau=10 / 2400), 0.5)
    few, many = judge(squares(3)), judge(squares(3, 2))
    assert not few.is_anomalous and few.mask.sum() == 9 and few.image_score == 0 and few.p_value == 1
    assert many.is_anomalous and many.mask.sum() == 13 and many.p_value == 0.05
    # Neither region breaks the rule alone.
    assert [region.p_value for region in many.regions] == [1, 1]


def test_region_shows_only_what_breaks_the_rule():
    judge = ruled(MaskRule("region", region_area=9), 0.5)
    small, large = judge(squares(2, 2, 2)), judge(squares(2, 3, 4))
    assert not small.is_anomalous and not small.mask.any() and small.regions == []
    assert large.is_anomalous and [region.area for region in large.regions] == [9, 16]
    assert large.mask.sum() == 25 and [region.p_value for region in large.regions] == [0.05, 0.05]
    assert large.image_score == np.float32(249 / 255)


def test_cleaning_above_the_region_area_removes_more_of_the_mask_only():
    prediction = ruled(MaskRule("region", region_area=4), 0.5, min_area=10)(squares(2, 3, 4))
    assert prediction.is_anomalous and [region.area for region in prediction.regions] == [16]


def test_region_p_value_is_the_images_had_it_no_other_region():
    rng = np.random.default_rng(3)
    for rule in (MaskRule(), MaskRule("area_fraction", tau=0.01), MaskRule("region", region_area=4)):
        scores = np.linspace(0.1, 0.4, 19).tolist()
        card = Calibration.fit(scores, list(map(str, scores)), Promise(0.5), "print", rule)
        judge = detector(sigma=1.5).calibrated(card)
        pixels = np.where(rng.random((40, 60)) < 0.04, 255, 30).astype(np.uint8)
        prediction = judge(pixels)
        assert len(prediction.regions) > 2
        for region in prediction.regions:
            rows, columns = (
                slice(region.top, region.top + region.height),
                slice(region.left, region.left + region.width),
            )
            labels, _ = ndimage.label(prediction.mask[rows, columns], structure=np.ones((3, 3)))
            scores = prediction.score_map[rows, columns]
            (own,) = {labels[place] for place in zip(*np.nonzero((scores == region.score) & (labels > 0)), strict=True)}
            alone = np.zeros_like(prediction.score_map)
            alone[rows, columns] = np.where(labels == own, scores, 0)
            assert region.p_value == judge.calibration.p_value(rule.score(alone))
            assert region.p_value >= prediction.p_value
        if rule.name != "area_fraction":
            assert min(region.p_value for region in prediction.regions) == prediction.p_value


def test_assumed_noise_decides_by_its_own_threshold():
    noise_found = Noise(sigma=0.01, pixels=2400, ks=0, correlation=0, spread=1)
    card = Calibration.fit([0.9], ["a"], Promise(0.05), "print", MaskRule("parametric_noise"), noise_found)
    judge = detector().calibrated(card)
    assert card.threshold < 0.06
    below, above = np.full((40, 60), card.threshold, np.float32), np.full((40, 60), card.threshold, np.float32)
    above[3, 4] = np.nextafter(np.float32(card.threshold), np.float32(1))
    assert not judge(below).is_anomalous and not judge(below).mask.any()
    assert judge(above).is_anomalous and judge(above).mask.sum() == 1


def test_wrong_pixels_are_refused():
    with pytest.raises(ImageError):
        detector().score_map(np.zeros((4, 4, 2), np.uint8))


def test_prediction_of_a_normal_and_a_defective_image():
    normal, defective = np.full((20, 30), 100, np.uint8), np.full((20, 30), 100, np.uint8)
    defective[4:8, 10:16], defective[15:17, 2:4] = 250, 230
    judge = calibrated(0.7)
    passed, failed = judge(normal), judge(defective)
    assert not passed.is_anomalous and not passed.mask.any() and passed.regions == [] and passed.p_value == 0.5
    assert failed.is_anomalous and failed.p_value == 0.1
    assert failed.image_score == failed.score_map.max() == np.float32(250 / 255)
    boxes = [(r.left, r.top, r.width, r.height, r.area) for r in failed.regions]
    assert boxes == [(10, 4, 6, 4, 24), (2, 15, 2, 2, 4)]
    np.testing.assert_array_equal(failed.mask, defective > 200, strict=True)


@pytest.mark.parametrize("seed", range(8))
def test_image_is_anomalous_exactly_if_its_mask_is_not_empty(seed):
    judge = calibrated(0.4 + 0.06 * seed, sigma=1.5)
    prediction = judge(noise((33, 47), seed))
    np.testing.assert_array_equal(prediction.mask, prediction.score_map > judge.calibration.threshold, strict=True)
    assert prediction.is_anomalous == prediction.mask.any() == (len(prediction.regions) > 0)


def test_score_at_the_threshold_is_normal():
    judge = calibrated(float(np.float32(200 / 255)))
    assert not judge(np.full((8, 8), 200, np.uint8)).is_anomalous
    assert judge(np.full((8, 8), 201, np.uint8)).is_anomalous


def test_calibration_images_raise_no_more_alarms_than_promised():
    images = [noise((20, 30), seed) for seed in range(19)]
    plain = detector(sigma=1.0)
    scores = [float(score_map.max()) for score_map in plain.score_maps(images)]
    judge = plain.calibrated(Calibration.fit(scores, list(map(str, range(19))), Promise(0.2), "print"))
    assert sum(judge(image).is_anomalous for image in images) == 3


def test_small_regions_are_cleaned_away():
    pixels = np.zeros((20, 30), np.uint8)
    pixels[2, 3], pixels[10:14, 10:14] = 255, 250
    prediction = calibrated(0.7, min_area=5)(pixels)
    assert [region.area for region in prediction.regions] == [16]
    assert not prediction.mask[2, 3] and prediction.mask.sum() == 16


def test_path_and_array_give_the_same_prediction(tmp_path, save):
    pixels = noise((20, 30))
    path = save(tmp_path / "a.png", pixels)
    judge = calibrated()
    for given in (path, str(path)):
        np.testing.assert_array_equal(judge(given).score_map, judge(pixels).score_map, strict=True)


def test_decision_without_calibration_is_refused():
    with pytest.raises(NotCalibrated, match="blemish calibrate"):
        detector()(noise((20, 30)))


def test_calibration_of_another_detector_is_refused():
    card = calibrated().calibration
    with pytest.raises(CalibrationError, match="another detector"):
        replace(detector(), fingerprint="other").calibrated(card)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sigma", [0.0, 2.0])
def test_map_that_is_not_finite_is_refused(value, sigma):
    def scorer(tiles):
        scores = brightness(tiles).copy()
        scores[0, 3, 4] = value
        return scores

    with pytest.raises(CalibrationError, match="NaN or infinite"):
        calibrated(scorer=scorer, sigma=sigma)(noise((20, 30)))


@pytest.mark.parametrize(
    "shape", [lambda b, t: (b, 1, t, t), lambda b, t: (b, t // 2, t // 2), lambda b, t: (b - 1, t, t)]
)
def test_scorer_of_the_wrong_shape_is_found_out(shape):
    def scorer(tiles):
        return np.zeros(shape(len(tiles), tiles.shape[-1]), np.float32)

    with pytest.raises((BlemishError, ValueError)):
        detector(scorer=scorer).score_map(noise((40, 40)))

"""Ensembles of NumPy scorers: joined maps against the same by hand, units, fingerprints, what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from blemish.calibration import Calibration, Promise
from blemish.data.images import to_unit
from blemish.detector import TileDetector
from blemish.ensemble import Ensemble, high_quantile, learn_units
from blemish.errors import CalibrationError, ConfigError, DataError, ImageError
from blemish.normalisation import SpatialNormalisation
from blemish.postprocess import Cleaning, Smoothing
from blemish.preprocess import Preprocess
from blemish.tiling import Tiling


def brightness(tiles):
    return tiles.mean(axis=1)


def darkness(tiles):
    return 1 - tiles.mean(axis=1)


class Explained:
    """Scores brightness, and expects the negative of what it sees."""

    def __call__(self, tiles):
        return tiles.mean(axis=1)

    def explain(self, tiles):
        return np.concatenate([tiles.mean(axis=1, keepdims=True), 1 - tiles], axis=1)


def member(scorer=brightness, name="bright", channels=1, size=None, tile=16, normalisation=None):
    return TileDetector(
        scorer,
        Preprocess(channels, size=size),
        Tiling(tile, batch=3),
        Smoothing(0),
        normalisation,
        cleaning=Cleaning(),
        fingerprint=name,
    )


def ensemble(*members, units=(0.5, 2.0), join="mean"):
    members = members or (member(), member(darkness, "dark", channels=3, size=24))
    return Ensemble.of(members, units, join, Cleaning())


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


IMAGES = [noise((20, 30)), noise((20, 30), 1), noise((17, 40, 3), 2), noise((20, 30), 3), noise((50, 9), 4)]


@pytest.mark.parametrize(("join", "by_hand"), [("mean", np.mean), ("max", np.max)])
def test_maps_are_those_of_the_members_joined_by_hand(join, by_hand):
    both = ensemble(join=join)
    for image, score_map in zip(IMAGES, both.score_maps(IMAGES), strict=True):
        apart = [one.score_map(image) / unit for one, unit in zip(both.members, both.units, strict=True)]
        np.testing.assert_allclose(score_map, by_hand(apart, axis=0), rtol=1e-6)
        assert score_map.dtype == np.float32 and score_map.shape == image.shape[:2]


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_images_are_gone_through_once_and_few_are_held(monkeypatch, at_once):
    monkeypatch.setattr("blemish.ensemble._IMAGES_AT_ONCE", at_once)
    drawn, ahead = 0, []

    def images():
        nonlocal drawn
        for image in IMAGES:
            drawn += 1
            yield image

    maps = []
    for batch in ensemble().score_batches(images()):
        ahead.append(drawn - len(maps))
        maps += [scored.score_map for scored in batch]
    assert drawn == len(maps) == len(IMAGES)
    assert max(ahead) <= at_once + 1
    for image, score_map in zip(IMAGES, maps, strict=True):
        np.testing.assert_allclose(score_map, ensemble().score_map(image), rtol=1e-6)


def test_large_images_are_held_one_at_a_time(monkeypatch):
    monkeypatch.setattr("blemish.ensemble.PIXELS_AT_ONCE", 700)
    assert [len(batch) for batch in ensemble().score_batches(IMAGES)] == [1] * len(IMAGES)


def test_first_member_that_tells_what_it_expected_is_asked():
    image = noise((16, 16))
    assert ensemble().explain(image)[1] is None
    both = ensemble(member(), member(Explained(), "told"), member(Explained(), "late", channels=3), units=(1, 1, 1))
    score_map, expected = both.explain(image)
    np.testing.assert_allclose(expected[..., 0], 1 - to_unit(image), atol=1e-6)
    np.testing.assert_allclose(score_map, both.score_map(image), rtol=1e-6)
    assert next(both.score_batches([image]))[0].expected is None


def test_an_ensemble_may_be_a_member():
    inner = ensemble(join="max")
    outer = ensemble(inner, member(), units=(2.0, 1.0))
    image = IMAGES[0]
    np.testing.assert_allclose(outer.score_map(image), (inner.score_map(image) / 2 + to_unit(image)) / 2, rtol=1e-6)


def test_fingerprint_is_of_members_units_and_join():
    made = {
        one.fingerprint
        for one in (
            ensemble(),
            ensemble(join="max"),
            ensemble(units=(0.5, 2.1)),
            ensemble(member(), member(name="another")),
            ensemble(member(), member(darkness, "dark"), member(name="third"), units=(0.5, 2.0, 1.0)),
        )
    }
    assert len(made) == 5
    assert ensemble().fingerprint == ensemble().fingerprint


def test_a_card_of_another_ensemble_is_refused():
    card = Calibration.fit(range(9), [str(n) for n in range(9)], Promise(0.1), ensemble().fingerprint)
    assert ensemble().calibrated(card).decide(np.full((4, 4), 100, np.float32)).is_anomalous
    with pytest.raises(CalibrationError, match="another detector"):
        ensemble(join="max").calibrated(card)


def test_sizes_are_those_that_every_member_takes():
    statistics = SpatialNormalisation(np.zeros((20, 30), np.float32), np.ones((20, 30), np.float32))
    both = ensemble(member(), member(name="normalised", normalisation=statistics))
    both.check_size(IMAGES[0])
    with pytest.raises(ImageError, match="one size"):
        both.check_size(IMAGES[2])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ensemble(member(), units=(1.0,)), "two or more runs to combine, found 1"),
        (lambda: ensemble(member(), member()), "found the same detector as number 1 and number 2"),
        (lambda: ensemble(join="sum"), "Expected join to be one of mean, max, found 'sum'"),
        (lambda: ensemble(units=(1.0, 0.0)), "a positive unit for each"),
        (lambda: ensemble(units=(1.0, np.nan)), "a positive unit for each"),
        (lambda: replace(ensemble(), units=(1.0,)), "a positive unit for each"),
    ],
)
def test_what_makes_no_ensemble_is_refused(make, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make()


@pytest.mark.parametrize("share", [0, 0.5, 0.9, 0.999, 1])
def test_quantile_over_maps_is_that_of_all_values(share):
    maps = [np.random.default_rng(seed).gamma(1, size=(7, 5 + seed)).astype(np.float32) for seed in range(20)]
    pooled = np.concatenate([one.ravel() for one in maps])
    assert high_quantile(maps, len(pooled), share) == np.quantile(pooled, share, method="higher")


def test_units_are_quantiles_of_each_members_maps(tmp_path, save):
    paths = [save(tmp_path / f"{number}.png", noise((30, 40), number)) for number in range(3)]
    pooled = np.concatenate([to_unit(noise((30, 40), number)).ravel() for number in range(3)])
    units = learn_units([member(), member(darkness, "dark")], paths, progress=False)
    expected = [np.quantile(values, 0.999, method="higher") for values in (pooled, 1 - pooled)]
    np.testing.assert_allclose(units, expected, rtol=1e-6)


def test_what_gives_no_unit_is_refused(tmp_path, save):
    path = save(tmp_path / "image.png", noise((30, 40)))
    (tmp_path / "broken.png").write_bytes(path.read_bytes()[:60])
    silent, diverged = member(lambda tiles: 0 * tiles[:, 0]), member(lambda tiles: np.nan * tiles[:, 0])
    for detector, paths, error, sentence in (
        (silent, [path], ConfigError, "number 1 scores 99.9% of the pixels of 1 normal images as 0"),
        (diverged, [path], DataError, "NaN or infinite"),
        (member(), [tmp_path / "broken.png"], (DataError, ImageError), "broken.png"),
        (member(), [], ConfigError, "no run was fitted to"),
    ):
        with pytest.raises(error, match=sentence):
            learn_units([detector], paths, progress=False)

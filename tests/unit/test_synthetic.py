"""Synthetic defects, and the figure without labels that they give."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from blemish import load_detector
from blemish.data.images import read_pixels, to_unit
from blemish.data.synthetic import KINDS, SMALLEST_SIDE, add_defect, deal_kinds
from blemish.detector import ScoredImage
from blemish.errors import ConfigError, ImageError
from blemish.evaluation import synthetic
from blemish.evaluation.synthetic import METRICS, check_metric, read_metric, synthetic_defects_figure, write_figure

SHAPE = (120, 150)


def picture(seed, shape=SHAPE, channels=1, dtype=np.uint8):
    """Smooth noise and some grain: every kind of defect can be seen on it."""
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.normal(size=(*shape, channels)), (0, 0), 3).reshape(*shape, channels)
    unit = (0.5 + 0.12 * noise / noise.std() + rng.normal(0, 0.01, noise.shape)).clip(0, 1)
    return unit.astype(dtype) if dtype == np.float32 else (unit * np.iinfo(dtype).max).astype(dtype)


def drawn(kind, seed, **how):
    clean = picture(seed, **how)
    return clean, add_defect(clean, picture(seed + 100, **how), kind, np.random.default_rng(seed))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_mask_is_where_the_image_changes_visibly(kind, channels, dtype):
    for seed in range(6):
        clean, defect = drawn(kind, seed, channels=channels, dtype=dtype)
        assert defect.kind == kind
        assert defect.image.shape == clean.shape and defect.image.dtype == dtype
        assert defect.mask.shape == SHAPE and defect.mask.dtype == bool
        change = np.abs(to_unit(defect.image) - to_unit(clean)).max(axis=2)
        assert (change[defect.mask] > 0).all() and change[defect.mask].max() > 0.02
        blurred = cv2.GaussianBlur(change, (0, 0), 2)
        assert blurred[~defect.mask].max() < blurred[defect.mask].max()
        assert np.median(change) == 0  # a defect is local


@pytest.mark.parametrize("kind", KINDS)
def test_defects_are_drawn_anew_by_every_seed_and_alike_by_one(kind):
    clean, other = picture(0), picture(1)
    before = clean.copy()
    first, again, another = (add_defect(clean, other, kind, np.random.default_rng(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.image, again.image, strict=True)
    np.testing.assert_array_equal(first.mask, again.mask, strict=True)
    assert (first.image != another.image).any()
    np.testing.assert_array_equal(clean, before, strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_range_from_small_to_a_quarter_of_the_short_side(kind):
    extents = []
    for seed in range(40):
        _, defect = drawn(kind, seed, shape=(200, 300))
        rows, columns = np.nonzero(defect.mask)
        extents.append(max(np.ptp(rows), np.ptp(columns)) + 1)
    assert max(extents) <= 0.5 * 200  # a crack is longer than it is far, a patch may lie across
    assert min(extents) <= 0.08 * 200 < 0.12 * 200 <= max(extents)


def test_a_warp_that_cannot_be_seen_becomes_another_kind():
    even = np.full((64, 64, 1), 128, np.uint8)
    kinds = Counter(add_defect(even, even, "warp", np.random.default_rng(seed)).kind for seed in range(20))
    assert set(kinds) <= {"crack", "stain", "dent"} and len(kinds) > 1


@pytest.mark.parametrize("level", [0, 255])
def test_black_and_white_images_get_visible_defects_too(level):
    image = np.full((SMALLEST_SIDE, 40, 3), level, np.uint8)
    for kind in KINDS:
        assert add_defect(image, image, kind, np.random.default_rng(0)).mask.any()


def test_other_images_may_have_another_size_and_other_channels():
    clean = picture(0, channels=3)
    for other in (picture(1, shape=(20, 17)), picture(1, shape=(400, 90)), picture(1, dtype=np.uint16)):
        assert add_defect(clean, other, "patch", np.random.default_rng(0)).image.shape == clean.shape


def test_images_too_small_for_a_defect_are_refused():
    with pytest.raises(ImageError, match="at least 16 x 16"):
        add_defect(picture(0, shape=(15, 40)), picture(1), "crack", np.random.default_rng(0))


@pytest.mark.parametrize(("images", "most", "pairs"), [(100, 100, 100), (150, 100, 100), (7, 100, 42), (30, 100, 90)])
def test_kinds_are_dealt_evenly(images, most, pairs):
    dealt = deal_kinds(images, most)
    assert len(dealt) == pairs == len(set(dealt))
    by_kind = Counter(kind for _, kind in dealt)
    assert len(by_kind) == len(KINDS) and max(by_kind.values()) - min(by_kind.values()) <= pairs // images + 1


# --- the figure -----------------------------------------------------------------------------------------------


def seeing(blind=False):
    """A detector for even images of level 100, which it knows by heart, or one that sees nothing."""

    def score_batches(images):
        for image in images:
            far = np.abs(image[..., 0].astype(np.float32) - 100)
            yield [ScoredImage(np.zeros_like(far) if blind else far, None, None)]

    def decide(score_map, label):
        mask = score_map > 1
        return SimpleNamespace(
            image_score=float(score_map.max()), is_anomalous=mask.any(), score_map=score_map, mask=mask
        )

    return SimpleNamespace(score_batches=score_batches, decide=decide)


@pytest.fixture
def even_images(tmp_path, save):
    return [save(tmp_path / f"{number}.png", np.full((40, 40), 100, np.uint8)) for number in range(5)]


def test_figure_is_one_for_a_detector_that_sees_and_half_for_a_blind_one(even_images):
    figure = synthetic_defects_figure(seeing(), even_images, 20, progress=False)
    assert figure["image_auroc"] == 1.0 and figure["pixel_auroc"] > 0.99
    assert (figure["images"], figure["defective"]) == (5, 20)
    assert sum(kind["defective"] for kind in figure["kinds"].values()) == 20
    blind = synthetic_defects_figure(seeing(blind=True), even_images, 20, progress=False)
    assert blind["image_auroc"] == blind["pixel_auroc"] == blind["mean"] == 0.5


def test_figure_depends_on_the_images_and_the_seed_alone(tiny_run, tiny_data):
    detector = load_detector(tiny_run)
    paths = sorted((tiny_data / "train/good").glob("*.png"))[:8]
    first = synthetic_defects_figure(detector, paths, 16, progress=False)
    assert synthetic_defects_figure(detector, paths[::-1], 16, progress=False) == first
    assert synthetic_defects_figure(detector, paths, 16, seed=1, progress=False) != first


def test_figure_takes_no_more_images_than_asked_for_and_skips_tiny_ones(even_images, save, tmp_path, monkeypatch):
    tiny = save(tmp_path / "tiny.png", np.full((8, 8), 100, np.uint8))
    seen = []
    monkeypatch.setattr(synthetic, "read_pixels", lambda path: seen.append(path) or read_pixels(path))
    figure = synthetic_defects_figure(seeing(), [tiny, *even_images], 3, progress=False)
    assert figure["images"] == figure["defective"] == 3 and tiny not in seen and len(set(seen)) == 3
    assert synthetic_defects_figure(seeing(), [tiny], 3, progress=False) is None


def test_large_images_are_fewer(even_images, monkeypatch):
    monkeypatch.setattr(synthetic, "_PIXELS", 2 * 40 * 40)
    monkeypatch.setattr(synthetic, "_FEWEST", 1)
    assert synthetic_defects_figure(seeing(), even_images, 20, progress=False)["images"] == 2


def test_metric_is_read_from_the_run_folder(even_images, tmp_path):
    assert read_metric(tmp_path, METRICS[0]) is None
    figure = synthetic_defects_figure(seeing(), even_images, 20, progress=False)
    write_figure(tmp_path, figure, {"software": "blemish"})
    values = [read_metric(tmp_path, name) for name in ("synthetic/image_auroc", "synthetic/pixel_auroc")]
    assert values == [figure["image_auroc"], figure["pixel_auroc"]]
    assert read_metric(tmp_path, "synthetic/mean") == sum(values) / 2


@pytest.mark.parametrize("name", ["image_auroc", "test/image_auroc", None])
def test_a_metric_that_needs_test_labels_is_refused(name):
    with pytest.raises(ConfigError, match="labelled test images are not offered"):
        check_metric(name)

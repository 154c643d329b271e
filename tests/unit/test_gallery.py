"""The gallery: which images come first, and thumbnails that hide no defect. No torch is needed."""

from __future__ import annotations

import csv
import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from blemish.calibration import Calibration, Promise
from blemish.data.images import read_pixels
from blemish.data.records import Record
from blemish.detector import TileDetector
from blemish.pictures import colour
from blemish.pipeline import evaluate, predict
from blemish.postprocess import Cleaning, Smoothing
from blemish.preprocess import Preprocess
from blemish.report import gallery
from blemish.report.gallery import SIDE, Shown, write_gallery
from blemish.tiling import Tiling

THRESHOLD = 0.5


class Scorer:
    """The score of a pixel is its value."""

    def __call__(self, tiles):
        return tiles.mean(axis=1)


class Explainer(Scorer):
    """Expects black."""

    def explain(self, tiles):
        return np.concatenate([self(tiles)[:, None], np.zeros_like(tiles)], axis=1)


def judge(scorer, channels=1):
    scores = [THRESHOLD * (rank + 1) / 9 for rank in range(9)]
    card = Calibration.fit(scores, [str(score) for score in scores], Promise(0.1), "print")
    tiling = Tiling(64, 0.0, 8)
    return TileDetector(
        scorer,
        Preprocess(channels, None),
        tiling,
        Smoothing(0),
        cleaning=Cleaning(),
        fingerprint="print",
        calibration=card,
    )


def read(path):
    """The index and the decoded pictures of each image."""
    with zipfile.ZipFile(path) as archive:
        index = json.loads(archive.read("index.json"))
        pictures = [
            {name: np.asarray(Image.open(io.BytesIO(archive.read(place)))) for name, place in entry["pictures"].items()}
            for entry in index["images"]
        ]
        assert sorted(archive.namelist()) == sorted(
            ["index.json", *(place for entry in index["images"] for place in entry["pictures"].values())]
        )
    return index, pictures


def grey(value=60, shape=(40, 48)):
    return np.full(shape, value, np.uint8)


def test_pictures_are_named_in_the_order_given(tmp_path, save):
    paths = [save(tmp_path / f"{name}.png", grey(value)) for name, value in (("b", 50), ("a", 20), ("c", 90))]
    truth = save(tmp_path / "truth.png", grey(0))
    shown = [Shown(paths[0]), Shown(paths[1], truth), Shown(paths[2])]
    write_gallery(tmp_path / "gallery.zip", judge(Explainer()), shown, progress=False)
    index, pictures = read(tmp_path / "gallery.zip")
    assert index["threshold"] == THRESHOLD
    assert [entry["path"] for entry in index["images"]] == [str(path) for path in paths]
    assert [(entry["width"], entry["height"]) for entry in index["images"]] == [(48, 40)] * 3
    assert [set(one) - {"observed", "expected", "heat", "mask"} for one in pictures] == [set(), {"truth"}, set()]
    for one, value in zip(pictures, (50, 20, 90), strict=True):
        assert np.abs(one["observed"].astype(int) - value).max() <= 3
        assert one["expected"].max() <= 3


def test_scorer_that_says_no_expectation_has_no_such_picture(tmp_path, save):
    path = save(tmp_path / "a.png", grey())
    write_gallery(tmp_path / "gallery.zip", judge(Scorer()), [Shown(path)], progress=False)
    assert [set(one) for one in read(tmp_path / "gallery.zip")[1]] == [{"observed", "heat", "mask"}]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((40, 48), (40, 48)),
        ((160, 160), (160, 160)),
        ((161, 5), (160, 5)),
        ((900, 300), (160, 53)),
        ((1, 700), (1, 160)),
    ],
)
def test_thumbnails_have_at_most_160_pixels_a_side(tmp_path, save, shape, expected):
    path = save(tmp_path / "a.png", grey(shape=shape))
    write_gallery(tmp_path / "gallery.zip", judge(Explainer()), [Shown(path, path)], progress=False)
    (entry,), (pictures,) = (
        part for part in (read(tmp_path / "gallery.zip")[0]["images"], read(tmp_path / "gallery.zip")[1])
    )
    assert SIDE == 160 and (entry["height"], entry["width"]) == shape
    assert set(pictures) == {"observed", "expected", "heat", "mask", "truth"}
    assert {picture.shape[:2] for picture in pictures.values()} == {expected}


@pytest.mark.parametrize("place", [(0, 0), (499, 799), (123, 457), (498, 3)])
def test_one_pixel_stays_visible(tmp_path, save, place):
    pixels, mask = grey(60, (500, 800)), grey(0, (500, 800))
    pixels[place], mask[place] = 255, 255
    shown = Shown(save(tmp_path / "a.png", pixels), save(tmp_path / "mask.png", mask))
    write_gallery(tmp_path / "gallery.zip", judge(Scorer()), [shown], progress=False)
    ((pictures,),) = (read(tmp_path / "gallery.zip")[1],)
    where = (place[0] * 100 // 500, place[1] * 160 // 800)
    for name in ("mask", "truth"):
        assert pictures[name].dtype == bool and np.argwhere(pictures[name]).tolist() == [list(where)]
    # WebP loses a little of the colour at the very pixel, but not the contrast.
    strongest = colour(np.ones((1, 1), np.float32), THRESHOLD)[0, 0].astype(int)
    calm = pictures["heat"][50 if where[0] < 40 else 0, 80 if where[1] < 60 else 10].astype(int)
    found = pictures["heat"][where].astype(int)
    assert np.abs(found - strongest).sum() < np.abs(calm - strongest).sum() / 2


def test_colour_and_16_bit_images_are_shown(tmp_path, save):
    rgb = np.zeros((20, 30, 3), np.uint8)
    rgb[..., 0] = 80
    deep = np.full((20, 30), 100 * 257, np.uint16)
    paths = [save(tmp_path / "rgb.png", rgb), save(tmp_path / "deep.png", deep)]
    write_gallery(tmp_path / "gallery.zip", judge(Explainer(), 3), [Shown(path) for path in paths], progress=False)
    _, (colours, grey_one) = read(tmp_path / "gallery.zip")
    assert colours["observed"][..., 0].mean() > 70 > 20 > colours["observed"][..., 1:].mean()
    assert np.abs(grey_one["observed"].astype(int) - 100).max() <= 3


def test_image_that_became_unreadable_is_left_out(tmp_path, save):
    paths = [save(tmp_path / f"{number}.png", grey()) for number in range(3)]
    paths[1].write_bytes(b"")
    write_gallery(tmp_path / "gallery.zip", judge(Scorer()), [Shown(path) for path in paths], progress=False)
    assert [entry["path"] for entry in read(tmp_path / "gallery.zip")[0]["images"]] == [str(paths[0]), str(paths[2])]


def test_no_image_is_an_empty_gallery(tmp_path):
    write_gallery(tmp_path / "gallery.zip", judge(Scorer()), [], progress=False)
    assert read(tmp_path / "gallery.zip") == ({"threshold": THRESHOLD, "images": []}, [])


# (kind, brightest pixel): the threshold lies at 127.5.
EVALUATED = [
    *(("good", 10), ("good", 200), ("good", 90), ("good", 140)),
    *(("dent", 30), ("dent", 250), ("dent", 120), ("dent", 130), ("dent", 80)),
]


@pytest.mark.parametrize("most", [0, 4, 100])
def test_evaluation_shows_missed_defects_then_false_alarms_then_the_rest(tmp_path, save, most):
    records = []
    for number, (kind, value) in enumerate(EVALUATED):
        pixels = grey(0)
        pixels[5, 6] = value
        path = save(tmp_path / f"{number}_{kind}_{value}.png", pixels)
        truth = None if kind == "good" else save(tmp_path / f"truth/{number}.png", (pixels > 0).astype(np.uint8) * 255)
        records.append(Record(path, kind, truth, "test"))
    (tmp_path / "broken.png").write_bytes(b"")
    records.insert(3, Record(tmp_path / "broken.png", split="test"))
    evaluate(judge(Explainer()), records, tmp_path / "out", gallery=most, progress=False)
    index, pictures = read(tmp_path / "out/gallery.zip")
    found = [entry["path"].rpartition("_")[2].removesuffix(".png") for entry in index["images"]]
    missed, false_alarms, rest = ["120", "80", "30"], ["200", "140"], ["250", "130", "90", "10"]
    assert found == [*missed, *false_alarms, *rest][:most]
    for entry, one in zip(index["images"], pictures, strict=True):
        assert ("truth" in one) == ("dent" in entry["path"])
        assert one["mask"].any() == (read_pixels(entry["path"]).max() > 127)
    with (tmp_path / "out/evaluation.csv").open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(records)
    assert json.loads((tmp_path / "out/card.json").read_text()) == judge(Explainer()).card.to_dict()


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("most", [0, 2, 3])
def test_no_image_is_scored_twice_where_all_are_shown(tmp_path, save, monkeypatch, most, large):
    class Counting(Explainer):
        tiles = 0

        def __call__(self, tiles):
            self.tiles += len(tiles)
            return super().__call__(tiles)

    monkeypatch.setattr(gallery, "_LARGE", 1000 if large else 2**22)
    for number in range(3):
        save(tmp_path / f"in/{number}.png", grey(60 * number))
    once, shown = (0 if most < 3 or large else 3), min(most, 3)
    records = [Record(path, "good", None, "test") for path in sorted((tmp_path / "in").iterdir())]
    for name, run in (
        ("evaluated", lambda detector, out: evaluate(detector, records, out, gallery=most, progress=False)),
        ("predicted", lambda detector, out: predict(detector, tmp_path / "in", out, gallery=most, progress=False)),
    ):
        scorer = Counting()
        run(judge(scorer), tmp_path / name)
        rescored = 0 if once or (large and name == "predicted") else shown
        assert scorer.tiles == 3 + rescored
        assert len(read(tmp_path / name / "gallery.zip")[1]) == shown


def test_large_image_is_shown_by_its_stored_map(tmp_path, save, monkeypatch):
    monkeypatch.setattr(gallery, "_LARGE", 1000)
    paths = [save(tmp_path / "small.png", grey(50, (30, 30))), save(tmp_path / "large.png", grey(50))]
    stored = np.zeros((40, 48), np.float32)
    stored[5, 7] = 9
    Image.fromarray(stored).save(tmp_path / "map.tiff")
    shown = [Shown(path, score_map=tmp_path / "map.tiff") for path in paths]
    write_gallery(tmp_path / "gallery.zip", judge(Explainer()), shown, progress=False)
    _, (small, large) = read(tmp_path / "gallery.zip")
    assert "expected" in small and not small["mask"].any()
    assert "expected" not in large and np.argwhere(large["mask"]).tolist() == [[5, 7]]

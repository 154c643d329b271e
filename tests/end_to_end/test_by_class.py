"""Calibration by class, from training to the report: two kinds of part, one of which varies much more."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from blemish import load_detector
from blemish.data.images import read_pixels
from blemish.pictures import heat_map

BANK = (
    *("model=template_bank", "model.templates=2", "model.tries=2"),
    *("model.alignment.motion=none", "model.alignment.illumination=none"),
    *("image.size=32", "tiling.size=32", "tiling.standardise=false"),
    *("score=residual", "residual=l1", "smoothing.sigma=0", "synthetic.images=0", "trainer=cpu"),
    *("split.calibration=0.6", "calibration.alpha=0.1"),
)
UNLIKELY = 5e-5  # on either side


def part(kind, seed):
    """A calm part with a bar across and hardly any noise, or a wild one with a bar down and a spot of any strength."""
    rng = np.random.default_rng([kind == "wild", seed])
    pixels = np.full((32, 32), 90.0)
    pixels[(slice(None), slice(8, 14)) if kind == "wild" else slice(18, 24)] = 180
    pixels += rng.normal(0, 3, pixels.shape)
    if kind == "wild":
        top, left = rng.integers(0, 29, 2)
        pixels[top : top + 3, left : left + 3] += rng.uniform(-90, 90)
    return pixels.clip(0, 255).astype(np.uint8)


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def root(tmp_path_factory, save):
    """The MVTec AD layout: both kinds train, and are tested; `blob` is a calm part with a faint spot."""
    root = tmp_path_factory.mktemp("parts")
    for kind, count in (("calm", 70), ("wild", 30)):
        for number in range(count):
            save(root / f"train/good/{kind}{number:03}.png", part(kind, number))
        for number in range(6):
            save(root / f"test/good/{kind}{number:03}.png", part(kind, 1000 + number))
        for number in range(60):
            save(root / f"new/{kind}{number:03}.png", part(kind, 2000 + number))
    for number in range(4):
        pixels = part("calm", 3000 + number)
        pixels[4:8, 4:8] += 60
        save(root / f"test/blob/{number:03}.png", pixels)
    return root


@pytest.fixture(scope="module")
def run(root, tmp_path_factory, run_cli):
    """Calibrated by class; read only."""
    run = tmp_path_factory.mktemp("runs") / "by_class"
    done = run_cli(["train", "data=mvtec", f"data.root={root}", *BANK, "calibration.by_class=true", f"out={run}"])
    assert done.code == 0, done.err
    assert "of each class (2 classes, each with its own threshold)" in done.out
    return run


@pytest.fixture(scope="module")
def predicted(run, root, tmp_path_factory, run_cli):
    out = tmp_path_factory.mktemp("out") / "new"
    done = run_cli(["predict", f"run={run}", f"input={root / 'new'}", f"out={out}", "fdr=0.01"])
    assert done.code == 0, done.err
    return out


def classes_of_kinds(rows):
    """{"calm": its class, "wild": its class}: each class is one kind, and each kind is one class."""
    found = {(Path(row["path"]).name[:4], row["class"]) for row in rows if "blob" not in row["path"]}
    assert len(found) == 2 and {label for _, label in found} == {"template 1", "template 2"}
    return dict(found)


def test_each_class_keeps_its_promise_where_one_threshold_alarms_in_one_class_only(
    run, predicted, root, tmp_path, run_cli
):
    rows = rows_of(predicted / "predictions.csv")
    labels, card = classes_of_kinds(rows), read_json(run / "card.json")
    alarms = Counter(row["class"] for row in rows if row["decision"] == "anomalous")
    for label in labels.values():
        n, rank = (card["classes"][label][key] for key in ("units", "rank"))
        low, high = stats.betabinom.ppf([UNLIKELY, 1 - UNLIKELY], 60, n + 1 - rank, rank)
        assert low <= alarms[label] <= high
    pooled = Path(shutil.copytree(run, tmp_path / "pooled"))
    assert run_cli(["calibrate", f"run={pooled}", "calibration.by_class=false"]).code == 0
    assert run_cli(["predict", f"run={pooled}", f"input={root / 'new'}", f"out={tmp_path / 'out'}"]).code == 0
    again = rows_of(tmp_path / "out/predictions.csv")
    assert [row["class"] for row in again] == [row["class"] for row in rows]
    assert {row["class"] for row in again if row["decision"] == "anomalous"} == {labels["wild"]}
    # And back, from the images of the run's own calibration part.
    assert run_cli(["calibrate", f"run={pooled}", "calibration.by_class=true"]).code == 0
    assert read_json(pooled / "card.json")["classes"] == card["classes"]


def test_rows_pictures_and_python_decide_by_the_card_of_the_class(run, predicted):
    detector, rows = load_detector(run, device="cpu"), rows_of(predicted / "predictions.csv")
    smallest = {label: 1 / (part.n + 1) for label, part in detector.card.classes.items()}
    for row in (rows[0], rows[70], rows[-1]):
        score, own = float(row["image_score"]), detector.card.of(row["class"])
        assert float(row["p_value"]) == own.p_value(score) >= smallest[row["class"]]
        assert row["decision"] == ("anomalous" if score > own.threshold else "normal")
        prediction = detector(row["path"])
        assert (prediction.label, prediction.threshold) == (row["class"], own.threshold)
        assert prediction.image_score == pytest.approx(score, rel=1e-5)
        pixels = read_pixels(row["path"])
        with Image.open(predicted / row["map"]) as tiff:
            score_map = np.asarray(tiff)
        drawn = heat_map(score_map, own.threshold, pixels, score_map > own.threshold)
        np.testing.assert_array_equal(np.asarray(Image.open(predicted / row["heatmap"])), drawn)


def test_a_defect_too_faint_for_one_threshold_is_found_in_its_class(run):
    rows = rows_of(run / "evaluation.csv")
    labels, card = classes_of_kinds(rows), read_json(run / "card.json")
    faint = [row for row in rows if row["kind"] == "blob"]
    assert {row["class"] for row in faint} == {labels["calm"]}
    assert all(row["decision"] == "anomalous" for row in faint)
    assert all(float(row["image_score"]) < card["classes"][labels["wild"]]["threshold"] for row in faint)
    thresholds = read_json(run / "metrics.json")["made"]["calibration"]["threshold"]
    assert thresholds == {label: part["threshold"] for label, part in card["classes"].items()}


def test_report_shows_each_threshold_and_moves_all_of_them(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    card = read_json(run / "card.json")
    assert "one for each of 2 classes" in page and "recalibrated since" not in page
    facts, rows = (
        json.loads(page.partition(f'<script id="{name}" type="application/json">')[2].partition("</script>")[0])
        for name in ("facts", "rows")
    )
    own = facts["steps"][facts["own"]]
    assert own["thresholds"] == [part["threshold"] for part in card["classes"].values()] and own["lines"] == [1.0]
    labels = list(card["classes"])
    table = {row["path"]: row for row in rows_of(run / "evaluation.csv")}
    assert len(rows) == len(table) == 16
    for path, _, score, *_, label, place in rows:
        assert (label, labels[place]) == (table[path]["class"],) * 2
        assert (score > own["thresholds"][place]) == (table[path]["decision"] == "anomalous")
    strict = next(step for step in facts["steps"] if step["alpha"] == 0.001)
    fewest = min(part["units"] for part in card["classes"].values())
    assert not strict["promised"] and f"999 needed, {fewest} available in the smallest class" in strict["words"]


def test_compare_knows_whether_the_thresholds_are_those_of_the_figures(run, tmp_path, run_cli):
    copy = Path(shutil.copytree(run, tmp_path / "runs/copy"))
    for alpha, stale in (("0.1", False), ("0.2", True)):
        assert run_cli(["calibrate", f"run={copy}", f"calibration.alpha={alpha}"]).code == 0
        compared = run_cli(["compare", copy.parent])
        assert compared.code == 0 and ("evaluate again" in compared.out) is stale


def test_report_refuses_a_table_without_classes(run, tmp_path, run_cli):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    table = (copy / "evaluation.csv").read_text(encoding="utf-8")
    (copy / "evaluation.csv").write_text(table.replace("template 1", ""), encoding="utf-8")
    refused = run_cli(["report", f"run={copy}"])
    assert refused.code == 2
    assert "images of no class that it knows" in refused.sentences[0]


def test_monitor_refuses_in_one_sentence(run, root, tmp_path, run_cli):
    refused = run_cli(["monitor", f"run={run}", f"input={root / 'new'}", f"state={tmp_path / 'j.jsonl'}"])
    assert refused.code == 2
    assert len(refused.sentences) == 1 and "this calibration is by class" in refused.sentences[0]
    assert not (tmp_path / "j.jsonl").exists()


def test_a_model_without_classes_is_refused_before_training_and_before_scoring(
    tiny_data, tiny_run, tiny, tmp_path, run_cli
):
    words = ["train", "data=mvtec", f"data.root={tiny_data}", *tiny, "calibration.by_class=true"]
    for arguments in (
        [*words, f"out={tmp_path / 'run'}"],
        ["calibrate", f"run={tiny_run}", "calibration.by_class=true"],
    ):
        refused = run_cli(arguments)
        assert refused.code == 2
        assert "expects a model that tells classes of parts apart" in refused.sentences[0]
    assert not (tmp_path / "run").exists()


def test_too_few_images_are_refused_before_training_where_that_is_known(root, tmp_path, run_cli):
    words = ["train", "data=mvtec", f"data.root={root}", *BANK, "calibration.by_class=true", f"out={tmp_path / 'run'}"]
    refused = run_cli([*words, "model.templates=7"])
    assert refused.code == 2
    assert "60 calibration images are too few for alpha = 0.1 (marginal) in each of 7 classes" in refused.sentences[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_too_few_images_of_one_class_name_it_and_lose_no_training(root, tmp_path, run_cli):
    words = ["train", "data=mvtec", f"data.root={root}", *BANK, "calibration.by_class=true", f"out={tmp_path / 'run'}"]
    refused = run_cli([*words, "calibration.alpha=0.0323"])  # needs 30 of each, of 60: all wild parts there are
    assert refused.code == 2
    assert "calibration images of the class 'template " in refused.sentences[0] and "needs 30" in refused.sentences[0]
    settled = run_cli(["calibrate", f"run={tmp_path / 'run'}", "calibration.alpha=0.1", "calibration.by_class=true"])
    assert settled.code == 0, settled.err
    assert "thresholds: template 1 " in settled.out


# --- classes that the data name


@pytest.mark.slow
def test_named_classes_have_a_template_a_threshold_and_their_name(root, tmp_path, run_cli, save):
    for kind, count in (("bar across", 40), ("bar down", 30)):
        for number in range(count):
            pixels = part("calm" if kind == "bar across" else "wild", 5000 + number)
            save(tmp_path / f"data/{kind}/lot/{number:03}.png", pixels)
    words = ["data=folder", f"data.root={tmp_path / 'data'}", "data.classes=folders", "model.classes=named", *BANK]
    run = tmp_path / "run"
    done = run_cli(["train", *words, "calibration.by_class=true", "calibration.alpha=0.2", f"out={run}"])
    assert done.code == 0, done.err
    assert list(read_json(run / "card.json")["classes"]) == ["bar across", "bar down"]
    assert len(load_detector(run, device="cpu").scorer.model.templates) == 2
    assert run_cli(["predict", f"run={run}", f"input={root / 'test/good'}", f"out={tmp_path / 'out'}"]).code == 0
    found = {(Path(row["path"]).name[:4], row["class"]) for row in rows_of(tmp_path / "out/predictions.csv")}
    assert found == {("calm", "bar across"), ("wild", "bar down")}


def test_named_classes_of_data_that_name_none_are_one_sentence(root, tmp_path, run_cli):
    words = ["train", "data=mvtec", f"data.root={root}", *BANK, "model.classes=named", f"out={tmp_path / 'run'}"]
    refused = run_cli(words)
    assert refused.code == 2
    assert "expects a class for every defect-free image, found none for 100 of 100" in refused.sentences[0]
    assert not (tmp_path / "run").exists()

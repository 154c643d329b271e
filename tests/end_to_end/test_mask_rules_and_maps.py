"""Mask rules, spatial normalisation and false discovery rates, from training to the files that prediction writes."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from blemish import load_detector
from blemish.data.images import read_mask, read_pixels
from blemish.errors import CalibrationError

pytestmark = pytest.mark.usefixtures("in_tmp")

RULES = {
    "any_pixel": (),
    "area_fraction": ("calibration.mask_rule=area_fraction", "calibration.tau=0.01"),
    "region": ("calibration.mask_rule=region", "calibration.region_area=9"),
    "parametric_noise": (
        "calibration.mask_rule=parametric_noise",
        "residual=l1",
        "smoothing.sigma=0",
        "calibration.alpha=0.9",
    ),
}
EIGHT = np.ones((3, 3))


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def rows_of(out):
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def part_of(run, split):
    with (run / "splits.csv").open(newline="", encoding="utf-8") as file:
        return [row["path"] for row in csv.DictReader(file) if row["split"] == split]


@pytest.fixture(scope="module")
def ruled(tiny_run, tiny_data, tiny, run_cli, tmp_path_factory):
    """(rule) -> (run, what training said, predictions of the test part at a false discovery rate of 0.3), made once."""
    made = {}

    def make(rule):
        if rule not in made:
            folder = tmp_path_factory.mktemp(rule)
            run, said = tiny_run, None
            if rule != "any_pixel":
                run = folder / "run"
                said = run_cli(["train", "data=mvtec", f"data.root={tiny_data}", f"out={run}", *tiny, *RULES[rule]])
                assert said.code == 0, said.err
            words = ["predict", f"run={run}", f"input={tiny_data / 'test'}", f"out={folder / 'out'}", "fdr=0.3"]
            predicted = run_cli(words)
            assert predicted.code == 0, predicted.err
            discoveries = sum(row["fdr_decision"] == "anomalous" for row in rows_of(folder / "out"))
            assert f"at a false discovery rate of 0.3: {discoveries} anomalous (column fdr_decision)" in predicted.out
            made[rule] = run, said, folder / "out"
        return made[rule]

    return make


# --- mask rules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_image_is_anomalous_exactly_if_its_mask_breaks_the_rule(ruled, rule):
    run, _, out = ruled(rule)
    card = read_json(run / "card.json")
    assert read_json(out / "card.json") == card and card["mask_rule"]["name"] == rule
    decisions = set()
    for row in rows_of(out):
        score_map = np.asarray(Image.open(out / row["map"]))
        assert score_map.dtype == np.float32
        mask = score_map.astype(np.float64) > card["threshold"]
        labels, count = ndimage.label(mask, EIGHT)
        large = [label for label in range(1, count + 1) if (labels == label).sum() >= 9]
        breaks = mask.any()
        if rule == "area_fraction":
            breaks = mask.sum() > 0.01 * mask.size
        elif rule == "region":
            breaks, mask = bool(large), np.isin(labels, large)
        assert row["decision"] == ("anomalous" if breaks else "normal")
        assert (row["image_score"] > card["threshold"]) == breaks
        np.testing.assert_array_equal(read_mask(out / row["mask"], mask.shape), mask, strict=True)
        assert read_pixels(out / row["heatmap"]).shape == (*mask.shape, 3)
        decisions.add((row["decision"], "/blob/" in row["path"]))
    # Where textures are taken for noise, its threshold is too high (test_detector.py has one that is not).
    assert ("anomalous", True) in decisions or rule == "parametric_noise"


@pytest.mark.parametrize("rule", RULES)
def test_p_values_of_images_and_regions_come_from_the_card(ruled, rule):
    run, _, out = ruled(rule)
    scores = np.array(read_json(run / "card.json")["scores"])
    for row in rows_of(out):
        assert row["p_value"] == (1 + (scores >= row["image_score"]).sum()) / 13
        assert len(row["region_p_values"]) == row["regions"] == len(row["boxes"])
        assert all(row["p_value"] <= p <= 1 for p in row["region_p_values"])
        if rule != "area_fraction" and row["decision"] == "anomalous":
            assert min(row["region_p_values"]) == row["p_value"]


@pytest.mark.parametrize("rule", RULES)
def test_q_values_are_those_of_the_batch(ruled, rule):
    rows = rows_of(ruled(rule)[2])
    p_values = [row["p_value"] for row in rows]
    for row in rows:
        shares = [p * len(rows) / sum(other <= p for other in p_values) for p in p_values if p >= row["p_value"]]
        assert row["q_value"] == pytest.approx(min(1.0, *shares), rel=1e-12)
        assert row["fdr_decision"] == ("anomalous" if row["q_value"] <= 0.3 else "normal")


def test_recalibrating_to_a_rule_equals_training_with_it(ruled, run_copy, run_cli):
    before = read_json(run_copy / "card.json")
    for rule in ("area_fraction", "region"):
        result = run_cli(["calibrate", f"run={run_copy}", *RULES[rule]])
        assert result.code == 0, result.err
        ours, theirs = (read_json(run / "card.json") for run in (run_copy, ruled(rule)[0]))
        for card in (ours, theirs):
            card["made"] = {key: value for key, value in card["made"].items() if key == "calibration_fingerprint"}
        assert ours == theirs and ours["scores"] != before["scores"] and ours["fingerprint"] == before["fingerprint"]
    # Another promise keeps the rule, and another setting of the rule scores anew.
    assert run_cli(["calibrate", f"run={run_copy}", "calibration.alpha=0.3"]).code == 0
    laxer = read_json(run_copy / "card.json")
    assert (laxer["scores"], laxer["mask_rule"]) == (ours["scores"], ours["mask_rule"])
    assert run_cli(["calibrate", f"run={run_copy}", "calibration.region_area=1", "calibration.alpha=0.1"]).code == 0
    strictest = read_json(run_copy / "card.json")
    assert (strictest["scores"], strictest["rank"]) == (before["scores"], before["rank"])


def test_another_rule_finds_the_calibration_images_where_they_have_moved(run_copy, run_cli, tiny_data, tmp_path):
    before = read_json(run_copy / "card.json")
    copy = shutil.copytree(tiny_data, tmp_path / "moved")
    words = ["calibrate", f"run={run_copy}", "data=mvtec", f"data.root={copy}"]
    lost = copy / Path(part_of(run_copy, "calibration")[0]).relative_to(tiny_data)
    table = run_copy / "splits.csv"
    table.write_text(table.read_text(encoding="utf-8").replace(str(tiny_data), "gone"), encoding="utf-8")
    result = run_cli([*words, *RULES["region"]])
    assert result.code == 0, result.err
    after = read_json(run_copy / "card.json")
    assert after["made"]["calibrated_on"] == before["made"]["calibrated_on"] and after["scores"] != before["scores"]
    lost.unlink()
    result = run_cli(words)
    assert result.code == 2 and "took part in training" in result.sentences[0]


@pytest.mark.parametrize("change", ["changed", "gone", "no list"])
def test_another_rule_refuses_calibration_images_that_are_not_the_same(run_copy, run_cli, tiny_data, tmp_path, change):
    copy = shutil.copytree(tiny_data / "train", tmp_path / "train")
    table = (run_copy / "splits.csv").read_text(encoding="utf-8")
    (run_copy / "splits.csv").write_text(table.replace(f"{tiny_data / 'train'}/", f"{copy}/"), encoding="utf-8")
    *_, last = part_of(run_copy, "calibration")
    if change == "changed":
        shutil.copy(part_of(run_copy, "train")[0], last)
    elif change == "gone":
        (tmp_path / "train/good" / last.rpartition("/")[2]).unlink()
    else:
        (run_copy / "splits.csv").unlink()
    before = (run_copy / "detector.pt").read_bytes(), (run_copy / "card.json").read_bytes()
    result = run_cli(["calibrate", f"run={run_copy}", "calibration.mask_rule=region"])
    assert result.code == 2 and len(result.sentences) == 1 and "Traceback" not in result.err
    expected = {"changed": f"{last} has changed since", "gone": f"Cannot read {last}", "no list": "splits.csv"}
    assert expected[change] in result.sentences[0]
    assert ((run_copy / "detector.pt").read_bytes(), (run_copy / "card.json").read_bytes()) == before


def test_assumed_noise_is_said_to_be_assumed(ruled):
    run, said, _ = ruled("parametric_noise")
    card = read_json(run / "card.json")
    assert card["in_words"].startswith("assumed, not promised: ") and card["in_words"] in said.out
    assert card["rank"] is None and set(card["noise"]) == {"sigma", "pixels", "ks", "correlation", "spread"}
    doubts = [line for line in said.sentences if "warning: the assumption of calibration.mask_rule is doubtful" in line]
    assert doubts == said.sentences and any("correlated" in line for line in doubts)  # textures are no white noise
    assert load_detector(run).calibration.to_dict() == card


# --- false discovery rate -----------------------------------------------------------------------------------------


def test_resumed_prediction_has_the_q_values_of_the_whole_batch(ruled, run_cli, tiny_data, tmp_path, assert_same_rows):
    run, _, whole = ruled("any_pixel")
    out = shutil.copytree(whole, tmp_path / "out")
    unfinished = [row | {"q_value": None, "fdr_decision": None} for row in rows_of(out)[:5]]
    (out / "predictions.jsonl").unlink()
    (out / ".predictions.jsonl.part").write_text("".join(json.dumps(row) + "\n" for row in unfinished), "utf-8")
    (tmp_path / "in").mkdir()
    result = run_cli(["predict", f"run={run}", f"input={tiny_data / 'test'}", "out=out", "fdr=0.3"])
    assert result.code == 0, result.err
    assert_same_rows(rows_of(out), rows_of(whole))


def test_unusable_image_has_no_q_value_and_counts_in_none(run_cli, tiny_run, save, texture, tmp_path):
    for number in range(3):
        save(tmp_path / f"in/{number}.png", texture(number))
    (tmp_path / "in/1.png").write_bytes(b"")
    assert run_cli(["predict", f"run={tiny_run}", "input=in", "out=out", "fdr=0.5"]).code == 1
    rows = rows_of(tmp_path / "out")
    assert (
        [row["q_value"] is None for row in rows]
        == [row["fdr_decision"] is None for row in rows]
        == [False, True, False]
    )
    assert [rows[1][key] for key in ("map", "heatmap", "mask", "p_value")] == [None] * 4
    largest = max(row["p_value"] for row in (rows[0], rows[2]))
    assert max(row["q_value"] for row in (rows[0], rows[2])) == pytest.approx(largest)


def test_without_a_rate_the_decision_is_left_open(run_cli, tiny_run, tiny_data, tmp_path):
    result = run_cli(["predict", f"run={tiny_run}", f"input={tiny_data / 'test/blob'}", "out=out"])
    rows = rows_of(tmp_path / "out")
    assert {row["fdr_decision"] for row in rows} == {None} and all(0 < row["q_value"] <= 1 for row in rows)
    assert "false discovery rate" not in result.out


# --- normalisation ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def aligned(tiny_data, tiny, run_cli, tmp_path_factory):
    """A run whose score maps are normalised pixel by pixel."""
    run = tmp_path_factory.mktemp("aligned") / "run"
    words = ["train", "data=mvtec", f"data.root={tiny_data}", f"out={run}", *tiny, "normalisation.kind=robust"]
    result = run_cli(words)
    assert result.code == 0, result.err
    return run


def test_statistics_are_those_of_the_validation_images(aligned, tiny_run):
    detector = load_detector(aligned)
    plain = replace(detector, normalisation=None, calibration=None)
    assert load_detector(tiny_run).fingerprint != detector.fingerprint
    maps = np.stack([plain.score_map(read_pixels(path)) for path in part_of(aligned, "validation")]).astype(np.float64)
    location = np.median(maps, 0)
    scale = 1.4826 * np.median(np.abs(maps - location), 0)
    np.testing.assert_allclose(detector.normalisation.location, location, rtol=1e-4)
    np.testing.assert_allclose(detector.normalisation.scale, scale + np.median(scale), rtol=1e-3, atol=1e-6)


def test_loaded_detector_scores_as_the_trained_one_did(aligned):
    detector = load_detector(aligned)
    pixels = [read_pixels(path) for path in part_of(aligned, "calibration")]
    scored = [each for batch in detector.score_batches(pixels) for each in batch]
    again = sorted(float(each.score_map.max()) for each in scored)
    assert again == list(detector.calibration.scores)
    assert sum(detector.decide(each.score_map).is_anomalous for each in scored) == 0


def test_altered_statistics_void_the_calibration(aligned, tmp_path):
    run = shutil.copytree(aligned, tmp_path / "run")
    content = torch.load(run / "detector.pt", weights_only=True)
    content["normalisation"]["scale"][3, 4] *= 1.001
    torch.save(content, run / "detector.pt")
    with pytest.raises(CalibrationError, match="another detector"):
        load_detector(run)


def test_image_of_another_size_costs_only_its_own_row(aligned, run_cli, save, texture, tmp_path):
    for number in range(4):
        save(tmp_path / f"in/{number}.png", texture(number, (40, 48) if number != 1 else (48, 40)))
    result = run_cli(["predict", f"run={aligned}", "input=in", "out=out"])
    assert result.code == 1 and len(result.sentences) == 1 and "Traceback" not in result.err
    assert "40 x 48, found 48 x 40" in result.sentences[0] and "in/1.png" in result.sentences[0]
    assert [bool(row["error"]) for row in rows_of(tmp_path / "out")] == [False, True, False, False]


def test_unequal_images_are_refused_before_training(run_cli, tiny, normal_folder, save, texture, tmp_path):
    save(normal_folder / "wide.png", texture(70, (40, 64)))
    words = ["train", f"data.root={normal_folder}", f"out={tmp_path / 'run'}", *tiny, "normalisation.kind=mean_std"]
    result = run_cli(words)
    assert result.code == 2 and len(result.sentences) == 1
    assert "64 x 40" in result.sentences[0] and "wide.png" in result.sentences[0]
    assert not (tmp_path / "run").exists()


# --- reports ------------------------------------------------------------------------------------------------------


def test_every_verb_that_scores_writes_curves_gallery_and_page(ruled, run_cli, tmp_path):
    run, _, out = ruled("any_pixel")
    for folder in (run, out):
        assert (folder / "report.html").stat().st_size > 1000 and (folder / "gallery.zip").is_file()
    curves, metrics = read_json(run / "curves.json"), read_json(run / "metrics.json")
    for name, figure in (("image_roc", "image_auroc"), ("pixel_roc", "pixel_auroc")):
        drawn = curves["overall"][name]
        x, y = drawn["false_positive_rate"], drawn["true_positive_rate"]
        area = sum((b - a) * (c + d) / 2 for a, b, c, d in zip(x, x[1:], y, y[1:], strict=False))
        assert area == pytest.approx(metrics["overall"][figure], abs=3e-3)
        assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1) and len(x) <= 302
    copy = shutil.copytree(out, tmp_path / "copy")
    (copy / "report.html").unlink()
    for words in (["report", f"run={copy}"], ["report", copy]):
        assert run_cli(words).code == 0
        assert (copy / "report.html").is_file()
        (copy / "report.html").unlink()

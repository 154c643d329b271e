"""Every verb on generated data: what it prints, what it writes, and how it goes on after a failure."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import yaml
from PIL import Image

from blemish import __version__, load_detector
from blemish.data.images import read_image, read_mask, read_pixels
from blemish.files import hold
from blemish.pictures import heat_map

pytestmark = pytest.mark.usefixtures("in_tmp")

VERBS = ("train", "calibrate", "evaluate", "predict", "check", "compare", "report", "monitor")
COLUMNS = [
    *(
        "path",
        "class",
        "image_score",
        "p_value",
        "q_value",
        "decision",
        "fdr_decision",
        "regions",
        "boxes",
        "region_p_values",
    ),
    *("map", "heatmap", "mask", "seconds", "error"),
]
ODD_NAMES = [
    "two words",
    "a,b",
    "[x]",
    "{x}",
    "k=v",
    "größe 部品",
    "it's",
    'say "x"',
    "back\\slash",
    "$HOME",
    "${x}",
    "a#b",
]


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def rows_of(out):
    """The rows of predictions.csv and .jsonl, which must tell the same."""
    with (out / "predictions.csv").open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == COLUMNS
        table = list(reader)
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["path"] for row in table] == [row["path"] for row in lines]
    for row, line in zip(table, lines, strict=True):
        assert set(line) == set(COLUMNS)
        assert all(json.loads(row[key]) == line[key] for key in ("boxes", "region_p_values"))
        assert all(row[key] == ("" if line[key] is None else str(line[key])) for key in ("q_value", "fdr_decision"))
        assert row["decision"] == (line["decision"] or "")
        assert row["image_score"] == ("" if line["image_score"] is None else str(line["image_score"]))
    return lines


@pytest.fixture(scope="module")
def predicted(tiny_run, tiny_data, run_cli, tmp_path_factory):
    """The predictions of the test part."""
    out = tmp_path_factory.mktemp("predicted") / "out"
    result = run_cli(["predict", f"run={tiny_run}", f"input={tiny_data / 'test'}", f"out={out}"])
    assert result.code == 0, result.err
    assert "13 images" in result.out and str(out) in result.out
    return out


# --- the command itself ---------------------------------------------------------------------------------------


def test_usage_lists_every_verb(run_cli):
    result = run_cli(["--help"])
    assert result.code == 0 and all(f"\n  {verb} " in result.out for verb in VERBS)
    assert run_cli([]).code == 2


def test_version_is_told(run_cli):
    result = run_cli(["--version"])
    assert (result.code, result.out) == (0, f"blemish {__version__}\n")


OFTEN = ("train", "predict")


@pytest.mark.parametrize(
    "verb", [verb if verb in OFTEN else pytest.param(verb, marks=pytest.mark.slow) for verb in VERBS]
)
def test_help_and_settings_of_every_verb(run_cli, verb, tmp_path):
    help_text = run_cli([verb, "--help"])
    assert help_text.code == 0 and f"blemish {verb} " in help_text.out and help_text.err == ""
    settings = run_cli([verb, "--cfg", "job"])
    assert settings.code == 0 and settings.err == ""
    assert yaml.safe_load(settings.out)
    assert list(tmp_path.iterdir()) == []


def test_settings_show_the_overrides(run_cli):
    settings = yaml.safe_load(run_cli(["train", "--cfg", "job", "model=vae", "tiling.size=64"]).out)
    assert settings["model"]["_target_"].endswith("VariationalAutoencoder") and settings["tiling"]["size"] == 64


def test_ctrl_c_is_one_sentence(run_cli, tiny_run, tiny_data, monkeypatch):
    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("blemish.pipeline.predict", interrupt)
    result = run_cli(["predict", f"run={tiny_run}", f"input={tiny_data}"])
    assert result.code == 130 and len(result.sentences) == 1 and "interrupted" in result.sentences[0]
    assert "Traceback" not in result.err


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
def test_a_termination_is_like_ctrl_c_and_says_what_was_begun(run_cli, tiny, tiny_data, monkeypatch, tmp_path):
    def terminate(*arguments, **keywords):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("blemish.training.run.split_records", terminate)
    result = run_cli(["train", "data=mvtec", f"data.root={tiny_data}", f"out={tmp_path / 'run'}", *tiny])
    assert result.code == 130 and "nothing was begun" in result.sentences[0] and "Traceback" not in result.err
    assert signal.getsignal(signal.SIGTERM) is before and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_command_works_from_any_folder(spawn_cli, tiny_run, tiny_data, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "my run")
    shutil.copytree(tiny_data / "test/blob", tmp_path / "parts")
    (tmp_path / "elsewhere").mkdir()
    result = spawn_cli(["predict", "run=../my run", "input=../parts", "out=result"], cwd=tmp_path / "elsewhere")
    assert result.returncode == 0, result.stderr
    assert len(rows_of(tmp_path / "elsewhere/result")) == 5
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["result"]


# --- train ----------------------------------------------------------------------------------------------------


def test_run_folder_is_complete(tiny_run):
    names = {str(path.relative_to(tiny_run)) for path in tiny_run.rglob("*") if path.is_file()}
    events = {name for name in names if name.startswith("tensorboard/events.out.tfevents")}
    assert events
    assert names - events - {"tensorboard/hparams.yaml"} == {
        "config.yaml",
        "run.json",
        "splits.csv",
        "detector.pt",
        "card.json",
        "metrics.json",
        "curves.json",
        "evaluation.csv",
        "synthetic.json",
        "gallery.zip",
        "report.html",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
    }


def test_run_tells_its_origin(tiny_run, tiny_data, tiny):
    about = read_json(tiny_run / "run.json")
    assert about["version"] == __version__ and about["seed"] == 0 and about["status"] == "done"
    assert set(tiny) <= set(about["overrides"])
    assert about["images"] == {"train": 42, "validation": 6, "calibration": 12, "test": 13}
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in about["data_fingerprint"].values())
    settings = yaml.safe_load((tiny_run / "config.yaml").read_text(encoding="utf-8"))
    assert settings["data"]["root"] == str(tiny_data) and settings["image"]["channels"] == 1
    assert settings["training"]["steps"] == 4 and settings["model"]["tile_size"] == 32


def test_splits_name_every_image_once(tiny_run, tiny_data):
    with (tiny_run / "splits.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    images = [str(path) for part in ("train", "test") for path in (tiny_data / part).rglob("*.png")]
    assert sorted(row["path"] for row in rows) == sorted(images)
    assert all(row["split"] == "test" for row in rows if "/test/" in row["path"])
    assert all(row["kind"] == "good" for row in rows if row["split"] != "test")


def test_card_holds_the_promise(tiny_run):
    card = read_json(tiny_run / "card.json")
    assert card["promise"] == {"alpha": 0.1, "rule": "marginal", "delta": 0.05, "by_class": False}
    assert card["units"] == card["images"] == 12 and card["rank"] == 12
    assert card["threshold"] == sorted(card["scores"])[11]
    assert "expect about 77 false alarms (any pixel flagged), at most 100 on average" in card["in_words"]  # 1000 / 13
    assert card["fingerprint"] == load_detector(tiny_run).fingerprint


def test_training_on_a_plain_folder_has_no_metrics(normal_folder, run_cli, tiny, tmp_path):
    result = run_cli(["train", f"data.root={normal_folder}", *tiny])
    assert result.code == 0, result.err
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "detector.pt").is_file() and not (run / "metrics.json").exists()
    assert result.out.count(f"run folder: runs/{run.name}") >= 1


def test_a_batch_size_by_trial_is_recorded_as_the_number_that_it_was(normal_folder, run_cli, tiny, tmp_path):
    run, again = tmp_path / "run", tmp_path / "again"
    made = run_cli(["train", f"data.root={normal_folder}", f"out={run}", *tiny, "training.batch_size=auto"])
    assert made.code == 0, made.err
    size = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["training"]["batch_size"]
    assert isinstance(size, int) and f"training.batch_size={size}, chosen by trial" in made.out
    # Trying has not moved the training: the number itself gives the same detector.
    run_cli(["train", f"data.root={normal_folder}", f"out={again}", *tiny, f"training.batch_size={size}"])
    cards = [json.loads((folder / "card.json").read_text(encoding="utf-8")) for folder in (run, again)]
    assert cards[0]["scores"] == cards[1]["scores"]


def test_training_leaves_nothing_on_the_error_stream_but_progress(run_cli, tiny_data, tiny, tmp_path):
    result = run_cli(["train", "data=mvtec", f"data.root={tiny_data}", f"out={tmp_path / 'run'}", *tiny])
    words = ("Warning", "warn", "deprecated", "overridden", "site-packages")
    assert not [line for line in result.err.splitlines() if any(word in line for word in words)]


def test_training_reports_unreadable_test_images_and_still_measures(mvtec_root, run_cli, tiny, tmp_path):
    (mvtec_root / "test/blob/002.png").write_bytes(b"")
    result = run_cli(["train", "data=mvtec", f"data.root={mvtec_root}", f"out={tmp_path / 'run'}", *tiny])
    assert result.code == 1
    assert len(result.sentences) == 1 and "002.png" in result.sentences[0]
    assert read_json(tmp_path / "run/metrics.json")["overall"]["images"] == 4


# --- predict --------------------------------------------------------------------------------------------------


def test_prediction_tree_mirrors_the_input(predicted, tiny_data):
    stems = {path.relative_to(tiny_data / "test").with_suffix("") for path in (tiny_data / "test").rglob("*.png")}
    for folder, suffix in (("maps", ".tiff"), ("heatmaps", ".png"), ("masks", ".png")):
        files = [path for path in (predicted / folder).rglob("*") if path.is_file()]
        assert {path.suffix for path in files} == {suffix}
        assert {path.relative_to(predicted / folder).with_suffix("") for path in files} == stems
    assert not list(predicted.rglob("*.tmp")) and not list(predicted.rglob("*.part"))


def test_files_hold_what_the_detector_says(predicted, tiny_run, tiny_data):
    detector = load_detector(tiny_run)
    for row in rows_of(predicted):
        name = row["path"].removeprefix(f"{tiny_data / 'test'}/").removesuffix(".png")
        with Image.open(predicted / f"maps/{name}.tiff") as image:
            score_map = np.asarray(image)
        # Some processors add up a single tile in another order than one among others: the last bits differ.
        np.testing.assert_allclose(score_map, detector(row["path"]).score_map, rtol=0, atol=1e-5, strict=True)
        prediction = detector.decide(score_map)
        mask = read_mask(predicted / f"masks/{name}.png", score_map.shape)
        np.testing.assert_array_equal(mask, score_map > detector.calibration.threshold, strict=True)
        assert row["image_score"] == score_map.max() == prediction.image_score
        assert row["p_value"] == prediction.p_value
        assert row["decision"] == ("anomalous" if mask.any() else "normal")
        assert row["boxes"] == [[r.left, r.top, r.width, r.height] for r in prediction.regions]
        assert row["regions"] == len(row["boxes"]) and row["seconds"] >= 0 and row["error"] == ""


def test_defects_are_found_and_named(predicted):
    decisions = {row["path"]: row["decision"] for row in rows_of(predicted)}
    assert all(decision == "anomalous" for path, decision in decisions.items() if "/blob/" in path)


def test_heat_maps_share_the_scale_of_the_calibration(predicted, tiny_run, tiny_data):
    detector = load_detector(tiny_run)
    for name in ("good/000", "blob/000"):
        pixels = read_pixels(tiny_data / f"test/{name}.png")
        with Image.open(predicted / f"maps/{name}.tiff") as image:
            prediction = detector.decide(np.asarray(image))
        expected = heat_map(prediction.score_map, detector.calibration.threshold, pixels, prediction.mask)
        np.testing.assert_array_equal(read_pixels(predicted / f"heatmaps/{name}.png"), expected, strict=True)


def test_artefacts_tell_their_origin(predicted, tiny_run):
    made = read_json(predicted / "predict.json")
    card = read_json(tiny_run / "card.json")
    assert made["version"] == __version__ and made["fingerprint"] == card["fingerprint"]
    assert made["calibration"] == card["promise"] | {key: card[key] for key in ("mask_rule", "threshold")}
    note = json.loads(Image.open(predicted / "masks/blob/000.png").info["Software"])
    assert note["fingerprint"] == made["fingerprint"]
    tags = Image.open(predicted / "maps/blob/000.tiff").tag_v2
    assert json.loads(tags[270])["fingerprint"] == made["fingerprint"]


@pytest.mark.parametrize("shape", [(1, 1), (7, 90), (33, 31), (100, 130)])
def test_images_of_any_size_get_maps_of_their_own(run_cli, tiny_run, save, texture, tmp_path, shape):
    image = save(tmp_path / "in.png", texture(0, shape) if min(shape) > 1 else np.full(shape, 99, np.uint8))
    assert run_cli(["predict", f"run={tiny_run}", f"input={image}", "out=out"]).code == 0
    assert np.asarray(Image.open(tmp_path / "out/maps/in.tiff")).shape == shape
    assert read_pixels(tmp_path / "out/heatmaps/in.png").shape == (*shape, 3)
    assert read_mask(tmp_path / "out/masks/in.png", shape).shape == shape


def test_colour_and_16_bit_images_are_predicted_by_a_grey_run(run_cli, tiny_run, save, texture, tmp_path):
    grey = texture(3)
    save(tmp_path / "in/colour.png", np.repeat(grey[..., None], 3, axis=2))
    save(tmp_path / "in/deep.png", grey.astype(np.uint16) * 257)
    save(tmp_path / "in/grey.png", grey)
    assert run_cli(["predict", f"run={tiny_run}", "input=in", "out=out"]).code == 0
    maps = [np.asarray(Image.open(tmp_path / f"out/maps/{name}.tiff")) for name in ("grey", "colour", "deep")]
    np.testing.assert_allclose(maps[1], maps[0], atol=1e-5)
    np.testing.assert_allclose(maps[2], maps[0], atol=1e-5)


def test_corrupt_image_among_many_costs_only_its_own_row(run_cli, tiny_run, save, texture, tmp_path):
    for number in range(6):
        save(tmp_path / f"in/{number}.png", texture(number))
    (tmp_path / "in/2.png").write_bytes((tmp_path / "in/2.png").read_bytes()[:300])
    (tmp_path / "in/4.png").write_bytes(b"")
    result = run_cli(["predict", f"run={tiny_run}", "input=in", "out=out"])
    assert result.code == 1 and len(result.sentences) == 2 and "Traceback" not in result.err
    assert "2 unusable" in result.out
    rows = rows_of(tmp_path / "out")
    assert [bool(row["error"]) for row in rows] == [False, False, True, False, True, False]
    for row in rows:
        assert (row["decision"] is None) == (row["image_score"] is None) == bool(row["error"])
        assert not row["error"] or row["path"] in row["error"]
    assert len(list((tmp_path / "out/maps").iterdir())) == 4


def test_only_corrupt_images_still_make_a_table(run_cli, tiny_run, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"")
    result = run_cli(["predict", f"run={tiny_run}", "input=in", "out=out"])
    assert result.code == 1
    assert rows_of(tmp_path / "out")[0]["error"]


def test_finished_predictions_are_not_overwritten_by_accident(run_cli, tiny_run, predicted, tiny_data, tmp_path):
    shutil.copytree(predicted, tmp_path / "out")
    before = (tmp_path / "out/predictions.jsonl").read_bytes()
    words = ["predict", f"run={tiny_run}", f"input={tiny_data / 'test/blob'}", "out=out"]
    result = run_cli(words)
    assert result.code == 2 and "already holds predictions" in result.sentences[0]
    assert (tmp_path / "out/predictions.jsonl").read_bytes() == before
    assert run_cli([*words, "overwrite=true"]).code == 0
    assert len(rows_of(tmp_path / "out")) == 5


def interrupt(out, done, torn='{"path": "/torn'):
    """Make finished predictions look as a kill would have left them after `done` rows."""
    lines = (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    # What only the whole batch can say is not known yet.
    known = [json.dumps(json.loads(line) | {"q_value": None, "fdr_decision": None}) + "\n" for line in lines[:done]]
    (out / ".predictions.jsonl.part").write_text("".join(known) + torn, encoding="utf-8")
    (out / "predictions.jsonl").unlink()
    (out / "predictions.csv").unlink()
    return [json.loads(line) for line in lines]


def test_killed_prediction_goes_on_where_it_was(run_cli, tiny_run, tiny_data, predicted, tmp_path, assert_same_rows):
    out = shutil.copytree(predicted, tmp_path / "out")
    rows = interrupt(out, done=4)
    for path in [out / "maps/blob/000.tiff", out / "maps/good/007.tiff"]:
        path.unlink()
    result = run_cli(["predict", f"run={tiny_run}", f"input={tiny_data / 'test'}", "out=out"])
    assert result.code == 0, result.err
    assert "4 of them before the interruption" in result.out
    after = rows_of(out)
    assert_same_rows(after, rows)
    assert after[:4] == rows[:4]
    assert not (out / "maps/blob/000.tiff").exists() and (out / "maps/good/007.tiff").exists()


def test_resumed_prediction_counts_and_reports_all_images(run_cli, tiny_run, save, texture, tmp_path):
    for number in range(4):
        save(tmp_path / f"in/{number}.png", texture(number))
    (tmp_path / "in/0.png").write_bytes(b"")
    words = ["predict", f"run={tiny_run}", "input=in", "out=out"]
    first = run_cli(words)
    interrupt(tmp_path / "out", done=2)
    again = run_cli(words)
    assert again.code == first.code == 1
    assert again.sentences == first.sentences
    assert "4 images" in again.out and "1 unusable" in again.out


def test_unfinished_predictions_of_another_calibration_are_refused(run_cli, run_copy, tiny_data, predicted, tmp_path):
    out = shutil.copytree(predicted, tmp_path / "out")
    interrupt(out, done=4)
    assert run_cli(["calibrate", f"run={run_copy}", "calibration.alpha=0.2"]).code == 0
    result = run_cli(["predict", f"run={run_copy}", f"input={tiny_data / 'test'}", "out=out"])
    assert result.code == 2 and "another detector or calibration" in result.sentences[0]
    assert (out / ".predictions.jsonl.part").exists()


def test_default_output_lies_in_the_run(run_cli, run_copy, tiny_data):
    assert run_cli(["predict", f"run={run_copy}", f"input={tiny_data / 'test/blob'}"]).code == 0
    (out,) = (run_copy / "predictions").iterdir()
    assert len(rows_of(out)) == 5


def test_input_may_be_a_list(run_cli, tiny_run, tiny_data):
    good, blob = tiny_data / "test/good/000.png", tiny_data / "test/blob/001.png"
    result = run_cli(["predict", f"run={tiny_run}", f"input=[{good},{blob}]", "out=out"])
    assert result.code == 0, result.err
    assert "2 images" in result.out


@pytest.mark.parametrize("name", ["ü", "a (1)", "it's", "x=1 & y", "#1 {2}"])
def test_paths_of_a_list_may_hold_what_hydra_reads_otherwise(run_cli, tiny_run, tiny_data, tmp_path, name):
    for number in (0, 1):
        (tmp_path / name).mkdir(exist_ok=True)
        shutil.copy(tiny_data / "test/good/000.png", tmp_path / name / f"{number}.png")
    quoted = "'" in name  # which ends a quotation: such a list is the user's own to quote
    paths = [f"{tmp_path / name / number}.png".replace("'", "\\'") for number in ("0", "1")]
    listed = ", ".join(f"'{path}'" if quoted else path for path in paths)
    result = run_cli(["predict", f"run={tiny_run}", f"input=[{listed}]", "out=out"])
    assert result.code == 0 and "2 images" in result.out, result.err


def test_a_tilde_that_the_shell_left_is_the_home_folder(run_cli, tiny_run, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(tiny_data / "test/good/000.png", tmp_path / "a.png")
    assert run_cli(["predict", f"run={tiny_run}", "input=[~/a.png]", "out=~/out"]).code == 0
    assert (tmp_path / "out/predictions.csv").is_file()


def test_files_that_differ_by_suffix_only_keep_both_results(run_cli, tiny_run, save, texture, tmp_path):
    save(tmp_path / "in/a.png", texture(0))
    save(tmp_path / "in/a.bmp", texture(1))
    assert run_cli(["predict", f"run={tiny_run}", "input=in", "out=out"]).code == 0
    assert {path.name for path in (tmp_path / "out/maps").iterdir()} == {"a.png.tiff", "a.bmp.tiff"}


def test_equal_names_in_two_inputs_are_refused_before_any_work(run_cli, tiny_run, save, texture, tmp_path):
    for folder in ("x", "y"):
        save(tmp_path / folder / "a.png", texture(0))
    result = run_cli(["predict", f"run={tiny_run}", "input=[x,y]", "out=out"])
    assert result.code == 2 and "Two inputs" in result.sentences[0]
    assert not (tmp_path / "out").exists()


# --- evaluate -------------------------------------------------------------------------------------------------

FIGURES = {
    "images",
    "masks",
    "empty_masks",
    "image_auroc",
    "image_ap",
    "image_best_f1_over_thresholds",
    "pixel_auroc",
    "pixel_ap",
    "aupro_0.3",
    "aupro_0.05",
    "calibrated",
}
DECISIONS = {
    "image_precision",
    "image_recall",
    "image_f1",
    "pixel_precision",
    "pixel_recall",
    "pixel_dice",
    "pixel_iou",
}


def test_metrics_are_complete_overall_and_per_kind(tiny_run, run_cli, tmp_path):
    result = run_cli(["evaluate", f"run={tiny_run}", "out=out"])
    assert result.code == 0, result.err
    metrics = read_json(tmp_path / "out/metrics.json")
    assert set(metrics) == {"made", "overall", "kinds", "normals", "unreadable"}
    for figures in (metrics["overall"], metrics["kinds"]["blob"]):
        assert set(figures) == FIGURES and set(figures["calibrated"]) == DECISIONS
    assert metrics["overall"]["images"] == metrics["overall"]["masks"] == 5
    assert metrics["kinds"] == {"blob": metrics["overall"]}
    assert metrics["normals"]["images"] == 8
    assert metrics["overall"]["image_auroc"] == 1.0 and metrics["overall"]["pixel_auroc"] > 0.9
    assert metrics["made"]["version"] == __version__
    assert metrics == read_json(tiny_run / "metrics.json") | {"made": metrics["made"]}


def test_table_separates_calibrated_from_best_over_thresholds(tiny_run, run_cli):
    result = run_cli(["evaluate", f"run={tiny_run}", "out=out"])
    assert "over all thresholds" in result.out and "at the calibrated threshold" in result.out
    assert "best F1*" in result.out and "upper bound" in result.out
    assert re.search(r"false alarms: \d of 8 normal images", result.out)


def test_evaluation_rows_agree_with_predictions(tiny_run, run_cli, predicted, tmp_path):
    assert run_cli(["evaluate", f"run={tiny_run}", "out=out"]).code == 0
    with (tmp_path / "out/evaluation.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    for row in rows_of(predicted):
        assert float(rows[row["path"]]["image_score"]) == row["image_score"]
        assert rows[row["path"]]["decision"] == row["decision"]


def test_evaluation_does_not_replace_what_another_detector_made(run_cli, tiny_run, run_copy, predicted, tmp_path):
    out = shutil.copytree(predicted, tmp_path / "out")
    for folder, found in ((run_copy, "a run"), (out, "predictions")):
        before = (folder / "card.json").read_bytes()
        result = run_cli(["evaluate", f"run={tiny_run}", f"out={folder}"])
        assert result.code == 2 and f"holds {found}" in result.sentences[0]
        assert (folder / "card.json").read_bytes() == before
    assert run_cli(["evaluate", f"run={run_copy}", f"out={run_copy}"]).code == 0  # its own


def test_evaluation_of_other_data(tiny_run, run_cli, make_mvtec, tmp_path):
    make_mvtec(tmp_path / "other", train=1, good=3, blob=2)
    result = run_cli(["evaluate", f"run={tiny_run}", "data.root=other", "out=out"])
    assert result.code == 0, result.err
    assert read_json(tmp_path / "out/metrics.json")["normals"]["images"] == 3


@pytest.mark.parametrize("part", ["train", "calibration"])
def test_images_that_the_run_has_seen_evaluate_nothing(tiny_run, tiny_data, run_cli, make_mvtec, tmp_path, part):
    with (tiny_run / "splits.csv").open(encoding="utf-8") as file:
        seen = next(row["path"] for row in csv.DictReader(file) if row["split"] == part)
    make_mvtec(tmp_path / "other", train=1, good=3, blob=2)
    shutil.copy(seen, tmp_path / "other/test/good/seen.png")
    result = run_cli(["evaluate", f"run={tiny_run}", "data.root=other", "out=out"])
    assert result.code == 2 and "1 of 6 images took part in training or calibration" in result.sentences[0]
    assert not (tmp_path / "out").exists()


def test_evaluation_without_good_images_or_masks_leaves_figures_open(tiny_run, run_cli, make_mvtec, tmp_path):
    make_mvtec(tmp_path / "other", train=1, good=0, blob=2)
    shutil.rmtree(tmp_path / "other/ground_truth")
    result = run_cli(["evaluate", f"run={tiny_run}", "data.root=other", "out=out"])
    assert result.code == 0, result.err
    metrics = read_json(tmp_path / "out/metrics.json")
    assert metrics["overall"]["image_auroc"] is None and metrics["overall"]["pixel_auroc"] is None
    assert metrics["overall"]["calibrated"]["image_recall"] == 1.0
    assert "have no mask" in result.out


def test_unusable_test_images_and_masks_are_reported(tiny_run, run_cli, make_mvtec, save, tmp_path):
    make_mvtec(tmp_path / "other", train=1, good=3, blob=3)
    (tmp_path / "other/test/good/001.png").write_bytes(b"")
    save(tmp_path / "other/ground_truth/blob/002_mask.png", np.zeros((9, 9), np.uint8))
    result = run_cli(["evaluate", f"run={tiny_run}", "data.root=other", "out=out"])
    assert result.code == 1 and len(result.sentences) == 2
    metrics = read_json(tmp_path / "out/metrics.json")
    assert len(metrics["unreadable"]) == 2
    assert (metrics["normals"]["images"], metrics["overall"]["images"]) == (2, 2)


def test_two_predictions_do_not_write_into_one_folder(run_cli, tiny_run, tiny_data, predicted, tmp_path):
    out = shutil.copytree(predicted, tmp_path / "out")
    rows = interrupt(out, done=4)
    words = ["predict", f"run={tiny_run}", f"input={tiny_data / 'test'}", "out=out"]
    with (out / ".predictions.jsonl.part").open("ab") as other:
        hold(other, "")
        for command in (words, [*words, "overwrite=true"]):
            result = run_cli(command)
            assert result.code == 2 and len(result.sentences) == 1
            assert "Another `blemish` is writing predictions to out" in result.sentences[0]
    assert run_cli(words).code == 0 and len(rows_of(out)) == len(rows)


def test_the_detector_in_a_run_names_the_run(run_cli, run_copy, tiny_data, tmp_path):
    assert run_cli(["predict", f"run={run_copy / 'detector.pt'}", f"input={tiny_data / 'test/blob'}"]).code == 0
    assert [out.name for out in (run_copy / "predictions").iterdir()]
    assert run_cli(["calibrate", f"run={run_copy / 'detector.pt'}", "calibration.alpha=0.2"]).code == 0
    assert read_json(run_copy / "card.json")["promise"]["alpha"] == 0.2


# --- calibrate ------------------------------------------------------------------------------------------------


def test_calibration_on_other_normals_keeps_the_model(run_copy, run_cli, save, texture, tmp_path):
    before = load_detector(run_copy)
    for number in range(20):
        save(tmp_path / f"new/{number}.png", texture(300 + number))
    result = run_cli(["calibrate", f"run={run_copy}", "data.root=new"])
    assert result.code == 0, result.err
    after = load_detector(run_copy)
    assert after.fingerprint == before.fingerprint and after.calibration.n == 20
    assert after.calibration.promise == before.calibration.promise
    expected = sorted(float(before.score_map(read_image(path)).max()) for path in (tmp_path / "new").iterdir())
    assert list(after.calibration.scores) == pytest.approx(expected, rel=1e-5)
    assert read_json(run_copy / "card.json") == after.calibration.to_dict()
    assert {"made"} & set(read_json(run_copy / "card.json"))


def test_another_alpha_needs_no_data(run_copy, run_cli):
    before = load_detector(run_copy).calibration
    result = run_cli(["calibrate", f"run={run_copy}", "calibration.alpha=0.3"])
    assert result.code == 0, result.err
    after = load_detector(run_copy).calibration
    assert after.promise.alpha == 0.3 and after.scores == before.scores
    assert after.threshold == sorted(before.scores)[9]


def test_other_rule_needs_no_data(run_copy, run_cli):
    result = run_cli(["calibrate", f"run={run_copy}", "calibration.rule=pac", "calibration.alpha=0.3"])
    assert result.code == 0, result.err
    assert load_detector(run_copy).calibration.promise.rule == "pac" and "confidence" in result.out


def test_images_that_trained_do_not_calibrate(run_copy, run_cli, tiny_data):
    before = (run_copy / "detector.pt").read_bytes()
    result = run_cli(["calibrate", f"run={run_copy}", f"data.root={tiny_data / 'train'}"])
    assert (
        result.code == 2 and "48 of 60 calibration images, or others of their group, took part" in result.sentences[0]
    )
    assert (run_copy / "detector.pt").read_bytes() == before


@pytest.mark.parametrize(("rule", "needed"), [("marginal", "99"), ("pac", "299")])
def test_too_few_images_name_the_number_needed(run_copy, run_cli, rule, needed):
    before = (run_copy / "detector.pt").read_bytes()
    result = run_cli(["calibrate", f"run={run_copy}", "calibration.alpha=0.01", f"calibration.rule={rule}"])
    assert result.code == 2 and len(result.sentences) == 1
    assert "12 calibration images are too few" in result.sentences[0] and needed in result.sentences[0]
    assert (run_copy / "detector.pt").read_bytes() == before


def test_unreadable_calibration_image_changes_nothing(run_copy, run_cli, save, texture, tmp_path):
    before = (run_copy / "detector.pt").read_bytes()
    for number in range(12):
        save(tmp_path / f"new/{number}.png", texture(300 + number))
    (tmp_path / "new/5.png").write_bytes(b"")
    result = run_cli(["calibrate", f"run={run_copy}", "data.root=new"])
    assert result.code == 2 and "5.png" in result.sentences[0]
    assert (run_copy / "detector.pt").read_bytes() == before


# --- check ----------------------------------------------------------------------------------------------------


def test_check_of_sound_data(run_cli, tiny_data):
    result = run_cli(["check", "data=mvtec", f"data.root={tiny_data}"])
    assert result.code == 0, result.out
    for fact in ("images: 73", "68 good", "5 blob", "48 x 40", "bits per channel: 73 8", "no problem found"):
        assert fact in result.out
    assert "19 calibration images can promise alpha >= 0.05" in result.out


def test_check_takes_its_folder_as_a_plain_word(run_cli, normal_folder):
    assert "images: 60" in run_cli(["check", normal_folder]).out


def test_check_lists_every_problem(run_cli, mvtec_root):
    (mvtec_root / "train/good/003.png").write_bytes(b"")
    (mvtec_root / "test/good/001.png").write_text("no image")
    (mvtec_root / "test/blob/002.png").unlink()
    (mvtec_root / "ground_truth/blob/004_mask.png").unlink()
    shutil.copy(mvtec_root / "train/good/010.png", mvtec_root / "test/good/copy.png")
    result = run_cli(["check", "data=mvtec", f"data.root={mvtec_root}"])
    assert result.code == 1
    problems = [line for line in result.out.splitlines() if line.startswith("problem: ")]
    for name in ("003.png", "001.png", "002_mask.png has no image"):
        assert sum(name in problem for problem in problems) == 1, name
    assert any("010.png" in problem and "copy.png" in problem for problem in problems)
    assert "defective images without a mask: 1" in result.out
    assert f"{len(problems)} problems found" in result.out and len(problems) == 4


def test_check_says_when_the_promise_cannot_be_kept(run_cli, normal_folder):
    result = run_cli(["check", f"data.root={normal_folder}", "calibration.alpha=0.01"])
    assert result.code == 1
    assert any("needs 99" in line for line in result.out.splitlines() if line.startswith("problem: "))


def test_check_agrees_with_train_on_the_promise(run_cli, normal_folder, tiny, tmp_path):
    settings = [f"data.root={normal_folder}", "calibration.alpha=0.03"]
    checked = run_cli(["check", *settings])
    trained = run_cli(["train", *settings, *[word for word in tiny if not word.startswith("calibration")]])
    assert (checked.code, trained.code) == (1, 2)
    assert trained.sentences[0].startswith("blemish: 30 calibration images are too few")
    assert "30 calibration images are too few" in checked.out


# --- sweeps ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.slow
def test_sweep_makes_a_run_per_combination_and_compare_a_table(run_cli, tiny_data, tiny, tmp_path):
    words = ["train", "--multirun", "model=conv_ae,vae", "residual=l1,ssim", "data=mvtec", f"data.root={tiny_data}"]
    result = run_cli([*words, "out=sweep", *tiny, "training.steps=2"])
    assert result.code == 0, result.err
    runs = sorted((tmp_path / "sweep").glob("*/config.yaml"))
    assert [path.parent.name for path in runs] == ["0", "1", "2", "3"]
    settings = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in runs]
    chosen = [(one["model"]["_target_"].split(".")[-1], one["score"]["residual"]["_target_"]) for one in settings]
    assert chosen == [
        (model, f"blemish.residuals.{residual}")
        for model in ("ConvAutoencoder", "VariationalAutoencoder")
        for residual in ("L1", "SSIM")
    ]
    assert all("${" not in path.read_text(encoding="utf-8") for path in runs)

    compared = run_cli(["compare", "sweep"])
    assert compared.code == 0, compared.err
    with (tmp_path / "sweep/compare.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["model"], row["residual"]) for row in rows] == [
        ("0", "conv_ae", "l1"),
        ("1", "conv_ae", "ssim"),
        ("2", "vae", "l1"),
        ("3", "vae", "ssim"),
    ]
    for row in rows:
        metrics = read_json(tmp_path / f"sweep/{row['run']}/metrics.json")
        assert float(row["image_auroc"]) == metrics["overall"]["image_auroc"]
        assert "vae" in compared.out and f"{metrics['overall']['image_auroc']:.4f}" in compared.out


def test_failed_run_of_a_sweep_does_not_end_it(run_cli, normal_folder, tiny, tmp_path):
    words = ["train", "--multirun", "tiling.size=30,32", f"data.root={normal_folder}", "out=sweep"]
    result = run_cli([*words, *[word for word in tiny if not word.startswith("tiling")], "training.steps=2"])
    assert result.code == 2 and len(result.sentences) == 1 and "multiple of 4" in result.sentences[0]
    assert (tmp_path / "sweep/1/detector.pt").is_file() and not (tmp_path / "sweep/0/detector.pt").exists()


def test_compare_marks_unfinished_runs(run_cli, tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "runs/a")
    shutil.copytree(tiny_run, tmp_path / "runs/b")
    for name in ("detector.pt", "metrics.json"):
        (tmp_path / "runs/b" / name).unlink()
    result = run_cli(["compare", "runs"])
    assert result.code == 0, result.err
    (line,) = [line for line in result.out.splitlines() if line.startswith("b ")]
    assert "unfinished" in line


# --- paths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_path_works_as_run_input_and_out(run_cli, tiny_run, tiny_data, tmp_path, name):
    shutil.copytree(tiny_run, tmp_path / name / "run")
    shutil.copytree(tiny_data / "test/blob", tmp_path / name / "in")
    words = [f"{key}={tmp_path / name / key}" for key in ("run", "out")] + [f"input={tmp_path / name / 'in'}"]
    result = run_cli(["predict", *words])
    assert result.code == 0, result.err
    assert len(rows_of(tmp_path / name / "out")) == 5
    single = run_cli(["predict", words[0], f"input={tmp_path / name / 'in/000.png'}", f"out={tmp_path / name}2"])
    assert single.code == 0, single.err
    assert len(rows_of(tmp_path / f"{name}2")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_path_works_for_data(run_cli, tiny_data, tmp_path, name):
    shutil.copytree(tiny_data, tmp_path / name)
    for words in (["check", "data=mvtec", f"data.root={tmp_path / name}"], ["check", "data=mvtec", tmp_path / name]):
        result = run_cli(words)
        assert result.code == 0 and "images: 73" in result.out, result.err


def test_training_in_an_odd_path_can_be_evaluated_and_compared(run_cli, make_mvtec, tiny, tmp_path):
    root = make_mvtec(tmp_path / "teile, [neu] größe=3" / "data", train=30, good=2, blob=2)
    run = tmp_path / "läufe, [neu] größe=3" / "run 1"
    result = run_cli(["train", "data=mvtec", f"data.root={root}", f"out={run}", *tiny, "training.steps=2"])
    assert result.code == 0, result.err
    assert run_cli(["evaluate", f"run={run}"]).code == 0
    compared = run_cli(["compare", run.parent])
    assert compared.code == 0 and "run 1" in compared.out

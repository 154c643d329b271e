"""`blemish ensemble`: from two trained runs to one that every verb takes for a run."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from blemish import load_detector
from blemish.checkpoint import read_checkpoint
from blemish.data.images import read_pixels
from blemish.ensemble import Ensemble
from blemish.errors import CalibrationError, CheckpointError, ConfigError
from blemish.files import DETECTOR_FILE
from blemish.models.run_encoder import RunEncoder


def train(run_cli, tiny, data, run, *words):
    result = run_cli(["train", "data=mvtec", f"data.root={data}", f"out={run}", *tiny, "synthetic.images=0", *words])
    assert result.code == 0, result.err
    return run


@pytest.fixture(scope="module")
def other_run(run_cli, tiny, tiny_data, tmp_path_factory):
    """A run on the same data, with another model, residual, image size and tiling; read only."""
    run = tmp_path_factory.mktemp("runs") / "other"
    return train(run_cli, tiny, tiny_data, run, "residual=l2", "image.size=32", "model.width=8", "image.channels=3")


@pytest.fixture(scope="module")
def both(run_cli, tiny_run, other_run, tmp_path_factory):
    """The ensemble of both, and what its making printed; its members' folders are gone; read only."""
    folder = tmp_path_factory.mktemp("ensemble")
    runs = [shutil.copytree(run, folder / run.name) for run in (tiny_run, other_run)]
    words = ["ensemble", f"runs=[{runs[0]},{runs[1]}]", f"out={folder / 'both'}", "calibration.alpha=0.1"]
    result = run_cli([*words, "synthetic.images=4", "cleaning.min_area=2"])
    assert result.code == 0, result.err
    for run in runs:
        shutil.rmtree(run)
    return folder / "both", result.out


def rewrite(run, change):
    content = torch.load(run / DETECTOR_FILE, weights_only=True)
    change(content)
    torch.save(content, run / DETECTOR_FILE)


def test_an_ensemble_is_not_exported(both, run_cli):
    result = run_cli(["export", f"run={both[0]}", "format=torch"])
    assert (
        result.code == 2 and "Ensemble cannot be exported, because it joins several detectors" in result.sentences[-1]
    )
    assert not (both[0] / "export").exists()


def test_it_ends_as_a_training_does(both, tiny_run):
    run, printed = both
    assert "calibrated: " in printed and "synthetic defects on" in printed and f"run folder: {run}" in printed
    made = {path.name for path in run.iterdir()}
    assert made == {path.name for path in tiny_run.iterdir()} - {"checkpoints", "tensorboard"}
    about, settings = (json.loads((run / "run.json").read_text()), yaml.safe_load((run / "config.yaml").read_text()))
    before = json.loads((tiny_run / "run.json").read_text())
    assert about["status"] == "done" and about["data_fingerprint"] == before["data_fingerprint"]
    assert settings["data"] == yaml.safe_load((tiny_run / "config.yaml").read_text())["data"]
    assert (run / "splits.csv").read_text() == (tiny_run / "splits.csv").read_text()


def test_maps_are_the_members_own_in_units_of_the_validation_images(both, tiny_run, other_run, tiny_data):
    detector = load_detector(both[0], device="cpu")
    members = [load_detector(run, device="cpu") for run in (tiny_run, other_run)]
    assert isinstance(detector, Ensemble) and detector.join == "mean" and detector.cleaning.min_area == 2
    assert [one.fingerprint for one in detector.members] == [one.fingerprint for one in members]
    with (tiny_run / "splits.csv").open() as file:
        held_out = [line.split(",")[0] for line in file if line.split(",")[1] == "validation"]
    for member, unit in zip(members, detector.units, strict=True):
        pooled = np.concatenate([member.score_map(read_pixels(path)).ravel() for path in held_out])
        assert unit == pytest.approx(np.quantile(pooled, 0.999, method="higher"), rel=1e-5)
    image = read_pixels(sorted(tiny_data.glob("test/blob/*"))[0])
    by_hand = np.mean([one.score_map(image) / unit for one, unit in zip(members, detector.units, strict=True)], axis=0)
    np.testing.assert_allclose(detector.score_map(image), by_hand, rtol=1e-5)
    about = read_checkpoint(both[0])["about"]
    assert about["trained_on"] == read_checkpoint(tiny_run)["about"]["trained_on"]


def test_verbs_take_it_for_a_run_from_anywhere(both, run_cli, tiny_data, in_tmp):
    run = shutil.copytree(both[0], in_tmp / "elsewhere")
    before = load_detector(run).card
    predicted = run_cli(["predict", "run=elsewhere", f"input={tiny_data / 'test' / 'blob'}", "out=out"])
    assert predicted.code == 0 and "5 images: " in predicted.out, predicted.err
    first = sorted(tiny_data.glob("test/blob/*"))[0]
    with Image.open(next(iter(sorted((in_tmp / "out" / "maps").iterdir())))) as tiff:
        np.testing.assert_allclose(np.asarray(tiff), load_detector(run)(first).score_map, rtol=1e-5)
    for words in (
        ["calibrate", "run=elsewhere", "calibration.alpha=0.2"],
        ["calibrate", "run=elsewhere", "calibration.mask_rule=area_fraction", "calibration.tau=0.01"],
        ["evaluate", "run=elsewhere"],
        ["monitor", "run=elsewhere", f"input={tiny_data / 'test' / 'good'}"],
        ["report", "run=elsewhere"],
        ["compare", "."],
    ):
        result = run_cli(words)
        assert result.code == 0, (words, result.err)
    after = load_detector(run).card
    assert after.promise.alpha == 0.2 and after.made["calibrated_on"] == before.made["calibrated_on"]
    seen = run_cli(["monitor", "run=elsewhere", f"input={tiny_data / 'train'}"])
    assert seen.code == 2 and "took part in training or calibration" in seen.sentences[0]


def test_other_join_other_promise(both, run_cli, tiny_run, other_run, tmp_path):
    out = tmp_path / "max"
    words = ["ensemble", f"runs=[{tiny_run},{other_run}]", "join=max", f"out={out}", "synthetic.images=0"]
    assert run_cli([*words, "calibration.alpha=0.1", "report.images=0"]).code == 0
    assert load_detector(out).card.fingerprint != load_detector(both[0]).card.fingerprint
    card = json.loads((both[0] / "card.json").read_text())
    rewrite(out, lambda content: content.update(calibration=card))
    with pytest.raises(CalibrationError, match="made for another detector"):
        load_detector(out)


def test_a_kill_loses_the_figures_alone(run_cli, tiny_run, other_run, tmp_path, monkeypatch):
    out = tmp_path / "stopped"
    words = ["ensemble", f"runs=[{tiny_run},{other_run}]", f"out={out}", "calibration.alpha=0.1", "report.images=0"]

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("blemish.pipeline.measure", stop)
        result = run_cli(words)
    assert result.code == 130 and f"`blemish evaluate run={out}` measures it" in result.sentences[0]
    again = run_cli(words)
    assert again.code == 2 and f"`blemish evaluate run={out}`" in again.sentences[0]
    assert run_cli(["evaluate", f"run={out}", "report.images=0"]).code == 0
    assert json.loads((out / "metrics.json").read_text())["overall"]["image_auroc"] > 0.4


def test_an_ensemble_joins_another_on_other_images(both, run_cli, tiny_run, save, texture, tmp_path):
    for number in range(24):
        save(tmp_path / f"new/{number:02d}.png", texture(5000 + number))
    out = tmp_path / "nested"
    words = ["ensemble", f"runs=[{both[0]},{tiny_run}]", f"data.root={tmp_path / 'new'}", f"out={out}"]
    result = run_cli([*words, "synthetic.images=0"])
    assert result.code == 0, result.err
    detector = load_detector(out)
    assert detector.card.n == 20 and isinstance(detector.members[0], Ensemble)
    assert json.loads((out / "run.json").read_text())["images"]["train"] == 0
    content = read_checkpoint(out)
    assert len(content["about"]["trained_on"]) == len(read_checkpoint(tiny_run)["about"]["trained_on"]) + 2


def test_a_run_that_has_seen_a_calibration_image_is_refused(run_cli, tiny, tiny_run, tiny_data, tmp_path):
    reseeded = train(run_cli, tiny, tiny_data, tmp_path / "reseeded", "seed=1", "report.images=0")
    out = tmp_path / "out"
    result = run_cli(["ensemble", f"runs=[{tiny_run},{reseeded}]", f"out={out}", "calibration.alpha=0.1"])
    assert result.code == 2 and len(result.sentences) == 1 and not out.exists()
    assert "Expected calibration images that no run has seen" in result.sentences[0]
    assert str(reseeded) in result.sentences[0] and "same data, seed and split" in result.sentences[0]


def test_a_run_that_has_seen_a_test_image_is_refused(run_cli, tiny, tiny_run, tiny_data, tmp_path):
    normals = tmp_path / "normals"
    shutil.copytree(tiny_data / "train/good", normals / "train")
    shutil.copytree(tiny_data / "test/good", normals / "test")
    with (tiny_run / "splits.csv").open(encoding="utf-8") as file:  # calibration images must not be the reason
        for row in csv.DictReader(file):
            if row["split"] == "calibration":
                (normals / "train" / Path(row["path"]).name).unlink()
    words = ["train", f"data.root={normals}", f"out={tmp_path / 'run'}", *tiny, "report.images=0"]
    assert run_cli([*words, "calibration.alpha=0.2"]).code == 0
    out = tmp_path / "out"
    result = run_cli(["ensemble", f"runs=[{tiny_run},{tmp_path / 'run'}]", f"out={out}", "calibration.alpha=0.1"])
    assert result.code == 2 and not out.exists()
    assert "Expected test images that no run has seen" in result.sentences[0]


@pytest.mark.parametrize(
    ("runs", "words", "sentence"),
    [
        ("[]", (), "two or more runs"),
        ("{tiny}", (), "two or more runs to combine, found 1"),
        ("[{tiny},{tiny}]", (), "found the same detector as number 1 and number 2"),
        ("[{tiny},{tmp}/nowhere]", (), "No detector found at"),
        ("[{tmp}/nowhere,{tiny}]", (), "has no config.yaml"),
        ("[{tiny},{tmp}/unfinished]", (), "has not finished: continue it"),
        ("[{tiny},{other}]", ("join=sum",), "Expected join to be one of mean, max, found 'sum'"),
        ("[{tiny},{other}]", ("seed=3",), "'seed=3' is for other images"),
        ("[{tiny},{other}]", ("calibration.alpha=0.001",), "are too few for alpha"),
        (
            "[{tiny},{other}]",
            ("+calibration.by_class=true", "calibration.alpha=0.1"),
            "a model that tells classes of parts apart",
        ),
        ("[{tiny},{other}]", ("out={tiny}",), "exists and is not empty"),
        ("[{tiny},{other}]", ("data.root={tmp}/nowhere",), "nowhere"),
    ],
)
def test_mistakes_are_told_in_one_sentence(run_cli, tiny_run, other_run, in_tmp, runs, words, sentence):
    (in_tmp / "unfinished" / "checkpoints").mkdir(parents=True)
    (in_tmp / "unfinished" / "checkpoints" / "last.ckpt").touch()
    names = {"tiny": tiny_run, "other": other_run, "tmp": in_tmp}
    result = run_cli(["ensemble", f"runs={runs.format(**names)}", *(word.format(**names) for word in words)])
    assert result.code == 2 and len(result.sentences) == 1 and sentence in result.sentences[0], result.err
    assert not (in_tmp / "runs").exists()


def test_without_runs_the_setting_is_named(run_cli):
    result = run_cli(["ensemble"])
    assert result.code == 2 and "The setting runs is missing" in result.sentences[0]


def test_it_has_no_bottleneck_to_take_features_from(both):
    with pytest.raises(ConfigError, match=r"a run of a model with an encoder.*found Ensemble"):
        RunEncoder(str(both[0]))


def test_parts_are_kept_where_the_images_have_moved(both, run_cli, tiny_run, other_run, tiny_data, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    out = tmp_path / "moved"
    words = ["ensemble", f"runs=[{tiny_run},{other_run}]", "data=mvtec", f"data.root={data}", f"out={out}"]
    result = run_cli([*words, "calibration.alpha=0.1", "synthetic.images=0", "cleaning.min_area=2", "report.images=0"])
    assert result.code == 0, result.err
    cards = [load_detector(run).card for run in (out, both[0])]
    assert cards[0].scores == cards[1].scores and cards[0].made["calibrated_on"] == cards[1].made["calibrated_on"]


def test_changed_images_and_damaged_members_are_refused(both, run_cli, tiny_run, other_run, tiny_data, tmp_path):
    run = shutil.copytree(both[0], tmp_path / "run")
    rewrite(run, lambda content: content["members"][1].pop("state_dict"))
    with pytest.raises(CheckpointError, match=r"lacks members\.state_dict"):
        load_detector(run)
    moved = shutil.copytree(tiny_run, tmp_path / "moved")
    splits = (moved / "splits.csv").read_text()
    changed = splits[:-65] + "0" * 64 + "\n"
    head, last = changed[: changed[:-1].rindex("\n")], changed[changed[:-1].rindex("\n") :]
    for text, sentence in ((changed, "has changed since"), (head + last.replace(".png", "9.png"), "has gone since")):
        (moved / "splits.csv").write_text(text)
        result = run_cli(["ensemble", f"runs=[{moved},{other_run}]", f"out={tmp_path / 'out'}"])
        assert result.code == 2 and sentence in result.sentences[0], result.err

"""`blemish train` as it comes, but tiny: what the defaults choose works together, is saved, and predicts."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
import yaml

from blemish import load_detector
from blemish.checkpoint import read_checkpoint
from blemish.data.datasets import ImageCache, ValidationTiles
from blemish.data.images import read_pixels
from blemish.scores.density import DensityScore
from blemish.standardise import Light

pytestmark = pytest.mark.usefixtures("in_tmp")

# Only what makes it tiny; all else, the precision included, is as a user has it who sets nothing.
SMALL = (
    *("training.steps=4", "training.steps_per_epoch=2", "training.batch_size=4"),
    *("model.width=4", "model.depth=2"),
)


@pytest.fixture(scope="module")
def default_run(tiny_data, run_cli, tmp_path_factory):
    run = tmp_path_factory.mktemp("default") / "run"
    result = run_cli(["train", "data=mvtec", f"data.root={tiny_data}", f"out={run}", *SMALL])
    assert result.code == 0, result.err
    assert result.sentences == []
    return run


def settings_of(run):
    return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))


def test_defaults_are_what_the_manual_says(default_run):
    settings = settings_of(default_run)
    assert settings["model"]["_target_"].endswith(".RepairAutoencoder") and settings["model"]["mask_head"]
    assert settings["corruption"]["_target_"].endswith(".Structured")
    assert settings["score"]["_target_"].endswith(".DensityScore")
    terms = settings["score"]["other"]["terms"]
    assert [term["_target_"].rpartition(".")[2] for term in terms] == ["ResidualScore", "MaskScore"]
    assert settings["tiling"]["standardise"] is True and settings["trainer"]["precision"] == "auto"


def test_what_is_null_was_taken_from_the_images_and_saved(default_run):
    settings, saved = settings_of(default_run), read_checkpoint(default_run)["config"]
    assert settings["tiling"]["size"] == saved["tiling"]["size"] == 32  # of images of 40 x 48
    assert settings["image"]["channels"] == saved["image"]["channels"] == saved["model"]["channels"] == 1


def shown_to_the_score(run, data, detector, split):
    """Batches of the standardised tiles of a part."""
    with (run / "splits.csv").open(newline="", encoding="utf-8") as file:
        paths = [data / row["path"] for row in csv.DictReader(file) if row["split"] == split]
    images = ImageCache(paths, detector.preprocess, 1e9, split, progress=False)
    return [Light.of(x).remove(x) for x in ValidationTiles(images, detector.tiling).batches(4)]


def test_score_has_learned_of_standardised_training_and_validation_tiles(default_run, tiny_data):
    detector, state = load_detector(default_run), read_checkpoint(default_run)["score_state"]
    model, score = detector.scorer.model, detector.scorer.score
    score.learn(model, shown_to_the_score(default_run, tiny_data, detector, "train"))
    score.fit(model, shown_to_the_score(default_run, tiny_data, detector, "validation"))
    again = score.state_dict()
    assert state["centre"].shape == (8, 8, 12) and state["bank"].shape[1] == 140 and state["other.scale"].shape == (2,)
    assert state.keys() == again.keys()
    for name in ("projection", "centre", "median", "unit", "other.location", "other.scale"):
        torch.testing.assert_close(state[name], again[name].cpu(), rtol=1e-2, atol=1e-3)
    score.learn(model, shown_to_the_score(default_run, tiny_data, detector, "validation"))
    assert (score.centre - state["centre"]).abs().max() > 0.01


def test_saved_run_predicts_in_the_images_own_size_and_brightness(default_run, tiny_data):
    detector = load_detector(default_run)
    assert detector.scorer.standardise
    path = tiny_data / "test/blob/000.png"
    prediction = detector(path)
    assert prediction.score_map.shape == (40, 48) and np.isfinite(prediction.score_map).all()
    assert prediction.score_map.min() >= 0 and prediction.is_anomalous == (
        prediction.image_score > detector.card.threshold
    )
    pixels = read_pixels(path).astype(np.float32) / 255
    darker = detector.score_map(0.5 * pixels)
    np.testing.assert_allclose(darker, detector.score_map(pixels), rtol=0.01, atol=0.01 * darker.max())
    score_map, expected = detector.explain(read_pixels(path))
    np.testing.assert_allclose(score_map, prediction.score_map, rtol=1e-3, atol=1e-3)
    assert expected.shape == (40, 40, 1)  # as it was scored


def test_saved_run_predicts_from_the_command_line(default_run, tiny_data, run_cli, tmp_path):
    out = tmp_path / "out"
    result = run_cli(["predict", f"run={default_run}", f"input={tiny_data / 'test'}", f"out={out}"])
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 13 and not any(line["error"] for line in lines)
    assert {line["decision"] for line in lines} <= {"normal", "anomalous"}
    detector = load_detector(default_run)
    for line in lines:
        assert line["image_score"] == pytest.approx(detector(line["path"]).image_score, rel=1e-3)


def test_maps_of_training_images_that_are_remembered_normalise_nothing(tiny_data, run_cli):
    command = ["train", "data=mvtec", f"data.root={tiny_data}", "out=run", *SMALL, "image.size=32"]
    command += ["normalisation.kind=robust", "normalisation.source=train"]
    refused = run_cli(command)
    assert refused.code == 2 and "DensityScore remembers them, so that their score maps are almost 0" in refused.err
    assert run_cli([*command, "score.bank=0"]).code == 0


def test_the_score_remembers_what_augmentation_shows(tiny_data, run_cli, tmp_path, monkeypatch):
    learned = {}

    def learn(self, model, batches):
        learned[augment] = torch.cat([batch.clone() for batch in batches])

    monkeypatch.setattr(DensityScore, "learn", learn)
    for augment in ("none", "flips"):
        command = ["train", "data=mvtec", f"data.root={tiny_data}", f"out={tmp_path / augment}", *SMALL]
        assert run_cli([*command, f"augment={augment}"]).code == 0
    kept = (learned["none"] == learned["flips"]).flatten(1).all(dim=1)
    assert 0 < kept.float().mean() < 0.6  # of four turns one is none


@pytest.mark.parametrize("corruption", ["gaussian", "coarse_noise"])
def test_a_loss_to_which_no_pixel_counts_is_refused(corruption, tiny_data, run_cli, tmp_path):
    command = ["train", "data=mvtec", f"data.root={tiny_data}", f"out={tmp_path / 'run'}", *SMALL]
    refused = run_cli([*command, "objective.corrupted_weight=0", f"corruption={corruption}"])
    assert refused.code == 2 and "expects a corruption that leaves pixels clean" in refused.err
    assert not (tmp_path / "run").exists()
    assert run_cli([*command, "objective.corrupted_weight=0"]).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vae", "memory_ae", "conv_ae", "unet", "vqvae", "hierarchical_vae"])
def test_other_models_work_with_all_other_defaults(model, tiny_data, run_cli, tmp_path, texture):
    run = tmp_path / "run"
    result = run_cli(["train", "data=mvtec", f"data.root={tiny_data}", f"out={run}", f"model={model}", *SMALL])
    assert result.code == 0, result.err
    score_map = load_detector(run).score_map(texture(5))
    assert score_map.shape == (40, 48) and np.isfinite(score_map).all()
    state = read_checkpoint(run)["score_state"]
    assert (state["other.scale"][1] == 1) == (model != "unet")  # it alone has a mask head
    assert bool(state["centre"].numel()) == (model == "unet")  # and shows its activations

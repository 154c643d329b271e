"""Saved detectors: bit for bit what was trained, plain data only, and refused when damaged, foreign or altered."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from blemish import load_detector
from blemish.checkpoint import FORMAT, assemble, build_model, read_checkpoint, save_detector
from blemish.data.images import read_pixels
from blemish.errors import BlemishError, CalibrationError, CheckpointError, ConfigError
from blemish.normalisation import SpatialNormalisation

CONFIG = {
    "model": {
        "_target_": "blemish.models.autoencoder.ConvAutoencoder",
        "channels": 1,
        "width": 4,
        "depth": 2,
        "latent_dim": 4,
    },
    "score": {"_target_": "blemish.scores.residual.ResidualScore", "residual": {"_target_": "blemish.residuals.L1"}},
    "image": {"channels": 1, "max_side": None},
    "tiling": {"size": 16, "overlap": 0.25, "batch": 8},
    "smoothing": {"sigma": 1.0},
    "normalisation": {"kind": "none", "source": "validation", "images": 200},
    "cleaning": {"min_area": 1},
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(CONFIG)


def altered(path, value):
    """CONFIG with the setting at the dotted path changed."""
    config = copy.deepcopy(CONFIG)
    *sections, key = path.split(".")
    section = config
    for name in sections:
        section = section[name]
    section[key] = value
    return config


def rewrite(run, change):
    """Change the content of a run's detector.pt."""
    content = torch.load(run / "detector.pt", weights_only=True)
    change(content)
    torch.save(content, run / "detector.pt")


def image(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (37, 50), np.uint8)


def test_saved_and_loaded_maps_are_equal_bit_for_bit(model, tmp_path):
    before = assemble(CONFIG, model)
    save_detector(tmp_path, CONFIG, before, None, {"version": "0"})
    after = load_detector(tmp_path, device="cpu")
    np.testing.assert_array_equal(after.score_map(image()), before.score_map(image()), strict=True)
    assert after.fingerprint == before.fingerprint


def statistics(seed=0):
    rng = np.random.default_rng(seed)
    return SpatialNormalisation(rng.random((37, 50), np.float32), 0.1 + rng.random((37, 50), np.float32))


def test_statistics_are_saved_and_loaded_bit_for_bit(model, tmp_path):
    before = assemble(CONFIG, model, statistics())
    save_detector(tmp_path, CONFIG, before, None, {"version": "0"})
    after = load_detector(tmp_path, device="cpu")
    np.testing.assert_array_equal(after.normalisation.location, before.normalisation.location, strict=True)
    np.testing.assert_array_equal(after.normalisation.scale, before.normalisation.scale, strict=True)
    np.testing.assert_array_equal(after.score_map(image()), before.score_map(image()), strict=True)
    assert after.fingerprint == before.fingerprint != assemble(CONFIG, model).fingerprint


@pytest.mark.parametrize("name", ["location", "scale"])
def test_fingerprint_changes_with_any_statistic(model, name):
    changed = statistics()
    getattr(changed, name)[7, 9] += np.float32(1e-3)
    one, other, plain = (assemble(CONFIG, model, s).fingerprint for s in (statistics(), changed, None))
    assert len({one, other, plain}) == 3
    assert assemble(CONFIG, model, statistics()).fingerprint == one


def test_model_explains_one_tile_as_it_would_alone(model):
    pixels = np.random.default_rng(1).random((16, 16, 1), np.float32)
    detector = assemble(CONFIG, model)
    score_map, expected = detector.explain(pixels)
    with torch.inference_mode():
        alone = model(torch.from_numpy(pixels.transpose(2, 0, 1)[None])).expected[0, 0].numpy()
    np.testing.assert_array_equal(expected[..., 0], alone, strict=True)
    np.testing.assert_array_equal(score_map, detector.score_map(pixels), strict=True)


def test_loaded_run_is_calibrated_and_knows_its_origin(tiny_run):
    detector = load_detector(tiny_run)
    assert detector.calibration.to_dict() == json.loads((tiny_run / "card.json").read_text())
    about = json.loads((tiny_run / "run.json").read_text())
    assert {key: detector.about[key] for key in about} == about


def test_run_folder_and_its_file_load_alike(tiny_run):
    assert load_detector(tiny_run / "detector.pt").fingerprint == load_detector(str(tiny_run)).fingerprint


def test_detector_predicts_paths_and_arrays_alike(tiny_run, tiny_data):
    detector = load_detector(tiny_run)
    path = tiny_data / "test/blob/000.png"
    one, other = detector(path), detector(read_pixels(path))
    np.testing.assert_array_equal(one.score_map, other.score_map, strict=True)
    assert one.score_map.shape == one.mask.shape == (40, 48) and one.is_anomalous == other.is_anomalous


def test_moved_run_gives_the_same_maps(tiny_run, tmp_path):
    moved = Path(shutil.copytree(tiny_run, tmp_path / "elsewhere"))
    np.testing.assert_array_equal(
        load_detector(moved).score_map(image()), load_detector(tiny_run).score_map(image()), strict=True
    )


def test_checkpoint_holds_plain_data_only(tiny_run):
    def leaves(value):
        if isinstance(value, dict):
            for key, item in value.items():
                yield key
                yield from leaves(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from leaves(item)
        else:
            yield value

    kinds = {type(leaf) for leaf in leaves(read_checkpoint(tiny_run))}
    assert kinds <= {str, int, float, bool, type(None), torch.Tensor}


def test_checkpoint_names_its_version_and_the_data(tiny_run):
    content = read_checkpoint(tiny_run)
    assert content["version"] == json.loads((tiny_run / "run.json").read_text())["version"]
    assert len(content["about"]["trained_on"]) == 48


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("payload-ran"),))


def test_pickled_object_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": FORMAT, "config": Payload()}, tmp_path / "detector.pt")
    with pytest.raises(CheckpointError, match="damaged or not a blemish detector"):
        load_detector(tmp_path)
    assert not (tmp_path / "payload-ran").exists()


@pytest.mark.parametrize("section", ["model", "score"])
@pytest.mark.parametrize(
    "target", ["os.getcwd", "blemishes.Model", "torch.hub.load", "builtins.eval", "torch.nnx.Linear"]
)
def test_target_outside_the_trusted_packages_is_refused(run_copy, section, target):
    rewrite(run_copy, lambda content: content["config"].update({section: {"_target_": target}}))
    with pytest.raises(ConfigError, match="outside the trusted packages") as caught:
        load_detector(run_copy)
    assert target in str(caught.value)


def test_nested_target_outside_the_trusted_packages_is_refused(run_copy):
    def change(content):
        content["config"]["score"]["residual"] = {"_target_": "os.getcwd"}

    rewrite(run_copy, change)
    with pytest.raises(ConfigError, match="outside the trusted packages"):
        load_detector(run_copy)


@pytest.mark.parametrize(
    "target",
    [
        {"_target_": "blemish.cli.main", "arguments": ["--version"]},
        {"_target_": "blemish.checkpoint.read_checkpoint", "run": "."},
        {"_target_": "blemish.data.images.os.getcwd"},
        {"_target_": "blemish.build.build", "config": 1},
    ],
)
def test_trusted_packages_give_their_modules_but_not_any_function(run_copy, target):
    rewrite(run_copy, lambda content: content["config"].update(model=target))
    with pytest.raises(ConfigError):
        load_detector(run_copy)


def test_trusted_can_be_widened(run_copy):
    def change(content):
        content["config"]["score"]["residual"] = {"_target_": "collections.Counter"}

    rewrite(run_copy, change)
    with pytest.raises(ConfigError, match=r"trusted=\['collections'\]"):
        load_detector(run_copy)
    with pytest.raises(CalibrationError, match="another detector"):
        load_detector(run_copy, trusted=["collections"])


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_damaged_file_is_one_sentence(run_copy, content):
    whole = (run_copy / "detector.pt").read_bytes()
    (run_copy / "detector.pt").write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(CheckpointError, match="damaged or not a blemish detector") as caught:
        load_detector(run_copy)
    assert str(run_copy / "detector.pt") in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match=r"No detector found at .*detector.pt"):
        load_detector(tmp_path)


def test_unfinished_training_says_how_to_go_on(run_copy):
    (run_copy / "detector.pt").unlink()
    with pytest.raises(CheckpointError, match=f"blemish train resume={run_copy}"):
        load_detector(run_copy)


@pytest.mark.parametrize("number", [1, FORMAT + 1, None, str(FORMAT)])
def test_other_format_is_refused(run_copy, number):
    rewrite(run_copy, lambda content: content.update(format=number))
    with pytest.raises(CheckpointError, match="format"):
        load_detector(run_copy)


def test_file_that_holds_only_tensors_is_refused(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "detector.pt")
    with pytest.raises(CheckpointError, match="format Tensor"):
        load_detector(tmp_path)


@pytest.mark.parametrize("key", ["config", "state_dict", "normalisation", "calibration", "about"])
def test_lacking_part_is_one_sentence(run_copy, key):
    rewrite(run_copy, lambda content: content.pop(key))
    with pytest.raises(BlemishError):
        load_detector(run_copy)


def test_weights_of_another_architecture_are_refused(run_copy):
    rewrite(run_copy, lambda content: content["config"]["model"].update(width=8))
    with pytest.raises(CheckpointError, match="do not fit its model"):
        load_detector(run_copy)


def test_altered_weight_voids_the_calibration(run_copy):
    rewrite(run_copy, lambda content: next(iter(content["state_dict"].values())).add_(1e-6))
    with pytest.raises(CalibrationError, match="another detector"):
        load_detector(run_copy)


def test_added_statistics_void_the_calibration(run_copy):
    maps = {"location": torch.zeros(40, 48), "scale": torch.ones(40, 48)}
    rewrite(run_copy, lambda content: content.update(normalisation=maps))
    with pytest.raises(CalibrationError, match="another detector"):
        load_detector(run_copy)


@pytest.mark.parametrize(("section", "key", "value"), [("tiling", "overlap", 0.5), ("smoothing", "sigma", 1.0)])
def test_altered_setting_voids_the_calibration(run_copy, section, key, value):
    rewrite(run_copy, lambda content: content["config"][section].update({key: value}))
    with pytest.raises(CalibrationError, match="another detector"):
        load_detector(run_copy)


def test_altered_threshold_is_refused(run_copy):
    rewrite(run_copy, lambda content: content["calibration"].update(threshold=0.0))
    with pytest.raises(CalibrationError, match="contradicts"):
        load_detector(run_copy)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.activation", "relu"),
        ("score.residual._target_", "blemish.residuals.L2"),
        ("image.max_side", 32),
        ("tiling.size", 32),
        ("tiling.overlap", 0.5),
        ("smoothing.sigma", 2.0),
        ("normalisation.kind", "robust"),
    ],
)
def test_fingerprint_changes_with_what_shapes_a_score(model, path, value):
    assert assemble(altered(path, value), model).fingerprint != assemble(CONFIG, model).fingerprint


@pytest.mark.parametrize(("path", "value"), [("cleaning.min_area", 9), ("tiling.batch", 1)])
def test_fingerprint_keeps_with_what_does_not(model, path, value):
    assert assemble(altered(path, value), model).fingerprint == assemble(CONFIG, model).fingerprint


def test_fingerprint_changes_with_any_weight(model):
    before = assemble(CONFIG, model).fingerprint
    for name, tensor in model.state_dict().items():
        kept = tensor.clone()
        tensor += 1
        assert assemble(CONFIG, model).fingerprint != before, name
        tensor.copy_(kept)
    assert assemble(CONFIG, model).fingerprint == before


@pytest.mark.parametrize(
    ("path", "value", "fragment"),
    [
        ("tiling.size", 18, "multiple of 4"),
        ("model.normalisation", "bach", "did you mean 'batch'"),
        ("model._target_", "blemish.models.autoencoder.ConvAutoencode", "cannot be imported"),
        ("model._target_", "ConvAutoencoder", "cannot be imported"),
        ("model._target_", "blemish.residuals.L1", "does not fit"),
        ("model.widht", 4, "does not fit"),
    ],
)
def test_misfit_model_shows_before_any_work(path, value, fragment):
    with pytest.raises(ConfigError, match=fragment):
        build_model(altered(path, value))


def test_unusable_device_is_one_sentence(tiny_run):
    with pytest.raises(ConfigError, match="device 'nonsense'"):
        load_detector(tiny_run, device="nonsense")

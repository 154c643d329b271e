"""Training: reproducible, resumable to the same bits, and visible in TensorBoard."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from blemish import load_detector
from blemish.checkpoint import read_checkpoint
from blemish.data.datasets import ImageCache, TrainingTiles
from blemish.files import held
from blemish.preprocess import Preprocess
from blemish.tiling import Tiling
from blemish.training.fit import TrainingSettings
from blemish.training.run import _Parts
from blemish.training.task import ReconstructionTask

pytestmark = pytest.mark.usefixtures("in_tmp")

# Everything that draws random numbers takes part: corruption, augmentation, a sampled code.
RANDOM = ("model=vae", "augment=light", "corruption=coarse_noise", "training.steps=12", "training.patience=null")
DIE = """
import os, signal, sys
from blemish.cli import main
from blemish.training.task import ReconstructionTask
step = ReconstructionTask.training_step
def dying(self, batch, batch_idx):
    if self.current_epoch == 3 and batch_idx == 1:
        os.kill(os.getpid(), signal.{})
    return step(self, batch, batch_idx)
ReconstructionTask.training_step = dying
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def whole(tiny_data, tiny, run_cli, tmp_path_factory):
    """The training that was never interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert run_cli(["train", "data=mvtec", f"data.root={tiny_data}", f"out={run}", *tiny, *RANDOM]).code == 0
    return run


@pytest.fixture
def train(run_cli, tiny_data, tiny, tmp_path):
    """Train with more settings; return the run folder."""

    def run(*settings, name="run"):
        out = tmp_path / name
        result = run_cli(["train", "data=mvtec", f"data.root={tiny_data}", f"out={out}", *tiny, *settings])
        assert result.code == 0, result.err
        return out

    return run


def assert_same_weights(run, other):
    ours, theirs = read_checkpoint(run)["state_dict"], read_checkpoint(other)["state_dict"]
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_same_seed_gives_the_same_bits(train, tiny_run):
    again = train()
    assert_same_weights(again, tiny_run)
    assert read_checkpoint(again)["calibration"]["scores"] == read_checkpoint(tiny_run)["calibration"]["scores"]


@pytest.mark.slow
def test_another_seed_gives_other_weights_and_parts(train, tiny_run):
    other = train("seed=1")
    ours, theirs = read_checkpoint(other)["state_dict"], read_checkpoint(tiny_run)["state_dict"]
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
    assert (other / "splits.csv").read_text() != (tiny_run / "splits.csv").read_text()


@pytest.mark.parametrize(
    "settings",
    [
        ("training.cache_gb=0",),
        pytest.param(("training.cache_gb=0", "training.disk_gb=0"), marks=pytest.mark.slow),
        pytest.param(("training.cache_gb=0", "training.workers=1"), marks=pytest.mark.slow),
    ],
)
def test_how_tiles_are_prepared_changes_no_bit(train, tiny_run, settings):
    assert_same_weights(train(*settings), tiny_run)


def test_steps_of_several_batches_keep_their_number_and_the_cycle(train, monkeypatch):
    batches, rates = [], []
    step = ReconstructionTask.training_step

    def watched(self, batch, number):
        batches.append(self.global_step)
        rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return step(self, batch, number)

    monkeypatch.setattr(ReconstructionTask, "training_step", watched)
    run = train("training.accumulate=3")
    assert batches == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]  # TINY has 4 steps
    assert rates[:3] == rates[:1] * 3 and rates[-1] < 1e-4 < max(rates)
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.slow
def test_compiled_training_gives_the_same_detector_but_for_rounding(train, tiny_run):
    run = train("training.compile=true")
    ours, theirs = read_checkpoint(run)["state_dict"], read_checkpoint(tiny_run)["state_dict"]
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-4)
    assert_same_weights(train("training.compile=true", name="again"), run)


def test_compiling_takes_the_place_of_every_forward_pass_in_training(train, monkeypatch):
    calls = []

    def recorded(function):
        def forward(x):
            calls.append(torch.is_grad_enabled())
            return function(x)

        return forward

    monkeypatch.setattr(torch, "compile", recorded)
    train("training.compile=true")
    assert set(calls) == {True, False}  # training and validation


@pytest.mark.parametrize(
    ("model", "sentence"),
    [("conv_ae", r"needs a C\+\+ compiler"), ("adversarial_ae", "learns otherwise: leave it out")],
)
def test_what_cannot_be_compiled_is_one_sentence(run_cli, tiny_data, tiny, tmp_path, monkeypatch, model, sentence):
    def missing(function):
        raise RuntimeError("no g++")

    monkeypatch.setattr(torch, "compile", missing)
    words = ["train", "data=mvtec", f"data.root={tiny_data}", f"out={tmp_path / 'run'}", *tiny]
    result = run_cli([*words, f"model={model}", "training.compile=true"])
    assert result.code == 2
    assert re.search(sentence, result.sentences[-1])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("signal", "code"), [("SIGKILL", -9), ("SIGINT", 130)])
def test_interrupted_training_resumes_to_the_same_bits(
    spawn_cli, run_cli, tiny_data, tiny, whole, tmp_path, signal, code
):
    run = tmp_path / "run"
    stopped = spawn_cli(
        ["train", "data=mvtec", f"data.root={tiny_data}", f"out={run}", *tiny, *RANDOM], code=DIE.format(signal)
    )
    assert stopped.returncode == code
    assert "Traceback" not in stopped.stderr
    if signal == "SIGINT":
        assert stopped.stderr.splitlines()[-1].startswith("blemish: interrupted")
    assert not (run / "detector.pt").exists() and (run / "checkpoints/last.ckpt").is_file()
    assert json.loads((run / "run.json").read_text())["status"] == "training"

    resumed = run_cli(["train", f"resume={run}"])
    assert resumed.code == 0, resumed.err
    assert_same_weights(run, whole)
    ours, theirs = read_checkpoint(run)["calibration"], read_checkpoint(whole)["calibration"]
    assert ours["scores"] == theirs["scores"]
    assert json.loads((run / "run.json").read_text())["status"] == "done"


@pytest.mark.slow
def test_training_stopped_before_its_first_checkpoint_starts_over(train, run_cli, tiny_run, run_copy):
    for name in ("detector.pt", "card.json", "checkpoints/last.ckpt", "checkpoints/best.ckpt"):
        (run_copy / name).unlink()
    about = json.loads((run_copy / "run.json").read_text())
    (run_copy / "run.json").write_text(json.dumps(about | {"status": "training"}))
    resumed = run_cli(["train", f"resume={run_copy}"])
    assert resumed.code == 0, resumed.err
    assert_same_weights(run_copy, tiny_run)


def test_finished_training_is_not_resumed(run_cli, run_copy):
    before = (run_copy / "detector.pt").read_bytes()
    result = run_cli(["train", f"resume={run_copy}"])
    assert result.code == 2 and "finished" in result.sentences[0]
    assert (run_copy / "detector.pt").read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be held")
def test_two_trainings_do_not_work_in_one_folder(run_cli, run_copy, tiny, tiny_data, tmp_path):
    new = ["train", "data=mvtec", f"data.root={tiny_data}", f"out={tmp_path / 'new'}", *tiny]
    for run, words in ((run_copy, ["train", f"resume={run_copy}"]), (tmp_path / "new", new)):
        with held(run, "taken by the test"):
            before = sorted(run.iterdir())
            result = run_cli(words)
            assert result.code == 2 and "Another `blemish train` works in" in result.sentences[0], result.err
            assert sorted(run.iterdir()) == before


def test_resume_takes_no_other_settings(run_cli, run_copy):
    result = run_cli(["train", f"resume={run_copy}", "training.steps=8"])
    assert result.code == 2 and "leave out training.steps=8" in result.sentences[0]


def test_resume_refuses_changed_images(run_cli, tiny, mvtec_root, save, texture, tmp_path):
    run = tmp_path / "run"
    assert run_cli(["train", "data=mvtec", f"data.root={mvtec_root}", f"out={run}", *tiny]).code == 0
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"status": "training"}))
    (run / "detector.pt").unlink()
    save(mvtec_root / "train/good/new.png", texture(500))
    result = run_cli(["train", f"resume={run}"])
    assert result.code == 2 and "images changed" in result.sentences[0]


@pytest.mark.parametrize("section", ["normalisation", "report"])
def test_training_begun_by_another_version_is_not_resumed(run_cli, run_copy, section):
    about = json.loads((run_copy / "run.json").read_text())
    (run_copy / "run.json").write_text(json.dumps(about | {"status": "training"}))
    settings = yaml.safe_load((run_copy / "config.yaml").read_text())
    del settings[section]
    (run_copy / "config.yaml").write_text(yaml.safe_dump(settings))
    result = run_cli(["train", f"resume={run_copy}"])
    assert result.code == 2 and len(result.sentences) == 1 and f"lacks the section {section}" in result.sentences[0]


def test_damaged_checkpoint_is_one_sentence(run_cli, run_copy):
    about = json.loads((run_copy / "run.json").read_text())
    (run_copy / "run.json").write_text(json.dumps(about | {"status": "training"}))
    (run_copy / "detector.pt").unlink()
    (run_copy / "checkpoints/last.ckpt").write_bytes(b"damaged")
    result = run_cli(["train", f"resume={run_copy}"])
    assert result.code == 2 and len(result.sentences) == 1 and "last.ckpt" in result.sentences[0]


def test_tensorboard_shows_losses_rates_and_a_picture(tiny_run):
    events = EventAccumulator(str(tiny_run / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/reconstruction", "val/loss", "val/score"} <= set(tags["scalars"])
    assert any(tag.startswith("lr") for tag in tags["scalars"])
    assert [event.step for event in events.Scalars("val/loss")] == [1, 3]
    for tag in tags["scalars"]:
        assert all(np.isfinite(event.value) for event in events.Scalars(tag))
    (picture, *_) = events.Images("panel/input_expected_score")
    assert picture.height > 3 * 32 and picture.width > 32


def test_loss_falls(train):
    run = train("training.steps=40", "training.steps_per_epoch=10", "training.patience=null")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("val/loss")]
    assert len(losses) == 4 and losses[-1] < losses[0]


@pytest.mark.parametrize(
    "settings",
    [
        ("trainer.precision=bf16-mixed",),
        pytest.param(("training.channels_last=false",), marks=pytest.mark.slow),
        pytest.param(
            ("model=vae", "model.latent=flat", "objective.warmup_steps=2", "objective.free_bits=0.1"),
            marks=pytest.mark.slow,
        ),
        ("residual=gradient", "image.channels=3", "image.max_side=40", "smoothing.sigma=0", "augment=flips"),
    ],
    ids=["bf16", "contiguous", "flat vae", "colour"],
)
def test_variants_train_to_a_detector_that_predicts(train, tiny_data, settings):
    prediction = load_detector(train(*settings))(tiny_data / "test/blob/000.png")
    assert prediction.score_map.shape == (40, 48) and np.isfinite(prediction.score_map).all()
    assert prediction.is_anomalous == prediction.mask.any()


def steps_in(run, name):
    return torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True)["global_step"]


@pytest.mark.slow
def test_early_stopping_ends_a_training_that_does_not_improve(train):
    run = train("training.steps=40", "training.learning_rate=1e-12", "training.patience=2")
    assert steps_in(run, "last") < 40


@pytest.mark.slow
def test_every_epoch_is_kept_whether_it_improved_or_not(train):
    run = train("training.steps=40", "training.learning_rate=1e-12", "training.patience=null")
    assert steps_in(run, "last") == 40  # where a resumed training goes on
    assert steps_in(run, "best") < 40


def test_diverged_training_is_one_sentence(run_cli, tiny_data, tiny, tmp_path):
    settings = ("training.learning_rate=1e30", "trainer.gradient_clip_val=null")
    result = run_cli(["train", "data=mvtec", f"data.root={tiny_data}", f"out={tmp_path / 'run'}", *tiny, *settings])
    assert result.code == 2, result.out
    assert len(result.sentences) == 1 and "diverged" in result.sentences[0]
    assert "Traceback" not in result.err


@pytest.mark.slow
def test_two_processes_train_one_detector(spawn_cli, tiny_data, tiny, tmp_path):
    run = tmp_path / "run"
    settings = ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu")
    result = spawn_cli(["train", "data=mvtec", f"data.root={tiny_data}", f"out={run}", *tiny, *settings])
    assert result.returncode == 0, result.stderr
    assert load_detector(run)(tiny_data / "test/blob/000.png").score_map.shape == (40, 48)
    assert steps_in(run, "last") == 4


BY_ITSELF = ("model=pca", "backbone=colour_histogram", "image.channels=3", "tiling.size=32", "image.size=null")
BY_ITSELF += ("calibration.alpha=0.1", "trainer=cpu", "synthetic.images=0", "report.images=0")


def test_settings_that_do_nothing_are_named(run_cli, tiny, tiny_data, tmp_path):
    data = ["data=mvtec", f"data.root={tiny_data}"]
    done = run_cli(["train", *BY_ITSELF, *data, f"out={tmp_path / 'a'}", "training.learning_rate=1", "augment=flips"])
    assert done.code == 0, done.err
    assert "ignored: training.learning_rate=1, augment=flips, for PrincipalSubspace learns by itself" in done.out
    words = ["model=repair_ae", "model.width=4", "model.depth=2", "corruption=none"]
    small = [word for word in tiny if not word.startswith(("model", "corruption"))]
    done = run_cli(["train", *small, *words, *data, f"out={tmp_path / 'b'}"])
    assert done.code == 0, done.err
    assert "note: NoCorruption changes every pixel or none" in done.out


def test_a_missing_package_is_named_before_anything_is_written(run_cli, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)  # as if it were not installed
    words = [*BY_ITSELF, "model=isolation_forest", "model.dimensions=2", "data=mvtec", f"data.root={tiny_data}"]
    done = run_cli(["train", *words, f"out={tmp_path / 'run'}"])
    assert done.code == 2 and "fitted by scikit-learn, which is not installed" in done.sentences[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("way", ["fit", "prepare"])
def test_what_comes_before_the_trainer_happens_where_it_trains(tiny_data, way):
    """`meta` stands for a GPU: it shows where tensors are, and computes nothing."""
    found = []

    class Recording(torch.nn.Module):
        whole_image = False

        def to(self, device):
            self.where = device  # nothing comes back from there
            return self

        def _record(self, batches, labels=()):
            found.append((self.where, {batch.device.type for batch in batches}, len(labels)))

        def release(self):
            found.append("released")

    setattr(Recording, way, Recording._record)
    paths = sorted((tiny_data / "train" / "good").iterdir())[:3]
    images = ImageCache(paths, Preprocess(channels=1), 2**20, "train", 0)
    tiling = Tiling(size=32)
    training = TrainingSettings(1, 2, 1, 0.1, 0.0, None, 0, True, 0.1, 1)
    parts = _Parts(
        *(Recording(), None, None, None, training, None, tiling),
        *(TrainingTiles(images, 32, 0, None), [None] * 3, None, "meta"),
    )
    if way == "fit":
        assert parts.learn() is parts.model
    else:
        parts.prepare()
        assert parts.model.where == "cpu", "for the trainer to take"
    ((where, tiles_at, labels),) = found
    assert (where, tiles_at) == ("meta", {"meta"}) and labels == (parts._normal().total if way == "fit" else 0)

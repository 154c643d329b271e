"""Training against a discriminator: both players move, it resumes to the same bits, and can be looked at."""

from __future__ import annotations

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from blemish import load_detector
from blemish.checkpoint import read_checkpoint

pytestmark = pytest.mark.usefixtures("in_tmp")

# f-AnoGAN has all there is: two stages, of which the kill hits the second, noise in training, frozen parameters.
CHANGES = ("model=f_anogan", "score=f_anogan", "training.steps=12", "training.patience=null", "synthetic.images=0")
DIE = """
import os, signal, sys
from blemish.cli import main
from blemish.training.adversarial import AdversarialTask
step = AdversarialTask.training_step
def dying(self, batch, batch_idx):
    if self.current_epoch == {} and batch_idx == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_idx)
AdversarialTask.training_step = dying
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def whole(tiny_data, tiny, run_cli, tmp_path_factory):
    """The training that was never interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    result = run_cli(["train", "data=mvtec", f"data.root={tiny_data}", f"out={run}", *tiny, *CHANGES])
    assert result.code == 0, result.err
    return run


def scalars(run):
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_curves_of_both_players_are_there_to_look_at(whole):
    curves = scalars(whole)
    for name in ("generator", "discriminator", "real", "fake", "reconstruction", "penalty"):
        assert curves[f"train/{name}"], name
    assert len(curves["val/loss"]) == 6


def test_steps_are_batches_and_the_best_weights_are_of_the_last_stage(whole):
    last, best = (
        torch.load(whole / f"checkpoints/{name}.ckpt", map_location="cpu", weights_only=True)
        for name in ("last", "best")
    )
    assert last["global_step"] == 12
    assert best["global_step"] > 0.6 * 12  # gan_share
    assert [len(optimizer["state"]) > 0 for optimizer in last["optimizer_states"]] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [2, 5])
def test_interrupted_training_resumes_to_the_same_bits(spawn_cli, run_cli, tiny_data, tiny, whole, tmp_path, epoch):
    run = tmp_path / "run"
    stopped = spawn_cli(
        ["train", "data=mvtec", f"data.root={tiny_data}", f"out={run}", *tiny, *CHANGES], code=DIE.format(epoch)
    )
    assert stopped.returncode == -9 and (run / "checkpoints/last.ckpt").is_file()
    resumed = run_cli(["train", f"resume={run}"])
    assert resumed.code == 0, resumed.err
    for part in ("state_dict", "score_state"):
        ours, theirs = read_checkpoint(run)[part], read_checkpoint(whole)[part]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read_checkpoint(run)["calibration"]["scores"] == read_checkpoint(whole)["calibration"]["scores"]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [("model=ganomaly", "score=ganomaly"), ("model=adversarial_ae",)])
def test_both_players_learn_also_on_corrupted_tiles(changes, run_cli, tiny_data, tiny, tmp_path, texture):
    run = tmp_path / "run"
    result = run_cli(["train", "data=mvtec", f"data.root={tiny_data}", f"out={run}", *tiny, *changes])
    assert result.code == 0, result.err
    last = torch.load(run / "checkpoints/last.ckpt", map_location="cpu", weights_only=True)
    states = [state for optimizer in last["optimizer_states"] for state in optimizer["state"].values()]
    assert len(states) == sum(parameter.requires_grad for parameter in load_detector(run).scorer.model.parameters())
    # The last bias of the discriminator may rest: within the margins of the hinge, real and fake pull equally.
    assert all(state["exp_avg_sq"].any() for state in states if state["exp_avg_sq"].ndim > 1)
    assert load_detector(run).score_map(texture(5)).shape == (40, 48)


def test_a_trainer_that_cannot_work_is_refused_before_training(run_cli, tiny_data, tiny, tmp_path):
    run = tmp_path / "run"
    wrong = "training.accumulate=2"
    result = run_cli(["train", "data=mvtec", f"data.root={tiny_data}", f"out={run}", *tiny, *CHANGES, wrong])
    assert result.code == 2 and "training.accumulate=1, found 2" in result.sentences[0]
    assert not run.exists()

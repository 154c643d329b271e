"""The batch size by trial: when it grows, when it stops, and that trying leaves no trace."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from blemish.data.corruption import NoCorruption
from blemish.errors import ConfigError
from blemish.models.contracts import Output
from blemish.residuals import L2
from blemish.training.batch_size import Trial, choose
from blemish.training.objectives import ReconstructionObjective
from blemish.training.task import ReconstructionTask


def device(overhead, each, room):
    """Seconds of a step on a device that needs `overhead` for any batch, and holds `room` tiles."""
    return lambda size: overhead + each * size if size <= room else None


@pytest.mark.parametrize(
    ("seconds", "size"),
    [
        (device(0.0, 1.0, 1000), 8),  # busy with few tiles: more of them only make longer steps
        (device(32.0, 1.0, 1000), 128),  # from 64 to 128: 2 * 96 / 160 = 1.2 times; to 256: 1.11
        (device(1e6, 1.0, 1000), 256),  # never busy: the largest
        (device(1e6, 1.0, 50), 32),  # no room for 64
        (device(1e6, 1.0, 8), 8),
        (device(0.0, 1.0, 5), 4),
        (device(1e6, 1.0, 2), 2),  # and does not try 4 again
        (device(0.0, 1.0, 1), 1),
    ],
)
def test_it_doubles_while_that_pays_and_fits(seconds, size):
    tried = []

    def noted(count):
        tried.append(count)
        return seconds(count)

    choice = choose(noted)
    assert choice.size == size and choice.size in choice.speeds
    assert len(tried) == len(set(tried))
    assert all(choice.speeds[count] == count / seconds(count) for count in choice.speeds)
    assert f"training.batch_size={size}" in str(choice)


def test_no_room_for_a_single_tile_is_said():
    with pytest.raises(ConfigError, match=r"single tile.*tiling\.size"):
        choose(lambda size: None)


class Scale(nn.Module):
    """Fails as a full GPU does with more than `room` tiles."""

    def __init__(self, room):
        super().__init__()
        self.factor, self.room, self.seen = nn.Parameter(torch.tensor(0.5)), room, []
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x):
        self.seen.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Output(x, self.factor * self.norm(x) + 0.01 * torch.rand_like(x))


class Tiles:
    def __getitems__(self, positions):
        values = np.random.default_rng(positions[0]).integers(0, 256, (len(positions), 1, 8, 8), np.uint8)
        return torch.from_numpy(values)


def task_of(room):
    return ReconstructionTask(Scale(room), ReconstructionObjective(L2()), NoCorruption(), 0.1, 0.0, 10, 0)


def test_a_trial_leaves_the_model_and_the_random_numbers_as_they_are():
    task = task_of(100)
    before, state = copy.deepcopy(task.state_dict()), torch.get_rng_state()
    assert Trial(task, Tiles(), "cpu", "32-true").seconds(4) > 0
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert task.model.factor.grad is None and task.model.seen == []


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_device_that_is_full_holds_what_it_can(precision):
    trial = Trial(task_of(3), Tiles(), "cpu", precision)
    assert trial.seconds(4) is None
    assert trial.seconds(3) > 0
    assert choose(trial.seconds).size == 2

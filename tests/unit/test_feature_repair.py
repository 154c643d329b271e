"""Models that see a corrupted tile and are trained to expect the clean one's features."""

import gc
import pickle
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blemish.data.corruption import Structured
from blemish.models.contracts import Fittable, Observing, Output, Preparing
from blemish.models.feature_repair import FeatureRepair
from blemish.models.student import Student
from blemish.residuals import L2
from blemish.training.objectives import ReconstructionObjective
from blemish.training.task import ReconstructionTask

SIZE = 32


class Coarse(nn.Module):
    """Mean and spread of 4 x 4 pixels."""

    features = 2

    def forward(self, x):
        x = x.mean(dim=1, keepdim=True)
        mean = F.avg_pool2d(x, 4)
        return torch.cat([mean, F.avg_pool2d(x.square(), 4) - mean.square()], 1)


def tiles(count=16, seed=0):
    """Upright waves (N, 1, 32, 32), each with a phase of its own."""
    phase = 6.3 * torch.rand(count, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
    wave = 0.5 + 0.4 * torch.sin(torch.arange(SIZE) / 3 + phase)
    return wave.expand(count, 1, SIZE, SIZE).contiguous()


def prepared(kind, **arguments):
    torch.manual_seed(0)
    model = kind(Coarse(), width=16, **arguments)
    model.prepare(tiles().split(5))
    return model


def trained(model, steps=80):
    corruption = Structured(probability=1.0)
    task = ReconstructionTask(model.train(), ReconstructionObjective(L2()), corruption, 0.01, 0.0, steps, 0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    for step in range(steps):
        optimizer.zero_grad()
        task.loss_of(tiles(8, step)).total.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def asked(monkeypatch):
    """The numbers of tiles that the frozen network was shown, call by call."""
    calls, look = [], Coarse.forward
    monkeypatch.setattr(Coarse, "forward", lambda self, x: calls.append(len(x)) or look(self, x))
    return calls


@pytest.mark.parametrize("kind", [FeatureRepair, Student])
def test_they_are_trained_by_the_trainer_towards_prepared_features(kind):
    model = prepared(kind)
    assert isinstance(model, Observing) and isinstance(model, Preparing) and not isinstance(model, Fittable)
    normal = model.observe(tiles())
    torch.testing.assert_close(normal.mean(dim=(0, 2, 3)), torch.zeros(2), atol=1e-2, rtol=0)
    torch.testing.assert_close(normal.std(dim=(0, 2, 3)), torch.ones(2), atol=1e-2, rtol=0)
    model.eval()
    assert torch.equal(model(tiles(2, 5)).observed, model.observe(tiles(2, 5)))


def test_the_target_is_what_the_clean_tile_shows_whatever_was_given():
    model, asked = prepared(FeatureRepair), []

    class Watching(ReconstructionObjective):
        def forward(self, output, target, mask, step):
            asked.append((output, target, mask))
            return super().forward(output, target, mask, step)

    task = ReconstructionTask(model.train(), Watching(L2()), Structured(probability=1.0), 0.01, 0.0, 10, 0)
    task.loss_of(tiles(4))
    ((output, target, mask),) = asked
    torch.testing.assert_close(target, model.observe(tiles(4)))
    assert not torch.equal(output.observed, target) and output.repaired.shape == mask.shape == (4, 1, SIZE, SIZE)


def test_repair_tells_where_it_repaired():
    model, clean = trained(prepared(FeatureRepair)), tiles(12, 99)
    given = clean.clone()
    given[:, :, 12:20, 8:16] = 0.5
    with torch.no_grad():
        output = model(given)
        inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        inside[12:20, 8:16] = True
        belief = output.repaired[:, 0].sigmoid()
        assert belief[:, inside].mean() > 4 * belief[:, ~inside].mean()
        wanted = model.observe(clean)
        grid = F.max_pool2d(inside.float()[None, None], 4)[0, 0] > 0
        before = (output.observed - wanted).square().mean(dim=1)[:, grid].mean()
        after = (output.expected - wanted).square().mean(dim=1)[:, grid].mean()
        assert after < 0.3 * before


@pytest.mark.slow
def test_student_knows_normal_tiles_and_no_others():
    model = trained(prepared(Student, depth=2), 150)
    with torch.no_grad():
        normal, upset = (L2()(*model(x)[:2]).mean() for x in (tiles(8, 99), tiles(8, 99).mT.contiguous()))
    assert upset > 3 * normal


def test_the_mask_head_can_be_left_out():
    output = prepared(FeatureRepair, mask_head=False)(tiles(2))
    assert type(output) is Output and output.repaired is None


def test_corrupted_places_of_a_grid_weigh_by_their_share():
    expected = torch.zeros(1, 1, 2, 2)
    target = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None]
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4, :2] = 1  # half of the first place
    loss = ReconstructionObjective(L2(), corrupted_weight=5.0)(Output(expected, expected), target, mask, 0)
    assert loss.total.item() == pytest.approx((3 * 1 + 4 + 9 + 16) / (3 + 1 + 1 + 1))


def test_a_teacher_need_not_look_at_what_is_corrupted(asked):
    model = prepared(Student)
    asked.clear()
    task = ReconstructionTask(model.train(), ReconstructionObjective(L2()), Structured(), 0.01, 0.0, 1, 0)
    for step in range(3):
        task.loss_of(tiles(8, 1 + step))
    assert sorted(asked) == [1, 8, 8, 8], "the clean tiles, and one for the size of the grid"
    output = model.eval()(tiles(4))
    assert torch.equal(output.observed, model.observe(tiles(4)))
    assert not torch.equal(output.observed, output.expected)


@pytest.mark.parametrize("kind", [FeatureRepair, Student])
def test_gradients_pass_through_what_is_observed_but_not_in_training(kind):
    model = prepared(kind)
    x = tiles(2).requires_grad_()
    assert model.eval().observe(x).requires_grad
    assert not model.train().observe(x).requires_grad


@pytest.mark.parametrize("mask_head", [True, False])
def test_what_is_observed_is_shown_to_a_density(mask_head):
    model = prepared(FeatureRepair, mask_head=mask_head).eval()
    output = model(tiles(2))
    assert torch.equal(output.activations[0], output.observed)
    assert len(output.activations) == 1 + mask_head


def test_normal_tiles_are_not_shown_to_the_network_again_in_training(asked):
    model = prepared(Student).train()
    asked.clear()
    known = tiles()[[3, 11, 3]].contiguous(memory_format=torch.channels_last)
    expected = model.observe(known)
    assert not asked
    model.eval()
    torch.testing.assert_close(expected, model.observe(known), atol=2e-3, rtol=2e-3)  # the file has float16
    assert asked == [3], "never in evaluation"
    model.train()
    mixed = torch.cat([tiles()[:2], tiles(1, seed=9), tiles()[4:5]])
    observed = model.observe(mixed)
    assert asked == [3, 1], "strangers only"
    torch.testing.assert_close(observed, model.eval().observe(mixed), atol=2e-3, rtol=2e-3)
    del asked[:]
    for other in (deepcopy(model.train()), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other.observe(known), expected, atol=2e-3, rtol=2e-3)
    model.release()
    model.observe(known)
    assert asked == [3, 3, 3], "neither copies have the file, nor what is trained"


@pytest.mark.parametrize("kind", [FeatureRepair, Student])
def test_preparing_leaves_autocast_as_it_was(kind):
    """Left on, its cache would hold the weights of the first step for ever."""
    model = prepared(kind).train()
    task = ReconstructionTask(model, ReconstructionObjective(L2()), Structured(probability=1.0), 0.01, 0.0, 1, 0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    losses = []
    for _ in range(8):
        torch.manual_seed(0)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = task.loss_of(tiles(8)).total
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    with torch.autocast("cpu", torch.bfloat16):
        del model, task
        gc.collect()
        assert torch.is_autocast_enabled("cpu")

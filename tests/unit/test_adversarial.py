"""Adversarial models: what bounds the discriminator, what each round trains, what the scores add up."""

import pytest
import torch
from torch import nn

from blemish.data.corruption import NoCorruption
from blemish.errors import ConfigError
from blemish.models.adversarial_ae import AdversarialAutoencoder
from blemish.models.autoencoder import ConvAutoencoder
from blemish.models.contracts import Adversarial, Judgement, Output, Pair
from blemish.models.discriminator import SpectralConv2d, of_codes, of_tiles
from blemish.models.f_anogan import FastAnoGan
from blemish.models.ganomaly import Ganomaly
from blemish.residuals import L1, L2
from blemish.scores.features import FeatureScore
from blemish.training.adversarial import AdversarialTask, check_adversarial, hinge, one_cycle, without_clipping
from blemish.training.objectives import ReconstructionObjective

SMALL = {"width": 4, "depth": 2, "latent_dim": 4}
MODELS = {
    "adversarial_ae": lambda: AdversarialAutoencoder(**SMALL),
    "ganomaly": lambda: Ganomaly(**SMALL),
    "f_anogan": lambda: FastAnoGan(**SMALL, tile_size=16),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def tiles(count=3):
    return torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def task_of(model, steps=10):
    return AdversarialTask(model, ReconstructionObjective(L1()), NoCorruption(), 1e-3, 0.0, steps, 0)


@pytest.mark.parametrize("kernel", [1, 3])
def test_power_iteration_finds_the_spectral_norm(kernel):
    layer = SpectralConv2d(5, 7, kernel)
    nn.init.normal_(layer.weight, std=3.0)
    for _ in range(50):
        layer(torch.rand(1, 5, 8, 8))
    exact = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
    torch.testing.assert_close(layer.eval().spectral_norm(), exact, rtol=1e-4, atol=0)


def test_a_code_discriminator_is_no_steeper_than_its_activations_allow():
    judge = of_codes(6).eval()
    a, b = torch.randn(2, 200, 6)
    with torch.no_grad():
        steepness = (judge(a).logits - judge(b).logits).flatten().abs() / (a - b).norm(dim=1)
    assert steepness.max() <= 2 / 1.04 * 1.01  # the gain of two activations; a percent for the power iteration


def test_the_discriminator_learns_through_its_norm_and_not_by_looking():
    judge = of_tiles(1, [4, 8])
    judge(tiles()).logits.mean().backward()
    weight = judge.trunk[0].weight
    # A gradient along the weights would change their length, which the division undoes.
    along = (weight.grad * weight.detach()).sum().abs()
    assert along < 1e-3 * weight.grad.norm() * weight.detach().norm()
    before = judge.trunk[0].direction.clone()
    judge.eval()(tiles())
    assert torch.equal(before, judge.trunk[0].direction)


def test_bfloat16_leaves_the_norm_alone():
    judge = of_tiles(1, [4, 8]).eval()
    plain = judge.trunk[0].spectral_norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(judge.trunk[0].spectral_norm(), plain)
        assert judge(tiles()).logits.dtype == torch.float32


@pytest.mark.parametrize("name", MODELS)
def test_players_share_no_parameter_and_leave_none_out(name):
    model = MODELS[name]()
    assert isinstance(model, Adversarial)
    stages = range(len(model.stages))
    learners = {parameter for stage in stages for parameter in model.play(tiles(), tiles(), stage).learners}
    opponents = set(model.discriminator.parameters())
    assert not learners & opponents
    assert learners | opponents == set(model.parameters())


def test_an_ordinary_model_is_not_taken_for_a_player():
    assert not isinstance(ConvAutoencoder(**SMALL), Adversarial)


def test_the_second_stage_of_f_anogan_freezes_generator_and_discriminator():
    model = FastAnoGan(**SMALL, tile_size=16).train()
    first = model.play(tiles(), tiles(), 0)
    assert first.output is None and first.fake.shape == first.real.shape
    frozen = {**model.decoder.state_dict(), **model.discriminator.state_dict()}
    frozen = {key: value.clone() for key, value in frozen.items()}
    second = model.play(tiles(), tiles(), 1)
    assert second.real is None
    assert set(second.learners) == {*model.encoder.parameters(), *model.into_code.parameters()}
    after = {**model.decoder.state_dict(), **model.discriminator.state_dict()}
    assert all(torch.equal(frozen[key], value) for key, value in after.items())


def test_feature_matching_is_in_units_of_the_features():
    model = Ganomaly(**SMALL)
    logits, seen = torch.zeros(2, 1, 2, 2), torch.randn(2, 5, 2, 2)
    losses = [
        model.persuasion(Judgement(logits, scale * seen), Judgement(logits, scale * (seen + 1))) for scale in (1.0, 9.0)
    ]
    torch.testing.assert_close(*losses)
    assert model.persuasion(Judgement(logits, seen), Judgement(logits, seen)) == 0


def test_hinge_by_hand():
    assert hinge(torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])) == 0.25 + 0.5


def test_stages_and_their_cycles():
    task = task_of(FastAnoGan(**SMALL, tile_size=16, gan_share=0.6), steps=10)
    assert [task.stage(step)[0] for step in range(10)] == [0] * 6 + [1] * 4
    assert [round(task.stage(step)[1], 6) for step in (0, 3, 6, 8)] == [0, 0.5, 0, 0.5]
    assert one_cycle(0.0) == pytest.approx(0.04)
    assert one_cycle(0.3) == pytest.approx(1)
    assert one_cycle(1.0) == pytest.approx(0)


class Fixed(nn.Module):
    """Says what it is told to."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


def test_scores_of_both_papers_by_hand():
    x = torch.zeros(1, 1, 4, 4)
    codes = Pair(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), torch.tensor([1.5, 0.0]).view(1, 2, 1, 1))
    model = Fixed(Output(x, x + 0.5, features=codes))
    ganomaly = FeatureScore(L1(), pixels=0, features=1, distance="l1")(model, x)
    torch.testing.assert_close(ganomaly, torch.full_like(x, (0.5 + 2) / 2))
    f_anogan = FeatureScore(L2(), pixels=1, features=0.1)(model, x)
    torch.testing.assert_close(f_anogan, torch.full_like(x, 0.25 + 0.1 * (0.25 + 4) / 2))


def test_a_defect_in_the_features_is_where_it_is():
    x, seen = torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 2, 2)
    other = seen.clone()
    other[..., 0, 1] = 1.0
    score = FeatureScore(L1(), pixels=0, features=1)(Fixed(Output(x, x, features=Pair(seen, other))), x)
    assert score.shape == x.shape
    assert score[0, 0, 0, 7] == 1 and score[0, 0, 7, 0] == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"pixels": -1, "features": 1}, r"score\.pixels >= 0, found -1"),
        ({"pixels": 0, "features": 0}, r"score\.pixels or score\.features above 0, found both 0"),
        ({"pixels": 0, "features": 1, "distance": "l3"}, r"Unknown score\.distance 'l3'"),
    ],
)
def test_impossible_scores_are_refused_in_words(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        FeatureScore(L1(), **arguments)


def test_a_model_without_features_is_refused_in_words():
    with pytest.raises(ConfigError, match="such as model=ganomaly"):
        FeatureScore(L1(), 0, 1)(ConvAutoencoder(**SMALL).eval(), tiles())


def test_clipping_is_taken_out_of_the_trainer():
    assert without_clipping({"gradient_clip_val": 1.0, "devices": 1}) == ({"devices": 1}, (1.0, "norm"))
    value = {"gradient_clip_val": 2, "gradient_clip_algorithm": "value"}
    assert without_clipping(value) == ({}, (2.0, "value"))
    assert without_clipping({"gradient_clip_val": None}) == ({}, None)


@pytest.mark.parametrize(
    ("accumulate", "precision", "devices", "sentence"),
    [
        (1, "16-mixed", 1, r"trainer\.precision=bf16-mixed or 32-true, found 16-mixed"),
        (2, "32-true", 1, r"training\.accumulate=1, found 2"),
        (1, "32-true", 2, r"one device, found 2: set trainer\.devices=1"),
    ],
)
def test_trainers_that_cannot_work_are_refused_in_words(accumulate, precision, devices, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_adversarial(accumulate, precision, devices)
    check_adversarial(1, "bf16-mixed", 1)

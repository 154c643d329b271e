"""What was repaired: one pass of the model for all terms, and the residual alone where a model tells no mask."""

from __future__ import annotations

import pytest
import torch
import yaml
from torch import nn

from blemish.build import TRUSTED, build
from blemish.errors import ConfigError
from blemish.models.autoencoder import ConvAutoencoder
from blemish.models.repair import RepairAutoencoder
from blemish.models.vae import VariationalAutoencoder
from blemish.residuals import L1, L2, GradientMagnitude
from blemish.scores.augmented import FlipsScore
from blemish.scores.combinations import CombinedScore
from blemish.scores.gradient import InputGradientScore, ProjectionScore
from blemish.scores.repair import MaskScore
from blemish.scores.residual import ResidualScore
from blemish.scores.restoration import RecursiveScore
from blemish.scores.variational import KlScore, MonteCarloScore, sampling, seeded
from blemish.settings import config_folder


def tiles(seed=0, count=3):
    return torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(seed))


def model_of(cls, **changes):
    torch.manual_seed(0)
    return cls(channels=1, width=4, depth=2, **changes).eval()


class Counted(nn.Module):
    """Counts how often it is asked."""

    def __init__(self, model):
        super().__init__()
        self.model, self.asked = model, 0

    def forward(self, x):
        self.asked += 1
        return self.model(x)


class Drawn(nn.Module):
    """A sampled decoding of the very tiles that it is given."""

    def forward(self, model, x):
        with torch.inference_mode(), sampling(model), seeded(0, x.device):
            return (model(x).expected - x).abs()


class Slope(nn.Module):
    """A score that follows gradients to the very tiles that it is given."""

    def forward(self, model, x):
        with torch.enable_grad():
            return torch.autograd.grad(model(x).expected.sum(), x)[0].abs()


def repaired_score():
    path = config_folder() / "score/repaired.yaml"
    return build(yaml.safe_load(path.read_text(encoding="utf-8")), TRUSTED, "score")


# One pass


JOINED = {"sum": torch.add, "max": torch.maximum, "product": torch.mul}


@pytest.mark.parametrize("join", JOINED)
def test_residual_and_mask_ask_the_model_once_for_each_batch(join):
    model = Counted(model_of(RepairAutoencoder)).eval()
    score = CombinedScore([ResidualScore(L1()), MaskScore()], join)
    for seed, count in ((0, 3), (1, 3), (2, 1), (0, 3)):
        x, asked = tiles(seed, count), model.asked
        found, expected = score.explain(model, x)
        assert model.asked == asked + 1
        output = model.model(x)
        terms = [L1()(x, output.expected), nn.functional.softplus(output.repaired)]
        torch.testing.assert_close(found, JOINED[join](*terms))
        torch.testing.assert_close(expected, output.expected)


def test_tiles_that_are_changed_in_place_are_asked_anew():
    model, score, x = model_of(RepairAutoencoder), CombinedScore([ResidualScore(L1()), MaskScore()]), tiles()
    score(model, x)
    x.copy_(tiles(1))
    torch.testing.assert_close(score(model, x), score(model, tiles(1)))


def test_another_model_is_asked_anew():
    score, x = CombinedScore([ResidualScore(L1())]), tiles()
    score(model_of(RepairAutoencoder), x)
    other = model_of(RepairAutoencoder, dilations=[1])
    torch.testing.assert_close(score(other, x), ResidualScore(L1())(other, x))


OTHERS = {
    "drawn": Drawn(),
    "monte carlo": MonteCarloScore(L1(), draws=3, seed=5),
    "one draw": MonteCarloScore(L1(), draws=1, seed=5),
    "kl": KlScore(),
    "gradient": InputGradientScore(L2(), of="elbo"),
    "projection": ProjectionScore(L2(), steps=2),
    "recursive": RecursiveScore(L1(), times=2),
    "flips": FlipsScore(ResidualScore(L2())),
    "combined": CombinedScore([ResidualScore(L2()), MonteCarloScore(L2(), draws=2)]),
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_terms_of_a_vae_are_what_they_are_alone(other, count):
    model, x = model_of(VariationalAutoencoder, latent_dim=3), tiles(count=count)
    residual = ResidualScore(L1())
    alone = residual(model, x) + other(model, x)
    torch.testing.assert_close(CombinedScore([residual, other])(model, x), alone)
    torch.testing.assert_close(CombinedScore([other, residual])(model, x), alone)
    assert not any(module.training for module in model.modules())


def test_draws_are_no_decodings_of_the_mean():
    model, x = model_of(VariationalAutoencoder, latent_dim=3), tiles()  # else the test above would show nothing
    assert (Drawn()(model, x) - ResidualScore(L1())(model, x)).abs().max() > 1e-3


def test_what_was_remembered_does_not_stop_gradients():
    model, x, residual = model_of(ConvAutoencoder, latent_dim=3), tiles().requires_grad_(), ResidualScore(L1())
    alone = residual(model, x) + Slope()(model, x)
    torch.testing.assert_close(CombinedScore([residual, Slope()])(model, x), alone)


# Without a mask head


def test_mask_is_the_same_everywhere_where_it_is_not_required_and_not_told():
    x, model = tiles(), model_of(ConvAutoencoder, latent_dim=3)
    score, expected = MaskScore(required=False).explain(model, x)
    assert score.shape == (3, 1, 32, 32) and (score == 1).all()
    torch.testing.assert_close(expected, model(x).expected)
    for strict in (MaskScore(), MaskScore(required=True)):
        with pytest.raises(ConfigError, match="MaskScore expects a model that says where it repaired"):
            strict(model, x)


def test_mask_is_told_where_it_can_be_though_not_required():
    model, x = model_of(RepairAutoencoder), tiles()
    assert torch.equal(MaskScore(required=False)(model, x), MaskScore()(model, x))
    assert (MaskScore(required=False)(model, x) > 0).all()


WITHOUT_MASK = {
    "autoencoder": (ConvAutoencoder, {"latent_dim": 3}),
    "no head": (RepairAutoencoder, {"mask_head": False}),
}


@pytest.mark.parametrize("kind", WITHOUT_MASK)
@pytest.mark.parametrize("join", JOINED)
def test_score_is_the_residual_in_its_unit_where_there_is_no_mask(kind, join):
    build_model, arguments = WITHOUT_MASK[kind]
    model, x = model_of(build_model, **arguments), tiles(1)
    residual = ResidualScore(GradientMagnitude(scales=3))
    score = CombinedScore([residual, MaskScore(required=False)], join)
    score.fit(model, [tiles(2), tiles(3)])
    above = ((residual(model, x) - score.location[0]) / score.scale[0]).clamp(min=0)
    assert above.max() > 0.3
    torch.testing.assert_close(score(model, x), above)


def test_product_is_zero_only_where_a_term_is():
    model, x = model_of(RepairAutoencoder), tiles(1)
    score = CombinedScore([ResidualScore(GradientMagnitude(scales=3)), MaskScore()], "product")
    score.fit(model, [tiles(2)])
    assert (score.location == 0).all()  # a median would silence half of the pixels
    assert ((score(model, x) == 0) == (score.terms[0](model, x) == 0)).all()


def test_score_repaired_is_residual_times_mask_in_units_of_normal_tiles():
    model, score = model_of(RepairAutoencoder), repaired_score()
    score.fit(model, [tiles(2), tiles(3)])
    x, by_hand = tiles(1), 1
    for number, term in enumerate([ResidualScore(GradientMagnitude(scales=3)), MaskScore()]):
        normal = torch.cat([term(model, tiles(2)), term(model, tiles(3))]).flatten().sort().values
        high = normal[round(0.999 * len(normal)) - 1]
        torch.testing.assert_close(score.scale[number], high)
        by_hand = by_hand * term(model, x) / high
    torch.testing.assert_close(score(model, x), by_hand)

"""What every score in configs/score promises; a new file joins by itself."""

import io
from copy import deepcopy
from functools import partial

import pytest
import torch

from blemish.build import TRUSTED, build
from blemish.checkpoint import build_model
from blemish.errors import ConfigError
from blemish.models.contracts import Fittable
from blemish.scores.contracts import FittableScore, learning_parts
from blemish.scores.engine import TorchScorer
from blemish.settings import config_folder

NAMES = sorted(path.stem for path in (config_folder() / "score").glob("*.yaml"))
SMALL = ("model.width=4", "model.depth=2")
MODELS = {  # a score must fit one
    **dict.fromkeys(("conv_ae", "vae", "repair_ae", "ganomaly"), SMALL),
    "kde": ("model.samples=100",),
}
every_score = pytest.mark.parametrize("name", NAMES)
every_channels = pytest.mark.parametrize("channels", [1, 3])
SIZE = 32
SMALL_BACKBONE = ("backbone.weights=none", "backbone.layers=[2,8]", "backbone.margin=0")


def tiles(channels=1, size=(SIZE, SIZE), count=3, seed=0):
    return torch.rand(count, channels, *size, generator=torch.Generator().manual_seed(seed))


def composed_small(settings, name, model, channels=1, *overrides):
    composed = settings(f"model={model}", f"tiling.size={SIZE}", f"image.channels={channels}", *overrides)
    return composed | {"score": settings(f"score={name}", "image.channels=1")["score"]}


@pytest.fixture(scope="module")
def compose(settings):
    return partial(composed_small, settings)


def build_pair(config):
    """A score, and a model whose running statistics and weights are no longer those of the start."""
    torch.manual_seed(0)
    model = build_model(config, TRUSTED)
    x = tiles(config["image"]["channels"], count=8, seed=1)
    if isinstance(model, Fittable):
        model.fit([x])
    else:
        (model.train()(x).expected - x).square().mean().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        model.zero_grad(set_to_none=True)
    return build(config["score"], TRUSTED, "score"), model.eval()


def build_fitting(settings, name, channels=1):
    """A score, and the first of `MODELS` that it fits."""
    for model, small in MODELS.items():
        try:
            return build_pair(composed_small(settings, name, model, channels, *SMALL_BACKBONE, *small))
        except ConfigError as error:
            refusal = error
            if "pip install" in str(error):
                break
    raise refusal


@pytest.fixture(scope="module")
def make(settings, installed):
    made = {}

    def copy_of(name, channels=1):
        if (name, channels) not in made:
            with installed():
                made[name, channels] = build_fitting(settings, name, channels)
        return deepcopy(made[name, channels])

    return copy_of


@every_score
@every_channels
@pytest.mark.parametrize("size", [(SIZE, SIZE), (SIZE, 48)])
def test_shape_sign_and_type(make, name, channels, size):
    score, model = make(name, channels)
    result = score(model, tiles(channels, size))
    assert result.shape == (3, 1, *size)
    assert result.dtype == torch.float32
    assert torch.isfinite(result).all()
    assert result.min() >= 0
    assert result.max() > 0
    assert not result.requires_grad


@every_score
def test_results_repeat_and_leave_the_random_numbers_alone(make, name):
    score, model = make(name)
    torch.manual_seed(1)
    first = score(model, tiles())
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(first, score(model, tiles()))
    assert torch.equal(before, torch.get_rng_state())


@every_score
def test_model_score_and_input_stay_as_they_were(make, name):
    score, model = make(name)
    x, parts = tiles(), (model, score)
    state = [{key: value.clone() for key, value in part.state_dict().items()} for part in parts]
    modes = [module.training for part in parts for module in part.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    score(model, x)
    assert torch.equal(x, tiles())
    assert not x.requires_grad
    for part, before in zip(parts, state, strict=True):
        assert all(torch.equal(before[key], value) for key, value in part.state_dict().items())
    assert modes == [module.training for part in parts for module in part.modules()]
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())


@every_score
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_gradient_mode_is_its_own(make, name, mode):
    score, model = make(name)
    plain = score(model, tiles())
    with mode():
        assert torch.equal(score(model, tiles() + 0), plain)  # the sum is an inference tensor


@every_score
def test_a_tile_does_not_depend_on_its_batch(make, name):
    score, model = make(name)
    alone = torch.cat([score(model, tile[None]) for tile in tiles()])
    torch.testing.assert_close(score(model, tiles()), alone, atol=1e-4, rtol=1e-3)


@every_score
def test_memory_format_does_not_change_the_answer(make, name):
    score, model = make(name, channels=3)
    plain = score(model, tiles(3))
    model.to(memory_format=torch.channels_last)
    other = score(model, tiles(3).to(memory_format=torch.channels_last))
    tolerance = 0.05 if name == "monte_carlo" else 1e-4  # a code's noise is dealt in the order of memory
    torch.testing.assert_close(plain, other, atol=tolerance, rtol=1e-3)


@every_score
def test_it_tells_what_it_expected(make, name):
    score, model = make(name)
    told, expected = score.explain(model, tiles())
    assert torch.equal(told, score(model, tiles()))
    assert expected.shape == model(tiles()).expected.shape
    assert not expected.requires_grad


@every_score
@every_channels
def test_it_serves_the_tile_scorer(make, name, channels):
    score, model = make(name, channels)
    x = tiles(channels).numpy()
    scorer = TorchScorer(model, score)
    assert scorer(x).shape == (3, SIZE, SIZE)
    pixels = channels if model(tiles(channels)).expected.shape == x.shape else 0  # features make no picture
    assert scorer.explain(x).shape == (3, 1 + pixels, SIZE, SIZE)


@every_score
def test_it_survives_saving_also_after_it_has_learned(make, name):
    score, model = make(name)
    for part in learning_parts(score):
        part.learn(model, [tiles(seed=seed) for seed in range(4)])
    if isinstance(score, FittableScore):
        score.fit(model, (tiles(seed=seed) for seed in range(4)))
    saved = io.BytesIO()
    torch.save(score.state_dict(), saved)
    saved.seek(0)
    other, _ = make(name)
    other.load_state_dict(torch.load(saved, weights_only=True))
    result = score(model, tiles())
    assert torch.isfinite(result).all()
    assert torch.equal(result, other(model, tiles()))


@every_score
@pytest.mark.parametrize(
    "model",
    [
        path.stem if path.stem in MODELS else pytest.param(path.stem, marks=pytest.mark.slow)
        for path in sorted((config_folder() / "model").glob("*.yaml"))
    ],
)
def test_every_model_fits_or_is_refused_in_words(compose, installed, name, model):
    try:
        with installed():
            build_model(compose(name, model, 1, *SMALL_BACKBONE), TRUSTED)
    except ConfigError as refusal:
        assert len(str(refusal).split()) > 6

"""What every model in configs/model promises; a new file joins by itself."""

import io
from copy import deepcopy
from functools import cache

import pytest
import torch
import yaml

from blemish.build import TRUSTED, build
from blemish.data.corruption import CutPaste
from blemish.errors import ConfigError
from blemish.models.contracts import Adversarial, Contrasting, Gaussian, Latent, Output, Pair
from blemish.settings import config_folder

FILES = {
    file.stem: yaml.safe_load(file.read_text("utf-8")) for file in sorted((config_folder() / "model").glob("*.yaml"))
}
ARGUMENTS = {name: content.get("model", content) for name, content in FILES.items()}  # a model may bring settings


def having(argument):
    return [name for name, arguments in ARGUMENTS.items() if argument in arguments]


def on_pixels(argument):
    """Those that have the argument, and no backbone that asks more of a tile."""
    return [name for name in having(argument) if "backbone" not in ARGUMENTS[name]]


LIKE_OTHERS = (  # of the default suite, in what they promise here
    *("golden_template", "pca", "global_gaussian", "isolation_forest", "one_class_svm", "adversarial_ae", "f_anogan"),
    *("feature_vae", "student", "siamese"),
)
every_model = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LIKE_OTHERS else name for name in ARGUMENTS]
)
halving_model = pytest.mark.parametrize("name", on_pixels("depth"))
every_channels = pytest.mark.parametrize("channels", [1, pytest.param(3, marks=pytest.mark.slow)])
SIZE = 64
RANDOM_BACKBONE = (
    "backbone.weights=none",
    "backbone.layers=[1,2]",
    "backbone.margin=0",
)  # needs no package, and is small
QUICK = {
    "steps": 4,
    "batch_size": 64,
    "dimensions": 8,
    "samples": 300,
    "trees": 10,
    "templates": 2,
    "tries": 1,
}  # where a model has a number for it


def tiles(channels=1, size=SIZE, count=3, seed=0):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def fresh(settings, name, channels=1, size=SIZE, seed=0):
    torch.manual_seed(seed)
    quick = [f"model.{key}={value}" for key, value in QUICK.items() if ARGUMENTS[name].get(key)]
    composed = settings(f"model={name}", f"image.channels={channels}", f"tiling.size={size}", *RANDOM_BACKBONE, *quick)
    return build(composed["model"], TRUSTED, "model")


def learned(model, channels=1, size=SIZE, seed=0, device="cpu"):
    """After what comes before the trainer, or in its place."""
    if isinstance(model, Contrasting):
        model.contrast_with(CutPaste(1.0))
    for learn in ("fit", "prepare"):
        if hasattr(model, learn):
            getattr(model, learn)([tiles(channels, size, seed=seed + 1).to(device)])
    return model


@pytest.fixture(scope="module")
def make(settings):
    """A fresh model, built as `blemish train` builds it; one that fits in one pass has had its pass."""

    @cache
    def built(name, channels, size, seed):
        model = learned(fresh(settings, name, channels, size, seed), channels, size, seed)
        return model, torch.get_rng_state()

    def build_model(name, channels=1, size=SIZE, seed=0):
        model, random = built(name, channels, size, seed)
        torch.set_rng_state(random)  # as if it had been built just now
        return deepcopy(model)

    return build_model


def everything(output):
    """One number that every part of an output has a share in."""
    shares = [(output.expected - output.observed).square().mean()]
    shares += [latent.kl().mean() for latent in output.latents]
    shares += [output.penalty] if output.penalty is not None else []
    shares += [output.repaired.sigmoid().mean()] if output.repaired is not None else []
    return sum(shares)


def trained_a_little(model, x):
    """One step of gradient, so that weights and running statistics are no longer those of the start."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if parameters:
        optimizer = torch.optim.SGD(parameters, 0.01)
        everything(model.train()(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def expected_by(model, x):
    return model.eval()(x).expected


@torch.no_grad()
def judged_by(model, x):
    """What was expected, or the evidence of a model that expects nothing."""
    output = model.eval()(x)
    return output.expected if output.evidence is None else output.evidence


@torch.no_grad()
def evaluated(model, x):
    """All that a model gives in evaluation, part by part."""
    output = model.eval()(x)
    levels = [part for latent in output.latents for gaussian in latent if gaussian is not None for part in gaussian]
    return [part for part in (*output._replace(latents=()), *levels) if isinstance(part, torch.Tensor)]


@every_model
@every_channels
@pytest.mark.parametrize("size", [64, pytest.param(96, marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [True, False])
def test_observed_and_expected_have_one_shape(make, name, channels, size, training):
    x = tiles(channels, size)
    output = make(name, channels, size).train(training)(x)
    assert type(output) is Output
    assert output.observed.shape == output.expected.shape
    assert output.observed.ndim == 4
    assert len(output.observed) == len(x)
    assert torch.isfinite(output.observed).all()
    assert torch.isfinite(output.expected).all()


def assert_distribution(gaussian, count):
    assert type(gaussian) is Gaussian
    assert gaussian.mean.shape == gaussian.log_variance.shape
    assert gaussian.mean.ndim in (2, 4)
    assert len(gaussian.mean) == count


@every_model
@pytest.mark.parametrize("training", [True, False])
def test_latents_are_distributions_with_a_prior_of_their_shape(make, name, training):
    latents = make(name).train(training)(tiles()).latents
    assert type(latents) is tuple
    for latent in latents:
        assert type(latent) is Latent
        assert_distribution(latent.posterior, 3)
        if latent.prior is not None:
            assert_distribution(latent.prior, 3)
            assert latent.prior.mean.shape == latent.posterior.mean.shape
        assert (latent.kl() > -1e-5).all()


@every_model
@pytest.mark.parametrize("training", [True, False])
def test_penalty_is_a_finite_scalar_or_nothing(make, name, training):
    penalty = make(name).train(training)(tiles()).penalty
    assert penalty is None or (penalty.ndim == 0 and 0 <= penalty < float("inf"))


@every_model
@every_channels
@pytest.mark.parametrize("size", [64, pytest.param(96, marks=pytest.mark.slow)])
def test_repaired_is_one_logit_a_pixel_or_nothing(make, name, channels, size):
    output = make(name, channels, size).train()(tiles(channels, size))
    if output.repaired is not None:
        assert output.repaired.shape == (3, 1, size, size)
        assert torch.isfinite(output.repaired).all()


@every_model
@every_channels
def test_valid_and_spread_are_one_value_a_pixel_or_nothing(make, name, channels):
    output = trained_a_little(make(name, channels), tiles(channels)).eval()(tiles(channels))
    shape = (3, 1, *output.expected.shape[-2:])
    assert output.valid is None or (output.valid.dtype == torch.bool and output.valid.shape == shape)
    assert output.spread is None or (output.spread.shape == shape and (output.spread > 0).all())


@every_model
@every_channels
def test_evidence_is_not_negative_and_comes_without_expectation(make, name, channels):
    output = make(name, channels).eval()(tiles(channels))
    if output.evidence is not None:
        assert output.evidence.dtype == torch.float32
        assert output.evidence.shape == (3, 1, *output.observed.shape[-2:])
        assert torch.isfinite(output.evidence).all() and (output.evidence >= 0).all() and output.evidence.max() > 0
        assert torch.equal(output.expected, output.observed)


@every_model
@every_channels
def test_features_are_a_pair_of_one_shape_or_nothing(make, name, channels):
    pair = make(name, channels).eval()(tiles(channels)).features
    if pair is not None:
        assert type(pair) is Pair
        assert pair.observed.shape == pair.expected.shape
        assert (pair.observed.ndim, len(pair.observed)) == (4, 3)
        assert pair.observed.dtype == torch.float32
        assert torch.isfinite(pair.observed).all() and torch.isfinite(pair.expected).all()


@every_model
def test_a_latent_is_drawn_anew_in_training(make, name):
    model = make(name).train()
    first, second = model(tiles()), model(tiles())
    assert not first.latents or not torch.equal(first.expected, second.expected)


@every_model
def test_input_is_left_as_it_was(make, name):
    x = tiles()
    make(name).train()(x)
    assert torch.equal(x, tiles())


@every_model
def test_gradient_reaches_every_parameter(make, name):
    model = make(name).train()
    parameters = {key: value for key, value in model.named_parameters() if value.requires_grad}
    if parameters:
        everything(model(tiles())).backward()
    if isinstance(model, Adversarial):  # which its output alone need not reach
        judged = model.discriminator(model.play(tiles(), tiles(), 0).real)
        judged.logits.mean().backward()
    unreached = [
        key
        for key, value in parameters.items()
        if value.grad is None or not value.grad.any() or value.grad.isnan().any()
    ]
    assert unreached == []


@every_model
def test_evaluation_repeats_bit_for_bit(make, name):
    model = make(name)
    torch.manual_seed(1)
    first = evaluated(model, tiles())
    torch.manual_seed(2)
    second = evaluated(model, tiles())
    assert len(first) == len(second)
    assert all(map(torch.equal, first, second))


@every_model
def test_evaluation_changes_no_state(make, name):
    model = trained_a_little(make(name), tiles())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected_by(model, tiles(seed=5))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@every_model
def test_a_tile_does_not_depend_on_its_batch(make, name):
    model = trained_a_little(make(name), tiles())
    together = judged_by(model, tiles())
    alone = torch.cat([judged_by(model, tile[None]) for tile in tiles()])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@every_model
@every_channels
def test_weights_saved_and_loaded_give_the_same_bits(make, name, channels):
    x = tiles(channels)
    model = trained_a_little(make(name, channels), x)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    other = make(name, channels, seed=7)
    assert not torch.equal(judged_by(model, x), judged_by(other, x))
    other.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(judged_by(model, x), judged_by(other, x))


@every_model
def test_what_is_learned_does_not_depend_on_the_memory_format(settings, name):
    """Buffers of four axes are turned by the scorer that tries a model before it is trained."""
    if not any(hasattr(fresh(settings, name), learn) for learn in ("fit", "prepare")):
        pytest.skip("it learns from the trainer alone")
    plain = learned(fresh(settings, name)).eval()
    other = learned(fresh(settings, name).to(memory_format=torch.channels_last)).eval()
    ours, theirs = (judged_by(model, tiles(seed=5)) for model in (plain, other))
    assert (ours - theirs).norm() < 0.05 * ours.norm()  # Adam makes steps of the sign of rounding where slopes are 0


@every_model
def test_memory_format_does_not_change_the_answer(make, name):
    model = trained_a_little(make(name), tiles())
    plain = judged_by(model, tiles())
    model.to(memory_format=torch.channels_last)
    other = judged_by(model, tiles().to(memory_format=torch.channels_last))
    torch.testing.assert_close(plain, other, atol=1e-5, rtol=1e-4)


@every_model
@pytest.mark.parametrize("size", [37, 1])
def test_a_tile_of_another_size_fits_or_is_refused_in_words(make, name, size):
    model = make(name).eval()
    x = tiles(size=size)
    try:
        output = model(x)
    except ConfigError as refusal:
        assert str(size) in str(refusal)
    else:
        assert output.observed.shape == output.expected.shape


@halving_model
@pytest.mark.parametrize("size", [37, 1, 4, 68])
def test_a_tile_that_cannot_be_halved_is_refused(make, name, size):
    with pytest.raises(ConfigError, match=f"{size} x {size}"):
        make(name)(tiles(size=size))


@pytest.fixture
def variant(settings):
    """A model with some of its arguments changed."""

    def build_variant(name, **changes):
        torch.manual_seed(0)
        arguments = settings(f"model={name}", "image.channels=1", f"tiling.size={SIZE}", "backbone.weights=none")[
            "model"
        ]
        return build(arguments | changes, TRUSTED, "model")

    return build_variant


@pytest.mark.parametrize("name", having("tile_size"))
def test_a_flat_latent_fits_its_own_tile_only(variant, name):
    model = variant(name, latent="flat").eval()
    assert model(tiles()).expected.shape == (3, 1, SIZE, SIZE)
    with pytest.raises(ConfigError, match=r"set model\.tile_size to tiling\.size"):
        model(tiles(size=96))


IMPOSSIBLE = [
    ({"channels": 2}, r"model\.channels 1 \(grey\) or 3 \(colour\), found 2"),
    ({"depth": 0}, r"model\.depth to be a positive whole number, found 0"),
    ({"depth": 9}, r"model\.depth of at most 8"),
    ({"width": 1.5}, r"model\.width to be a positive whole number, found 1\.5"),
    ({"latent_dim": -4}, r"model\.latent_dim to be a positive whole number, found -4"),
    ({"latent": "flatt"}, r"Unknown model\.latent 'flatt': did you mean 'flat'\?"),
    ({"latent": "flat", "tile_size": None}, r"A flat latent needs model\.tile_size"),
    ({"skips": "ful"}, r"Unknown model\.skips 'ful': did you mean 'full'\?"),
    ({"dilations": [1, 0]}, r"model\.dilations to be positive whole numbers, found \[1, 0\]"),
    ({"normalisation": "layer"}, r"Unknown model\.normalisation 'layer'"),
    ({"activation": "rel"}, r"Unknown model\.activation 'rel': did you mean 'relu'"),
    ({"fine_dim": 0}, r"model\.fine_dim to be a positive whole number, found 0"),
    ({"codes": 1}, r"model\.codes to be a whole number of at least 2, found 1"),
    ({"decay": 1.0}, r"model\.decay between 0 and 1, found 1\.0"),
    ({"commitment": -1}, r"model\.commitment >= 0, found -1"),
    ({"slots": 0}, r"model\.slots to be a whole number of at least 2, found 0"),
    ({"blocks": 3}, r"model\.blocks to divide model\.latent_dim \(64\), found 3"),
    ({"shrinkage": 256}, r"model\.shrinkage in \[0, model\.slots\) = \[0, 256\), found 256"),
    ({"entropy_weight": -1}, r"model\.entropy_weight >= 0, found -1"),
    ({"adversarial_weight": 0}, r"model\.adversarial_weight > 0, found 0"),
    ({"code_weight": -1}, r"model\.code_weight > 0, found -1"),
    ({"kappa": 0}, r"model\.kappa > 0, found 0"),
    ({"discriminator_rate": 0}, r"model\.discriminator_rate > 0, found 0"),
    ({"gan_share": 1.0}, r"model\.gan_share between 0 and 1, found 1\.0"),
    ({"sigma": 0}, r"model\.sigma > 0, in pixels, found 0"),
]


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [(name, *row) for row in IMPOSSIBLE for name in having("depth") if row[0].keys() <= ARGUMENTS[name].keys()],
)
def test_impossible_architecture_is_refused_in_words(variant, name, change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        variant(name, **change)


@every_model
def test_an_unknown_argument_is_refused_in_words(variant, name):
    with pytest.raises(ConfigError, match=r"^model does not fit .*'width_'"):
        variant(name, width_=3)


@pytest.mark.parametrize(
    ("name", "change"),
    [(name, {}) for name in on_pixels("depth") if name not in having("bank")]  # which the trainer does not train
    + [(name, {"latent": latent}) for name in on_pixels("latent") for latent in ("flat", "spatial")]
    + [(name, {"skips": skips}) for name in on_pixels("skips") for skips in ("none", "gated", "full")]
    + [(name, {"mask_head": head}) for name in on_pixels("mask_head") for head in (True, False)]
    + [(name, {"blocks": 4, "shrinkage": 3.0}) for name in on_pixels("blocks")],
)
@pytest.mark.parametrize(
    ("normalisation", "activation"),
    [
        ("batch", "silu"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("instance", "relu"), ("group", "leaky_relu"), ("none", "gelu"))
        ),
    ],
)
def test_every_variant_trains(variant, name, change, normalisation, activation):
    fitting = {"tile_size": 16} if "tile_size" in ARGUMENTS[name] else {}
    change = fitting | change | {"normalisation": normalisation, "activation": activation}
    model = variant(name, width=4, depth=2, **change)
    x = tiles(size=16)
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    losses = []
    for _ in range(4):
        output = model.train()(x)
        losses.append((output.expected - output.observed).square().mean())
        optimizer.zero_grad()
        everything(output).backward()
        optimizer.step()
    assert losses[-1] < 0.98 * losses[0]
    assert torch.isfinite(expected_by(model, x)).all()


@every_model
def test_half_of_autocast_stays_finite(make, name):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = make(name).train()(tiles())
        total = everything(output)
    assert torch.isfinite(output.expected).all()
    assert torch.isfinite(total)

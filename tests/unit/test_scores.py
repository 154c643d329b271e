"""Scores against what they should be, worked out another way."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blemish.build import TRUSTED, build
from blemish.errors import ConfigError
from blemish.models.autoencoder import ConvAutoencoder
from blemish.models.contracts import Gaussian, Latent, Output
from blemish.models.vae import VariationalAutoencoder
from blemish.residuals import L1, L2
from blemish.scores.augmented import FlipsScore, MultiScaleScore, NoiseDrawsScore
from blemish.scores.combinations import CombinedScore
from blemish.scores.engine import TorchScorer
from blemish.scores.gradient import InputGradientScore, ProjectionScore
from blemish.scores.repair import MaskScore
from blemish.scores.residual import ResidualScore
from blemish.scores.restoration import InpaintingScore, RecursiveScore
from blemish.scores.variational import ElboScore, KlScore, MonteCarloScore, kl_map
from blemish.standardise import Light, standardised
from blemish.training.objectives import ReconstructionObjective

TINY = {"channels": 1, "width": 4, "depth": 2, "latent_dim": 3}


def tiles(channels=1, height=16, width=16, count=2, seed=0):
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(seed))


def vae(**changes):
    torch.manual_seed(0)
    return VariationalAutoencoder(**(TINY | changes)).eval()


class Map(nn.Module):
    """Expects what a function makes of the tile."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return Output(x, self.function(x))


class Wide(nn.Module):
    """Expects a mixture of 9 x 9 pixels, different for each."""

    def __init__(self, channels=1):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(channels, channels, 9, padding=4)

    def forward(self, x):
        return Output(x, torch.sigmoid(self.layer(x)))


class Pixels(nn.Module):
    """A score that is the tile's first channel, times something."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor

    def forward(self, model, x):
        return self.factor * x[:, :1]


identity, half = Map(lambda x: x), Map(lambda x: 0.5 * x)


# Kullback-Leibler divergence and ELBO


def normal(gaussian):
    return torch.distributions.Normal(gaussian.mean, torch.exp(0.5 * gaussian.log_variance))


@pytest.mark.parametrize("with_prior", [False, True])
def test_kl_map_is_the_divergence_of_each_cell_shared_by_its_pixels(with_prior):
    posterior, prior = (Gaussian(*torch.randn(2, 3, 5, 4, 6)) for _ in range(2))
    reference = normal(prior) if with_prior else torch.distributions.Normal(0.0, 1.0)
    divergence = torch.distributions.kl_divergence(normal(posterior), reference).sum(1, keepdim=True)
    x = tiles(3, 16, 24, count=3)
    result = kl_map([Latent(posterior, prior if with_prior else None)], x, x)
    assert result.shape == (3, 1, 16, 24)
    torch.testing.assert_close(result.mean((1, 2, 3)), divergence.sum((1, 2, 3)) / x[0].numel())
    cells = F.interpolate(divergence / (3 * 4 * 4), (16, 24), mode="bilinear", align_corners=False)
    torch.testing.assert_close(result, cells)


def test_kl_map_of_a_flat_code_is_a_plane_and_levels_add_up():
    flat, grid = (Latent(Gaussian(*torch.randn(2, 2, 5, *size))) for size in ((), (4, 4)))
    x = tiles()
    plane = kl_map([flat], x, x)
    torch.testing.assert_close(plane, flat.kl().sum(1)[:, None, None, None].expand(-1, 1, 16, 16) / 256)
    torch.testing.assert_close(kl_map([flat, grid], x, x), plane + kl_map([grid], x, x))


@pytest.mark.parametrize("changes", [{}, {"latent": "flat", "tile_size": 16}, {"channels": 3}])
def test_the_mean_of_the_elbo_is_what_training_minimises(changes):
    model, x = vae(**changes), tiles(changes.get("channels", 1))
    loss = ReconstructionObjective(L1(), beta=0.3)(model(x), x, torch.zeros_like(x[:, :1]), 0)
    torch.testing.assert_close(ElboScore(L1(), beta=0.3)(model, x).mean(), loss.total.detach())
    torch.testing.assert_close(KlScore()(model, x).mean(), loss.kl.detach())


@pytest.mark.parametrize(
    "score",
    [ElboScore(L1()), KlScore(), MonteCarloScore(L1()), InputGradientScore(L1(), of="kl")],
    ids=lambda score: type(score).__name__,
)
def test_a_model_without_latent_is_refused(score):
    with pytest.raises(ConfigError, match=f"^{type(score).__name__} expects a model with a latent distribution"):
        score(identity, tiles())


# Monte Carlo


def test_monte_carlo_is_the_mean_over_draws_and_the_same_for_every_tile():
    model, x = vae(normalisation="none"), tiles()
    result = MonteCarloScore(L2(), draws=5, seed=3)(model, x)
    for number, tile in enumerate(x):
        torch.manual_seed(3)
        output = model.train()(tile.expand(5, 1, 16, 16))
        torch.testing.assert_close(result[number], (output.expected - tile).square().mean(0).detach())
    model.eval()
    assert not torch.equal(result, MonteCarloScore(L2(), draws=5, seed=4)(model, x))
    assert not torch.equal(result, ResidualScore(L2())(model, x))


def test_monte_carlo_keeps_batch_norm_dropout_and_modes_as_they_are():
    model = vae()
    model.encoder.add_module("dropout", nn.Dropout(0.5).eval())
    model.encoder[0].train()  # a mixture, which must come back
    modes = [module.training for module in model.modules()]
    seen = []
    model.encoder.dropout.register_forward_hook(lambda module, *_: seen.append(module.training))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d) and not module.training]
    before = [norm.running_mean.clone() for norm in norms]
    MonteCarloScore(L1())(model, tiles())
    assert seen
    assert not any(seen)
    assert norms
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
    assert modes == [module.training for module in model.modules()]


def test_monte_carlo_restores_modes_and_random_numbers_when_it_fails():
    model, state = vae(), torch.get_rng_state()
    model.decoder.register_forward_hook(lambda *_: 1 / 0 if model.training else None)
    with pytest.raises(ZeroDivisionError):
        MonteCarloScore(L1())(model, tiles())
    assert not any(module.training for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())


# Gradients


class Square(nn.Module):
    """L2 at the precision of its input, which the residuals would lower."""

    def forward(self, observed, expected):
        return (observed - expected).square().mean(1, keepdim=True)


@pytest.mark.parametrize("times_residual", [False, True])
def test_input_gradient_equals_finite_differences(times_residual):
    model, x, step = Wide(2).double(), tiles(2, 6, 5, count=1).double(), 1e-6
    loss = ResidualScore(Square())
    slopes = torch.zeros_like(x)
    for place in np.ndindex(*x.shape):
        shift = torch.zeros_like(x)
        shift[place] = step
        slopes[place] = (loss(model, x + shift).sum() - loss(model, x - shift).sum()) / (2 * step)
    reference = slopes.abs().mean(1, keepdim=True)
    if times_residual:
        reference = reference * loss(model, x)
    score = InputGradientScore(Square(), times_residual=times_residual)
    torch.testing.assert_close(score(model, x), reference, atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize(("of", "weight"), [("kl", 1.0), ("elbo", 0.3)])
def test_input_gradient_of_the_code_equals_finite_differences(of, weight):
    model, x, step = vae(normalisation="none", depth=1).double(), tiles(height=4, width=4, count=1).double(), 1e-3
    residual = ResidualScore(Square())

    def loss(x):
        kl = torch.distributions.kl_divergence(
            normal(model(x).latents[0].posterior), torch.distributions.Normal(0.0, 1.0)
        )
        return weight * kl.sum() + (residual(model, x).sum() if of == "elbo" else 0)

    slopes = torch.zeros_like(x)
    for place in np.ndindex(*x.shape):
        shift = torch.zeros_like(x)
        shift[place] = step
        slopes[place] = (loss(x + shift) - loss(x - shift)).detach() / (2 * step)
    score = InputGradientScore(Square(), of=of, beta=0.3, times_residual=False)
    torch.testing.assert_close(score(model, x), slopes.abs(), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("score", [InputGradientScore(L2()), ProjectionScore(L2())], ids=["gradient", "projection"])
def test_a_model_that_stops_gradients_is_refused(score):
    class Frozen(nn.Module):
        @torch.no_grad()
        def forward(self, x):
            return Output(x.detach() * 1, x.detach() * 0.5)

    with pytest.raises(ConfigError, match="follows gradients from the model's output back to its input, and found"):
        score(Frozen(), tiles())


@pytest.mark.parametrize("rate", [0.5, 100])
def test_projection_lowers_the_energy_of_every_tile(rate):
    model, x, weight = Wide(3), tiles(3, count=4), 0.1
    projected = ProjectionScore(L2(), steps=20, rate=rate, weight=weight).project(model, x)

    @torch.no_grad()
    def energy(y):
        return ((y - model(y).expected).square() + weight * (y - x).abs()).sum((1, 2, 3))

    assert (energy(projected) < 0.9 * energy(x)).all()
    assert projected.min() >= 0
    assert projected.max() <= 1


def test_one_step_of_projection_by_hand():
    x = tiles(3)
    score, expected = ProjectionScore(L2(), steps=1, rate=0.7).explain(Map(lambda x: 0 * x + 0.5), x)
    by_hand = x - 0.7 * 2 * (x - 0.5) * (x - 0.5).square()  # the distance to the tile has no slope at the tile
    torch.testing.assert_close(expected, by_hand)
    torch.testing.assert_close(score, (x - by_hand).square().mean(1, keepdim=True))


@pytest.mark.parametrize("residual", [L1(), L2()])
def test_projection_reaches_what_the_model_knows_however_near_it_is(residual):
    x = torch.full((2, 1, 8, 8), 0.5)
    x[1] += 0.1
    projected = ProjectionScore(residual, weight=0.0).project(Map(lambda x: 0 * x + 0.5), x + 0.1)
    torch.testing.assert_close(projected, torch.full_like(x, 0.5), atol=0.03, rtol=0)


def test_projection_leaves_alone_what_the_model_knows():
    def right_half(x):
        return torch.cat([x[..., :8], torch.full_like(x[..., 8:], 0.5)], -1)

    score = ProjectionScore(L2(), steps=5)(Map(right_half), tiles())
    assert (score[..., :8] == 0).all()
    assert score[..., 8:].mean() > 0.001


def test_projection_stays_near_the_tile_as_its_weight_says():
    near, far = (ProjectionScore(L2(), rate=1, weight=weight)(Wide(), tiles()).mean() for weight in (1.0, 0.0))
    assert near < 0.7 * far


# Restoration


def test_recursion_follows_a_linear_model_towards_its_fixed_point():
    score, expected = RecursiveScore(L1(), times=3).explain(Map(lambda x: 0.5 * x + 0.2), tiles())
    by_hand = 0.4 + (tiles() - 0.4) * 0.5**4
    torch.testing.assert_close(expected, by_hand)
    torch.testing.assert_close(score, (tiles() - by_hand).abs())


def test_inpainting_hides_each_pixel_once_in_sets_of_like_size():
    masks = list(InpaintingScore(L1(), parts=3).masks(20, 30, 4))
    assert len(masks) == 3
    assert (torch.stack(masks).sum(0) == 1).all()
    cells = [int(mask[::4, ::4].sum()) for mask in masks]
    assert sum(cells) == 40
    assert max(cells) - min(cells) <= 1
    assert torch.equal(masks[0], masks[0][::4, ::4].repeat_interleave(4, 0).repeat_interleave(4, 1)[:20, :30])


@pytest.mark.parametrize("place", [(0, 0), (7, 3), (15, 15)])
def test_inpainting_never_sees_what_it_predicts(place):
    x = tiles()
    changed = x.clone()
    changed[(..., *place)] = 1 - changed[(..., *place)]
    score = InpaintingScore(L1())
    for cell in (1, 4):
        before, after = score.paint(Wide(), x, cell), score.paint(Wide(), changed, cell)
        assert torch.equal(before[(..., *place)], after[(..., *place)])
        assert not torch.equal(before, after)


def test_inpainting_by_hand_with_a_model_that_returns_what_it_sees():
    x, score = tiles(3), InpaintingScore(L2(), cells=[2, 8], parts=2)
    painted = []
    for cell in (2, 8):
        expected = torch.zeros_like(x)
        for mask in score.masks(16, 16, cell):
            for tile, result in zip(x, expected, strict=True):
                for channel in range(3):
                    result[channel][mask] = tile[channel][~mask].mean()
        painted.append(expected)
    result, expected = score.explain(identity, x)
    torch.testing.assert_close(result, sum(L2()(x, y) for y in painted) / 2)
    torch.testing.assert_close(expected, sum(painted) / 2)


@pytest.mark.parametrize("contrast", [0.5, 0.004])  # of the raw tile; the lesser is less than is brought to full
def test_inpainting_shows_a_standardised_tile_as_training_does(contrast):
    raw = 0.3 + contrast * tiles()
    score = InpaintingScore(L1(), cells=[4], standardise=True)
    seen = []

    def remember(x):
        seen.append(x)
        return x

    painted = score.paint(Map(remember), standardised(raw), 4)
    for shown, hidden in zip(seen, score.masks(16, 16, 4), strict=True):
        mean = (raw * ~hidden).sum(dim=(2, 3), keepdim=True) / (~hidden).sum()
        given = torch.where(hidden, mean, raw)
        # Training hides first, then standardises.
        torch.testing.assert_close(shown, standardised(given), atol=1e-4, rtol=1e-4)
        light = Light.of(raw)
        # What is painted is in the light of the tile that was scored: here, the mean of what was visible.
        torch.testing.assert_close(painted[:, :, hidden], light.remove(mean).expand_as(painted)[:, :, hidden])


def test_inpainting_refuses_a_tile_with_too_few_cells():
    with pytest.raises(ConfigError, match=r"A tile of 16 x 16 pixels has fewer than score\.parts=3 cells of 16"):
        InpaintingScore(L1(), cells=[16])(identity, tiles())


@pytest.mark.parametrize(
    "score",
    [ProjectionScore(L1()), RecursiveScore(L1()), InpaintingScore(L1()), NoiseDrawsScore(ResidualScore(L1()))],
    ids=lambda score: type(score).__name__,
)
def test_a_model_of_features_is_refused(score):
    features = Map(lambda x: x[:, :, ::2, ::2])
    with pytest.raises(ConfigError, match=r"tile of shape \(1, 16, 16\), found \(1, 8, 8\): choose a model in pixel"):
        score(features, tiles())


# The model's own mask


def test_mask_is_evidence_in_nats_and_needs_a_mask_head():
    class Repairing(nn.Module):
        def forward(self, x):
            return Output(x, x, repaired=10 * x[:, :1] - 5)

    x = tiles(3)
    probability = 1 / (1 + torch.exp(5 - 10 * x[:, :1]))
    torch.testing.assert_close(MaskScore()(Repairing(), x), -torch.log(1 - probability), rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match="MaskScore expects a model that says where it repaired"):
        MaskScore()(identity, x)


# Views


def test_flips_is_the_mean_over_flips():
    model, x = Wide(3), tiles(3)
    residual, expected = (
        torch.stack(
            [value.flip(axes) for axes in ([], [-1], [-2], [-1, -2]) for value in [function(x.flip(axes))]]
        ).mean(0)
        for function in (lambda x: ResidualScore(L1())(model, x), lambda x: model(x).expected.detach())
    )
    told = FlipsScore(ResidualScore(L1())).explain(model, x)
    torch.testing.assert_close(told, (residual, expected))


@pytest.mark.parametrize(("flips", "axis"), [({"vertical": False}, -1), ({"horizontal": False}, -2), ({}, -1)])
def test_flips_makes_the_score_follow_a_flip(flips, axis):
    model, x = Wide(), tiles()
    score = FlipsScore(ResidualScore(L1()), **flips)
    torch.testing.assert_close(score(model, x.flip(axis)), score(model, x).flip(axis))
    plain = ResidualScore(L1())
    assert not torch.allclose(plain(model, x.flip(axis)), plain(model, x).flip(axis))


def test_multi_scale_by_hand():
    model, x = Wide(), tiles()
    small = F.avg_pool2d(x, 2)
    enlarged = F.interpolate(ResidualScore(L1())(model, small), (16, 16), mode="bilinear", align_corners=False)
    score = MultiScaleScore(ResidualScore(L1()), scales=[1, 0.5])
    torch.testing.assert_close(score(model, x), (ResidualScore(L1())(model, x) + enlarged) / 2)
    assert score.explain(model, x)[1].shape == x.shape


def test_multi_scale_refuses_a_scale_that_the_model_cannot_take():
    model = ConvAutoencoder(**TINY).eval()
    with pytest.raises(ConfigError, match=r"^At score\.scales=\[1\.0, 0\.6\] of tiles of 16 x 16 pixels: .*10 x 10"):
        MultiScaleScore(ResidualScore(L1()), scales=[1.0, 0.6])(model, tiles())


def test_noise_reaches_the_model_but_not_what_is_observed():
    x = tiles(3, 64, 64, count=3)
    x[1] = x[0]
    score, expected = NoiseDrawsScore(ResidualScore(L2()), std=0.2, draws=5).explain(identity, x)
    assert score.mean().item() == pytest.approx(0.04, rel=0.05)
    torch.testing.assert_close(score[0], score[2])  # every tile sees the same noise
    assert torch.equal(score[0], score[1])
    noise = expected[0] - x[0]
    assert noise.std().item() == pytest.approx(0.2 / 5**0.5, rel=0.05)


def test_without_noise_nothing_changes():
    x = tiles()
    torch.testing.assert_close(
        NoiseDrawsScore(ResidualScore(L1()), std=0, draws=2)(Wide(), x), ResidualScore(L1())(Wide(), x)
    )


def test_noise_works_with_draws_of_codes():
    model = vae()
    score = NoiseDrawsScore(MonteCarloScore(L1(), draws=2), draws=2)
    assert torch.equal(score(model, tiles()), score(model, tiles()))
    assert not any(module.training for module in model.modules())


def test_a_score_that_does_not_tell_stays_silent_inside_another():
    for score in (FlipsScore(Pixels()), MultiScaleScore(Pixels()), CombinedScore([Pixels()])):
        assert TorchScorer(identity, score).explain(tiles().numpy()).shape == (2, 1, 16, 16)


# Combinations


def normals():
    """1001 values in steps of 0.001, dealt over three batches of tiles."""
    values = torch.randperm(1001, generator=torch.Generator().manual_seed(0)) / 1000
    return [values[first : first + 1001 // 7 * 3].reshape(-1, 1, 11, 13) for first in (0, 429)] + [
        values[858:].reshape(1, 1, 11, 13)
    ]


@pytest.mark.parametrize("join", ["sum", "max"])
def test_combined_measures_each_term_by_what_normal_tiles_show(join):
    score = CombinedScore([Pixels(), Pixels(1000)], join, quantile=0.9)
    score.fit(identity, iter(normals()))
    torch.testing.assert_close(score.location, torch.tensor([0.5, 500]), atol=0, rtol=0.002)
    torch.testing.assert_close(score.scale, torch.tensor([0.4, 400]), atol=0, rtol=0.005)
    x = tiles()
    one = ((x - score.location[0]) / score.scale[0]).clamp(min=0)
    other = ((1000 * x - score.location[1]) / score.scale[1]).clamp(min=0)
    torch.testing.assert_close(score(identity, x), one + other if join == "sum" else torch.maximum(one, other))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)  # units do not matter


def test_combined_takes_scores_as_they_are_before_it_has_learned():
    x = tiles()
    assert torch.equal(CombinedScore([Pixels(2), Pixels(3)])(identity, x), 2 * x + 3 * x)
    assert torch.equal(CombinedScore([Pixels(2), Pixels(3)], "max")(identity, x), 3 * x)


def test_combined_stays_finite_where_a_term_is_constant_on_normal_tiles():
    score = CombinedScore([Pixels(0), Pixels()])
    score.fit(identity, [tiles()])
    assert torch.isfinite(score(identity, tiles())).all()


def test_combined_survives_saving():
    score = CombinedScore([Pixels(), CombinedScore([Pixels(7)])])
    score.fit(identity, normals())
    saved = io.BytesIO()
    torch.save(score.state_dict(), saved)
    saved.seek(0)
    other = CombinedScore([Pixels(), CombinedScore([Pixels(7)])])
    assert not torch.equal(other(identity, tiles()), score(identity, tiles()))
    other.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(other(identity, tiles()), score(identity, tiles()))


@pytest.mark.parametrize("wrap", [FlipsScore, MultiScaleScore, NoiseDrawsScore, lambda score: CombinedScore([score])])
def test_fitting_reaches_what_lies_within(wrap):
    inner = CombinedScore([Pixels()], quantile=0.9)
    wrap(FlipsScore(inner)).fit(identity, iter(normals()))
    assert inner.location.item() == pytest.approx(0.5, abs=0.002)
    assert inner.scale.item() == pytest.approx(0.4, abs=0.002)


def test_an_outer_score_learns_after_the_inner_one():
    outer = CombinedScore([CombinedScore([Pixels()], quantile=0.9)], quantile=0.9)
    outer.fit(identity, iter(normals()))
    assert outer.location.item() == pytest.approx(0, abs=0.01)  # half of the inner score is 0
    assert outer.scale.item() == pytest.approx(1, rel=0.01)  # in units of the inner scale


def test_wrappers_of_scores_that_do_not_learn_have_nothing_to_fit():
    FlipsScore(Pixels()).fit(identity, iter(()))
    with pytest.raises(ConfigError, match=r"CombinedScore learns from normal tiles, found none"):
        CombinedScore([Pixels()]).fit(identity, iter(()))


def test_scores_nest_by_their_targets():
    residual = {"_target_": "blemish.scores.residual.ResidualScore", "residual": {"_target_": "blemish.residuals.L1"}}
    flips = {"_target_": "blemish.scores.augmented.FlipsScore", "score": residual}
    gradient = {
        "_target_": "blemish.scores.gradient.InputGradientScore",
        "residual": {"_target_": "blemish.residuals.L2"},
    }
    config = {"_target_": "blemish.scores.combinations.CombinedScore", "terms": [flips, residual, gradient]}
    nested = {"_target_": "blemish.scores.augmented.MultiScaleScore", "score": config}
    score = build(nested, TRUSTED, "score")
    score.fit(half, [tiles()])
    result = score(half, tiles(seed=1))
    assert result.shape == (2, 1, 16, 16)
    assert torch.isfinite(result).all()


# Arguments


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ElboScore(L1(), beta=-1), r"Expected score\.beta >= 0, found -1"),
        (lambda: MonteCarloScore(L1(), draws=0), r"Expected score\.draws to be a positive whole number, found 0"),
        (lambda: InputGradientScore(L1(), of="elboo"), r"Unknown score\.of 'elboo': did you mean 'elbo'\?"),
        (lambda: InputGradientScore(L1(), beta=-1), r"score\.beta >= 0"),
        (lambda: ProjectionScore(L1(), steps=0), r"score\.steps to be a positive whole number, found 0"),
        (lambda: ProjectionScore(L1(), rate=-2), r"score\.rate >= 0, found -2"),
        (lambda: ProjectionScore(L1(), weight=-2), r"score\.weight >= 0, found -2"),
        (lambda: RecursiveScore(L1(), times=0), r"score\.times to be a positive whole number, found 0"),
        (lambda: InpaintingScore(L1(), cells=[]), r"score\.cells of whole pixels and score\.parts >= 2"),
        (lambda: InpaintingScore(L1(), parts=1), r"found \[4, 8, 16\] and 1"),
        (lambda: FlipsScore(Pixels(), False, False), r"score\.horizontal or score\.vertical to be true, found neither"),
        (lambda: MultiScaleScore(Pixels(), []), r"score\.scales in \(0, 1\], found \[\]"),
        (lambda: MultiScaleScore(Pixels(), [2]), r"score\.scales in \(0, 1\], found \[2\]"),
        (lambda: NoiseDrawsScore(Pixels(), std=-1), r"score\.std >= 0, found -1"),
        (lambda: NoiseDrawsScore(Pixels(), draws=2.5), r"score\.draws to be a positive whole number, found 2\.5"),
        (lambda: CombinedScore([]), r"one or more scores in score\.terms, found none"),
        (lambda: CombinedScore([Pixels()], "mean"), r"Unknown score\.join 'mean'"),
        (lambda: CombinedScore([Pixels()], quantile=1), r"score\.quantile between 0\.5 and 1, found 1"),
    ],
)
def test_impossible_arguments_are_refused_in_words(make, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make()

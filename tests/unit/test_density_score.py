"""A density of a network's own activations: against SciPy, place by place; what it learns, keeps and refuses."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, mahalanobis
from torch import nn

from blemish.errors import ConfigError
from blemish.models.autoencoder import ConvAutoencoder
from blemish.models.contracts import Output
from blemish.models.repair import RepairAutoencoder
from blemish.residuals import L2
from blemish.scores.augmented import FlipsScore, MultiScaleScore, NoiseDrawsScore
from blemish.scores.combinations import CombinedScore
from blemish.scores.contracts import LearningScore
from blemish.scores.density import DensityScore
from blemish.scores.residual import ResidualScore

SIDE = 16  # of tiles; places are 4 pixels apart
RESIDUAL = ResidualScore(L2())


class Nothing(nn.Module):
    """A score that has nothing to say."""

    def forward(self, model, x):
        return torch.zeros_like(x[:, :1])


NOTHING = Nothing()


class Showing(nn.Module):
    """Activations at three strides that are easily computed by hand."""

    def forward(self, x):
        fine = torch.cat([x, x.square()], 1)
        coarse = nn.functional.avg_pool2d(x, 8)
        return Output(x, x, activations=(fine, nn.functional.avg_pool2d(fine, 4).sqrt(), coarse))


def tiles(count=40, seed=0, size=SIDE):
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(seed))


def learned(model=None, normal=None, **changes):
    score = DensityScore(changes.pop("other", NOTHING), **changes)
    normal = tiles() if normal is None else normal
    score.learn(model or Showing(), normal.split(7))
    return score


def grid_by_hand(x):
    """(B, 4, 4, 5) of `Showing`."""
    fine = torch.cat([x, x.square()], 1)
    pooled = nn.functional.avg_pool2d(fine, 4)
    coarse = nn.functional.interpolate(nn.functional.avg_pool2d(x, 8), (4, 4), mode="bilinear", align_corners=False)
    return torch.cat([pooled, pooled.sqrt(), coarse], 1).permute(0, 2, 3, 1).double().numpy()


def test_it_is_scipys_mahalanobis_distance_at_each_place():
    score = learned(dimensions=3, shrinkage=0.02, bank=0)
    assert isinstance(score, LearningScore)
    assert score.projection.shape == (3, 5) and score.centre.shape == (4, 4, 3)
    projection = score.projection.double().numpy()
    normal, new = (grid_by_hand(x) @ projection.T for x in (tiles(), tiles(2, 1)))
    found = places(score, tiles(2, 1))
    for row, column in ((0, 0), (1, 3), (3, 2)):
        seen = normal[:, row, column]
        inverse = np.linalg.inv(np.cov(seen.T) + 0.02 * np.eye(3))
        for number in range(2):
            wanted = mahalanobis(new[number, row, column], seen.mean(axis=0), inverse) / 3**0.5
            assert float(found[number, row, column]) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("kept", [500, 40, 9])
def test_with_a_bank_it_is_the_distance_to_the_nearest_of_it(kept):
    score = learned(dimensions=3, shrinkage=0.02, bank=kept)
    assert score.bank.shape == (16, min(kept, 40), 3)
    projection = score.projection.double().numpy()
    normal, new = (grid_by_hand(x) @ projection.T for x in (tiles(), tiles(2, 1)))
    remembered = normal[np.linspace(0, 39, min(kept, 40)).round().astype(int)]
    found = places(score, tiles(2, 1))
    for row, column in ((0, 0), (1, 3), (3, 2)):
        inverse = np.linalg.inv(np.cov(normal[:, row, column].T) + 0.02 * np.eye(3))
        wanted = cdist(new[:, row, column], remembered[:, row, column], "mahalanobis", VI=inverse).min(axis=1) / 3**0.5
        np.testing.assert_allclose(found[:, row, column], wanted, rtol=0.02, atol=0.02)
    known = score(Showing(), tiles()[[0, 39]])  # the first and the last are always remembered
    assert float(known.max()) < 0.05


def places(score, x):
    """The distances before they are enlarged: (B, h, w)."""
    score_map = score(Showing(), x)[:, 0]  # a linear map of the distances, which is inverted
    basis = torch.eye(4 * 4).view(16, 1, 4, 4)
    enlarging = nn.functional.interpolate(basis, (SIDE, SIDE), mode="bilinear", align_corners=False).flatten(1).T
    return torch.linalg.lstsq(enlarging.double(), score_map.flatten(1).T.double()).solution.T.view(-1, 4, 4)


def test_each_feature_counts_in_its_own_unit():
    class Louder(Showing):
        def forward(self, x):
            output = super().forward(x)
            return output._replace(activations=tuple(1000 * layer + 5 for layer in output.activations))

    torch.testing.assert_close(
        learned(Louder())(Louder(), tiles(2, 1)), learned()(Showing(), tiles(2, 1)), rtol=0.02, atol=0.01
    )


def test_an_unusual_place_is_worst_where_it_is():
    x = tiles(1, 1)
    x[..., 8:12, 4:8] = 1
    score_map = learned()(Showing(), x)[0, 0]
    assert divmod(int(score_map.argmax()), SIDE) in [(row, column) for row in range(7, 13) for column in range(3, 9)]


def test_more_dimensions_than_features_are_not_made():
    assert learned(dimensions=100).projection.shape == (5, 5)


@pytest.mark.parametrize(("stride", "side"), [(1, 16), (2, 8), (4, 4), (8, 2), (100, 1)])
def test_places_are_so_many_pixels_apart(stride, side):
    assert learned(stride=stride).centre.shape[:2] == (side, side)


def test_the_finest_layer_is_the_finest_grid():
    torch.manual_seed(0)
    model = RepairAutoencoder(width=4, depth=2).eval()
    score = learned(model, stride=1)
    assert score.centre.shape == (SIDE // 2, SIDE // 2, 12)  # a level, and twice the width before the mask


def test_another_score_speaks_while_it_has_nothing_to_say():
    x = tiles(2)
    hidden = ConvAutoencoder(width=4, depth=2, latent_dim=2).eval()
    silent = learned(hidden, other=RESIDUAL)
    assert not silent.centre.numel() and torch.equal(silent(hidden, x), RESIDUAL(hidden, x))
    shown = RepairAutoencoder(width=4, depth=2).eval()
    score = DensityScore(RESIDUAL)
    assert torch.equal(score(shown, x), RESIDUAL(shown, x))
    score.learn(shown, tiles().split(7))
    assert torch.equal(score(shown, x), learned(shown, other=RESIDUAL)(shown, x))


def test_the_other_score_learns_its_units_and_asks_no_second_time():
    class Counted(ConvAutoencoder):
        asked = 0

        def forward(self, x):
            self.asked += 1
            return super().forward(x)

    model = Counted(width=4, depth=2, latent_dim=2).eval()
    score = DensityScore(CombinedScore([ResidualScore(L2())]))
    score.fit(model, [tiles()])
    assert float(score.other.scale) != 1
    model.asked = 0
    score(model, tiles(2))
    assert model.asked == 1


def test_what_exceeds_the_median_is_amplified_by_the_largest_other_score_in_each_place():
    torch.manual_seed(0)
    model = RepairAutoencoder(width=4, depth=2).eval()
    normal, x = tiles(20, 1), tiles(3, 2)
    distance = learned(model)
    score = learned(model, other=RESIDUAL, quantile=0.99)
    score.fit(model, normal.split(6))

    def largest(shown):
        return RESIDUAL(model, shown).unfold(2, 4, 4).unfold(3, 4, 4).amax((4, 5))

    usual, residuals = distance._ask(model, normal)[2].flatten(), largest(normal).flatten().sort().values
    torch.testing.assert_close(score.median, usual.sort().values[len(usual) // 2 - 1])
    torch.testing.assert_close(score.unit, residuals[round(0.99 * len(residuals)) - 1])
    excess = (distance._ask(model, x)[2] - score.median).clamp(min=0)
    assert 0.3 < float((excess == 0).float().mean()) < 0.7
    wanted = nn.functional.interpolate(excess * (1 + largest(x) / score.unit), (SIDE, SIDE), mode="bilinear")
    torch.testing.assert_close(score(model, x), wanted)
    torch.testing.assert_close(score.explain(model, x)[1], model(x).expected)


def test_places_that_do_not_divide_the_tile_are_amplified_too():
    class Odd(Showing):
        def forward(self, x):
            output = super().forward(x)
            return output._replace(activations=tuple(layer[..., :10, :10] for layer in output.activations[:1]))

    score = learned(Odd(), other=RESIDUAL, stride=3)
    assert SIDE % score.centre.shape[0]
    score.fit(Odd(), [tiles()])
    assert torch.isfinite(score(Odd(), tiles(2, 1))).all()


def test_tiles_of_another_size_are_refused():
    with pytest.raises(ConfigError, match=r"a grid of 4 x 4 places, the tile has 6 x 6"):
        learned()(Showing(), tiles(size=24))


def test_one_tile_is_enough_to_say_something():
    score = learned(normal=tiles(1))
    assert torch.isfinite(score(Showing(), tiles(2, 1))).all()


@pytest.mark.parametrize("before", [{}, {"dimensions": 2}])
def test_what_was_learned_is_saved_whatever_its_size(before):
    score, saved = learned(), io.BytesIO()
    torch.save(score.state_dict(), saved)
    saved.seek(0)
    other = learned(**before) if before else DensityScore(RESIDUAL)
    other.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(other(Showing(), tiles(2, 1)), score(Showing(), tiles(2, 1)))
    other.load_state_dict(DensityScore(RESIDUAL).state_dict())
    assert not other.centre.numel()


def test_the_same_seed_learns_the_same():
    first, again, other = learned(seed=1), learned(seed=1), learned(seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), again.buffers(), strict=True))
    assert not torch.equal(first.projection, other.projection)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stride": 0}, r"score\.stride to be a positive whole number, found 0"),
        ({"dimensions": 1.5}, r"score\.dimensions to be a positive whole number"),
        ({"shrinkage": 0}, r"score\.shrinkage > 0"),
        ({"bank": -1}, r"score\.bank to be a whole number, or 0 for none, found -1"),
        ({"bank": 2.5}, r"score\.bank to be a whole number"),
        ({"cache_gb": -1}, r"score\.cache_gb > 0"),
        ({"quantile": 1}, r"score\.quantile between 0\.5 and 1"),
    ],
)
def test_numbers_out_of_range_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        DensityScore(RESIDUAL, **changes)


@pytest.mark.parametrize("wrap", [FlipsScore, MultiScaleScore])
def test_a_view_that_moves_places_is_refused(wrap):
    inner = CombinedScore([DensityScore(NOTHING)])
    with pytest.raises(ConfigError, match=r"DensityScore learns each place of a tile by itself, and \w+ moves them"):
        wrap(inner)
    NoiseDrawsScore(inner)

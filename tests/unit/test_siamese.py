"""The embedding that learns what is the same, its bank, and the distance of pairs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blemish.data.corruption import Corrupted, NoCorruption
from blemish.errors import ConfigError
from blemish.models.contracts import Contrasting, Encoding, Fittable
from blemish.models.reference import ReferencePair
from blemish.models.siamese import Siamese, contrast
from blemish.residuals import L2
from blemish.scores.residual import ResidualScore
from blemish.scores.siamese import SiameseScore

SIZE = 32
SMALL = {"dimensions": 8, "width": 8, "depth": 2, "dilations": [1], "crop": 32, "bank": 300, "candidates": 2000}


def tiles(count=24, seed=0):
    """Upright waves (N, 1, 32, 32), each with a phase and a light of its own."""
    generator = torch.Generator().manual_seed(seed)
    phase, level = (
        6.3 * torch.rand(count, 1, 1, 1, generator=generator),
        torch.rand(count, 1, 1, 1, generator=generator),
    )
    wave = 0.4 + 0.2 * level + 0.25 * torch.sin(torch.arange(SIZE) / 2 + phase)
    return wave.expand(count, 1, SIZE, SIZE).contiguous()


def turned(x):
    """A square somewhere in (B, 1, 32, 32) whose waves are upright no more."""
    mask = torch.zeros_like(x)
    for tile, (top, left) in enumerate(torch.randint(0, SIZE - 12, (len(x), 2)).tolist()):
        mask[tile, :, top : top + 12, left : left + 12] = 1
    return Corrupted(torch.where(mask > 0, x.transpose(2, 3), x), x, mask)


def made(**arguments):
    torch.manual_seed(0)
    return Siamese(**SMALL | {"steps": 3} | arguments)


def fitted(corrupt=None, **arguments):
    model = made(**arguments)
    model.contrast_with(corrupt or turned)
    model.fit(tiles().split(7), ["some label"] * 24)
    return model.eval()


@pytest.fixture(scope="module")
def trained():
    return fitted(steps=60, learning_rate=0.005, crops_per_step=4)


# --- the loss


def at_one_place(*vectors):
    """Vectors of two numbers -> embeddings (1, 2, 1, w), one place each."""
    return torch.tensor(vectors).T[None, :, None]


EAST, NORTH, WEST = (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)


def test_loss_by_hand():
    # Squared distances: anchor to same 0, 2, 0; anchor to corrupted 2, 0, 2.
    anchor, same = at_one_place(EAST, EAST, EAST), at_one_place(EAST, NORTH, EAST)
    corrupted = at_one_place(NORTH, EAST, NORTH)
    covered = torch.tensor([[[0.0, 1.0, 0.1]]])  # clean, corrupted, and too little of it to say
    told = contrast(anchor, same, corrupted, covered, 1.0, "corruption")
    assert told.item() == pytest.approx(2 / 3 + 2 + (1 + 2 - 0))
    apart = contrast(anchor, anchor, at_one_place(EAST, WEST, EAST), covered, 1.0, "corruption")
    assert apart.item() == 0  # 4 is farther than the margin


def test_what_is_corrupted_is_to_be_unlike_any_clean_place():
    anchor, corrupted = at_one_place(EAST, NORTH), at_one_place(NORTH, NORTH)
    told = contrast(anchor, anchor, corrupted, torch.tensor([[[1.0, 0.0]]]), 1.0, "corruption")
    assert told.item() == pytest.approx(1)  # it is 2 from itself, but 0 from the other place


def test_loss_of_places_elsewhere_by_hand():
    anchor = torch.cat([at_one_place(EAST), at_one_place(NORTH)])  # two tiles of one place: elsewhere is the other
    covered = torch.ones(2, 1, 1)
    assert contrast(anchor, anchor, anchor, covered, 3.0, "others").item() == pytest.approx(3 - 2)
    assert contrast(anchor, anchor, anchor, covered, 3.0, "both").item() == pytest.approx(3 - 2 + 3)


def test_what_has_no_place_costs_nothing():
    anchor = at_one_place(EAST, NORTH)
    assert contrast(anchor, anchor, anchor, torch.zeros(1, 1, 2), 1.0, "corruption").item() == 0


# --- the model


def test_a_planted_defect_stands_out(trained):
    x = tiles(6, 5)
    x[:, :, 8:20, 8:20] = x[:, :, 8:20, 8:20].transpose(2, 3)
    told = ResidualScore(L2())(trained, x)[:, 0]
    inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    inside[10:18, 10:18] = True
    outside = F.max_pool2d(inside[None].float(), 17, 1, 8)[0] == 0
    assert (told[:, inside].mean(dim=1) > 3 * told[:, outside].mean(dim=1)).all()
    assert ResidualScore(L2())(trained, tiles(6, 5)).mean() < 0.5 * told[:, inside].mean()


def test_embeddings_are_of_unit_length_and_differ(trained):
    code = trained.encode(tiles(4, 1))
    assert isinstance(trained, Encoding) and code.shape == (4, 8, SIZE // 4, SIZE // 4)
    torch.testing.assert_close(code.norm(dim=1), torch.ones(4, 8, 8))
    assert torch.equal(trained(tiles(4, 1)).observed, code)
    other, normal = trained.encode(tiles(4, 1).transpose(2, 3)).movedim(1, -1).flatten(0, 2), trained.bank
    assert torch.cdist(other, normal).min(dim=1).values.mean() > 0.3
    assert normal.std(dim=0).max() > 0.05


def test_light_moves_embeddings_less_than_a_defect(trained):
    x = tiles(4, 1)
    brighter, turned = (x - 0.5) * 1.1 + 0.53, x.transpose(2, 3)
    lit, other = ((trained.encode(y) - trained.encode(x)).square().sum(dim=1).mean() for y in (brighter, turned))
    assert lit < 0.3 * other


def test_the_bank_holds_embeddings_of_whole_tiles_as_they_are_scored(trained):
    known = trained.encode(tiles()).movedim(1, -1).flatten(0, 2)
    assert torch.cdist(trained.bank, known).min(dim=1).values.max() < 5e-3  # float16 in between
    assert len(trained.bank.unique(dim=0)) == 300


def test_same_seed_same_bits_and_the_random_state_is_left_alone():
    first = fitted(seed=1)
    assert not first.training and all(parameter.grad is None for parameter in first.parameters())
    state = torch.get_rng_state()
    again = fitted(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    other = fitted(seed=2)
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(first.encode(tiles(2)), other.encode(tiles(2)))


def test_corruption_is_asked_for_where_it_is_needed_only():
    model = made(negatives="others")
    assert isinstance(model, Fittable) and isinstance(model, Contrasting)
    model.fit([tiles()])  # was told of none
    with pytest.raises(ConfigError, match=r"expects corrupted tiles.*set model\.negatives=others"):
        made(negatives="both").fit([tiles()])
    with pytest.raises(ConfigError, match=r"found nothing corrupted: set corruption=structured"):
        fitted(NoCorruption(), negatives="corruption")
    with pytest.raises(ConfigError, match="learns from normal tiles, found none"):
        model.fit([])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"negatives": "other"}, r"Unknown model\.negatives 'other': did you mean 'others'"),
        ({"margin": 0}, r"model\.margin > 0, found 0"),
        ({"light": 1.0}, r"0 <= model\.light < 1 and model\.noise >= 0, found 1\.0 and"),
        ({"noise": -1}, r"model\.noise >= 0, found .* and -1"),
        ({"crop": 0}, r"model\.crop to be a positive whole number, found 0"),
        ({"dimensions": 0}, r"model\.dimensions to be a positive whole number, found 0"),
        ({"learning_rate": 0}, r"model\.learning_rate > 0, found 0"),
        ({"bank": 3000}, r"model\.candidates of at least model\.bank \(3000\), found 2000"),
    ],
)
def test_mistakes_are_one_sentence(change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        made(**change)


# --- pairs


@pytest.fixture
def pairs(trained, monkeypatch):
    encoder = nn.Module()
    encoder.forward, encoder.step = trained.encode, SIZE // trained.encode(tiles(1)).shape[-1]
    monkeypatch.setattr("blemish.scores.siamese.RunEncoder", lambda run: encoder)
    return SiameseScore("a run")


def pile(query, reference, valid=None):
    """What `ReferencePair` takes."""
    return torch.cat([query, reference, torch.ones_like(query) if valid is None else valid], 1)


def test_a_pair_differs_where_its_embeddings_do(pairs, trained):
    reference = tiles(3, 5)
    query = turned(reference).input
    told, expected = pairs.explain(ReferencePair(), pile(query, reference))
    assert told.shape == (3, 1, SIZE, SIZE) and torch.equal(expected, reference)
    by_hand = (trained.encode(query) - trained.encode(reference)).square().sum(dim=1, keepdim=True) / 4
    torch.testing.assert_close(told, F.interpolate(by_hand, (SIZE, SIZE), mode="bilinear"), atol=1e-5, rtol=1e-4)
    assert told.min() >= 0 and told.max() > 0.1
    assert pairs(ReferencePair(), pile(query, query)).max() < 1e-6


def test_any_size_is_compared_and_what_is_not_valid_is_equal(pairs):
    reference = tiles(1, 5)[..., :27, :30]
    query, valid = 1 - reference, torch.ones_like(reference)
    valid[..., :14] = 0
    told = pairs(ReferencePair(), pile(query, reference, valid))
    assert told.shape == (1, 1, 27, 30) and (told[..., :14] == 0).all() and told[..., 20:].min() >= 0
    assert torch.isfinite(told).all() and not told.requires_grad
    nothing = pairs(ReferencePair(), pile(query, reference, torch.zeros_like(valid)))
    assert (nothing == 0).all()


def test_a_pair_score_asks_for_a_run():
    with pytest.raises(ConfigError, match=r"strategy\.run is not set"):
        SiameseScore(None)

"""Models whose expectation is a picture: a given reference, templates."""

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from blemish.errors import ConfigError
from blemish.models.contracts import Fittable, classes_of
from blemish.models.reference import ReferencePair, TemplateBank
from blemish.residuals import L1
from blemish.scores.engine import TorchScorer
from blemish.scores.residual import ResidualScore


def picture(seed, size=64):
    """A smooth random picture (size, size) in [0, 1], with an edge or two to align by."""
    rng = np.random.default_rng(seed)
    small = rng.random((9, 9)).astype(np.float32)
    image = cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC)
    cv2.rectangle(image, (size // 4, size // 3), (size // 2, 3 * size // 4), float(rng.random()), -1)
    return image.clip(0, 1)


def shifted(image, x, y):
    moved = cv2.warpAffine(
        image,
        np.float32([[1, 0, x], [0, 1, y]]),
        image.shape[::-1],
        flags=cv2.INTER_CUBIC,
        borderMode=cv2.BORDER_REFLECT,
    )
    return moved.clip(0, 1)


def as_tiles(images):
    return torch.from_numpy(np.stack(images).astype(np.float32))[:, None]


def normals(seed, count, noise=0.02, most=3.0):
    rng = np.random.default_rng([seed, 1])
    image = picture(seed)
    return [
        (shifted(image, *rng.uniform(-most, most, 2)) + noise * rng.standard_normal(image.shape)).clip(0, 1)
        for _ in range(count)
    ]


# --- pairs


@pytest.mark.parametrize("channels", [1, 3])
def test_a_pair_is_query_reference_and_validity(channels):
    query, reference = torch.rand(2, 2, channels, 8, 9)
    valid = torch.zeros(2, 1, 8, 9)
    valid[..., 3:] = 1
    output = ReferencePair()(torch.cat([query, reference, valid], 1))
    assert torch.equal(output.observed, query) and torch.equal(output.expected, reference)
    assert output.valid.dtype == torch.bool and torch.equal(output.valid.float(), valid)


def test_a_pair_of_other_channels_is_one_sentence():
    with pytest.raises(ConfigError, match=r"odd number of channels, found 6"):
        ReferencePair()(torch.rand(1, 6, 8, 8))


def test_an_edge_may_be_off_by_the_tolerance():
    query, reference = torch.rand(2, 2, 1, 9, 11)
    output = ReferencePair(tolerance=2)(torch.cat([query, reference, torch.ones(2, 1, 9, 11)], 1))
    brightest = F.max_pool2d(reference, 5, 1, 2)
    darkest = -F.max_pool2d(-reference, 5, 1, 2)
    assert torch.equal(output.expected, torch.minimum(torch.maximum(query, darkest), brightest))


def test_nothing_is_scored_where_nothing_can_be_compared():
    pair = torch.rand(1, 3, 8, 8)
    pair[:, 2] = 0
    pair[:, 2, :, :4] = 1
    score = ResidualScore(L1())(ReferencePair(), pair)
    torch.testing.assert_close(score[..., :4], (pair[:, :1] - pair[:, 1:2]).abs()[..., :4])
    assert (score[..., 4:] == 0).all()


# --- templates


def fitted(templates, tiles, labels=(), **arguments):
    torch.manual_seed(0)
    model = TemplateBank(1, 64, templates, **arguments)
    assert isinstance(model, Fittable)
    model.fit(tiles.split(5), labels)
    return model.eval()


@pytest.mark.parametrize("statistic", ["median", "mean"])
def test_golden_template_is_what_normal_tiles_have_in_common(statistic):
    model = fitted(1, as_tiles(normals(0, 15)), statistic=statistic, alignment={"motion": "translation"})
    query = as_tiles([shifted(picture(0), 1.6, -2.3)])
    output = model(query)
    inside = output.valid
    assert 0.8 < inside.float().mean() < 1
    error = (output.expected - query).abs()[inside]
    assert error.mean() < 0.01
    # Without alignment, the edges are apart.
    still = fitted(1, as_tiles(normals(0, 15)), statistic=statistic, alignment={"motion": "none"})(query)
    assert (still.expected - query).abs().mean() > 3 * error.mean()


def test_a_defect_stands_out_against_the_spread():
    model = fitted(1, as_tiles(normals(0, 15)), alignment={"motion": "translation"})
    query = shifted(picture(0), -1.2, 0.7)
    query[40:44, 10:14] = 1 - query[40:44, 10:14]
    score = ResidualScore(L1())(model, as_tiles([query]))[0, 0]
    assert score[40:44, 10:14].median() > 5 * score.median()
    top, left = divmod(int(score.argmax()), 64)
    assert 39 <= top <= 44 and 9 <= left <= 14


def test_bank_tells_kinds_apart_and_expects_the_right_one():
    kinds = [normals(seed, 8, most=1.0) for seed in (1, 2, 3)]
    mixed = [kind[number] for number in range(8) for kind in kinds]
    model = fitted(3, as_tiles(mixed), alignment={"motion": "translation"}, tries=2)
    for seed in (1, 2, 3):
        query = as_tiles([shifted(picture(seed), 0.4, -0.6)])
        output = model(query)
        assert (output.expected - query).abs()[output.valid].mean() < 0.02
    stranger = as_tiles([picture(9)])
    assert (model(stranger).expected - stranger).abs().mean() > 0.1


def test_fewer_kinds_than_templates():
    model = fitted(4, as_tiles([picture(0)] * 3), alignment={"motion": "none"})
    assert torch.equal(model.templates[0], model.templates[3])
    torch.testing.assert_close(model.templates[0, 0], torch.from_numpy(picture(0)), atol=1 / 255, rtol=0)


def test_state_and_seed_give_the_same_answer():
    tiles = as_tiles([image for seed in (1, 2) for image in normals(seed, 5)])
    model, again = (fitted(2, tiles, alignment={"motion": "translation"}) for _ in range(2))
    other = TemplateBank(1, 64, 2, alignment={"motion": "translation"}).eval()
    other.load_state_dict(model.state_dict())
    query = as_tiles(normals(2, 2))
    for one in (again, other):
        assert all(
            torch.equal(a, b) for a, b in zip(model(query), one(query), strict=True) if isinstance(a, torch.Tensor)
        )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"templates": 0}, r"model\.templates to be a positive whole number, found 0"),
        ({"statistic": "mode"}, r"Unknown model\.statistic 'mode'"),
        ({"alignment": {"motion": "afine"}}, "did you mean 'affine'"),
        ({"alignment": {"moton": "affine"}}, r"model\.alignment does not fit Alignment"),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        TemplateBank(1, 64, **arguments)


def test_another_size_is_one_sentence():
    with pytest.raises(ConfigError, match="templates are of 64 x 64 pixels, the tile of 32 x 32"):
        TemplateBank(1, 64)(torch.rand(1, 1, 32, 32))


def test_no_tile_is_one_sentence():
    with pytest.raises(ConfigError, match="learns from normal tiles, found none"):
        TemplateBank(1, 64).fit([])


# --- classes


def test_the_choice_is_the_template_that_fits_best():
    model = fitted(2, as_tiles(normals(1, 6) + normals(2, 6)), alignment={"motion": "none"})
    assert classes_of(model) == ("template 1", "template 2") and classes_of(ReferencePair()) == ()
    queries = as_tiles([picture(1), picture(2), picture(1)])
    choice = model(queries).choice
    assert choice.dtype == torch.int64 and choice[0] == choice[2] != choice[1]
    for query, number in zip(queries, choice, strict=True):
        distances = [float((query[0] - template[0]).abs().mean()) for template in model.templates]
        assert int(np.argmin(distances)) == number


def test_a_named_class_has_one_template_of_its_own_tiles():
    # Two pictures that would be sorted apart are of one class; the other class is rare.
    tiles = as_tiles([*normals(1, 5, most=0.0), *normals(2, 4, most=0.0), *normals(3, 2, most=0.0)])
    labels = ["left"] * 5 + ["left"] * 4 + ["right"] * 2
    model = fitted(7, tiles, labels, classes=["left", "right"], alignment={"motion": "none"})
    assert classes_of(model) == ("left", "right") and len(model.templates) == 2
    own = torch.from_numpy(picture(3))
    assert (model.templates[1, 0] - own).abs().mean() < 0.03 < (model.templates[0, 0] - own).abs().mean()
    assert model(as_tiles([picture(1), picture(3)])).choice.tolist() == [0, 1]


def test_the_scorer_tells_the_class_in_the_pass_that_scores():
    model = fitted(1, as_tiles([*normals(1, 3), *normals(2, 3)]), ["b"] * 3 + ["a"] * 3, classes=["a", "b"])
    scorer, tiles, calls = TorchScorer(model, ResidualScore(L1())), as_tiles([picture(1), picture(2)]).numpy(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    explained, labels = scorer.classify(tiles)
    assert scorer.classes == ("a", "b") and labels == ["b", "a"] and len(calls) == 1
    np.testing.assert_array_equal(explained[:, 0], scorer(tiles))


def test_a_class_without_a_tile_is_one_sentence():
    with pytest.raises(ConfigError, match="images of the class 'right' among the 2 training images"):
        fitted(1, as_tiles([picture(0)] * 2), ["left"] * 2, classes=["left", "right"])


@pytest.mark.parametrize("classes", ["named", [], ["left", "left"]])
def test_classes_are_different_names(classes):
    with pytest.raises(ConfigError, match=r"model\.classes to be a list of different names"):
        TemplateBank(1, 64, classes=classes)

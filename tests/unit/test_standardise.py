"""One brightness and contrast for every tile: what it promises, and that a detector's answers stay in the image's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from blemish.detector import TileDetector
from blemish.models.contracts import Output
from blemish.postprocess import Cleaning, Smoothing
from blemish.preprocess import Preprocess
from blemish.residuals import L1
from blemish.scores.engine import TorchScorer
from blemish.scores.residual import ResidualScore
from blemish.standardise import Light
from blemish.tiling import Tiling


def tiles(channels=1, count=4, low=0.3, high=0.6):
    return low + (high - low) * torch.rand(count, channels, 16, 16, generator=torch.Generator().manual_seed(0))


def standardised(x):
    return Light.of(x).remove(x)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_tile_gets_one_mean_and_spread(channels):
    x = tiles(channels) * torch.tensor([0.3, 0.7, 1.0, 1.5])[:, None, None, None]
    found = standardised(x)
    torch.testing.assert_close(found.mean((1, 2, 3)), torch.full((4,), 0.5))
    torch.testing.assert_close(found.std((1, 2, 3)), torch.full((4,), 0.2))


def test_channels_share_one_light():
    x = tiles(3)
    x[:, 0] += 0.3  # a red tile stays red
    found = standardised(x).mean((2, 3))
    assert (found[:, 0] > found[:, 1:].amax(1) + 0.2).all()


@pytest.mark.parametrize("make", [tiles, lambda: torch.full((4, 1, 16, 16), 0.9)], ids=["texture", "flat"])
def test_restore_is_the_way_back(make):
    x = make()
    light = Light.of(x)
    torch.testing.assert_close(light.restore(light.remove(x)), x)
    other = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(light.remove(light.restore(other)), other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.37, 1.0])
def test_flat_tile_becomes_the_level(value):
    torch.testing.assert_close(standardised(torch.full((2, 3, 16, 16), value)), torch.full((2, 3, 16, 16), 0.5))


def test_noise_on_an_even_surface_is_not_blown_up():
    x = 0.5 + 0.001 * (tiles(low=-1, high=1))
    assert standardised(x).std() < 0.011  # ten times, and not 300


@pytest.mark.parametrize(("contrast", "brightness"), [(0.5, 0.0), (1.4, 0.1), (1.0, -0.2), (0.3, 0.6)])
def test_brightness_and_contrast_make_no_difference(contrast, brightness):
    x = tiles(3)
    torch.testing.assert_close(standardised(contrast * x + brightness), standardised(x), atol=2e-5, rtol=1e-4)


def test_no_tile_depends_on_its_neighbours():
    x = tiles()
    torch.testing.assert_close(standardised(x)[1:2], standardised(x[1:2]))


# In a detector


class Expects(nn.Module):
    """Expects what a function makes of the tile."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return Output(x, self.function(x))


def detector(function, standardise=True):
    scorer = TorchScorer(Expects(function), ResidualScore(L1()), standardise=standardise)
    return TileDetector(scorer, Preprocess(1), Tiling(16), Smoothing(1.0), cleaning=Cleaning(1), fingerprint="print")


def blurred(x):
    return nn.functional.avg_pool2d(x, 5, 1, 2, count_include_pad=False)


def image(shape=(40, 50)):
    return (0.3 + 0.5 * np.random.default_rng(0).random(shape)).astype(np.float32)


def test_a_darkened_image_has_the_same_score_map():
    light, dark = image(), 0.4 * image() + np.float32(0.05)
    judge = detector(blurred)
    np.testing.assert_allclose(judge.score_map(dark), judge.score_map(light), atol=1e-5)
    assert judge.score_map(light).mean() > 0.05
    plain = detector(blurred, standardise=False)
    np.testing.assert_allclose(plain.score_map(dark), 0.4 * plain.score_map(light), atol=1e-5)


def test_the_model_sees_standardised_tiles():
    seen = []
    detector(lambda x: seen.append(x) or x).score_map(image())
    torch.testing.assert_close(torch.cat(seen), standardised(torch.cat(seen)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("contrast", [1.0, 0.2])
def test_what_was_expected_is_told_in_the_images_own_brightness(contrast):
    pixels = contrast * image()
    score_map, expected = detector(lambda x: x).explain(pixels)
    np.testing.assert_allclose(expected[..., 0], pixels, atol=1e-6)
    assert score_map.max() == 0
    one_tile = contrast * image((16, 16))
    _, level = detector(lambda x: torch.full_like(x, 0.5)).explain(one_tile)
    np.testing.assert_allclose(level[..., 0], one_tile.mean(), atol=1e-6)


def test_explaining_changes_no_score():
    judge = detector(blurred)
    np.testing.assert_allclose(judge.explain(image())[0], judge.score_map(image()), atol=1e-6)

"""Histograms of colour, against plain counts and scikit-image's hue, saturation and value."""

import numpy as np
import pytest
import torch
from skimage.color import hsv2rgb, rgb2hsv

from blemish.errors import ConfigError
from blemish.models.colour_histogram import ColourHistogram, circular_share, share, to_hsv
from blemish.models.isolation_forest import IsolationForest
from blemish.models.kde import KernelDensity
from blemish.scores.evidence import EvidenceScore

DEFECT = slice(24, 40), slice(16, 40)


def colours(shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_colours_are_those_of_scikit_image():
    x = colours((2, 3, 16, 16))
    x[:, :, :2] = x[:, :1, :2]  # grey
    x[:, :, 2] = 0  # black
    x[:, 0, 3] = x[:, 1, 3] = 1  # two largest
    x[:, 1, 4] = x[:, 2, 4] = 0  # two smallest
    wanted = rgb2hsv(x.numpy(), channel_axis=1)
    hue, saturation, value = (part[:, 0].numpy() for part in to_hsv(x))
    apart = np.abs(hue - wanted[:, 0])
    assert np.minimum(apart, 1 - apart).max() < 1e-5
    np.testing.assert_allclose(saturation, wanted[:, 1], atol=1e-6)
    np.testing.assert_allclose(value, wanted[:, 2], atol=1e-6)


def test_each_value_is_shared_by_two_neighbouring_bins():
    values = torch.linspace(0, 0.999, 500)
    for shares in (
        torch.stack([share(values, number, 5) for number in range(5)]),
        torch.stack([circular_share(values, number, 7) for number in range(7)]),
    ):
        torch.testing.assert_close(shares.sum(dim=0), torch.ones(500))
        assert (shares > 0).sum(dim=0).max() == 2
    assert share(torch.tensor(0.5), 2, 5) == 1 and share(torch.tensor(1.0), 4, 5) == 1
    assert circular_share(torch.tensor(0.95), 0, 10) == pytest.approx(0.5)  # around the circle


def test_a_window_counts_the_pixels_that_it_shows():
    x = colours((2, 3, 32, 48))
    model = ColourHistogram(hue=6, saturation=4, value=5, cell=12, stride=4)
    grid = model(x)
    assert grid.shape == (2, 15, 8, 12) and model.features == 15
    hue, saturation, value = to_hsv(x)
    for row, column in ((1, 1), (3, 5), (6, 10)):
        inside = (..., slice(4 * row - 4, 4 * row + 8), slice(4 * column - 4, 4 * column + 8))
        wanted = [(circular_share(hue, k, 6) * saturation * value)[inside].mean(dim=(1, 2, 3)) for k in range(6)]
        wanted += [share(saturation, k, 4)[inside].mean(dim=(1, 2, 3)) for k in range(4)]
        wanted += [share(value, k, 5)[inside].mean(dim=(1, 2, 3)) for k in range(5)]
        torch.testing.assert_close(grid[..., row, column], torch.stack(wanted, dim=1))
    assert torch.equal(grid[..., 0, :], grid[..., 1, :]) and torch.equal(grid[..., 11], grid[..., 10])  # all are whole
    torch.testing.assert_close(grid[:, 6:10].sum(dim=1), torch.ones(2, 8, 12))
    torch.testing.assert_close(grid[:, 10:].sum(dim=1), torch.ones(2, 8, 12))


def test_a_grey_tile_has_no_hue_and_one_saturation():
    grid = ColourHistogram()(colours((1, 1, 24, 24)))
    assert (grid[:, :12] == 0).all() and (grid[:, 12] == 1).all() and (grid[:, 13:18] == 0).all()
    assert torch.equal(grid, ColourHistogram()(colours((1, 1, 24, 24)).expand(-1, 3, -1, -1)))
    assert ColourHistogram(hue=0, saturation=0)(colours((1, 1, 24, 24))).shape == (1, 8, 6, 6)


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((1, 3, 24, 30), r"multiples of 4, .* found 24 x 30: set tiling\.size"),
        ((1, 3, 16, 24), r"at least 20 pixels, .* found 16 x 24"),
        ((1, 2, 24, 24), "1 or 3 channels, found 2"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(shape, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ColourHistogram()(torch.zeros(shape))


def painted(seed, defect=None):
    """A tile (3, 64, 64) of green stripes; `defect` turns the hue of a region, or its stripes."""
    rng = np.random.default_rng(seed)
    hsv = np.stack([rng.normal(mean, deviation, (64, 64)) for mean, deviation in ((0.35, 0.02), (0.5, 0.05), (0, 0))])
    hsv[2] = 0.5 + 0.2 * np.sin(np.arange(64) * np.pi / 2) + rng.normal(0, 0.03, (64, 64))
    if defect == "hue":
        hsv[0][DEFECT] += 0.25
    x = hsv2rgb(hsv.clip(0, 1), channel_axis=0)
    if defect == "stripes":
        region = x[(slice(3), *DEFECT)].reshape(3, 4, 4, 6, 4)  # in blocks of 4 x 4 pixels, one period
        x[(slice(3), *DEFECT)] = region.transpose(0, 1, 4, 3, 2).reshape(3, 16, 24)
    return torch.from_numpy(x).float()


@pytest.mark.parametrize("kind", [IsolationForest, KernelDensity])
def test_a_shift_of_hue_is_found_and_a_change_of_order_is_not(kind):
    """The second is a limit: a histogram of a window does not know where in it a pixel lies."""
    model, score = kind(ColourHistogram()), EvidenceScore()
    model.fit(torch.stack([painted(seed) for seed in range(20)]).split(5))
    plain, hue, stripes = (
        score(model.eval(), torch.stack([painted(seed, defect) for seed in range(100, 110)]))[:, 0]
        for defect in (None, "hue", "stripes")
    )
    inside = hue[:, 24:40, 16:40]
    assert inside.amax(dim=(1, 2)).min() > plain.max()
    assert inside.mean() > plain.quantile(0.999)
    torch.testing.assert_close(stripes, plain, rtol=1e-3, atol=1e-3)

"""What structured corruption draws: shapes, and what they are filled with."""

import math

import pytest
import torch
import torch.nn.functional as F

from blemish.data.fills import FILLS, mean_and_std
from blemish.data.shapes import SHAPES, _weights, log_uniform, smooth_noise, uniform

CPU = torch.device("cpu")
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
every_fill = pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS.keys())


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def tiles(shape=(6, 3, 32, 40), seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def smooth_tiles(shape=(6, 3, 64, 64), seed=0):
    return F.interpolate(tiles((*shape[:2], 6, 6), seed), shape[2:], mode="bicubic").clamp(0, 1)


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


def extents(opacity):
    """The longer side of each shape's box, in pixels; and whether it lies inside whole, and shows at all."""
    found = []
    for one in opacity[:, 0] > 0.5:
        rows, columns = one.any(dim=1).nonzero(), one.any(dim=0).nonzero()
        if len(rows):
            height, width = one.shape
            inside = rows.min() > 0 and columns.min() > 0 and rows.max() < height - 1 and columns.max() < width - 1
            longest = max(rows.max() - rows.min(), columns.max() - columns.min()).item() + 1
            found.append((longest, bool(inside), one.sum().item()))
    return found


# --- random numbers


def test_uniform_and_log_uniform():
    plain, log = uniform(20000, 2, 8, CPU), log_uniform(20000, 2, 8, CPU)
    assert plain.shape == log.shape == (20000, 1, 1, 1)
    assert plain.mean().item() == pytest.approx(5, rel=0.02)
    assert (log > 4).float().mean().item() == pytest.approx(0.5, abs=0.02)
    for values in (plain, log):
        assert 2 <= values.min() < 2.01
        assert 7.98 < values.max() <= 8.001


@pytest.mark.parametrize("cell", [1.0, 3.0, 16.0])
@pytest.mark.parametrize("size", [(24, 24), (17, 30), (1, 1)])
def test_smooth_noise_has_mean_0_and_deviation_1(cell, size):
    noise = smooth_noise(1000, 2, size, torch.full((1000, 1, 1, 1), cell))
    assert noise.shape == (1000, 2, *size)
    assert abs(noise.mean().item()) < 0.06
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(noise.std(dim=0), torch.ones(2, *size), atol=0.15, rtol=0)  # at every place


def test_smooth_noise_is_smooth_over_each_ones_own_cell():
    cells = torch.tensor([2.0, 16.0]).repeat(200).view(-1, 1, 1, 1)
    noise = smooth_noise(400, 1, (64, 64), cells)
    fine, coarse = noise[::2], noise[1::2]
    for axis in (2, 3):
        near, far = (noise.narrow(axis, start, 54) for start in (0, 10))
        assert abs(correlation(near[::2], far[::2])) < 0.03
        assert correlation(near[1::2], far[1::2]) > 0.5
    assert fine.diff(dim=3).std() > 4 * coarse.diff(dim=3).std()


def test_smooth_noise_is_independent_of_channel_and_tile():
    noise = smooth_noise(4000, 2, (8, 8), torch.full((4000, 1, 1, 1), 8.0))
    assert abs(correlation(noise[:, 0], noise[:, 1])) < 0.06
    assert abs(correlation(noise[:2000], noise[2000:])) < 0.06


def test_weights_are_no_denormal_numbers():
    weights = _weights(256, 132, torch.full((3, 1, 1), 2.0))
    torch.testing.assert_close(weights.square().sum(dim=2), torch.ones(3, 256))
    assert weights.min() > 1e-20


# --- shapes


@every_shape
@pytest.mark.parametrize("size", [(64, 64), (17, 40), (3, 50), (1, 1)])
@pytest.mark.parametrize("count", [1, 5])
def test_shapes_are_opacities_of_the_size_asked_for(shape, size, count):
    opacity = shape(count, size, 1.0, max(1.0, min(size) / 2), CPU)
    assert opacity.shape == (count, 1, *size)
    assert ((opacity >= 0) & (opacity <= 1)).all()


@every_shape
def test_shapes_show_and_differ(shape):
    opacity = shape(100, (64, 64), 4.0, 32.0, CPU)
    found = extents(opacity)
    assert len(found) > 85, "the others lie outside, or are fainter"
    assert len({area for *_, area in found}) > 30
    assert opacity.mean() < 0.4
    assert (opacity.mean(dim=0) > 0).float().mean() > 0.8  # not always at one place


@every_shape
def test_shapes_are_no_larger_than_asked_for(shape):
    longest = torch.tensor([float(longest) for longest, *_ in extents(shape(150, (128, 128), 8.0, 32.0, CPU))])
    # Strokes, and the window around blobs, are up to twice as long; displacement adds some.
    most = {"lines": 2, "blobs": 2}.get(shape.__name__, 1) * 32
    assert longest.quantile(0.95) <= 1.25 * most
    assert longest.max() <= 2 * most


@every_shape
def test_shapes_grow_with_what_is_asked_for(shape):
    def area(largest):
        return shape(150, (128, 128), largest / 4, largest, CPU).mean().item()

    growth = area(40.0) / area(10.0)
    assert (2 if shape is SHAPES["lines"] else 6) < growth < 20


def test_ellipses_have_the_area_asked_for():
    def areas(smallest):
        found = extents(SHAPES["ellipses"](300, (96, 96), smallest, 24.0, CPU))
        return torch.tensor([area / 24**2 for _, inside, area in found if inside])

    # Both axes bound: from a diamond over a disc to nearly a square; displacement makes it more or less.
    round_ones = areas(24.0)
    assert 0.35 < round_ones.min() < 0.7
    assert 0.9 < round_ones.max() < 1.4
    assert round_ones.mean().item() == pytest.approx(0.87, abs=0.06)
    assert 0.005 < areas(3.0).min() < 0.05


def test_lines_are_thin_and_long():
    found = [part for part in extents(SHAPES["lines"](200, (128, 128), 16.0, 48.0, CPU)) if part[1]]
    assert len(found) > 40
    assert sum(area / longest for longest, _, area in found) / len(found) < 4
    assert sum(longest for longest, *_ in found) / len(found) > 30


def test_edges_are_a_pixel_or_two_wide():
    opacity = SHAPES["ellipses"](100, (128, 128), 40.0, 60.0, CPU)
    between = ((opacity > 0.02) & (opacity < 0.98)).sum(dim=(1, 2, 3))
    inside = (opacity >= 0.98).sum(dim=(1, 2, 3))
    whole = inside > 500
    assert whole.sum() > 30
    assert (between[whole] > 0).all()
    assert (between[whole] / inside[whole].sqrt()).median() < 10  # of about 4 sqrt(area) pixels of outline


def test_no_blob_is_empty():
    # Where all noise inside the window was below 0, one in thirteen had nothing above its level.
    drawn = SHAPES["blobs"](2000, (64, 64), 4.0, 32.0, CPU)
    assert (drawn.amax(dim=(1, 2, 3)) > 0.25).float().mean() > 0.99


@pytest.mark.parametrize("name", ["blobs", "ellipses", "polygons"])
def test_a_share_of_the_shapes_fades_out(name):
    def half_covered(fading):
        opacity = SHAPES[name](300, (96, 96), 20.0, 40.0, CPU, fading)
        assert opacity.amax(dim=(1, 2, 3)).median() > 0.85  # seen as well as the others
        return (((opacity > 0.1) & (opacity < 0.9)).sum() / (opacity > 0.1).sum()).item()

    sharp, some, all_of_them = map(half_covered, (0.0, 0.5, 1.0))
    assert sharp < 0.3
    assert sharp + 0.15 < some < all_of_them - 0.1


# --- fills


@every_fill
@pytest.mark.parametrize("size", [(32, 32), (17, 40), (3, 50), (1, 1)])
@pytest.mark.parametrize(("batch", "channels"), [(1, 3), (5, 1)])
def test_fills_keep_shape_and_leave_the_tiles(fill, size, batch, channels):
    x, others = tiles((batch, channels, *size)), tiles((batch, channels, *size), seed=1)
    before = x.clone(), others.clone()
    filling = fill(x, others)
    assert filling.shape == x.shape
    assert filling.dtype == x.dtype
    assert filling.isfinite().all()
    assert torch.equal(x, before[0])
    assert torch.equal(others, before[1])


@every_fill
def test_fills_differ_from_the_tile_and_from_each_other(fill):
    x = smooth_tiles((1, 1, 64, 64)).expand(8, -1, -1, -1) + 0.05 * torch.randn(64, 64)
    filling = fill(x, smooth_tiles((8, 1, 64, 64), seed=1))
    assert ((filling - x).abs().mean(dim=(1, 2, 3)) > 0.01).all()
    assert len({round(value, 5) for value in (filling - x).abs().mean(dim=(1, 2, 3)).tolist()}) >= 5


@every_fill
def test_fills_of_a_tile_without_any_contrast_are_finite(fill):
    x = torch.full((4, 3, 16, 16), 0.5)
    assert fill(x, x).isfinite().all()


@pytest.mark.parametrize(("name", "source"), [("elsewhere", 0), ("another", 1)])
@pytest.mark.parametrize("size", [(32, 32), (17, 40)])
def test_moved_tiles_keep_their_pixels(name, source, size):
    pair = tiles((20, 3, *size)), tiles((20, 3, *size), seed=1)
    filling = FILLS[name](*pair)
    assert torch.equal(filling.flatten(2).sort().values, pair[source].flatten(2).sort().values)
    assert (filling != pair[source]).float().mean() > 0.99
    # The channels move together.
    first, last = (part.flatten(2)[0].T for part in (pair[source], filling))
    assert {tuple(pixel) for pixel in first.tolist()} == {tuple(pixel) for pixel in last.tolist()}


def test_moved_tiles_are_mirrored_and_turned_at_times():
    x = (torch.arange(32 * 32) / 1024.0).view(1, 1, 32, 32).repeat(200, 1, 1, 1)
    steps = FILLS["elsewhere"](x, x).diff(dim=3).flatten(1).median(dim=1).values * 1024
    kinds = {round(step) for step in steps.tolist()}
    assert kinds == {1, 32, -32}  # as it was (or upside down), or rows turned into columns, up or down
    assert (steps.abs() > 16).float().mean().item() == pytest.approx(0.3, abs=0.1)


def test_flat_is_one_colour_for_each_tile():
    x = smooth_tiles((200, 3, 16, 16))
    filling = FILLS["flat"](x, x)
    assert (filling == filling[..., :1, :1]).all()
    near = (filling[..., 0, 0] - x.mean(dim=(2, 3))).abs() < 2 * x.std(dim=(2, 3))
    assert 0.4 < near.float().mean() < 0.95


@pytest.mark.parametrize(("name", "correlated"), [("fine_noise", False), ("coarse_noise", True)])
def test_noise_is_added_in_units_of_the_tiles_contrast(name, correlated):
    x = smooth_tiles((100, 1, 64, 64))
    noise = FILLS[name](x, x) - x
    strength = noise.std(dim=(2, 3)) / x.std(dim=(2, 3))
    assert strength.quantile(0.05) > 0.3
    assert strength.quantile(0.95) < 3.5
    neighbours = correlation(noise[..., 1:], noise[..., :-1])
    assert neighbours > 0.8 if correlated else abs(neighbours) < 0.02


def test_brightness_is_a_line_through_the_values():
    x = smooth_tiles((100, 3, 16, 16))
    filling = FILLS["brightness"](x, x)
    slopes = []
    for before, after in zip(x.flatten(0, 1), filling.flatten(0, 1), strict=True):
        assert correlation(before, after) == pytest.approx(1, abs=1e-3)
        slopes.append((after.std() / before.std()).item())
    assert 0.29 < min(slopes) < 0.5
    assert 1.5 < max(slopes) < 2.01
    lighter = (filling.mean(dim=(2, 3)) > x.mean(dim=(2, 3))).float().mean()
    assert 0.3 < lighter < 0.7


def test_blur_is_the_mean_of_a_square():
    x = tiles((60, 2, 40, 48))
    filling = FILLS["blur"](x, x)
    widths = set()
    for before, after in zip(x, filling, strict=True):
        candidates = {2 * reach + 1: F.avg_pool2d(before, 2 * reach + 1, 1) for reach in range(2, 9)}
        fitting = [
            width
            for width, mean in candidates.items()
            if torch.allclose(mean, after[:, width // 2 : -(width // 2), width // 2 : -(width // 2)], atol=1e-5)
        ]
        assert len(fitting) == 1
        widths.add(fitting[0])
    assert widths == set(range(5, 19, 2))


def test_blur_keeps_a_flat_tile_up_to_its_borders():
    x = torch.full((4, 3, 20, 30), 0.3)
    torch.testing.assert_close(FILLS["blur"](x, x), x)


def test_elastic_moves_pixels_by_some_pixels_and_neighbours_alike():
    ramp = torch.arange(64.0).expand(64, 64)
    x = torch.stack([ramp, ramp.T]).expand(100, -1, -1, -1) / 64
    moved = 64 * (FILLS["elastic"](x, x) - x)[..., 16:-16, 16:-16]  # columns, rows: by how much
    spread = moved.square().mean(dim=(2, 3)).sqrt()
    assert spread.min() > 0.7
    assert spread.max() < 9
    assert spread.mean().item() == pytest.approx(4.5 / math.log(4), rel=0.15)
    assert abs(correlation(moved[:, 0], moved[:, 1])) < 0.1
    for axis in (2, 3):
        assert correlation(moved.narrow(axis, 0, 31), moved.narrow(axis, 1, 31)) > 0.9


def test_elastic_makes_no_values_up():
    x = smooth_tiles()
    filling = FILLS["elastic"](x, x)
    lowest, highest = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
    assert ((filling >= lowest - 1e-5) & (filling <= highest + 1e-5)).all()


def test_mean_and_std_against_torch():
    x = smooth_tiles((10, 3, 65, 64))
    mean, std = mean_and_std(x)
    assert mean.shape == std.shape == (10, 3, 1, 1)
    some = x[..., ::2, ::2]
    torch.testing.assert_close(mean, some.mean(dim=(2, 3), keepdim=True))
    torch.testing.assert_close(std, some.std(dim=(2, 3), keepdim=True, correction=0))
    assert (mean_and_std(torch.full((1, 1, 1, 1), 0.5))[1] == 0).all()

"""Corruption of the model's input."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from blemish.data.augment import TransformCorruption
from blemish.data.corruption import CoarseNoise, CutPaste, GaussianNoise, GridMask, NoCorruption, Structured
from blemish.data.fills import FILLS
from blemish.data.shapes import SHAPES
from blemish.errors import ConfigError

DROPOUT = {"CoarseDropout": {"fill": "random_uniform", "p": 1.0}}
ELASTIC = {"ElasticTransform": {"alpha": 60.0, "sigma": 4.0, "p": 1.0}}
NOISES = {
    "gaussian": GaussianNoise(0.1),
    "coarse": CoarseNoise(0.2, 8),
    "coarse with cells of one pixel": CoarseNoise(0.2, 1),
    "coarse with cells beyond the tile": CoarseNoise(0.2, 100),
}
LOCAL = {
    "grid": GridMask(),
    "cut and paste": CutPaste(probability=1.0),
    "transforms": TransformCorruption([DROPOUT]),
}
EVERY = {
    "none": NoCorruption(),
    **NOISES,
    **LOCAL,
    "elastic transform": TransformCorruption([ELASTIC]),
    "structured": Structured(probability=1.0),
    "structured, anchored": Structured(probability=1.0, anchor=0.1),
    **{f"{name} alone": Structured([name], probability=1.0) for name in SHAPES},
    **{f"{name} alone": Structured(fills=[name], probability=1.0) for name in FILLS},
}
SIZES = [(32, 32), (17, 40), (8, 8), (8, 63), (2, 2), (1, 1)]


def of(corruptions):
    return pytest.mark.parametrize("corrupt", corruptions.values(), ids=corruptions.keys())


every_corruption = of(EVERY)


def tiles(shape=(2, 3, 32, 40)):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def smooth_tiles(shape=(16, 1, 64, 64)):
    coarse = tiles((*shape[:2], 6, 6))
    return F.interpolate(coarse, shape[2:], mode="bicubic").clamp(0, 1)


def seeded(corrupt, x, seed=0):
    torch.manual_seed(seed)
    return corrupt(x)


def noise_of(corrupt, shape=(200, 1, 48, 48)):
    return seeded(corrupt, torch.zeros(shape)).input


def cell_means(change):
    return F.avg_pool2d(change.mean(dim=1, keepdim=True), 4)


@every_corruption
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("batch", "channels"), [(1, 3), (5, 1)])
def test_shapes_types_and_ranges(corrupt, size, batch, channels):
    x = tiles((batch, channels, *size))
    for seed in range(3):
        result = seeded(corrupt, x, seed)
        assert result.input.shape == result.target.shape == x.shape
        assert result.mask.shape == (batch, 1, *size)
        assert {part.dtype for part in result} == {torch.float32}
        assert all(part.isfinite().all() for part in result)
        assert ((result.mask >= 0) & (result.mask <= 1)).all()


@every_corruption
def test_tiles_are_left_as_they_were(corrupt):
    for x in (tiles(), tiles((2, 1, 32, 32))):
        before = x.clone()
        result = seeded(corrupt, x)
        result.input.add_(1)
        assert torch.equal(x, before) or isinstance(corrupt, NoCorruption)


@of({name: corrupt for name, corrupt in EVERY.items() if name not in ("gaussian", "structured, anchored")})
def test_memory_format_does_not_matter(corrupt):
    x = tiles()  # noise like a tile, in those two, is drawn in the order of its memory
    result = seeded(corrupt, x.contiguous(memory_format=torch.channels_last))
    for part, expected in zip(result, seeded(corrupt, x), strict=True):
        torch.testing.assert_close(part, expected)


@every_corruption
def test_only_torchs_global_generator_is_drawn_from(corrupt):
    x = tiles((4, 1, 32, 32))
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the global one is meant)
    first = seeded(corrupt, x, 3)
    assert random.getstate() == python
    now = np.random.get_state()  # noqa: NPY002
    assert all(np.array_equal(*parts) for parts in zip(now, numpy, strict=True))
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    again = seeded(corrupt, x, 3)
    assert all(torch.equal(*parts) for parts in zip(first, again, strict=True))


@of({name: corrupt for name, corrupt in EVERY.items() if name != "none"})
def test_other_seed_other_corruption_and_every_tile_its_own(corrupt):
    x = smooth_tiles((1, 3, 32, 32)).expand(8, -1, -1, -1).contiguous()
    first, second = (seeded(corrupt, x, seed).input for seed in (0, 1))
    assert not torch.equal(first, second)
    assert len({tuple(tile.flatten().tolist()) for tile in first}) > 4


@every_corruption
def test_target_is_the_clean_tile(corrupt):
    x = tiles()
    result = seeded(corrupt, x)
    if getattr(corrupt, "anchor", 0):
        assert not torch.equal(result.target, x)
    else:
        assert torch.equal(result.target, x)


@of(LOCAL)
def test_outside_the_mask_nothing_changes(corrupt):
    for x in (tiles((8, 3, 40, 32)), smooth_tiles()):
        result = seeded(corrupt, x)
        assert torch.equal(torch.where(result.mask == 0, result.input, x), x)
        assert 0 < result.mask.mean() < 1
        assert set(result.mask.unique().tolist()) == {0, 1}
        assert ((result.input >= 0) & (result.input <= 1)).all()


def test_no_corruption_is_the_input():
    x = tiles()
    result = NoCorruption()(x)
    assert torch.equal(result.input, x)
    assert torch.equal(result.target, x)
    assert not result.mask.any()


@of({name: make(probability=0.0) for name, make in {"structured": Structured, "cut and paste": CutPaste}.items()})
def test_at_probability_0_tiles_stay_clean(corrupt):
    x = tiles((4, 3, 32, 32))
    result = seeded(corrupt, x)
    assert torch.equal(result.input, x)
    assert not result.mask.any()


# --- noise


@of(NOISES)
def test_channels_have_noise_of_their_own(corrupt):
    noise = noise_of(corrupt, (2, 3, 32, 32))
    assert not torch.equal(noise[:, 0], noise[:, 1])


@of(NOISES)
def test_noise_does_not_depend_on_the_image_and_is_everywhere(corrupt):
    x = tiles()
    result = seeded(corrupt, x)
    torch.testing.assert_close(result.input - x, noise_of(corrupt, x.shape), atol=1e-6, rtol=0)
    assert (result.mask == 1).all()


@pytest.mark.parametrize("std", [0.05, 0.3])
@pytest.mark.parametrize(
    "make", [GaussianNoise, lambda std: CoarseNoise(std, 1)], ids=["gaussian", "cells of one pixel"]
)
def test_white_noise_has_the_deviation_that_was_set(make, std):
    noise = noise_of(make(std))
    assert noise.std().item() == pytest.approx(std, rel=0.02)
    assert abs(noise.mean().item()) < 0.02 * std


@pytest.mark.parametrize("cell", [2, 4, 8, 16])
def test_coarse_noise_has_roughly_the_deviation_that_was_set(cell):
    # Between the centres of cells, interpolation averages and so lowers it.
    noise = noise_of(CoarseNoise(0.2, cell))
    assert 0.5 * 0.2 < noise.std().item() < 1.1 * 0.2
    assert abs(noise.mean().item()) < 0.02


@pytest.mark.parametrize("cell", [4, 8, 16])
def test_coarse_noise_is_alike_within_a_cell_and_unrelated_beyond(cell):
    noise = noise_of(CoarseNoise(1.0, cell), (400, 1, 64, 64))

    def correlation(shift):
        return torch.corrcoef(torch.stack([noise[..., shift:].flatten(), noise[..., : 64 - shift].flatten()]))[0, 1]

    assert correlation(cell // 4) > 0.8
    assert abs(correlation(2 * cell + 1)) < 0.05


def test_coarse_grid_has_no_fixed_place():
    torch.manual_seed(0)
    corrupt = CoarseNoise(1.0, 8)
    kinks = [corrupt(torch.zeros(1, 1, 8, 64)).input[0, 0, 0].diff().diff().abs() > 1e-4 for _ in range(200)]
    assert torch.stack(kinks).any(dim=0).all()


def test_no_deviation_is_no_corruption():
    x = tiles()
    assert torch.equal(seeded(GaussianNoise(0), x).input, x)
    assert torch.equal(seeded(CoarseNoise(0), x).input, x)


@pytest.mark.parametrize("make", [lambda: GaussianNoise(-0.1), lambda: CoarseNoise(-0.1), lambda: CoarseNoise(0.2, 0)])
def test_impossible_noise_is_refused(make):
    with pytest.raises(ConfigError, match=r"Expected corruption\.std >= 0"):
        make()


# --- inpainting


@pytest.mark.parametrize("cell", [1, 4, 16])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_grid_mask_hides_whole_cells_one_part_of_them(cell, parts):
    x = tiles((40, 3, 72, 96))  # 72 is no multiple of 16: the last row of cells is cut
    result = seeded(GridMask([cell], parts), x)
    corners = result.mask[..., ::cell, ::cell]
    assert torch.equal(F.interpolate(corners, scale_factor=cell)[..., :72, :96], result.mask)
    assert corners.mean().item() == pytest.approx(1 / parts, abs=0.04)


def test_grid_mask_puts_each_channels_mean_in_place():
    x = tiles((4, 3, 32, 32))
    result = seeded(GridMask(), x)
    mean = x.mean(dim=(2, 3), keepdim=True).expand_as(x)
    hidden = result.mask.expand_as(x) == 1
    torch.testing.assert_close(result.input[hidden], mean[hidden])


def test_grid_mask_takes_every_cell_size_in_turn():
    torch.manual_seed(0)
    corrupt, seen = GridMask([4, 8, 16]), Counter()
    for _ in range(60):
        mask = corrupt(torch.zeros(4, 1, 64, 64)).mask
        whole = [cell for cell in (4, 8, 16) if torch.equal(F.max_pool2d(mask, cell), -F.max_pool2d(-mask, cell))]
        seen[max(whole)] += 1
    assert seen.keys() == {4, 8, 16}
    assert min(seen.values()) > 8


@pytest.mark.parametrize("wrong", [{"cells": []}, {"cells": [4, 0]}, {"parts": 1}])
def test_impossible_grids_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"Expected corruption\.cells of 1 pixel or more and corruption\.parts >= 2"):
        GridMask(**wrong)


# --- cut and paste


def numbered(batch=200, side=64):
    """Tiles whose pixels tell where they stood."""
    return (torch.arange(side**2, dtype=torch.float32) / side**2).view(1, 1, side, side).repeat(batch, 1, 1, 1)


def boxes(mask):
    """Height and width of what a mask (B, 1, H, W) covers, in pixels."""
    return [[int(part.any(dim=axis).sum()) for axis in (1, 0)] for part in mask[:, 0].bool()]


def test_rectangles_are_cut_and_pasted_whole():
    x = numbered()
    result = seeded(CutPaste(1.0, scars=0.0, jitter=0.0), x)
    moved = (result.input - x) * 64**2
    shifts = set()
    for tile, mask, (height, width) in zip(moved, result.mask.bool(), boxes(result.mask), strict=True):
        assert int(mask.sum()) == height * width
        ((shift,),) = [tile[mask].round().unique().tolist()]  # all by the same way, from inside the tile
        shifts.add(shift)
        assert 0.02 * 64**2 - 64 < height * width < 0.15 * 64**2 + 64
        assert max(height, width) / min(height, width) < 3.3 * 1.25
    assert len(shifts) > 150


def test_rectangles_have_the_papers_sizes_on_average_and_lie_both_ways():
    sizes = torch.tensor(boxes(seeded(CutPaste(1.0, scars=0.0), numbered(400)).mask), dtype=torch.float32)
    areas = sizes.prod(dim=1) / 64**2
    assert areas.mean().item() == pytest.approx((0.02 + 0.15) / 2, rel=0.1)
    assert areas.min() < 0.03
    assert areas.max() > 0.13
    assert (sizes[:, 0] > sizes[:, 1]).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_scars_are_small_and_turned():
    x = numbered(60, 256)  # the paper's size
    result = seeded(CutPaste(1.0, scars=1.0, jitter=0.0), x)
    areas = result.mask.sum(dim=(1, 2, 3))
    assert areas.mean().item() == pytest.approx(17.5 * 9, rel=0.1)
    assert (areas >= 10).all()
    assert (areas <= 27 * 18).all()
    filled = areas / torch.tensor([float(height * width) for height, width in boxes(result.mask)])
    assert filled.min() < 0.5
    inside = result.input[result.mask == 1]
    assert torch.isin(inside, x[0].flatten()).all()  # pixels of the tile, none made up


def test_share_of_scars_and_of_clean_tiles():
    mask = seeded(CutPaste(0.6, scars=0.3), numbered(1000, 32)).mask
    areas = mask.mean(dim=(1, 2, 3))
    assert (areas > 0).float().mean().item() == pytest.approx(0.6, abs=0.05)
    assert (areas[areas > 0] < 0.012).float().mean().item() == pytest.approx(0.3, abs=0.06)


def test_pieces_land_everywhere():
    often = seeded(CutPaste(1.0, scars=0.5), numbered(1000, 32)).mask.mean(dim=0)[0]
    assert (often > 0).float().mean() > 0.98
    assert often[8:24, 8:24].min() > 0.02


def test_jitter_changes_colours_a_little():
    x = 0.2 + 0.6 * numbered(100, 32).expand(-1, 3, -1, -1)
    plain, changed = (seeded(CutPaste(1.0, 0.0, jitter), x) for jitter in (0.0, 0.1))
    assert torch.equal(plain.mask, changed.mask)
    difference = (plain.input - changed.input).abs()
    assert 0.01 < difference[changed.mask.expand_as(x) == 1].mean() < 0.06
    assert difference.max() <= 0.1 * (0.5 + 0.3) + 1e-5
    assert not torch.equal(changed.input[:, 0], changed.input[:, 1])


@pytest.mark.parametrize("wrong", [{"probability": 1.1}, {"scars": -0.1}, {"jitter": 2}])
def test_impossible_pastes_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"Expected corruption\.probability, corruption\.scars and"):
        CutPaste(**wrong)


# --- structured


def test_scratches_are_drawn_down_to_a_pixel_of_the_tile():
    tiles_ = torch.full((200, 1, 128, 128), 0.5)
    opacity = seeded(lambda x: Structured(shapes=["lines"])._opacities(200, x), tiles_)
    share = opacity / opacity.amax(dim=(1, 2, 3), keepdim=True)
    # The area over the longer side of its box: the width, and less where a line is bent or cut off.
    widths = [
        area / max(box)
        for (box, area) in zip(boxes(share > 0.5), (share > 0.5).sum(dim=(1, 2, 3)), strict=True)
        if max(box)
    ]
    assert sum(width < 2 for width in widths) > 0.2 * len(widths)
    assert max(widths) < 128 / 8


@pytest.mark.parametrize(("contrasts", "is_seen"), [(0.3, False), (0.6, True)])
def test_a_scratch_of_a_pixel_is_in_the_mask_where_it_can_be_told(contrasts, is_seen):
    # Averaged over cells of 4 x 4 pixels, its change is a quarter: it was left to be taken for normal.
    tile = 0.5 + 0.1 * torch.randn(1, 1, 64, 64, generator=torch.manual_seed(0))
    scratch = torch.zeros(1, 1, 64, 64)
    scratch[..., 30] = 1
    corrupt = Structured(probability=1.0, most=1, faintest=1.0)
    corrupt._opacities = lambda count, x: scratch
    corrupt.fills = [lambda x, _: x + contrasts * x.std()]
    assert (seeded(corrupt, tile).mask == (scratch if is_seen else 0)).all()


@of({name: corrupt for name, corrupt in EVERY.items() if isinstance(corrupt, Structured) and not corrupt.anchor})
def test_structured_input_stays_an_image(corrupt):
    result = seeded(corrupt, smooth_tiles())
    assert ((result.input >= 0) & (result.input <= 1)).all()
    assert set(result.mask.unique().tolist()) <= {0, 1}


@of({f"{name} alone": Structured([name], probability=1.0) for name in SHAPES})
def test_every_shape_shows(corrupt):
    mask = seeded(corrupt, smooth_tiles((64, 1, 64, 64))).mask
    assert (mask.sum(dim=(1, 2, 3)) > 4).float().mean() > 0.5


@of({f"{name} alone": Structured(fills=[name], probability=1.0) for name in FILLS})
def test_every_fill_shows(corrupt):
    x = (smooth_tiles((64, 1, 64, 64)) + 0.1 * torch.randn(64, 1, 64, 64, generator=torch.manual_seed(0))).clamp(0, 1)
    result = seeded(corrupt, x)
    assert (result.mask.sum(dim=(1, 2, 3)) > 4).float().mean() > 0.5
    assert ((result.input - x).abs() * result.mask).sum() / result.mask.sum() > 0.04


@pytest.mark.parametrize("x", [tiles((32, 3, 64, 48)), smooth_tiles((32, 1, 64, 64))], ids=["noise", "smooth"])
@pytest.mark.parametrize("faintest", [0.05, 0.2, 1.0])
def test_what_the_mask_leaves_out_cannot_be_seen(x, faintest):
    result = seeded(Structured(probability=1.0, faintest=faintest), x)
    contrast = x.std(dim=(2, 3), keepdim=True).mean(dim=1, keepdim=True).clamp(0.05, 0.25)
    outside = cell_means(((result.input - x) * (1 - result.mask)).square()).sqrt()
    # At the very edge of a shape (opacity up to 0.1) a change may be a little more than that.
    assert (outside > 0.21 * contrast).float().mean() < 0.001
    assert outside.max() < 0.1
    visible = cell_means((result.input - x).square()).sqrt()[F.max_pool2d(result.mask, 4) == 1]
    assert visible.mean() > 2 * outside.mean()


def test_mask_has_no_holes_within_a_shape():
    # Noise against noise: single cells hardly change, what is around them does.
    x = tiles((64, 1, 64, 64))
    result = seeded(Structured(["ellipses"], ["elsewhere"], 1.0, 1, 0.3, 0.5, 1.0), x)
    changed = ((result.input - x).abs() > 0.1).float()
    assert (changed * result.mask).sum() / changed.sum() > 0.99
    core = F.avg_pool2d(changed, 9, 1, 4) > 0.7  # the middle of a shape
    assert core.sum() > 1000
    assert (result.mask[core] == 1).all()


def test_every_shape_and_fill_is_used_as_often():
    counts = Counter()

    def counted(name, make, tiles_of):
        def wrapped(*arguments):
            counts[name] += tiles_of(*arguments)
            return make(*arguments)

        return wrapped

    corrupt = Structured(probability=1.0, most=2)
    corrupt.shapes = [counted(name, make, lambda count, *_: count) for name, make in SHAPES.items()]
    corrupt.fills = [counted(name, make, lambda x, _: len(x)) for name, make in FILLS.items()]
    seeded(corrupt, tiles((400, 1, 8, 8)))
    for names in (SHAPES, FILLS):
        assert sum(counts[name] for name in names) == 800
        for name in names:
            assert counts[name] == pytest.approx(800 / len(names), rel=0.3)


def test_names_choose_shapes_and_fills():
    corrupt = Structured(["lines"], ["flat", "blur"])
    assert corrupt.shapes == [SHAPES["lines"]]
    assert corrupt.fills == [FILLS["flat"], FILLS["blur"]]
    assert Structured().shapes == list(SHAPES.values())
    assert Structured().fills == list(FILLS.values())


@pytest.mark.parametrize("probability", [0.3, 0.7])
@pytest.mark.parametrize("most", [1, 3])
def test_share_of_tiles_that_are_changed(probability, most):
    def everywhere(count, size, *_):
        return torch.ones(count, 1, *size)

    corrupt = Structured(fills=["flat"], probability=probability, most=most, faintest=1.0)
    corrupt.shapes = [everywhere]
    x = tiles((1000, 1, 8, 8))
    counts = Counter()
    flat = corrupt.fills[0]
    corrupt.fills = [lambda x, others: counts.update(fills=len(x)) or flat(x, others)]
    changed = (seeded(corrupt, x).input != x).flatten(1).any(dim=1).float().mean().item()
    assert changed == pytest.approx(probability, abs=0.05)
    expected = sum(probability**number for number in range(1, most + 1))
    assert counts["fills"] / len(x) == pytest.approx(expected, abs=0.08)


def test_later_corruptions_lie_above_earlier_ones():
    corrupt = Structured(probability=1.0, most=2, faintest=1.0)
    corrupt.shapes = [lambda count, size, *_: torch.ones(count, 1, *size)]
    # The first half of what is drawn is below: 4 tiles of 0.25, then 4 of 0.75.
    corrupt.fills = [lambda x, _: torch.tensor([0.25] * 4 + [0.75] * 4).view(8, 1, 1, 1).expand_as(x)]
    result = seeded(corrupt, torch.zeros(4, 1, 16, 16))
    assert (result.input == 0.75).all()
    assert (result.mask == 1).all()


@pytest.mark.parametrize("faintest", [0.1, 0.6, 1.0])
def test_opacity_is_uniform_from_the_faintest(faintest):
    corrupt = Structured(probability=1.0, most=1, faintest=faintest)
    corrupt.shapes = [lambda count, size, *_: torch.ones(count, 1, *size)]
    corrupt.fills = [lambda x, _: torch.ones_like(x)]
    opacities = seeded(corrupt, torch.zeros(500, 1, 4, 4)).input[:, 0, 0, 0]
    assert faintest <= opacities.min() < faintest + 0.02
    assert 0.98 < opacities.max() <= 1
    assert opacities.mean().item() == pytest.approx((1 + faintest) / 2, abs=0.03)


def test_size_of_shapes_is_as_a_fraction_of_the_tile():
    def covered(side, share):
        corrupt = Structured(["ellipses"], probability=1.0, most=1, smallest=share, largest=share, faintest=1.0)
        corrupt.fills = [lambda x, _: torch.ones_like(x)]
        return seeded(corrupt, torch.zeros(100, 1, side, side)).input.mean().item()

    # Axes of that share: 0.87 of its square on average (a disc: 0.79); some are cut off by the tile's borders.
    small, large, in_larger_tiles = covered(64, 0.2), covered(64, 0.4), covered(128, 0.2)
    assert 0.6 * 0.2**2 < small < 0.9 * 0.2**2
    assert 0.5 * 0.4**2 < large < 0.9 * 0.4**2
    assert in_larger_tiles == pytest.approx(small, rel=0.1)


def test_filling_from_other_tiles_comes_from_other_tiles():
    corrupt = Structured(fills=["another"], probability=1.0, most=1, faintest=1.0)
    corrupt.shapes = [lambda count, size, *_: torch.ones(count, 1, *size)]
    levels = torch.linspace(0.1, 0.9, 5).view(5, 1, 1, 1)
    for seed in range(10):
        result = seeded(corrupt, levels.repeat(1, 1, 8, 8), seed)
        assert (result.input - levels).abs().min() > 0.1
        assert (result.mask == 1).all()


@pytest.mark.parametrize("std", [0.05, 0.2])
def test_anchor_is_the_same_noise_on_input_and_target(std):
    x = smooth_tiles()
    plain, anchored = (seeded(Structured(anchor=anchor), x) for anchor in (0.0, std))
    noise = anchored.target - x
    assert noise.std().item() == pytest.approx(std, rel=0.02)
    torch.testing.assert_close(anchored.input - plain.input, noise, atol=1e-6, rtol=0)
    assert torch.equal(anchored.mask, plain.mask)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"shapes": ["elipses"]}, r"Unknown corruption\.shapes 'elipses': did you mean 'ellipses'"),
        ({"fills": ["flat", "blurr"]}, r"Unknown corruption\.fills 'blurr': did you mean 'blur'"),
        ({"fills": ["zzz"]}, r"Unknown corruption\.fills 'zzz': known: another, blur"),
        ({"smallest": 0}, r"0 < corruption\.smallest <= corruption\.largest <= 1"),
        ({"smallest": 0.6}, r"0 < corruption\.smallest <= corruption\.largest <= 1"),
        ({"largest": 1.5}, r"0 < corruption\.smallest <= corruption\.largest <= 1"),
        ({"faintest": 0}, r"0 < corruption\.faintest <= 1"),
        ({"probability": 1.5}, r"0 <= corruption\.probability <= 1"),
        ({"most": 0}, r"corruption\.most >= 1"),
        ({"fading": 1.5}, r"corruption\.fading between 0 and 1, found 1\.5"),
        ({"anchor": -1}, r"corruption\.anchor >= 0"),
    ],
)
def test_impossible_structures_are_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        Structured(**arguments)


# --- albumentations


def test_transforms_change_each_tile_its_own_way():
    x = torch.full((4, 3, 32, 32), 0.5)
    result = seeded(TransformCorruption([DROPOUT]), x)
    assert len({tuple(mask.flatten().tolist()) for mask in result.mask}) == 4
    assert torch.equal(result.mask[:, 0] == 1, (result.input != x).any(dim=1))


def test_transforms_see_the_tile_as_it_is():
    x = tiles((3, 3, 16, 24))
    result = seeded(TransformCorruption([{"HorizontalFlip": {"p": 1.0}}]), x)
    torch.testing.assert_close(result.input, x.flip(3), atol=0.5 / 255, rtol=0)


def test_transforms_that_change_next_to_nothing_are_taken_back():
    x = tiles()
    offset = {"RandomBrightnessContrast": {"brightness_limit": [0.001, 0.001], "contrast_limit": [0, 0], "p": 1.0}}
    result = seeded(TransformCorruption([offset]), x)
    assert torch.equal(result.input, x)
    assert not result.mask.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_transforms_keep_the_type(dtype):
    x = tiles().to(dtype)
    result = seeded(TransformCorruption([DROPOUT]), x)
    assert {part.dtype for part in result} == {dtype}
    assert torch.equal(torch.where(result.mask == 0, result.input, x), x)


@pytest.mark.parametrize(
    ("transforms", "words"),
    [
        ([{"CoarseDropuot": {}}], "did you mean 'CoarseDropout'"),
        ([{"CoarseDropout": {"holes": 3}}], r"do not fit albumentations\.CoarseDropout"),
        ([{"CoarseDropout": {}, "Blur": {}}], r"Expected an augmentation as"),
    ],
)
def test_impossible_transforms_are_refused(transforms, words):
    with pytest.raises(ConfigError, match=words):
        TransformCorruption(transforms)


def test_transforms_that_change_sizes_are_refused():
    with pytest.raises(ConfigError, match="sizes must stay"):
        TransformCorruption([{"RandomCrop": {"height": 8, "width": 8}}])(tiles())

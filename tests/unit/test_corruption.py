"""Corruption of the model's input."""

import pytest
import torch

from blemish.data.corruption import CoarseNoise, GaussianNoise, NoCorruption
from blemish.errors import ConfigError

EVERY = {
    "none": NoCorruption(),
    "gaussian": GaussianNoise(0.1),
    "coarse": CoarseNoise(0.2, 8),
    "coarse with cells of one pixel": CoarseNoise(0.2, 1),
    "coarse with cells beyond the tile": CoarseNoise(0.2, 100),
}
every_corruption = pytest.mark.parametrize("corrupt", EVERY.values(), ids=EVERY.keys())
noisy = pytest.mark.parametrize("corrupt", list(EVERY.values())[1:], ids=list(EVERY)[1:])


def tiles(shape=(2, 3, 32, 40)):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def seeded(corrupt, x, seed=0):
    torch.manual_seed(seed)
    return corrupt(x)


def noise_of(corrupt, shape=(200, 1, 48, 48)):
    return seeded(corrupt, torch.zeros(shape))


@every_corruption
@pytest.mark.parametrize("size", [(32, 32), (17, 40), (1, 1), (8, 63)])
def test_shape_and_type_stay(corrupt, size):
    x = tiles((2, 3, *size))
    result = seeded(corrupt, x)
    assert (result.shape, result.dtype) == (x.shape, x.dtype)


@every_corruption
def test_input_is_left_as_it_was(corrupt):
    x = tiles()
    before = x.clone()
    seeded(corrupt, x)
    assert torch.equal(x, before)


@every_corruption
def test_same_seed_same_result(corrupt):
    assert torch.equal(seeded(corrupt, tiles(), 3), seeded(corrupt, tiles(), 3))


@noisy
def test_other_seed_other_noise_and_every_tile_its_own(corrupt):
    noise = noise_of(corrupt, (2, 3, 32, 32))
    assert not torch.equal(noise, seeded(corrupt, torch.zeros(2, 3, 32, 32), 1))
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[:, 0], noise[:, 1])


@noisy
def test_noise_does_not_depend_on_the_image(corrupt):
    x = tiles()
    torch.testing.assert_close(seeded(corrupt, x) - x, seeded(corrupt, torch.zeros_like(x)), atol=1e-6, rtol=0)


def test_no_corruption_is_the_input():
    x = tiles()
    assert torch.equal(NoCorruption()(x), x)


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
    kinks = [corrupt(torch.zeros(1, 1, 8, 64))[0, 0, 0].diff().diff().abs() > 1e-4 for _ in range(200)]
    assert torch.stack(kinks).any(dim=0).all()


def test_no_deviation_is_no_corruption():
    x = tiles()
    assert torch.equal(seeded(GaussianNoise(0), x), x)
    assert torch.equal(seeded(CoarseNoise(0), x), x)


@pytest.mark.parametrize("make", [lambda: GaussianNoise(-0.1), lambda: CoarseNoise(-0.1), lambda: CoarseNoise(0.2, 0)])
def test_impossible_noise_is_refused(make):
    with pytest.raises(ConfigError, match=r"Expected corruption\.std >= 0"):
        make()

"""Tiles for training and validation: reproducible by position, complete, exact, and the same however they are held."""

from __future__ import annotations

import pickle
import tempfile

import cv2
import numpy as np
import pytest
import torch

from blemish.data.augment import Augmentation
from blemish.data.datamodule import TileDataModule
from blemish.data.datasets import ImageCache, PositionSampler, TrainingTiles, ValidationTiles, as_batch
from blemish.errors import ConfigError, DataError, ImageError
from blemish.preprocess import Preprocess
from blemish.tiling import Tiling

SIZE = 16


@pytest.fixture
def files(tmp_path, save, texture):
    return [save(tmp_path / f"{number}.png", texture(number)) for number in range(7)]


def cache(files, limit=1e9, channels=1, max_side=None, disk=0.0):
    return ImageCache(files, Preprocess(channels, max_side), limit, "train", disk, progress=False)


def numbered(tmp_path, save, count=5):
    """Images that are told apart by their one grey value."""
    return [save(tmp_path / f"{value}.png", np.full((SIZE, SIZE), value, np.uint8)) for value in range(count)]


def readable(images, index):
    try:
        return images[index] is not None
    except ImageError:
        return False


def test_tile_depends_on_seed_and_position_only(files):
    tiles = TrainingTiles(cache(files), SIZE, seed=3)
    first = [tiles[position] for position in range(20)]
    fresh = TrainingTiles(cache(files), SIZE, seed=3)
    for position in reversed(range(20)):
        assert torch.equal(fresh[position], first[position])
    other = TrainingTiles(cache(files), SIZE, seed=4)
    assert not all(torch.equal(other[position], first[position]) for position in range(20))


def test_batch_depends_on_seed_and_positions_only(files):
    positions = list(range(12, 20))
    first = TrainingTiles(cache(files), SIZE, seed=3).__getitems__(positions)
    used = TrainingTiles(cache(files), SIZE, seed=3)
    used.__getitems__([40, 41, 0, 7])
    assert torch.equal(used.__getitems__(positions), first)
    assert first.shape == (8, 1, SIZE, SIZE) and first.dtype == torch.uint8


def test_each_pass_sees_every_image_once_in_a_new_order(tmp_path, save):
    tiles = TrainingTiles(cache(numbered(tmp_path, save)), SIZE, seed=0)
    seen = [int(tiles[position][0, 0, 0, 0]) for position in range(20)]
    passes = [seen[first : first + 5] for first in range(0, 20, 5)]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in passes)
    assert len(set(map(tuple, passes))) > 1


def test_tiles_are_cut_from_everywhere(tmp_path, save):
    ramp = np.add.outer(np.arange(20) * 12, np.arange(20)).astype(np.uint8)
    tiles = TrainingTiles(cache([save(tmp_path / "a.png", ramp)]), SIZE, seed=0)
    corners = {int(tiles[position][0, 0, 0, 0]) for position in range(400)}
    assert corners == {int(value) for value in ramp[:5, :5].ravel()}


def test_tile_holds_the_pixels_of_its_image(tmp_path, save):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 24, 3), np.uint8)
    tile = TrainingTiles(cache([save(tmp_path / "a.png", pixels)], channels=3), SIZE, seed=0)[0][0]
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (SIZE, SIZE), axis=(0, 1))
    assert (windows == tile.numpy()).all(axis=(2, 3, 4)).sum() == 1


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (5, 5), (1, 40), (1, 1)])
def test_small_images_are_padded_by_reflection(tmp_path, save, texture, shape):
    pixels = texture(0, shape) if min(shape) > 1 else np.full(shape, 100, np.uint8)
    held = cache([save(tmp_path / "a.png", pixels)])
    for tiles in (TrainingTiles(held, SIZE, seed=0), ValidationTiles(held, Tiling(SIZE))):
        tile = tiles[0]
        assert tile.shape == (1, 1, SIZE, SIZE)
        assert set(tile.unique().tolist()) <= set(np.unique(pixels).tolist())


def test_16_bit_stays_exact_as_float32(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 65536, (SIZE, SIZE), np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    held = cache([tmp_path / "a.png"])
    for tiles in (TrainingTiles(held, SIZE, seed=0), ValidationTiles(held, Tiling(SIZE))):
        tile = tiles[0]
        assert tile.dtype == torch.float32
        np.testing.assert_array_equal(tile[0, 0].numpy(), pixels / np.float32(65535), strict=True)


def test_depths_mix_in_a_batch_on_one_scale():
    batch = as_batch([np.full((2, 2, 1), 255, np.uint8), np.full((2, 2, 1), 65535, np.uint16)])
    assert torch.equal(batch, torch.ones(2, 1, 2, 2))


def test_batches_lie_channels_last():
    batch = as_batch([np.zeros((4, 4, 3), np.uint8)] * 2)
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_validation_tiles_are_fixed_and_cover_every_image(files):
    tiles = ValidationTiles(cache(files), Tiling(SIZE, overlap=0.25))
    first = [tiles[index] for index in range(len(tiles))]
    assert len(tiles) == 7 * Tiling(SIZE, 0.25).count(40, 48)
    assert all(torch.equal(tiles[index], tile) for index, tile in enumerate(first))
    assert torch.equal(tiles.__getitems__([2, 5]), torch.cat([first[2], first[5]]))


def test_few_validation_tiles_are_spread_over_the_images(tmp_path, save):
    tiles = ValidationTiles(cache(numbered(tmp_path, save)), Tiling(8, overlap=0.0), most=5)
    assert len(tiles) == 5
    assert len({int(tiles[index][0, 0, 0, 0]) for index in range(5)}) >= 4


def test_validation_tiles_are_augmented_alike_whenever_they_are_read(files):
    plain = ValidationTiles(cache(files), Tiling(SIZE))
    flipped = ValidationTiles(cache(files), Tiling(SIZE), augment=Augmentation([{"HorizontalFlip": {"p": 1.0}}]))
    some = ValidationTiles(cache(files), Tiling(SIZE), augment=Augmentation([{"HorizontalFlip": {"p": 0.5}}]), seed=1)
    for tile, other in zip(plain.batches(4), flipped.batches(4), strict=True):
        assert torch.equal(tile.flip(3), other)
    first, again = (torch.cat(list(some.batches(4))) for _ in range(2))
    assert torch.equal(first, again)
    turned = [not torch.equal(one, other) for one, other in zip(first, torch.cat(list(plain.batches(4))), strict=True)]
    assert any(turned) and not all(turned)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_divide_the_stream_without_overlap_or_gap(processes):
    samplers = [PositionSampler(4, 5, rank, processes) for rank in range(processes)]
    taken = []
    for epoch in range(3):
        for sampler in samplers:
            sampler.set_epoch(epoch)
            positions = list(sampler)
            assert len(positions) == len(sampler) == 20
            taken += positions
    assert sorted(taken) == list(range(3 * 4 * 5 * processes))


def test_batches_are_runs_of_positions_and_follow_the_epoch():
    sampler = PositionSampler(2, 3, rank=1, processes=2)
    assert list(sampler) == [3, 4, 5, 9, 10, 11]
    sampler.set_epoch(1)
    assert list(sampler) == [15, 16, 17, 21, 22, 23]


@pytest.mark.parametrize("limit", [0, 40 * 48 * 3])
def test_cache_beyond_its_limit_gives_the_same_pixels(files, limit):
    held, limited = cache(files), cache(files, limit)
    assert len(limited) == 7
    for index in range(7):
        np.testing.assert_array_equal(limited[index], held[index], strict=True)


def test_cache_below_its_limit_reads_each_file_once(files):
    held = cache(files)
    before = [held[index].copy() for index in range(7)]
    for path in files:
        path.unlink()
    for index in range(7):
        np.testing.assert_array_equal(held[index], before[index], strict=True)


def test_what_memory_does_not_hold_is_mapped_from_a_file(files, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    size = 40 * 48
    held, mapped = cache(files), cache(files, limit=2 * size, disk=3.5 * size)
    for path in files:
        path.unlink()
    assert [readable(mapped, index) for index in range(7)] == [True] * 5 + [False] * 2
    other = pickle.loads(pickle.dumps(mapped))  # as another process gets it
    for index in range(5):
        np.testing.assert_array_equal(mapped[index], held[index], strict=True)
        np.testing.assert_array_equal(other[index], held[index], strict=True)
    assert isinstance(mapped[4], np.memmap)
    assert [file.stat().st_size for file in tmp_path.glob("temporary/*/*")] == [3 * size]
    del other
    assert mapped[4] is not None
    del mapped
    assert not list(tmp_path.glob("temporary/*"))


def test_cache_keeps_within_its_limit(files):
    limited = cache(files, limit=40 * 48 * 3)
    for path in files:
        path.unlink()
    assert [readable(limited, index) for index in range(7)] == [True] * 3 + [False] * 4


def test_cache_counts_broken_files_and_names_the_first(files):
    files[2].write_bytes(b"")
    files[5].write_text("no image")
    with pytest.raises(DataError, match=r"2 of 7 images .*2\.png.*blemish check") as caught:
        cache(files)
    assert "5.png" not in str(caught.value)


def test_cache_preprocesses(files):
    held = cache(files, channels=3, max_side=24)
    assert held[0].shape == (20, 24, 3)


def test_augmentation_is_for_training_only(files):
    augment = Augmentation([{"InvertImg": {"p": 1.0}}])
    plain = TileDataModule(TrainingTiles(cache(files), SIZE, 0), ValidationTiles(cache(files), Tiling(SIZE)), 4, 2)
    augmented = TileDataModule(
        TrainingTiles(cache(files), SIZE, 0, augment), ValidationTiles(cache(files), Tiling(SIZE)), 4, 2
    )
    for expected, found in zip(plain.train_dataloader(), augmented.train_dataloader(), strict=True):
        assert torch.equal(255 - expected, found)
    for expected, found in zip(plain.val_dataloader(), augmented.val_dataloader(), strict=True):
        assert torch.equal(expected, found)


def test_augmentation_is_the_same_for_the_same_seed(files):
    def tiles():
        augment = Augmentation([{"GaussNoise": {"p": 0.5}}, {"HorizontalFlip": {"p": 0.5}}])
        return TrainingTiles(cache(files), SIZE, 0, augment)

    first, again = tiles(), tiles()
    again.__getitems__([50, 51])
    assert torch.equal(first.__getitems__([4, 5, 6, 7]), again.__getitems__([4, 5, 6, 7]))
    assert not torch.equal(first.__getitems__([4, 5, 6, 7]), TrainingTiles(cache(files), SIZE, 0)[4])


def test_augmentation_draws_anew_for_each_tile(tmp_path, save):
    image = save(tmp_path / "a.png", np.full((SIZE, SIZE), 128, np.uint8))
    augment = Augmentation([{"GaussNoise": {"p": 1.0}}])
    batch = TrainingTiles(cache([image]), SIZE, 0, augment).__getitems__([0, 1, 2, 3])
    assert len({tile.numpy().tobytes() for tile in batch}) == 4


def test_augmented_16_bit_stays_in_the_unit_interval(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 65536, (32, 32), np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    augment = Augmentation([{"RandomBrightnessContrast": {"p": 1.0}}, {"Affine": {"rotate": [-5, 5], "p": 1.0}}])
    batch = TrainingTiles(cache([tmp_path / "a.png"]), SIZE, 0, augment).__getitems__([0, 1])
    assert batch.dtype == torch.float32 and batch.shape == (2, 1, SIZE, SIZE)
    assert batch.min() >= 0 and batch.max() <= 1


def test_augmentation_that_changes_the_size_is_refused(files):
    augment = Augmentation([{"Resize": {"height": 8, "width": 8}}])
    with pytest.raises(ConfigError, match="sizes must stay"):
        TrainingTiles(cache(files), SIZE, 0, augment)[0]


@pytest.mark.parametrize(
    ("transforms", "fragment"),
    [
        ([{"HorizontalFlop": {}}], "no transform 'HorizontalFlop'.*HorizontalFlip"),
        ([{"HorizontalFlip": {"p": 7}}], "do not fit albumentations.HorizontalFlip"),
        ([{"HorizontalFlip": {"probability": 0.5}}], "do not fit albumentations.HorizontalFlip"),
        ([{"HorizontalFlip": {}, "VerticalFlip": {}}], "Expected an augmentation as"),
    ],
)
def test_wrong_augmentation_is_refused(transforms, fragment):
    with pytest.raises(ConfigError, match=fragment):
        Augmentation(transforms)


# Borders


def places(tmp_path, save, shape, size=SIZE, draws=4000):
    """Where that many tiles began, (draws, 2), read off pixels that hold their own row and column."""
    grid = np.stack([*np.indices(shape), np.zeros(shape)], -1).astype(np.uint8)
    tiles = TrainingTiles(cache([save(tmp_path / "grid.png", grid)], channels=3), size, seed=0)
    batch = tiles.__getitems__(list(range(draws))).numpy()
    starts = batch[:, :2, 0, 0].astype(int)
    rows, columns = (starts[:, axis, None] + np.arange(size) for axis in (0, 1))
    assert (batch[:, 0] == rows[:, :, None]).all() and (batch[:, 1] == columns[:, None]).all()
    return starts


def test_tiles_never_leave_their_image(tmp_path, save):
    starts = places(tmp_path, save, (20, 43))
    assert set(starts[:, 0]) == set(range(20 - SIZE + 1)) and set(starts[:, 1]) == set(range(43 - SIZE + 1))


@pytest.mark.parametrize("shape", [(48, 80), (80, 48)])
def test_borders_are_seen_about_as_often_as_in_prediction(tmp_path, save, shape):
    starts = places(tmp_path, save, shape)
    for axis, side in enumerate(shape):
        seen = [float(((starts[:, axis] <= at) & (at < starts[:, axis] + SIZE)).mean()) for at in (0, side // 2, -1)]
        seen[2] = float((starts[:, axis] == side - SIZE).mean())
        predicted = 1 / len(Tiling(SIZE, 0.25).starts(side))  # the share of the tiles that see the first row
        for border in (seen[0], seen[2]):
            assert border > 0.4 * predicted  # drawn evenly, 0.13 at most
            assert border == pytest.approx((SIZE // 4 + 1) / (side - SIZE + SIZE // 2 + 1), rel=0.15)
        assert seen[1] == pytest.approx(SIZE / (side - SIZE + SIZE // 2 + 1), rel=0.1)  # the middle hardly loses


def test_between_the_borders_tiles_begin_everywhere_alike(tmp_path, save):
    counts = np.bincount(places(tmp_path, save, (48, 48), draws=8000).ravel(), minlength=33)
    inner = counts[1:-1]
    assert 0.8 * inner.mean() < inner.min() and inner.max() < 1.2 * inner.mean()


def test_an_image_of_the_tiles_size_gives_itself(tmp_path, save):
    assert (places(tmp_path, save, (SIZE, SIZE), draws=50) == 0).all()
    assert set(places(tmp_path, save, (SIZE, SIZE + 1), draws=50)[:, 1]) == {0, 1}

"""Tiles for training and validation: images decoded once, kept as integers, cut at reproducible places."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from blemish.data.augment import Augmentation
from blemish.data.images import Pixels, read_pixels, to_unit
from blemish.errors import DataError, ImageError
from blemish.files import explain_write_errors
from blemish.preprocess import Preprocess
from blemish.streaming import THREADS, map_ahead
from blemish.tiling import Tiling, pad_to_tile


class ImageCache:
    """Preprocessed images at their own bit depth: in memory up to `limit` bytes, then mapped from a temporary file of
    up to `disk` bytes (and half of what is free there); the rest is decoded whenever it is asked for.

    Raises:
        DataError: images cannot be read; says how many and which is the first. BlemishError: the disk is full.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        preprocess: Preprocess,
        limit: float,
        name: str,
        disk: float = 0.0,
        progress: bool = True,
    ) -> None:
        self._paths, self._preprocess = list(paths), preprocess
        self._held: dict[int, Pixels] = {}
        self._mapped = MappedImages(disk)
        used, broken = 0, []
        decoded = map_ahead(self._try, range(len(self._paths)), cost=lambda _: 0, budget=0, most=2 * THREADS)
        bar = tqdm(decoded, f"reading {name}", len(self._paths), unit="image", disable=not progress, leave=False)
        for index, pixels in enumerate(bar):
            if isinstance(pixels, ImageError):
                broken.append(pixels)
            elif used + pixels.nbytes <= limit:
                used += pixels.nbytes
                self._held[index] = pixels
            else:
                self._mapped.add(index, pixels)
        if broken:
            raise DataError(
                f"{len(broken)} of {len(paths)} images of the {name} part cannot be used. {broken[0]} "
                "`blemish check` lists all."
            )

    def _try(self, index: int) -> Pixels | ImageError:
        try:
            return self._preprocess(read_pixels(self._paths[index]))
        except ImageError as error:
            return error

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Pixels:
        """(H, W, C) at the image's own bit depth."""
        for kept in (self._held, self._mapped):
            if index in kept:
                return kept[index]
        return self._preprocess(read_pixels(self._paths[index]))


class MappedImages:
    """Images in a temporary file of up to `limit` bytes, which is removed with the process that wrote it."""

    def __init__(self, limit: float) -> None:
        self._limit, self._end = limit, 0
        self._places: dict[int, tuple[int, tuple[int, ...], np.dtype[np.generic]]] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._file = Path()

    def add(self, index: int, pixels: Pixels) -> None:
        """Append an image, if there is still room for it."""
        if self._folder is None and self._limit:
            self._folder = tempfile.TemporaryDirectory(prefix="blemish-")
            self._file = Path(self._folder.name) / "images"
            self._limit = min(self._limit, shutil.disk_usage(self._folder.name).free / 2)
        if self._end + pixels.nbytes <= self._limit:
            with explain_write_errors(self._file), self._file.open("ab") as file:
                file.write(np.ascontiguousarray(pixels).data)
            self._places[index] = self._end, pixels.shape, pixels.dtype
            self._end += pixels.nbytes

    def __contains__(self, index: int) -> bool:
        return index in self._places

    def __getitem__(self, index: int) -> Pixels:
        """(H, W, C); only what is looked at is read."""
        offset, shape, dtype = self._places[index]
        return np.memmap(self._file, dtype, "r", offset, shape)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_folder": None}  # another process reads the file, and leaves it where it is


class TrainingTiles(Dataset[Tensor]):
    """An endless, seeded stream of random tiles, addressed by position.

    Position p lies in pass p // n over the images; each pass is a new permutation. Places and augmentation depend on
    (seed, first position of the batch) alone, which is why a resumed training sees just what an uninterrupted one sees.
    """

    def __init__(self, images: ImageCache, size: int, seed: int, augment: Augmentation | None = None) -> None:
        self.images, self.augment, self.seed, self._size = images, augment, seed, size
        self._pass, self._order = -1, np.arange(0)

    def _image_at(self, position: int) -> Pixels:
        number, place = divmod(position, len(self.images))
        if number != self._pass:
            self._pass = number
            self._order = np.random.default_rng([self.seed, 0, number]).permutation(len(self.images))
        return self.images[int(self._order[place])]

    def _start(self, rng: np.random.Generator, side: int) -> int:
        """Where a tile begins. Drawn from a quarter of a tile outside the image on, and moved in.

        Drawn from the possible places alone, a border would hardly ever be seen; prediction always sees it.
        """
        beyond = self._size // 4
        return int(np.clip(rng.integers(-beyond, side - self._size + beyond + 1), 0, side - self._size))

    def __getitem__(self, position: int) -> Tensor:
        return self.__getitems__([position])

    def __getitems__(self, positions: list[int]) -> Tensor:
        """A batch of tiles (B, C, t, t): uint8, or float32 in [0, 1] for deeper images."""
        rng = np.random.default_rng([self.seed, 1, positions[0]])
        tiles = []
        for position in positions:
            image = pad_to_tile(self._image_at(position)[None], self._size)[0]
            top, left = (self._start(rng, side) for side in image.shape[:2])
            tiles.append(image[top : top + self._size, left : left + self._size])
        if self.augment is not None:
            tiles = self.augment(tiles, seed=int(rng.integers(2**31)))
        return as_batch(tiles)


class ValidationTiles(Dataset[Tensor]):
    """At most `most` fixed tiles, spread evenly over the images and their windows, of which there are `total`.

    Augmented, if at all, by what `seed` and a batch's first tile draw: the same batch is the same whenever it is read.
    """

    def __init__(
        self, images: ImageCache, tiling: Tiling, most: int = 256, augment: Augmentation | None = None, seed: int = 0
    ) -> None:
        self._images, self._size, self._augment, self._seed = images, tiling.size, augment, seed
        places = []
        for index in range(len(images)):
            height, width = images[index].shape[:2]
            places += [(index, top, left) for top in tiling.starts(height) for left in tiling.starts(width)]
        chosen = np.unique(np.linspace(0, len(places) - 1, min(most, len(places))).round().astype(int))
        self._places = [places[place] for place in chosen]
        self.total = len(places)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def sources(self) -> list[int]:
        """The number of the image that each tile is of."""
        return [image for image, _, _ in self._places]

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Tensor:
        """A batch of tiles (B, C, t, t), as `TrainingTiles` gives them."""
        tiles = []
        for image_index, top, left in (self._places[index] for index in indices):
            image = pad_to_tile(self._images[image_index][None], self._size)[0]
            tiles.append(image[top : top + self._size, left : left + self._size])
        if self._augment is not None:
            tiles = self._augment(tiles, seed=int(np.random.default_rng([self._seed, 2, indices[0]]).integers(2**31)))
        return as_batch(tiles)

    def batches(self, size: int, device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """All tiles in order, (B, C, t, t) float32 in [0, 1], at most `size` at once."""
        for first in range(0, len(self), size):
            yield to_input(self.__getitems__(list(range(first, min(first + size, len(self))))).to(device))


def to_input(batch: Tensor) -> Tensor:
    """Tiles as they travel, uint8 or float32 -> float32 in [0, 1]."""
    return batch.float().div_(255) if batch.dtype == torch.uint8 else batch


def as_batch(tiles: Sequence[Pixels]) -> Tensor:
    """(t, t, C) tiles -> (B, C, t, t) in channels-last memory; uint8 stays, other dtypes become float32 in [0, 1]."""
    if any(tile.dtype != np.uint8 for tile in tiles):
        tiles = [to_unit(tile) for tile in tiles]
    return torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2)


class PositionSampler(Sampler[int]):
    """The stream positions of one epoch, for this process: `steps` batches of `batch` per process."""

    def __init__(self, steps: int, batch: int, rank: int = 0, processes: int = 1) -> None:
        self._steps, self._batch, self._rank, self._processes = steps, batch, rank, processes
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._steps * self._batch

    def __iter__(self) -> Iterator[int]:
        for step in range(self._epoch * self._steps, (self._epoch + 1) * self._steps):
            first = (step * self._processes + self._rank) * self._batch
            yield from range(first, first + self._batch)

"""Features of normal tiles in a file: computed once, read many times; by later runs, too, if they are to be kept."""

from __future__ import annotations

import hashlib
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from blemish.errors import ConfigError
from blemish.files import atomic, explain_write_errors
from blemish.frozen import content_of

DTYPES = "float16", "float32"
_LEAST = 0.01  # of the mean deviation


@dataclass(frozen=True)
class FeatureCache:
    """Grids of features of N normal tiles; all that is read comes as float32.

    values: (N, h, w, D) float16 or float32, on disk. mean, deviation: of each feature over all of them, (D,) float32.
    chosen: the number of each one's tile among those that there were, (N,).
    """

    values: npt.NDArray[np.floating[Any]]
    mean: Tensor
    deviation: Tensor
    chosen: npt.NDArray[np.int64]

    @property
    def unit(self) -> Tensor:
        """The deviation of each feature, (D,), but not much less than the mean one: where normal tiles agree, a feature
        is not blown up further."""
        return self.deviation.clamp(min=_LEAST * float(self.deviation.mean()) + 1e-12)

    @property
    def tiles(self) -> int:
        return len(self.values)

    @property
    def patches(self) -> int:
        """The number of places in all grids."""
        return int(np.prod(self.values.shape[:3]))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Features of `count` random places, (count, D); a place may be drawn again."""
        return self.read(torch.randint(self.patches, (count,), generator=generator))

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Features of `count` different random places, at most all, (count, D)."""
        return self.read(self.choose(count, generator))

    def choose(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` different random places, at most all, (count,) int64."""
        return torch.randperm(self.patches, generator=generator)[:count]

    def read(self, places: Tensor) -> Tensor:
        """Features of places (N,), which are counted grid by grid, row by row: (N, D)."""
        return _read(self.values.reshape(-1, self.values.shape[3])[places.numpy()])

    def windows(self, count: int, side: int, generator: torch.Generator) -> Tensor:
        """`count` random parts of grids, (count, D, s, s), s = `side` or as much as there is."""
        height, width = self.values.shape[1:3]
        side = min(side, height, width)
        most = (self.tiles, height - side + 1, width - side + 1)
        places = torch.stack([torch.randint(end, (count,), generator=generator) for end in most], dim=1).tolist()
        found = np.stack([self.values[n, top : top + side, left : left + side] for n, top, left in places])
        return _read(found).permute(0, 3, 1, 2)

    def places(self, first: int, last: int) -> Tensor:
        """All tiles' features at the places from `first` to before `last`, counted row by row: (N, places, D)."""
        return _read(self.values.reshape(self.tiles, -1, self.values.shape[3])[:, first:last])


class KnownGrids:
    """The grids of tiles that come again, by their pixels.

    Args:
        cache: what was computed. batches: the tiles that it was computed from, in the same order.
    """

    def __init__(self, cache: FeatureCache, batches: Iterable[Tensor]) -> None:
        self._values = cache.values
        names = [_name_of(tile) for batch in batches for tile in batch]
        self._rows = {names[number]: row for row, number in enumerate(cache.chosen.tolist())}

    def of(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Tiles (B, C, H, W) -> which of them are known, (B,) bool, and their grids, (known, h, w, D) float32."""
        names = [_name_of(tile) for tile in tiles]
        rows = [self._rows[name] for name in names if name in self._rows]
        return torch.tensor([name in self._rows for name in names]), _read(self._values[rows])


def _name_of(tile: Tensor) -> bytes:
    return hashlib.sha256(content_of(tile)).digest()


def _read(values: npt.NDArray[np.floating[Any]]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


@contextmanager
def cached(
    backbone: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    gigabytes: float,
    device: torch.device,
    setting: str = "model.cache_gb",
    folder: Path | None = None,
    dtype: str = DTYPES[0],
    instead: str = "train the model anew",
) -> Iterator[FeatureCache]:
    """The features of normal tiles, for as long as the context lasts.

    Args:
        backbone: from tiles (B, C, H, W) to features (B, D, h, w).
        batches: are gone through twice.
        gigabytes: the file's largest size; of more tiles, so many as fit are taken, evenly spread, with a warning.
        setting: that says so, for the warning.
        folder: keeps what the backbone says of each tile, for whoever asks it about the same tile again; the file of
            this context lies there, too.
        dtype: float16 or float32, of the file: twice as large, for features that float16 cannot hold.
        instead: what to do about features that it cannot hold, for the message.

    Raises:
        ConfigError: there is no tile, or a feature does not fit the dtype. BlemishError: the disk is full.
    """
    total = sum(len(batch) for batch in batches)
    if not total:
        raise ConfigError("A model that compares features learns from normal tiles, found none.")

    def features(tiles: Tensor) -> Tensor:
        """(B, h, w, D)."""
        with torch.no_grad():
            return backbone(tiles.to(device)).float().permute(0, 2, 3, 1).cpu()

    shape = next(iter(batches)).shape[1:]
    probe = features(torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)))
    kind = np.dtype(dtype)
    fitting = max(1, int(gigabytes * 2**30 / (kind.itemsize * probe.numel())))
    chosen = np.arange(total)
    if fitting < total:
        warnings.warn(
            f"features of {fitting} of {total} tiles, evenly spread, fit into {setting}={gigabytes:g}: raise it "
            "to learn from more",
            stacklevel=2,
        )
        chosen = np.unique(np.linspace(0, total - 1, fitting).round().astype(int))

    kept = _Kept(folder, probe, kind) if folder else None

    def grids(tiles: Tensor) -> list[_Grid]:
        files = [kept.file(tile) for tile in tiles] if kept else []
        known = {place: grid for place, file in enumerate(files) if kept and (grid := kept.read(file))}
        missing = [place for place in range(len(tiles)) if place not in known]
        said = features(tiles) if missing else ()  # all: what is said of a tile may depend on the batch, by rounding
        for place in missing:
            known[place] = _Grid.of(said[place], kind, instead)
            if kept:
                kept.write(files[place], known[place])
        return [known[place] for place in range(len(tiles))]

    def compute(path: Path) -> tuple[Tensor, Tensor]:
        """Write the features to `path`; their mean and deviation."""
        moments, seen = _Moments(probe.shape[-1]), 0
        header = {
            "descr": np.lib.format.dtype_to_descr(kind),
            "fortran_order": False,
            "shape": (len(chosen), *probe.shape[1:]),
        }
        bar = tqdm(total=total, desc="features", unit="tile", leave=False)
        with bar, explain_write_errors(path), path.open("wb") as file:
            np.lib.format.write_array_header_2_0(file, header)
            for batch in batches:
                wanted = chosen[(chosen >= seen) & (chosen < seen + len(batch))] - seen
                seen += len(batch)
                for grid in grids(batch[torch.from_numpy(wanted)]) if len(wanted) else ():
                    moments.add(grid)
                    file.write(grid.values.data)
                bar.update(len(batch))
        return moments.result()

    with tempfile.TemporaryDirectory(prefix="blemish-", dir=folder) as temporary:
        path = Path(temporary) / "features.npy"
        mean, deviation = compute(path)
        cache = FeatureCache(np.load(path, mmap_mode="r"), mean, deviation, chosen)
        if sys.platform == "win32":  # where no open file can be removed
            yield cache
            return
    yield cache  # the file has no name any more: a kill leaves nothing


class _Grid(NamedTuple):
    """What a backbone says of one tile, (h, w, D), and of each feature the mean and the sum of squares about it before
    it was rounded, (D,) float64."""

    values: npt.NDArray[np.floating[Any]]
    mean: npt.NDArray[np.float64]
    squares: npt.NDArray[np.float64]

    @classmethod
    def of(cls, grid: Tensor, kind: np.dtype[Any], instead: str) -> _Grid:
        """Of (h, w, D) float32. Raises ConfigError if the file's kind of numbers cannot hold it."""
        with np.errstate(over="ignore"):
            rounded = grid.contiguous().numpy().astype(kind)
        if not np.isfinite(rounded).all():
            raise ConfigError(
                f"A feature is beyond what {kind} holds: {instead}."
                if torch.isfinite(grid).all()
                else "A feature is no number, so its network has diverged: train it anew with a smaller "
                "training.learning_rate, or choose another backbone."
            )
        flat = grid.double().flatten(0, 1)
        mean = flat.mean(dim=0)
        return cls(rounded, mean.numpy(), (flat - mean).square().sum(dim=0).numpy())


class _Kept:
    """Grids in a folder, a file for each tile: named by its pixels, in a folder named by what the backbone says of a
    fixed picture, which tells it from all others, its settings and the machine's rounding included."""

    def __init__(self, folder: Path, probe: Tensor, kind: np.dtype[Any]) -> None:
        self.kind = kind
        said = hashlib.sha256(f"{tuple(probe.shape)} {kind}".encode())
        said.update(content_of(probe))
        self.folder, self.shape = folder / said.hexdigest()[:32], tuple(probe.shape[1:])
        with explain_write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def file(self, tile: Tensor) -> Path:
        return self.folder / f"{_name_of(tile).hex()[:32]}.npz"

    def read(self, file: Path) -> _Grid | None:
        """None if it is not there, or damaged."""
        try:
            with np.load(file) as parts:
                grid = _Grid(*(parts[name] for name in _Grid._fields))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return grid if grid.values.shape == self.shape and grid.values.dtype == self.kind else None

    def write(self, file: Path, grid: _Grid) -> None:
        with atomic(file) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **grid._asdict())


class _Moments:
    """Mean and standard deviation of each of D features, from one grid after the other.

    Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """

    def __init__(self, features: int) -> None:
        self.count = 0
        self.mean, self.squares = np.zeros(features), np.zeros(features)

    def add(self, grid: _Grid) -> None:
        count = grid.values.shape[0] * grid.values.shape[1]
        apart, total = grid.mean - self.mean, self.count + count
        self.mean = self.mean + apart * (count / total)
        self.squares = self.squares + grid.squares + apart**2 * (self.count * count / total)
        self.count = total

    def result(self) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.mean).float(), torch.from_numpy(np.sqrt(self.squares / self.count)).float()

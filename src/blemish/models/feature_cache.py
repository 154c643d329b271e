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

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from blemish.errors import ConfigError
from blemish.files import explain_write_errors

_LEAST = 0.01  # of the mean deviation


@dataclass(frozen=True)
class FeatureCache:
    """Grids of features of N normal tiles; all that is read comes as float32.

    values: (N, h, w, D) float16, on disk. mean, deviation: of each feature over all of them, (D,) float32.
    """

    values: npt.NDArray[np.float16]
    mean: Tensor
    deviation: Tensor

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


def _read(values: npt.NDArray[np.float16]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


@contextmanager
def cached(
    backbone: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    gigabytes: float,
    device: torch.device,
    setting: str = "model.cache_gb",
    folder: Path | None = None,
) -> Iterator[FeatureCache]:
    """The features of normal tiles, for as long as the context lasts.

    Args:
        backbone: from tiles (B, C, H, W) to features (B, D, h, w).
        batches: are gone through twice.
        gigabytes: the file's largest size; of more tiles, so many as fit are taken, evenly spread, with a warning.
        setting: that says so, for the warning.
        folder: where the file stays, for whoever asks for the same tiles and backbone again; None for a temporary one.

    Raises:
        ConfigError: there is no tile, or a feature does not fit float16. BlemishError: the disk is full.
    """
    total, digest = 0, hashlib.sha256()
    for batch in batches:
        total += len(batch)
        if folder:
            digest.update(batch.cpu().contiguous().numpy().tobytes())
    if not total:
        raise ConfigError("A model that compares features learns from normal tiles, found none.")

    def features(tiles: Tensor) -> Tensor:
        """(B, h, w, D)."""
        with torch.no_grad():
            return backbone(tiles.to(device)).float().permute(0, 2, 3, 1).cpu()

    first = features(next(iter(batches))[:1])
    fitting = max(1, int(gigabytes * 2**30 / (2 * first.numel())))
    kept = np.arange(total)
    if fitting < total:
        warnings.warn(
            f"features of {fitting} of {total} tiles, evenly spread, fit into {setting}={gigabytes:g}: raise it "
            "to learn from more",
            stacklevel=2,
        )
        kept = np.unique(np.linspace(0, total - 1, fitting).round().astype(int))

    def compute(path: Path) -> tuple[Tensor, Tensor]:
        """Write the features to `path`; their mean and deviation."""
        moments, seen = _Moments(first), 0
        shape = (len(kept), *first.shape[1:])
        bar = tqdm(total=total, desc="features", unit="tile", leave=False)
        with bar, explain_write_errors(path), path.open("wb") as file:
            np.lib.format.write_array_header_2_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
            for batch in batches:
                chosen = kept[(kept >= seen) & (kept < seen + len(batch))] - seen
                seen += len(batch)
                if len(chosen):
                    grids = features(batch[torch.from_numpy(chosen)])
                    half = grids.half()
                    if not torch.isfinite(half).all():
                        raise ConfigError(
                            "A feature is beyond what float16 holds: choose another backbone, or train the model anew."
                            if torch.isfinite(grids).all()
                            else "A feature is no number, so its network has diverged: train it anew with a smaller "
                            "training.learning_rate, or choose another backbone."
                        )
                    moments.add(grids)
                    file.write(half.contiguous().numpy().tobytes())
                bar.update(len(batch))
        return moments.result()

    if folder is None:
        with tempfile.TemporaryDirectory(prefix="blemish-") as temporary:
            path = Path(temporary) / "features.npy"
            mean, deviation = compute(path)
            cache = FeatureCache(np.load(path, mmap_mode="r"), mean, deviation)
            if sys.platform == "win32":  # where no open file can be removed
                yield cache
                return
        yield cache  # the file has no name any more: a kill leaves nothing
        return
    # What the backbone says of a tile tells it from all others, its settings included.
    digest.update(f"{len(kept)} {tuple(first.shape)}".encode() + first.contiguous().numpy().tobytes())
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{digest.hexdigest()[:32]}.npy"
    yield _found(path) or _kept(path, compute)


def _found(path: Path) -> FeatureCache | None:
    """What an earlier run left there; None if it is not whole."""
    try:
        with np.load(path.with_suffix(".npz")) as moments:
            mean, deviation = (torch.from_numpy(moments[name]) for name in ("mean", "deviation"))
        return FeatureCache(np.load(path, mmap_mode="r"), mean, deviation)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _kept(path: Path, compute: Callable[[Path], tuple[Tensor, Tensor]]) -> FeatureCache:
    """Nobody finds half a file: the features come last, under their own name when they are whole."""
    with tempfile.TemporaryDirectory(prefix="partial-", dir=path.parent) as partial, explain_write_errors(path):
        values, about = Path(partial) / path.name, Path(partial) / "moments.npz"
        mean, deviation = compute(values)
        np.savez(about, mean=mean.numpy(), deviation=deviation.numpy())
        about.replace(path.with_suffix(".npz"))
        values.replace(path)
    return FeatureCache(np.load(path, mmap_mode="r"), mean, deviation)


class _Moments:
    """Mean and standard deviation of each feature, from grids (B, h, w, D) one after the other."""

    def __init__(self, first: Tensor) -> None:
        # Sums of squares about a value near the mean lose no digits.
        self.about = first.double().mean(dim=(0, 1, 2))
        self.sum, self.squares = torch.zeros_like(self.about), torch.zeros_like(self.about)
        self.count = 0

    def add(self, grid: Tensor) -> None:
        apart = (grid - self.about).flatten(0, 2)
        self.sum += apart.sum(dim=0)
        self.squares += apart.square().sum(dim=0)
        self.count += len(apart)

    def result(self) -> tuple[Tensor, Tensor]:
        mean = self.sum / self.count
        variance = (self.squares / self.count - mean.square()).clamp(min=0)
        return (self.about + mean).float(), variance.sqrt().float()

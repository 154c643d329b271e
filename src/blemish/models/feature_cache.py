"""Features of normal tiles in a temporary file: computed once, read many times."""

from __future__ import annotations

import tempfile
import warnings
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
) -> Iterator[FeatureCache]:
    """The features of normal tiles, for as long as the context lasts.

    Args:
        backbone: from tiles (B, C, H, W) to features (B, D, h, w).
        batches: are gone through twice.
        gigabytes: the file's largest size; of more tiles, so many as fit are taken, evenly spread, with a warning.
        setting: that says so, for the warning.

    Raises:
        ConfigError: there is no tile, or a feature does not fit float16. BlemishError: the disk is full.
    """
    total = sum(len(batch) for batch in batches)
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
    moments = _Moments(first)
    with tempfile.TemporaryDirectory(prefix="blemish-") as folder:
        path = Path(folder) / "features"
        seen = 0
        bar = tqdm(total=total, desc="features", unit="tile", leave=False)
        with bar, explain_write_errors(path), path.open("wb") as file:
            for batch in batches:
                chosen = kept[(kept >= seen) & (kept < seen + len(batch))] - seen
                seen += len(batch)
                if len(chosen):
                    grids = features(batch[torch.from_numpy(chosen)])
                    half = grids.half()
                    if not torch.isfinite(half).all():
                        raise ConfigError(
                            "A feature is beyond what float16 holds: choose another backbone, or train the model anew."
                        )
                    moments.add(grids)
                    file.write(half.contiguous().numpy().tobytes())
                bar.update(len(batch))
        mean, deviation = moments.result()
        values = np.memmap(path, np.float16, "r", shape=(len(kept), *first.shape[1:]))
        yield FeatureCache(values, mean, deviation)


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

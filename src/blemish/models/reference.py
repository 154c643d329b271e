"""Models whose expectation is a picture: a given reference, a golden template, the best of a bank of templates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from tqdm import tqdm

from blemish.alignment import Aligned, Alignment, warp
from blemish.errors import ConfigError, nearest_names
from blemish.models.arguments import check_counts
from blemish.models.contracts import Output

FloatArray = npt.NDArray[np.float32]
STATISTICS = ("median", "mean")
_FLOOR = 2 / 255  # of the spread: where all normal tiles agree exactly, rounding is still no defect
_MAD = 1.4826  # a normal distribution's standard deviation in median absolute deviations
_SIDE = 32  # of the shrunken tiles that are clustered and matched
_FARTHEST = 64  # pixels that an edge may be off
_STRIP = 2**22  # values of which a median is taken at once
_ROUNDS = 2  # of alignment: to a tile in the middle, then to what they all have in common


class ReferencePair(nn.Module):
    """Expects the reference that comes with each tile: tiles are query, reference and validity, one on the other.

    Args:
        tolerance: a pixel may show whatever lies between the darkest and the brightest value that the reference has
            within so many pixels (a square), so that an edge may lie so far off. 0 compares pixel with pixel.

    Raises:
        ConfigError: tolerance is no whole number from 0 to 64, or (in `forward`) a tile is no such pile.
    """

    def __init__(self, tolerance: int = 0) -> None:
        super().__init__()
        if not isinstance(tolerance, int) or not 0 <= tolerance <= _FARTHEST:
            raise ConfigError(f"Expected tolerance to be 0 to {_FARTHEST} whole pixels, found {tolerance}.")
        self.tolerance = tolerance

    def forward(self, x: Tensor) -> Output:
        """(B, 2 C + 1, H, W): query and reference in [0, 1], and 1 where they can be compared, 0 elsewhere."""
        channels, rest = divmod(x.shape[1] - 1, 2)
        if channels < 1 or rest:
            raise ConfigError(
                "ReferencePair expects tiles of query, reference and validity, an odd number of channels, found "
                f"{x.shape[1]}."
            )
        query, expected, valid = x[:, :channels], x[:, channels:-1].detach(), x[:, -1:].detach()
        if self.tolerance:
            darkest, brightest = (_within(expected, self.tolerance, pick) for pick in (torch.minimum, torch.maximum))
            expected = torch.minimum(torch.maximum(query.detach(), darkest), brightest)
        # What is expected is detached: a gradient with respect to the pair is one with respect to the query.
        return Output(query, expected, valid=valid > 0.5)


class TemplateBank(nn.Module):
    """Expects the template that fits a tile best, aligned with it; one template is the golden template.

    `fit` sorts normal tiles by likeness (k-means on shrunken, standardised tiles) or by their named class, aligns those
    of a kind with each other, and keeps, pixel by pixel, what they have in common and how much they differ.

    Args:
        channels: 1 or 3. size: side of a tile, which is a whole image.
        templates: how many kinds to tell apart; with fewer different tiles, some templates are equal.
        statistic: what is common at a pixel: median, or mean.
        alignment: settings of `blemish.alignment.Alignment`.
        tries: so many of the templates that look most alike are aligned with a tile; the best one is taken.
        seed: of the sorting.
        classes: names of classes, each of which has one template, instead of `templates` kinds.

    Raises:
        ConfigError: an argument is out of range, or (in `forward`) the tile has another size, or nothing was learned.
    """

    whole_image = True
    unexportable = "it aligns each tile by search in OpenCV, which no exported graph does"
    templates: Tensor
    spreads: Tensor
    fitted: Tensor

    def __init__(
        self,
        channels: int = 1,
        size: int = 128,
        templates: int = 1,
        statistic: str = "median",
        alignment: Mapping[str, Any] | None = None,
        tries: int = 2,
        seed: int = 0,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if classes is not None:
            if isinstance(classes, str) or not classes or len(set(classes)) < len(classes):
                raise ConfigError(
                    f"Expected model.classes to be a list of different names, found {classes}: `blemish train` fills "
                    "it in with model.classes=named."
                )
            templates = len(classes)
        self._names = list(classes or ())
        check_counts(size=size, templates=templates, tries=tries)
        if statistic not in STATISTICS:
            raise ConfigError(f"Unknown model.statistic '{statistic}': {nearest_names(statistic, STATISTICS)}")
        try:
            self.alignment = Alignment(**(alignment or {}))
        except TypeError as error:
            raise ConfigError(f"model.alignment does not fit Alignment: {error}.") from error
        self.statistic, self.tries, self.seed = statistic, min(tries, templates), seed
        self.register_buffer("templates", torch.full((templates, channels, size, size), 0.5))
        self.register_buffer("spreads", torch.ones(templates, 1, size, size))
        self.register_buffer("fitted", torch.tensor(False))

    @property
    def classes(self) -> tuple[str, ...]:
        """What each template stands for."""
        return tuple(self._names or (f"template {number}" for number in range(1, len(self.templates) + 1)))

    def fit(self, batches: Iterable[Tensor], labels: Sequence[str | None] = ()) -> None:
        """As `Fittable`; all tiles are held in memory, as 8-bit values, and those of a kind aligned, as 16-bit floats.

        Raises:
            ConfigError: there is no tile, or none of a named class.
        """
        tiles = [np.rint(_to_numpy(batch) * 255).astype(np.uint8) for batch in batches]
        if not tiles:
            raise ConfigError(f"{type(self).__name__} learns from normal tiles, found none.")
        known = np.concatenate(tiles)
        kinds, middles = self._sort(_signatures(known), labels)
        for number in range(len(self.templates)):
            members = known[kinds == kinds[middles[number]]]
            template, spread = self._common(members, _unit(known[middles[number]]), number)
            self.templates[number] = torch.from_numpy(template).permute(2, 0, 1)
            self.spreads[number, 0] = torch.from_numpy(spread)
        self.fitted.fill_(True)

    def _sort(self, signatures: FloatArray, labels: Sequence[str | None]) -> tuple[npt.NDArray[np.int_], list[int]]:
        """The kind of each tile, and for each template the number of the tile in the middle of its kind."""
        wanted = len(self.templates)
        different = len(np.unique(signatures, axis=0))
        if self._names:
            missing = [name for name in self._names if name not in labels]
            if missing:
                raise ConfigError(
                    f"Expected images of the class '{missing[0]}' among the {len(labels)} training images that are "
                    "learned from, found none: add some."
                )
            kinds = np.array([self._names.index(str(label)) for label in labels])
            centres = np.stack([signatures[kinds == kind].mean(axis=0) for kind in range(wanted)])
        elif wanted == 1 or different == 1:
            centres, kinds = signatures.mean(axis=0, keepdims=True), np.zeros(len(signatures), int)
        else:
            centres, kinds = kmeans2(
                signatures.astype(np.float64), min(wanted, different), iter=30, minit="++", seed=self.seed
            )
        middles = []
        for kind in np.unique(kinds):
            members = np.flatnonzero(kinds == kind)
            distances = np.square(signatures[members] - centres[kind]).sum(axis=1)
            middles.append(int(members[distances.argmin()]))
        return kinds, [middles[number % len(middles)] for number in range(wanted)]

    def _common(
        self, members: npt.NDArray[np.uint8], template: FloatArray, number: int
    ) -> tuple[FloatArray, FloatArray]:
        """What tiles (N, S, S, C) have in common (S, S, C), on the grid of `template`, and how they differ (S, S)."""
        spread = np.full(template.shape[:2], _FLOOR, np.float32)
        name = f"template {number + 1} of {len(self.templates)}"
        for _ in range(_ROUNDS):
            stack = np.empty((len(members), *template.shape), np.float16)
            for place, member in enumerate(tqdm(members, name, unit="image", leave=False)):
                aligned = self.alignment(_unit(member), template)
                stack[place] = np.where(aligned.valid[..., None], aligned.reference, np.nan)
            rows = max(1, _STRIP // stack[:, 0].size)
            strips = [slice(top, top + rows) for top in range(0, len(template), rows)]
            parts = [self._middle(stack[:, strip].astype(np.float32), template[strip]) for strip in strips]
            template, spread = (np.concatenate(part) for part in zip(*parts, strict=True))
        return template, spread + np.float32(_FLOOR)

    def _middle(self, stack: FloatArray, template: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The statistic of (N, H, S, C), NaN where a tile has nothing, and the spread (H, S) about it."""
        # The template itself, where no other tile has anything.
        stack = np.concatenate([stack, template[None]]) if len(stack) < 3 else stack
        seen = np.isfinite(stack).any(axis=0)
        middle = np.nanmedian if self.statistic == "median" else np.nanmean
        template = np.where(seen, middle(np.where(seen, stack, 0.5), axis=0), template).astype(np.float32)
        apart = np.abs(stack - template).mean(axis=3)
        known = np.isfinite(apart).any(axis=0)
        spread = np.where(known, _MAD * np.nanmedian(np.where(known, apart, 0), axis=0), 0).astype(np.float32)
        return template, spread

    def forward(self, x: Tensor) -> Output:
        """(B, C, S, S) in [0, 1] -> observed and expected (B, C, S, S), where they can be compared, spread, choice."""
        if x.shape[1:] != self.templates.shape[1:]:
            raise ConfigError(
                f"The templates are of {_size(self.templates)} pixels, the tile of {_size(x)}: set image.size and "
                "tiling.size to one size, that of the templates."
            )
        tiles = _to_numpy(x.detach())
        signatures = _signatures(tiles)
        known = _signatures(_to_numpy(self.templates))
        candidates = np.argsort(-(signatures @ known.T), axis=1, kind="stable")[:, : self.tries]
        found = [self._best(tile, numbers) for tile, numbers in zip(tiles, candidates, strict=True)]
        observed, expected, valid, spread, choice = (np.stack(parts) for parts in zip(*found, strict=True))
        return Output(
            torch.from_numpy(observed).permute(0, 3, 1, 2).to(x),
            torch.from_numpy(expected).permute(0, 3, 1, 2).to(x),
            valid=torch.from_numpy(valid)[:, None].to(x.device),
            spread=torch.from_numpy(spread)[:, None].to(x),
            choice=torch.from_numpy(choice).to(x.device),
        )

    def _best(
        self, tile: FloatArray, numbers: npt.NDArray[np.int_]
    ) -> tuple[FloatArray, FloatArray, npt.NDArray[np.bool_], FloatArray, np.int64]:
        """Of some templates, aligned with a tile, the nearest: observed, expected, validity, spread, its number."""
        chosen: tuple[float, Aligned, int] | None = None
        for number in numbers:
            aligned = self.alignment(_to_numpy(self.templates[number : number + 1])[0], tile)
            error = np.abs(aligned.query - aligned.reference)[aligned.valid]
            distance = float(error.mean()) if error.size else np.inf
            if chosen is None or distance < chosen[0]:
                chosen = distance, aligned, int(number)
        assert chosen is not None
        _, aligned, number = chosen
        spread, _ = warp(self.spreads[number, 0].cpu().numpy(), aligned.motion, tile.shape[:2])
        spread = np.maximum(spread, np.float32(_FLOOR))
        return aligned.query, aligned.reference, aligned.valid, spread, np.int64(number)


def _within(x: Tensor, radius: int, pick: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The extremum that `pick` finds in a square around each pixel of (B, C, H, W); pooling is 10 times slower."""
    x = F.pad(x, (radius, radius, radius, radius), mode="replicate")
    for axis in (2, 3):
        size = x.shape[axis] - 2 * radius
        x = reduce(pick, (x.narrow(axis, start, size) for start in range(2 * radius + 1)))
    return x


def _to_numpy(x: Tensor) -> FloatArray:
    """(B, C, H, W) -> (B, H, W, C) float32, contiguous."""
    return np.ascontiguousarray(x.float().cpu().permute(0, 2, 3, 1).numpy().clip(0, 1))


def _unit(tile: npt.NDArray[np.uint8]) -> FloatArray:
    return np.asarray(tile / np.float32(255), np.float32)


def _signatures(tiles: npt.NDArray[Any]) -> FloatArray:
    """(N, H, W, C) -> (N, D): each tile shrunk, and of mean 0 and length 1, so that a product is a correlation."""
    small = np.stack([cv2.resize(tile, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).ravel() for tile in tiles])
    small = small.astype(np.float32)
    small -= small.mean(axis=1, keepdims=True)
    return np.asarray(small / np.maximum(np.linalg.norm(small, axis=1, keepdims=True), 1e-6), np.float32)


def _size(x: Tensor) -> str:
    return f"{x.shape[-2]} x {x.shape[-1]}"

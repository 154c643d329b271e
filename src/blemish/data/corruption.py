"""Corruption of the model's input during training: the target stays clean, so the model learns to repair.

Works on whole batches on the model's device and draws from torch's global generator, which training seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from blemish.data.fills import FILLS, mean_and_std
from blemish.data.shapes import SHAPES, THIN, log_uniform, uniform
from blemish.errors import ConfigError, nearest_names


class Corrupted(NamedTuple):
    """What a training step sees.

    input: (B, C, H, W), for the model; values may leave [0, 1]. target: (B, C, H, W), what it should make of it.
    mask: (B, 1, H, W) in [0, 1], 1 where the input was corrupted.
    """

    input: Tensor
    target: Tensor
    mask: Tensor


class Corruption(Protocol):
    """tells_where: its masks are neither all 0 nor all 1; taken as true where it is not said."""

    def __call__(self, x: Tensor) -> Corrupted:
        """Clean tiles (B, C, H, W) in [0, 1], which stay as they are, to what a training step sees."""


class NoCorruption:
    """The plain autoencoder: the input is the target."""

    tells_where = False

    def __call__(self, x: Tensor) -> Corrupted:
        return Corrupted(x, x, torch.zeros_like(x[:, :1]))


class GaussianNoise:
    """White noise of standard deviation `std` (Vincent et al., denoising autoencoders, ICML 2008)."""

    tells_where = False

    def __init__(self, std: float = 0.1) -> None:
        if std < 0:
            raise ConfigError(f"Expected corruption.std >= 0, found {std}.")
        self.std = std

    def __call__(self, x: Tensor) -> Corrupted:
        return Corrupted(x + self.std * torch.randn_like(x), x, torch.ones_like(x[:, :1]))


class CoarseNoise:
    """Noise drawn on a grid of `cell`-pixel cells, enlarged bilinearly and shifted at random.

    Source: Kascenas et al., Denoising autoencoders for unsupervised anomaly detection in brain MRI, MIDL 2022:
    coarse noise makes a model repair structures, where white noise only makes it smooth.

    `std` is that of the grid's values; between them, interpolation leaves about two thirds of it.

    Raises:
        ConfigError: `std` is negative or `cell` below 1.
    """

    tells_where = False

    def __init__(self, std: float = 0.2, cell: int = 8) -> None:
        if std < 0 or cell < 1:
            raise ConfigError(f"Expected corruption.std >= 0 and corruption.cell >= 1, found {std} and {cell}.")
        self.std, self.cell = std, cell

    def __call__(self, x: Tensor) -> Corrupted:
        batch, channels, height, width = x.shape
        # One cell more than needed on each axis, of which a random window is cut: the grid has no fixed place.
        grid = (height // self.cell + 2, width // self.cell + 2)
        noise = torch.randn(batch, channels, *grid, device=x.device, dtype=x.dtype)
        noise = F.interpolate(noise, scale_factor=self.cell, mode="bilinear", align_corners=False)
        top, left = torch.randint(0, self.cell + 1, (2,)).tolist()
        noise = noise[..., top : top + height, left : left + width]
        return Corrupted(x + self.std * noise, x, torch.ones_like(x[:, :1]))


class GridMask:
    """Inpainting: squares of a random grid lose their pixels to the tile's mean.

    Source: Zavrtanik et al., Reconstruction by inpainting (RIAD), Pattern Recognition 2021: cells, of a size drawn from
    `cells`, are hidden, each with a chance of 1 / `parts`, and the model fills them from what surrounds them.
    `blemish.scores.restoration.InpaintingScore` hides them all, in as many disjoint sets.

    Raises:
        ConfigError: no cell size, one below 1, or fewer than two parts.
    """

    def __init__(self, cells: Sequence[int] = (4, 8, 16), parts: int = 3) -> None:
        if not cells or min(cells) < 1 or parts < 2:
            raise ConfigError(
                f"Expected corruption.cells of 1 pixel or more and corruption.parts >= 2, found {list(cells)} and "
                f"{parts}."
            )
        self.cells, self.parts = list(cells), parts

    def __call__(self, x: Tensor) -> Corrupted:
        cell = self.cells[int(torch.randint(len(self.cells), ()))]
        batch, _, height, width = x.shape
        grid = torch.rand(batch, 1, -(-height // cell), -(-width // cell), device=x.device) < 1 / self.parts
        mask = F.interpolate(grid.to(x.dtype), scale_factor=cell)[..., :height, :width]
        return Corrupted(torch.lerp(x, x.mean(dim=(2, 3), keepdim=True), mask), x, mask)


class CutPaste:
    """A piece of the tile, its colours a little changed, is pasted elsewhere in the tile.

    Source: Li et al., CutPaste, CVPR 2021 (arXiv 2104.04015), both kinds, with the paper's sizes: rectangles of 2 to
    15 % of the tile's area with sides as 1 : 1 to 1 : 3.3, and scars, 2 to 16 by 10 to 25 pixels of 256, turned by up
    to 45 degrees. The paper tells pasted tiles from clean ones; here the model repairs them.

    Args:
        probability: that a tile is changed.
        scars: how much of what is pasted are scars.
        jitter: most that brightness and contrast change, each channel by itself, as a fraction.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(self, probability: float = 0.7, scars: float = 0.5, jitter: float = 0.1) -> None:
        if not (0 <= probability <= 1 and 0 <= scars <= 1 and 0 <= jitter <= 1):
            raise ConfigError(
                "Expected corruption.probability, corruption.scars and corruption.jitter between 0 and 1, found "
                f"{probability}, {scars} and {jitter}."
            )
        self.probability, self.scars, self.jitter = probability, scars, jitter

    def __call__(self, x: Tensor) -> Corrupted:
        batch, channels, height, width = x.shape
        down, across, angle = self._pieces(batch, height, width, x.device)
        cos, sin = angle.cos(), angle.sin()
        rows = torch.arange(height, device=x.device, dtype=torch.float32).view(1, 1, -1, 1)
        columns = torch.arange(width, device=x.device, dtype=torch.float32).view(1, 1, 1, -1)
        # Pasted anywhere inside the tile, cut anywhere inside it.
        y = rows - _inside(height, cos * down + sin.abs() * across)
        z = columns - _inside(width, cos * across + sin.abs() * down)
        y, z = cos * y + sin * z, cos * z - sin * y
        chosen = torch.rand(batch, 1, 1, 1, device=x.device) < self.probability
        pasted = (2 * y.abs() <= down) & (2 * z.abs() <= across) & chosen
        source_row = (y + _inside(height, down)).round().clamp(0, height - 1)
        source_column = (z + _inside(width, across)).round().clamp(0, width - 1)
        place = (source_row * width + source_column).long().flatten(2).expand(-1, channels, -1)
        piece = x.flatten(2).gather(2, place).view_as(x)
        contrast, brightness = 1 + self.jitter * (2 * torch.rand(2, batch, channels, 1, 1, device=x.device) - 1)
        mean = x.mean(dim=(2, 3), keepdim=True)
        piece = ((piece - mean) * contrast + mean * brightness).clamp(0, 1)
        return Corrupted(torch.where(pasted, piece, x), x, pasted.to(x.dtype))

    def _pieces(self, batch: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Height and width in pixels and angle of a piece for each tile, (B, 1, 1, 1) each."""
        area = uniform(batch, 0.02, 0.15, device) * height * width
        longer = log_uniform(batch, 1, 3.3, device)
        aspect = torch.where(uniform(batch, 0, 1, device) < 0.5, longer, 1 / longer)
        pixel = min(height, width) / 256  # of the paper's images
        is_scar = uniform(batch, 0, 1, device) < self.scars
        down = torch.where(is_scar, pixel * uniform(batch, 10, 25, device), (area * aspect).sqrt())
        across = torch.where(is_scar, pixel * uniform(batch, 2, 16, device), (area / aspect).sqrt())
        angle = torch.where(is_scar, uniform(batch, -math.pi / 4, math.pi / 4, device), 0.0)
        return down.clamp(1, height), across.clamp(1, width), angle


def _inside(side: int, extent: Tensor) -> Tensor:
    """Centres for intervals of these extents, (B, 1, 1, 1), anywhere within 0 ... side - 1; the middle if too long."""
    room = (side - extent).clamp(min=0)
    return (side - 1) / 2 + room * (torch.rand_like(extent) - 0.5)


def _visible(clean: Tensor, corrupted: Tensor, covered: Tensor) -> Tensor:
    """1 where the corruption can be told from the tile: 4 x 4 pixels changed by a fifth of the tile's contrast.

    By the root of the mean square, so that a thin line in them is not averaged away. A shape counts as visible up to 4
    pixels around such a place, so that its mask has an edge and no holes.
    """
    change = F.avg_pool2d((corrupted - clean).square().mean(1, keepdim=True), 4, 4, ceil_mode=True).sqrt()
    contrast = mean_and_std(clean)[1].mean(dim=1, keepdim=True).clamp(0.05, 0.25)
    visible = (change > 0.2 * contrast).to(clean.dtype)
    near = F.interpolate(F.max_pool2d(visible, 3, 1, 1), scale_factor=4)
    return near[..., : clean.shape[2], : clean.shape[3]] * covered


class Structured:
    """Random shapes filled with other texture, another colour, noise, blur: what a defect might look like.

    Training to repair such corruption is what takes reconstruction from chance to the state of the art: Bauer et
    al., arXiv 2206.11723 and 2511.07233. Shapes and fills are in `data/shapes.py` and `data/fills.py`.

    Args:
        shapes, fills: names to choose from, each as often as it is named; null takes all, one as often as another.
        probability: that a tile has one corruption, given one that it has another, and so on, up to `most`.
        smallest, largest: size of the shapes, as fractions of the tile's shorter side.
        faintest: least opacity; opacities are uniform from there to 1.
        fading: share of the shapes that fade out, where others have an outline.
        anchor: standard deviation of the white noise that is put on input and target alike, which keeps the model
            from moving what is normal (Bauer et al.).

    Raises:
        ConfigError: an argument is out of range, or a name unknown.
    """

    def __init__(
        self,
        shapes: Sequence[str] | None = None,
        fills: Sequence[str] | None = None,
        probability: float = 0.8,
        most: int = 4,
        smallest: float = 0.06,
        largest: float = 0.5,
        faintest: float = 0.4,
        fading: float = 0.0,
        anchor: float = 0.0,
    ) -> None:
        for name, chosen, known in (("shapes", shapes, SHAPES), ("fills", fills, FILLS)):
            for word in chosen or ():
                if word not in known:
                    raise ConfigError(f"Unknown corruption.{name} '{word}': {nearest_names(word, known)}")
        if not (0 < smallest <= largest <= 1 and 0 < faintest <= 1 and 0 <= probability <= 1):
            raise ConfigError(
                "Expected 0 < corruption.smallest <= corruption.largest <= 1, 0 < corruption.faintest <= 1 and "
                f"0 <= corruption.probability <= 1, found {smallest}, {largest}, {faintest} and {probability}."
            )
        if not 0 <= fading <= 1:
            raise ConfigError(f"Expected corruption.fading between 0 and 1, found {fading}.")
        if most < 1 or anchor < 0:
            raise ConfigError(f"Expected corruption.most >= 1 and corruption.anchor >= 0, found {most} and {anchor}.")
        self.shapes = [SHAPES[name] for name in shapes or SHAPES]
        self.fills = [FILLS[name] for name in fills or FILLS]
        self.probability, self.most = probability, most
        self.smallest, self.largest, self.faintest, self.anchor = smallest, largest, faintest, anchor
        self.fading = fading

    def __call__(self, x: Tensor) -> Corrupted:
        again = (torch.rand(self.most, len(x), device=x.device) < self.probability).cumprod(0).bool()
        tiles = again.nonzero()[:, 1]  # layer by layer
        # All that is drawn, whatever the layer, is drawn at once: many small steps are slower than few large ones.
        opacity, filling = self._opacities(len(tiles), x), self._fillings(x, tiles)
        corrupted, covered = x.clone(), torch.zeros_like(x[:, :1])
        ends = again.sum(dim=1).cumsum(0).tolist()
        for first, end in zip([0, *ends], ends, strict=False):
            # index_select and index_copy_ move whole tiles, several times as fast as indexing.
            here, new = tiles[first:end], opacity[first:end]
            corrupted.index_copy_(0, here, torch.lerp(corrupted.index_select(0, here), filling[first:end], new))
            covered.index_copy_(0, here, torch.maximum(covered.index_select(0, here), new))
        corrupted.clamp_(0, 1)
        mask = _visible(x, corrupted, covered > 0.1)
        if self.anchor:
            noise = self.anchor * torch.randn_like(x)
            return Corrupted(corrupted + noise, x + noise, mask)
        return Corrupted(corrupted, x, mask)

    def _opacities(self, count: int, x: Tensor) -> Tensor:
        """A shape each: (count, 1, H, W)."""
        height, width = x.shape[2:]
        opacity = torch.empty(count, 1, height, width, device=x.device)
        for shape, where in _deal(self.shapes, count, x.device):
            # Half the resolution costs a quarter, but there a thin shape is twice as wide.
            step = 1 if shape in THIN else 2
            size = (-(-height // step), -(-width // step))
            smallest, largest = (max(1.0, share * min(size)) for share in (self.smallest, self.largest))
            drawn = shape(len(where), size, smallest, largest, x.device, self.fading)
            if step > 1:
                drawn = F.interpolate(drawn, scale_factor=step, mode="bilinear")[..., :height, :width]
            opacity.index_copy_(0, where, drawn)
        return opacity.to(x.dtype) * uniform(count, self.faintest, 1, x.device)

    def _fillings(self, x: Tensor, tiles: Tensor) -> Tensor:
        """A filling for each of the chosen tiles (numbers into x), made of it or of another of the batch."""
        step = torch.randint(1, max(2, len(x)), (len(tiles),), device=x.device)
        own, others = x.index_select(0, tiles), x.index_select(0, (tiles + step) % len(x))
        filling = torch.empty_like(own)
        for fill, where in _deal(self.fills, len(tiles), x.device):
            filling.index_copy_(0, where, fill(own.index_select(0, where), others.index_select(0, where)))
        return filling


def _deal(choices: Sequence[Any], count: int, device: torch.device) -> Iterator[tuple[Any, Tensor]]:
    """Give each of `count` places one of the choices at random: those dealt to someone, with their places."""
    dealt = torch.randint(len(choices), (count,), device=device)
    for number, choice in enumerate(choices):
        where = (dealt == number).nonzero()[:, 0]
        if len(where):
            yield choice, where

"""Random shapes for structured corruption: opacities for a whole batch at once, on its device.

Every shape is drawn over a smoothly displaced coordinate grid (Simard et al., ICDAR 2003, elastic distortion), so that
no outline is a perfect one. Sizes are log-uniform: as many small shapes as large ones.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor


def uniform(count: int, low: float, high: float, device: torch.device) -> Tensor:
    """(count, 1, 1, 1), uniform between the two."""
    return low + (high - low) * torch.rand(count, 1, 1, 1, device=device)


def log_uniform(count: int, low: float, high: float, device: torch.device) -> Tensor:
    """(count, 1, 1, 1), its logarithm uniform between those of the two."""
    return uniform(count, math.log(low), math.log(high), device).exp()


def smooth_noise(count: int, channels: int, size: tuple[int, int], cell: Tensor) -> Tensor:
    """(count, channels, H, W) of standard deviation 1, smooth over `cell` pixels (a number for each, (count, 1, 1, 1)).

    Normal values on a grid that is shifted at random, blended by Gaussian weights: two small matrix products, which on
    a CPU cost a fraction of bicubic interpolation.
    """
    height, width = size
    rows, columns = (math.ceil(side / float(cell.min())) + 4 for side in size)
    down = _weights(height, rows, cell.view(-1, 1, 1))
    across = _weights(width, columns, cell.view(-1, 1, 1))
    values = torch.randn(count, rows, channels * columns, device=cell.device)
    half = (down @ values).view(count, height * channels, columns)
    return (half @ across.transpose(1, 2)).view(count, height, channels, width).transpose(1, 2)


def _weights(side: int, points: int, cell: Tensor) -> Tensor:
    """(count, side, points): how much each grid point counts at each pixel; squares sum to 1."""
    pixels = torch.arange(side, device=cell.device).view(1, -1, 1)
    place = pixels / cell + 1.5 + torch.rand(len(cell), 1, 1, device=cell.device)
    # Without the bound, far weights are denormal numbers, with which a CPU is ten times slower.
    distance = (place - torch.arange(points, device=cell.device)).square().clamp(max=30)
    weights = torch.exp(-distance)
    return weights / weights.square().sum(dim=2, keepdim=True).sqrt()


def _coordinates(count: int, size: tuple[int, int], largest: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns, each (count, 1, H, W) in pixels from a random centre, turned at random and displaced."""
    height, width = size
    rows = torch.arange(height, device=device, dtype=torch.float32).view(1, 1, -1, 1)
    columns = torch.arange(width, device=device, dtype=torch.float32).view(1, 1, 1, -1)
    y = rows - uniform(count, 0, height, device)
    x = columns - uniform(count, 0, width, device)
    angle = uniform(count, 0, math.pi, device)
    turned = (angle.cos() * y + angle.sin() * x, angle.cos() * x - angle.sin() * y)
    strength = uniform(count, 0, largest / 8, device)
    bend = smooth_noise(count, 2, size, log_uniform(count, max(4, largest / 8), max(8, largest / 2), device))
    return turned[0] + strength * bend[:, :1], turned[1] + strength * bend[:, 1:]


def ellipses(
    count: int, size: tuple[int, int], smallest: float, largest: float, device: torch.device, fading: float = 0.0
) -> Tensor:
    """Superellipses, from diamonds over ellipses to rounded rectangles; axes in pixels, at most 1 : 4."""
    y, x = _coordinates(count, size, largest, device)
    long = log_uniform(count, smallest, largest, device) / 2
    short = (long * log_uniform(count, 0.25, 1, device)).clamp(min=smallest / 2)
    power = uniform(count, 1, 6, device)
    distance = ((y / long).abs().pow(power) + (x / short).abs().pow(power)).pow(1 / power)
    return _edge((1 - distance) * short, short, fading)


def lines(
    count: int, size: tuple[int, int], smallest: float, largest: float, device: torch.device, fading: float = 0.0
) -> Tensor:
    """Scratches: bent strokes, a pixel to a sixteenth of `largest` wide."""
    y, x = _coordinates(count, size, largest, device)
    length = log_uniform(count, 4 * smallest, 2 * largest, device) / 2
    width = log_uniform(count, 1.0, max(2.0, largest / 16), device) / 2
    beyond = (y.abs() - length).clamp(min=0)
    return _edge(width - torch.sqrt(x.square() + beyond.square()), width, fading)


def polygons(
    count: int, size: tuple[int, int], smallest: float, largest: float, device: torch.device, fading: float = 0.0
) -> Tensor:
    """Stars with 3 to 9 corners at random radii: splinters, notches, flakes."""
    y, x = _coordinates(count, size, largest, device)
    most = 9
    corners = torch.randint(3, most + 1, (count, 1, 1, 1), device=device)
    radii = log_uniform(count, smallest, largest, device) / 2
    corner_radii = radii * (0.3 + 0.7 * torch.rand(count, 1, most, 1, device=device))
    place = (torch.atan2(y, x) / (2 * math.pi)).remainder(1) * corners
    before = place.floor().clamp(max=corners - 1).long()
    after = (before + 1).remainder(corners)
    table = corner_radii.view(count, most)
    share = place - before
    first, second = (table.gather(1, index.flatten(1)).view_as(place) for index in (before, after))
    outline = first + share * (second - first)
    return _edge(outline - torch.sqrt(y.square() + x.square()), radii / 2, fading)


def blobs(
    count: int, size: tuple[int, int], smallest: float, largest: float, device: torch.device, fading: float = 0.0
) -> Tensor:
    """Low-frequency noise above a random level (Zavrtanik et al., DRAEM, ICCV 2021), inside a random ellipse.

    The level is 0.2 to 0.7 of the value inside that is furthest from 0, on whose side the blob is: there always is one.
    """
    cell = log_uniform(count, max(2, smallest / 2), max(4, largest / 2), device)
    noise = smooth_noise(count, 1, size, cell)
    window = ellipses(count, size, max(smallest, largest / 4), 2 * largest, device)
    inside = noise * window
    highest, lowest = inside.amax(dim=(2, 3), keepdim=True), inside.amin(dim=(2, 3), keepdim=True)
    side = torch.where(highest >= -lowest, 1.0, -1.0)
    above = side * noise - torch.maximum(highest, -lowest) * uniform(count, 0.2, 0.7, device)
    return _edge(above * cell, cell, fading) * window


class Shape(Protocol):
    def __call__(
        self,
        count: int,
        size: tuple[int, int],
        smallest: float,
        largest: float,
        device: torch.device,
        fading: float = 0.0,
    ) -> Tensor:
        """Opacities (count, 1, H, W) in [0, 1] of shapes of these sizes, in pixels; a share `fading` has no outline."""


SHAPES: dict[str, Shape] = {
    "blobs": blobs,
    "ellipses": ellipses,
    "lines": lines,
    "polygons": polygons,
}
THIN = (lines,)
"""What a pixel more or less in width makes another thing of."""


def _edge(inside: Tensor, radius: Tensor, fading: float) -> Tensor:
    """Opacity from the distance to the outline, in pixels, positive inside: an edge 1 to 2 pixels wide.

    A share `fading` of the shapes fades out instead, over up to twice their radius: a model that has seen sharp
    outlines alone may learn to find outlines, and stains have none (Schlueter et al., Natural synthetic anomalies, ECCV
    2022, blend for the same reason).
    """
    count, device = len(inside), inside.device
    width = uniform(count, 1, 2, device)
    if fading:
        fades = uniform(count, 0, 1, device) < fading
        width = torch.where(fades, width + uniform(count, 0, 2, device) * radius, width)
    return (inside / width + 0.5).clamp(0, 1)

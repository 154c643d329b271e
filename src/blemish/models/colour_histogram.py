"""Features that need no network: how hue, saturation and value are distributed around each place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.errors import ConfigError


class ColourHistogram(nn.Module):
    """Soft histograms of hue, saturation and value over windows of pixels, as a grid of features in [0, 1].

    Source: Swain and Ballard, Color indexing, IJCV 1991. A pixel is shared by the two bins whose centres it lies
    between, so that noise at an edge of a bin moves little. Hue is a circle, and each pixel counts there by its chroma
    (saturation times value): grey pixels have no hue, nor do nearly black ones, whose hue is noise. The bins of
    saturation and of value each sum to 1, those of hue to the mean chroma. A grey tile has all its saturation in the
    first bin, and only its value tells anything.

    A histogram knows no order: texture that changes and leaves the colours of a window as they were is not seen.

    Args:
        hue, saturation, value: numbers of bins; 0 leaves one out.
        cell: side of a window, in pixels, an odd multiple of `stride`. All windows lie inside the tile: places near its
            border take the nearest one, since a part of a window varies more, and had every maximum of normal tiles.
        stride: pixels from one window to the next; tile sides must be multiples of it.

    Raises:
        ConfigError: an argument is out of range, or (in `forward`) tiles do not fit.
    """

    def __init__(self, hue: int = 12, saturation: int = 6, value: int = 8, cell: int = 20, stride: int = 4) -> None:
        super().__init__()
        for name, number, least in (("hue", hue, 3), ("saturation", saturation, 2), ("value", value, 2)):
            if not isinstance(number, int) or (number != 0 and number < least):
                raise ConfigError(f"Expected backbone.{name} of 0, or {least} or more bins, found {number}.")
        if not hue + saturation + value:
            raise ConfigError("Expected bins in backbone.hue, backbone.saturation or backbone.value, found none.")
        if not isinstance(stride, int) or stride < 1:
            raise ConfigError(f"Expected backbone.stride to be a positive whole number, found {stride}.")
        if not isinstance(cell, int) or cell < 1 or cell % stride or cell // stride % 2 == 0:
            raise ConfigError(
                f"Expected backbone.cell to be an odd multiple of backbone.stride ({stride}), found {cell}."
            )
        self.hue, self.saturation, self.value = hue, saturation, value
        self.cell, self.stride = cell, stride
        self.features = hue + saturation + value

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1 or 3, H, W), values outside [0, 1] are cut -> (B, D, H / stride, W / stride), D = `features`."""
        if x.shape[1] not in (1, 3):
            raise ConfigError(f"A backbone expects tiles of 1 or 3 channels, found {x.shape[1]}: set image.channels.")
        height, width = x.shape[-2:]
        if height % self.stride or width % self.stride or min(height, width) < self.cell:
            raise ConfigError(
                f"Expected sides of at least {self.cell} pixels, in multiples of {self.stride}, for the colour "
                f"histogram, found {height} x {width}: set tiling.size, or backbone.cell and backbone.stride."
            )
        hue, saturation, value = to_hsv(x.float().clamp(0, 1).expand(-1, 3, -1, -1))
        bins = [self._pooled(circular_share(hue, k, self.hue) * (saturation * value)) for k in range(self.hue)]
        for channel, count in ((saturation, self.saturation), (value, self.value)):
            bins += [self._pooled(share(channel, k, count)) for k in range(count)]
        return torch.cat(bins, dim=1)

    def _pooled(self, values: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, 1, h, w), the mean over each window."""
        means = F.avg_pool2d(values, self.cell, self.stride)
        return F.pad(means, (self.cell // self.stride // 2,) * 4, mode="replicate")


def to_hsv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 3, H, W) in [0, 1] -> hue in [0, 1), 0 for grey, saturation and value in [0, 1], each (B, 1, H, W)."""
    red, green, blue = x[:, :1], x[:, 1:2], x[:, 2:3]
    value = x.amax(dim=1, keepdim=True)
    chroma = value - x.amin(dim=1, keepdim=True)
    divisor = torch.where(chroma > 0, chroma, 1)
    sixths = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = torch.where(chroma > 0, sixths / 6, 0).remainder(1)
    return hue, chroma / torch.where(value > 0, value, 1), value


def share(values: Tensor, number: int, bins: int) -> Tensor:
    """How much of values in [0, 1] falls to a bin; centres lie evenly from 0 to 1."""
    return (1 - (values * (bins - 1) - number).abs()).clamp(min=0)


def circular_share(values: Tensor, number: int, bins: int) -> Tensor:
    """How much of values in [0, 1), a circle, falls to a bin; the first one's centre is 0."""
    apart = (values * bins - number).abs()
    return (1 - torch.minimum(apart, bins - apart)).clamp(min=0)

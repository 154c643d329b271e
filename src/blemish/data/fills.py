"""What structured corruption fills its shapes with: a whole batch of other pixels for a batch of tiles.

Every fill maps tiles (B, C, H, W) in [0, 1], and as many other tiles, to that same shape; values may leave [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from blemish.data.shapes import log_uniform, smooth_noise, uniform


def _signs(count: int, device: torch.device) -> Tensor:
    return torch.randint(0, 2, (count, 1, 1, 1), device=device) * 2.0 - 1.0


def _level_and_contrast(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each tile and channel, (B, C, 1, 1); the latter at least 0.02."""
    mean, std = mean_and_std(x)
    return mean, std.clamp(min=0.02)


def mean_and_std(x: Tensor) -> tuple[Tensor, Tensor]:
    """Both of each tile and channel, (B, C, 1, 1), from every second row and column."""
    some = x[..., ::2, ::2]
    mean = some.mean(dim=(2, 3), keepdim=True)
    # Three times as fast on a CPU as torch.std_mean.
    return mean, (some - mean).square().mean(dim=(2, 3), keepdim=True).sqrt()


def elsewhere(x: Tensor, others: Tensor) -> Tensor:
    """The same tile from another place: shifted around its borders, half of them mirrored, some turned."""
    batch, _, height, width = x.shape
    rows = torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device)
    down, right = (torch.randint(side // 8, side - side // 8, (batch, 1), device=x.device) for side in (height, width))
    flip = torch.randint(0, 2, (batch, 1), device=x.device)
    y = (flip * (height - 1 - rows) + (1 - flip) * rows + down).remainder(height)
    z = (columns + right).remainder(width)
    moved = x[torch.arange(batch, device=x.device)[:, None, None], :, y[:, :, None], z[:, None, :]]
    moved = moved.permute(0, 3, 1, 2)
    if height == width:
        turned = torch.rand(batch, 1, 1, 1, device=x.device) < 0.3
        moved = torch.where(turned, moved.transpose(2, 3), moved)
    return moved


def another(x: Tensor, others: Tensor) -> Tensor:
    """Another normal tile, from another place of it."""
    return elsewhere(others, x)


def flat(x: Tensor, others: Tensor) -> Tensor:
    """One colour: half of them of any value, half near the tile's own mean."""
    batch, channels = x.shape[:2]
    mean, std = _level_and_contrast(x)
    anything = torch.rand(batch, channels, 1, 1, device=x.device)
    near = mean + 2 * std * torch.randn(batch, channels, 1, 1, device=x.device)
    chosen = torch.rand(batch, 1, 1, 1, device=x.device) < 0.5
    return torch.where(chosen, anything, near).expand_as(x)


def fine_noise(x: Tensor, others: Tensor) -> Tensor:
    """The tile under white noise."""
    _, std = _level_and_contrast(x)
    return x + std * uniform(len(x), 0.5, 3, x.device) * torch.randn_like(x)


def coarse_noise(x: Tensor, others: Tensor) -> Tensor:
    """The tile under smooth noise: stains and clouds."""
    batch, channels, height, width = x.shape
    cell = log_uniform(batch, 3, max(4, min(height, width) / 4), x.device)
    noise = smooth_noise(batch, channels, (height, width), cell)
    _, std = _level_and_contrast(x)
    return x + std * uniform(batch, 0.5, 3, x.device) * noise


def brightness(x: Tensor, others: Tensor) -> Tensor:
    """The tile lighter or darker, its contrast changed: 0.3 to 2 times."""
    mean, std = _level_and_contrast(x)
    shift = _signs(len(x), x.device) * uniform(len(x), 0.3, 3, x.device) * std
    return (x - mean) * log_uniform(len(x), 0.3, 2, x.device) + mean + shift


def blur(x: Tensor, others: Tensor) -> Tensor:
    """The tile without its detail: the mean of a square 5 to 17 pixels wide."""
    reach = torch.randint(2, 9, (len(x), 1, 1, 1), device=x.device)

    def means(side: int) -> Tensor:
        # A matrix product: on a CPU a quarter of the time of average pooling, and each tile has a width of its own.
        place = torch.arange(side, device=x.device)
        near = ((place[:, None] - place).abs() <= reach).to(x.dtype)
        return near / near.sum(dim=-1, keepdim=True)

    height, width = x.shape[2:]
    down = means(height)
    across = down if width == height else means(width)
    return down @ x @ across.transpose(2, 3)


def elastic(x: Tensor, others: Tensor) -> Tensor:
    """The tile bent out of shape: every pixel moved, neighbours alike, by 1.5 to 6 pixels (standard deviation).

    Source: Simard et al., Best practices for convolutional neural networks, ICDAR 2003.
    """
    size = (x.shape[2], x.shape[3])
    cell = log_uniform(len(x), 5, max(6, min(size) / 8), x.device)
    moved = log_uniform(len(x), 1.5, 6, x.device) * smooth_noise(len(x), 2, size, cell)
    # grid_sample counts a tile's side as 2.
    steps = moved * (2 / torch.tensor(size[::-1], device=x.device).view(2, 1, 1))
    rest = torch.eye(2, 3, device=x.device).expand(len(x), 2, 3)
    grid = F.affine_grid(rest, list(x.shape), align_corners=False) + steps.permute(0, 2, 3, 1)
    return F.grid_sample(x, grid.to(x.dtype), padding_mode="reflection", align_corners=False)


FILLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "another": another,
    "elsewhere": elsewhere,
    "flat": flat,
    "fine_noise": fine_noise,
    "coarse_noise": coarse_noise,
    "brightness": brightness,
    "blur": blur,
    "elastic": elastic,
}

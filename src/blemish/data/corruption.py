"""Corruption of the model's input during training: the target stays clean, so the model learns to repair.

Works on whole batches on the model's device and draws from torch's global generator, which training seeds.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from blemish.errors import ConfigError


class Corruption(Protocol):
    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> a corrupted copy of the same shape; values may leave [0, 1]."""


class NoCorruption:
    """The plain autoencoder: the input is the target."""

    def __call__(self, x: Tensor) -> Tensor:
        return x


class GaussianNoise:
    """White noise of standard deviation `std` (Vincent et al., denoising autoencoders, ICML 2008)."""

    def __init__(self, std: float = 0.1) -> None:
        if std < 0:
            raise ConfigError(f"Expected corruption.std >= 0, found {std}.")
        self.std = std

    def __call__(self, x: Tensor) -> Tensor:
        return x + self.std * torch.randn_like(x)


class CoarseNoise:
    """Noise drawn on a grid of `cell`-pixel cells, enlarged bilinearly and shifted at random.

    Source: Kascenas et al., Denoising autoencoders for unsupervised anomaly detection in brain MRI, MIDL 2022:
    coarse noise makes a model repair structures, where white noise only makes it smooth.

    `std` is that of the grid's values; between them, interpolation leaves about two thirds of it.

    Raises:
        ConfigError: `std` is negative or `cell` below 1.
    """

    def __init__(self, std: float = 0.2, cell: int = 8) -> None:
        if std < 0 or cell < 1:
            raise ConfigError(f"Expected corruption.std >= 0 and corruption.cell >= 1, found {std} and {cell}.")
        self.std, self.cell = std, cell

    def __call__(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        # One cell more than needed on each axis, of which a random window is cut: the grid has no fixed place.
        grid = (height // self.cell + 2, width // self.cell + 2)
        noise = torch.randn(batch, channels, *grid, device=x.device, dtype=x.dtype)
        noise = F.interpolate(noise, scale_factor=self.cell, mode="bilinear", align_corners=False)
        top, left = torch.randint(0, self.cell + 1, (2,)).tolist()
        return x + self.std * noise[..., top : top + height, left : left + width]

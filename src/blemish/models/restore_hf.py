"""A model that is shown the detail of a tile only, and restores the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blemish.blur import blurred, gaussian_window
from blemish.errors import ConfigError
from blemish.models.repair import UNet
from blemish.standardise import tile_mean


class HighFrequencyRestorer(UNet):
    """A U-Net that sees a tile's high frequencies and expects the whole tile: what it never saw it cannot copy.

    Source: Liu et al., FAIR: frequency-aware image restoration for industrial visual anomaly detection,
    arXiv 2309.07068. There a Butterworth filter on the Fourier transform cuts below 30 cycles per image of 256 pixels;
    here a Gaussian blur is subtracted, which needs no transform and no fixed size. It falls off more gently; with
    sigma 1.6 both halve the same frequency. As there, the detail is that of the grey image, so that colours must be
    restored, too, and training is on corrupted tiles. Compared are the observed and the expected tile, not details.

    Args:
        channels: 1 (grey) or 3 (colour).
        sigma: of the Gaussian blur, in pixels; larger lets lower frequencies through.
        grey: the detail of the mean of the channels, not of each.
        keep_mean: restore around the tile's own mean brightness. The paper restores whole images, whose brightness
            follows from what they show; a tile's often does not, and a wrong guess would be a residual all over it.
            The price: a defect that covers a share of the tile loses that share of its residual to the rest.
        mask_head: also predict where the tile was repaired; it sees the tile itself.
        arguments: the others of `RepairAutoencoder`, with full skip connections by default.

    Raises:
        ConfigError: an argument is out of range, or (in `forward`) the tile's sides do not fit the depth or sigma.
    """

    window: Tensor

    def __init__(
        self,
        channels: int = 1,
        sigma: float = 1.6,
        grey: bool = True,
        keep_mean: bool = True,
        mask_head: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(channels, mask_head=mask_head, **arguments)
        if not sigma > 0:
            raise ConfigError(f"Expected model.sigma > 0, in pixels, found {sigma}.")
        self.sigma, self.grey, self.keep_mean = sigma, grey, keep_mean
        reach = max(1, round(4 * sigma))
        self.register_buffer("window", gaussian_window(sigma, reach), persistent=False)

    def encode(self, x: Tensor) -> Tensor:
        """As in `RepairAutoencoder`, from the detail alone."""
        return super().encode(self.detail(x))

    def repair(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """As in `RepairAutoencoder`, from the detail alone."""
        features, expected = super().repair(self.detail(x))
        if self.keep_mean:
            expected = expected + tile_mean(x)
        return features, expected

    def detail(self, x: Tensor) -> Tensor:
        """What the network is shown: (B, C, H, W) -> the same shape, float32, around 0."""
        reach = len(self.window) // 2
        if min(x.shape[-2:]) <= reach:
            raise ConfigError(
                f"model.sigma {self.sigma:g} blurs over {reach} pixels to each side, which a tile of {x.shape[-2]} x "
                f"{x.shape[-1]} pixels does not have: lower it, or use a larger tiling.size."
            )
        with torch.autocast(x.device.type, enabled=False):  # differences of near-equal numbers, as in residuals
            shown = x.float()
            if self.grey:
                shown = shown.mean(dim=1, keepdim=True)
            return (shown - blurred(shown, self.window)).expand_as(x)

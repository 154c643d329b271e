"""Models that are trained to repair corrupted tiles: no way past the bottleneck at full resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.errors import ConfigError, nearest_names
from blemish.models.blocks import (
    Encoder,
    SkipDecoder,
    check_architecture,
    check_tile,
    conv_block,
    dilated_blocks,
    level_widths,
)
from blemish.models.contracts import Output

SKIPS = ("none", "gated", "full")


class RepairAutoencoder(nn.Module):
    """Encoder, dilated bottleneck, decoder; what it puts in place of a defect is what it expects there.

    Source: Bauer et al., Self-supervised training with autoencoders for visual anomaly detection,
    arXiv 2206.11723: an autoencoder trained on structured corruption projects a tile onto the normal ones. Dilated
    convolutions (Yu and Koltun, arXiv 1511.07122) let each pixel see far around a defect. The mask head follows
    Zavrtanik et al., DRAEM, ICCV 2021: from what was observed and what is expected, it tells where they differ in a
    way that matters; here it shares the encoder, and has a decoder of its own with all skip connections.

    Args:
        channels: 1 (grey) or 3 (colour).
        width: channels of the first level; they double per level, up to 8 times.
        depth: number of halvings; tile sides must be multiples of 2^depth.
        dilations: of the bottleneck's convolutions, one residual block each.
        skips: connections from encoder to decoder at every level but the first, which has none, so that no detail
            finds a way around: "none"; "gated", the decoder decides pixel by pixel what to let through (Oktay et al.,
            arXiv 1804.03999); "full", as in a U-Net.
        mask_head: also predict where the tile was repaired.
        normalisation: batch, instance, group or none. activation: silu, relu, leaky_relu or gelu.

    Raises:
        ConfigError: an argument is out of range, or (in `forward`) the tile's sides do not fit the depth.
    """

    levels_without_skip = 1

    def __init__(
        self,
        channels: int = 1,
        width: int = 24,
        depth: int = 4,
        dilations: Sequence[int] = (1, 2, 4),
        skips: str = "none",
        mask_head: bool = True,
        normalisation: str = "batch",
        activation: str = "silu",
    ) -> None:
        super().__init__()
        check_architecture(channels, width, depth, 1)
        if skips not in SKIPS:
            raise ConfigError(f"Unknown model.skips '{skips}': {nearest_names(skips, SKIPS)}")
        self.depth = depth
        style = (normalisation, activation)
        widths = level_widths(width, depth)
        self.encoder = Encoder(channels, width, depth, *style)
        self.bottleneck = dilated_blocks(widths[-1], dilations, *style)
        self.decoder = SkipDecoder(widths, skips, self.levels_without_skip, *style)
        self.paint = nn.Conv2d(width, 4 * channels, 3, padding=1)
        self.mask_decoder = SkipDecoder(widths, "full", 0, *style) if mask_head else None
        if mask_head:
            self.compare = conv_block(width + 4 * 2 * channels, width, 1, *style)
            self.mask = nn.Conv2d(width, 4, 3, padding=1)
            assert self.mask.bias is not None
            nn.init.constant_(self.mask.bias, -3.0)  # few pixels are corrupted

    def forward(self, x: Tensor) -> Output:
        """(B, C, H, W) in [0, 1] -> observed = x and expected, both (B, C, H, W), and the repaired logits.

        Shown as activations: the encoder's levels but the last, and what the mask is made of, if there is one.
        """
        check_tile(x.shape[-2], x.shape[-1], self.depth)
        features, expected = self.repair(x)
        # The bottleneck's many channels would drown what small places show.
        shown = tuple(features[:-1] or features)
        if self.mask_decoder is None:
            return Output(x, expected, activations=shown)
        # The mask must not make the picture worse: no gradient from one to the other.
        difference = (x - expected).detach()
        pixels = F.pixel_unshuffle(torch.cat([difference, difference.abs()], 1), 2)
        searched = self.mask_decoder(features)
        pixels = pixels.to(searched.dtype, memory_format=torch.channels_last)  # else what is joined is copied anew
        evidence = self.compare(torch.cat([searched, pixels], 1))
        repaired = F.pixel_shuffle(self.mask(evidence), 2)
        return Output(x, expected, repaired=repaired, activations=(*shown, searched, evidence))

    def encode(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> the bottleneck's features (B, D, H / 2^depth, W / 2^depth)."""
        check_tile(x.shape[-2], x.shape[-1], self.depth)
        features: Tensor = self.bottleneck(self.encoder(x))
        return features

    def repair(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The features of the encoder's levels, the last one after the bottleneck; and what is expected."""
        features = self.encoder.levels(x)
        features[-1] = self.bottleneck(features[-1])
        # The last step is a pixel shuffle: a convolution at full resolution would cost more than all others together.
        return features, F.pixel_shuffle(self.paint(self.decoder(features)), 2)


class UNet(RepairAutoencoder):
    """The same with full skip connections at every level (Ronneberger et al., arXiv 1505.04597).

    It can copy its input, so it learns to repair only from corruption that changes the input.

    Args: those of `RepairAutoencoder`.
    """

    levels_without_skip = 0

    def __init__(self, channels: int = 1, skips: str = "full", **arguments: Any) -> None:
        super().__init__(channels, skips=skips, **arguments)

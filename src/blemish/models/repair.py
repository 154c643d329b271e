"""Models that are trained to repair corrupted tiles: no way past the bottleneck at full resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from blemish.errors import ConfigError, nearest_names
from blemish.models.blocks import (
    Encoder,
    MaskHead,
    Skip,
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
    way that matters.

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
        style: Any = (normalisation, activation)
        widths = level_widths(width, depth)
        self.encoder = Encoder(channels, width, depth, *style)
        self.bottleneck = dilated_blocks(widths[-1], dilations, *style)
        self.skips, self.narrow, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        features = widths[-1]
        for level in reversed(range(depth - 1)):
            kind = skips if level >= self.levels_without_skip else "none"
            self.up.append(nn.Upsample(scale_factor=2, mode="nearest"))
            self.skips.append(Skip(kind, features, widths[level]))
            wider = features + (widths[level] if kind != "none" else 0)
            self.narrow.append(
                nn.Sequential(
                    conv_block(wider, widths[level], 1, *style), conv_block(widths[level], widths[level], 1, *style)
                )
            )
            features = widths[level]
        self.paint = nn.Sequential(nn.Conv2d(features, 4 * channels, 3, padding=1), nn.PixelShuffle(2))
        self.mask_head = MaskHead(channels, features, *style) if mask_head else None

    def forward(self, x: Tensor) -> Output:
        """(B, C, H, W) in [0, 1] -> observed = x and expected, both (B, C, H, W), and the repaired logits."""
        check_tile(x.shape[-2], x.shape[-1], self.depth)
        features, expected = self.repair(x)
        repaired = self.mask_head(x, expected.detach(), features) if self.mask_head is not None else None
        return Output(x, expected, repaired=repaired)

    def repair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's last features (B, width, H / 2, W / 2), and what is expected."""
        levels = []
        y = x
        for stage in self.encoder.stages():
            y = stage(y)
            levels.append(y)
        y = self.bottleneck(y)
        for up, skip, narrow, level in zip(self.up, self.skips, self.narrow, reversed(levels[:-1]), strict=True):
            y = narrow(skip(up(y), level))
        expected: Tensor = self.paint(y)
        return y, expected


class UNet(RepairAutoencoder):
    """The same with full skip connections at every level (Ronneberger et al., arXiv 1505.04597).

    It can copy its input, so it learns to repair only from corruption that changes the input.

    Args: those of `RepairAutoencoder`.
    """

    levels_without_skip = 0

    def __init__(self, channels: int = 1, skips: str = "full", **arguments: Any) -> None:
        super().__init__(channels, skips=skips, **arguments)

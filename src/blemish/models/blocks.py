"""The pieces that the convolutional models share: blocks, encoder, decoder, and the way into and out of a code."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.errors import ConfigError, nearest_names
from blemish.models.arguments import check_counts

NORMALISATIONS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "group": lambda channels: nn.GroupNorm(min(8, channels), channels),
    "none": lambda channels: nn.Identity(),
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "gelu": nn.GELU,
}


def conv_block(
    inputs: int, outputs: int, stride: int, normalisation: str, activation: str, dilation: int = 1
) -> nn.Sequential:
    """3 x 3 convolution, normalisation, activation: (B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
    for kind, name, known in (
        ("normalisation", normalisation, NORMALISATIONS),
        ("activation", activation, ACTIVATIONS),
    ):
        if name not in known:
            raise ConfigError(f"Unknown model.{kind} '{name}': {nearest_names(name, known)}")
    bias = normalisation == "none"
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=bias),
        NORMALISATIONS[normalisation](outputs),
        ACTIVATIONS[activation](),
    )


def check_architecture(channels: int, width: int, depth: int, latent_dim: int) -> None:
    """Raise ConfigError where a model's numbers make no network."""
    if channels not in (1, 3):
        raise ConfigError(f"Expected model.channels 1 (grey) or 3 (colour), found {channels}.")
    check_counts(width=width, depth=depth, latent_dim=latent_dim)
    if depth > 8:
        raise ConfigError(f"Expected model.depth of at most 8 (tiles of 256 pixels and more), found {depth}.")


def check_tile(height: int, width: int, depth: int) -> None:
    """Raise ConfigError unless both sides can be halved `depth` times."""
    step = 2**depth
    if height % step or width % step:
        near = max(step, round(height / step) * step)
        raise ConfigError(
            f"A tile of {height} x {width} pixels cannot be halved {depth} times: set tiling.size to a multiple of "
            f"{step}, such as {near}, or lower model.depth."
        )


def level_widths(width: int, depth: int) -> list[int]:
    """Channels at each level: doubling, capped at 8 times the first."""
    return [width * min(2**level, 8) for level in range(depth)]


class Encoder(nn.Sequential):
    """(B, C, H, W) -> (B, F, H / 2^depth, W / 2^depth) with F the last of `level_widths`."""

    def __init__(self, channels: int, width: int, depth: int, normalisation: str, activation: str) -> None:
        layers: list[nn.Module] = []
        for features in level_widths(width, depth):
            layers.append(conv_block(channels, features, 2, normalisation, activation))
            layers.append(conv_block(features, features, 1, normalisation, activation))
            channels = features
        super().__init__(*layers)

    def levels(self, x: Tensor) -> list[Tensor]:
        """The features of every level, finest first."""
        levels = []
        for position, layer in enumerate(self):
            x = layer(x)
            if position % 2:  # two layers make a level
                levels.append(x)
        return levels


class DilatedBlock(nn.Module):
    """x + two convolutions of it, the first one dilated: (B, F, h, w) -> the same."""

    def __init__(self, features: int, dilation: int, normalisation: str, activation: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            conv_block(features, features, 1, normalisation, activation, dilation),
            conv_block(features, features, 1, normalisation, activation),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.layers(x)
        return y


def dilated_blocks(features: int, dilations: Sequence[int], normalisation: str, activation: str) -> nn.Sequential:
    """One `DilatedBlock` for each dilation. Raises ConfigError if one is below 1."""
    if any(not isinstance(dilation, int) or dilation < 1 for dilation in dilations):
        raise ConfigError(f"Expected model.dilations to be positive whole numbers, found {list(dilations)}.")
    return nn.Sequential(*(DilatedBlock(features, dilation, normalisation, activation) for dilation in dilations))


class Skip(nn.Module):
    """Joins the decoder's features (B, F, h, w) and the encoder's (B, G, h, w) of one level.

    kind: "none" gives the decoder's alone, "full" (B, F + G, h, w), "gated" the same, the encoder's multiplied by a
    number in [0, 1] that is computed from both at each place.
    """

    def __init__(self, kind: str, decoder: int, encoder: int) -> None:
        super().__init__()
        self.kind = kind
        self.gate = nn.Conv2d(decoder + encoder, 1, 1) if kind == "gated" else None

    def forward(self, decoder: Tensor, encoder: Tensor) -> Tensor:
        if self.kind == "none":
            return decoder
        if self.gate is not None:
            encoder = encoder * torch.sigmoid(self.gate(torch.cat([decoder, encoder], 1)))
        return torch.cat([decoder, encoder], 1)


class SkipDecoder(nn.Module):
    """From the bottleneck to half the tile's resolution, joined by the encoder's features on the way.

    Args:
        widths: channels of the encoder's levels, the finest first.
        skips: "none", "gated" or "full", see `Skip`.
        without: so many of the finest levels have no skip, whatever `skips`.
    """

    def __init__(self, widths: Sequence[int], skips: str, without: int, normalisation: str, activation: str) -> None:
        super().__init__()
        self.skips, self.layers = nn.ModuleList(), nn.ModuleList()
        features = widths[-1]
        for level in reversed(range(len(widths) - 1)):
            kind, width = (skips if level >= without else "none"), widths[level]
            wider = features + (width if kind != "none" else 0)
            self.skips.append(Skip(kind, features, width))
            self.layers.append(
                nn.Sequential(
                    conv_block(wider, width, 1, normalisation, activation),
                    conv_block(width, width, 1, normalisation, activation),
                )
            )
            features = width

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """The features of each level, finest first, the last one the bottleneck's -> (B, widths[0], H / 2, W / 2)."""
        *finer, y = levels
        for skip, layers, level in zip(self.skips, self.layers, reversed(finer), strict=True):
            y = layers(skip(F.interpolate(y, scale_factor=2.0), level))
        return y


class Decoder(nn.Sequential):
    """(B, F, H / 2^depth, W / 2^depth) -> (B, C, H, W), unbounded.

    The last step is a pixel shuffle (Shi et al., arXiv 1609.05158): no convolution runs at full resolution,
    which would cost more than all others together.
    """

    def __init__(self, channels: int, width: int, depth: int, normalisation: str, activation: str) -> None:
        layers: list[nn.Module] = []
        widths = level_widths(width, depth)
        features = widths[-1]
        for narrower in reversed(widths[:-1]):
            layers.append(conv_block(features, features, 1, normalisation, activation))
            layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
            layers.append(conv_block(features, narrower, 1, normalisation, activation))
            features = narrower
        layers.append(conv_block(features, features, 1, normalisation, activation))
        layers.append(nn.Conv2d(features, 4 * channels, 3, padding=1))
        layers.append(nn.PixelShuffle(2))
        super().__init__(*layers)


class IntoCode(nn.Module):
    """Features (B, F, h, w) -> code: (B, D, h, w) if spatial, (B, D) if flat."""

    def __init__(self, features: int, code: int, latent: str, grid: int | None) -> None:
        super().__init__()
        self.grid = grid
        self.layer: nn.Module
        if latent == "spatial":
            self.layer = nn.Conv2d(features, code, 1)
        else:
            self.layer = nn.Sequential(nn.Flatten(), nn.Linear(features * _squared(latent, grid), code))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Sequential) and x.shape[-2:] != (self.grid, self.grid):
            raise ConfigError(
                f"A flat latent fits one tile size only: the model was built for a {self.grid} x {self.grid} grid, "
                f"found {x.shape[-2]} x {x.shape[-1]}; set model.tile_size to tiling.size, or use model.latent=spatial."
            )
        code: Tensor = self.layer(x)
        return code


class FromCode(nn.Module):
    """Code -> features (B, F, h, w), the way back of `IntoCode`."""

    def __init__(self, code: int, features: int, latent: str, grid: int | None) -> None:
        super().__init__()
        self.layer: nn.Module
        if latent == "spatial":
            self.layer = nn.Conv2d(code, features, 1)
        else:
            area = _squared(latent, grid)
            assert grid is not None
            self.layer = nn.Sequential(nn.Linear(code, features * area), nn.Unflatten(1, (features, grid, grid)))

    def forward(self, code: Tensor) -> Tensor:
        features: Tensor = self.layer(code)
        return features


def _squared(latent: str, grid: int | None) -> int:
    if latent != "flat":
        raise ConfigError(f"Unknown model.latent '{latent}': {nearest_names(latent, ('flat', 'spatial'))}")
    if not grid:
        raise ConfigError("A flat latent needs model.tile_size, a multiple of 2^depth.")
    return grid * grid

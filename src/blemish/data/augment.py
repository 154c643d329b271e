"""Augmentation and corruption of training tiles by albumentations; the only file that imports it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from blemish.data.corruption import Corrupted
from blemish.data.images import Pixels, to_unit
from blemish.errors import ConfigError, nearest_names

# Without it the import asks the network for a newer version.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import albumentations as A
import numpy as np
import torch
from torch import Tensor


class Augmentation:
    """A chain of albumentations transforms, each given as {name: {argument: value}}.

    Only transforms that a defect-free part survives belong here: what augmentation shows, the model will
    later find normal.

    Raises:
        ConfigError: an unknown transform or argument.
    """

    def __init__(self, transforms: Sequence[Mapping[str, Mapping[str, Any] | None]]) -> None:
        self._compose = A.Compose([_transform(item) for item in transforms])

    def __call__(self, tiles: list[Pixels], seed: int) -> list[Pixels]:
        """Augment tiles (t, t, C) of one batch; the same seed gives the same result. Sizes must not change.

        16-bit tiles become float32 in [0, 1], which every transform supports.
        """
        self._compose.set_random_seed(seed)
        augmented = []
        for tile in tiles:
            result = self._compose(image=tile if tile.dtype == np.uint8 else to_unit(tile))["image"]
            if result.shape != tile.shape:
                raise ConfigError(
                    f"An augmentation turned a tile of {tile.shape} into {result.shape}: sizes must stay."
                )
            augmented.append(result)
        return augmented


class TransformCorruption:
    """A chain of albumentations transforms as corruption: elastic deformation, dropout of holes, weather, ...

    Tile by tile on the CPU, wherever the model is; one number from torch's global generator seeds a batch.

    Args:
        transforms: each as {name: {argument: value}}; sizes must stay. Arguments in grey levels are in [0, 1].

    Raises:
        ConfigError: an unknown transform or argument; from a call, a transform that changes sizes.
    """

    def __init__(self, transforms: Sequence[Mapping[str, Mapping[str, Any] | None]]) -> None:
        self._augment = Augmentation(transforms)

    def __call__(self, x: Tensor) -> Corrupted:
        """Tiles (B, C, H, W) in [0, 1] to such tiles; what changes by less than half a level of 255 is taken back."""
        # A copy, for some transforms work in place.
        tiles = x.detach().permute(0, 2, 3, 1).to("cpu", torch.float32, copy=True).contiguous().numpy()
        changed = np.stack(self._augment(list(tiles), seed=int(torch.randint(2**31, ()))))
        corrupted = torch.from_numpy(changed).permute(0, 3, 1, 2).to(x).clamp(0, 1)
        mask = ((corrupted - x).abs() > 0.5 / 255).any(dim=1, keepdim=True)
        return Corrupted(torch.where(mask, corrupted, x), x, mask.to(x.dtype))


def _transform(item: Mapping[str, Mapping[str, Any] | None]) -> Any:
    if len(item) != 1:
        raise ConfigError(f"Expected an augmentation as {{name: {{argument: value}}}}, found {dict(item)}.")
    ((name, arguments),) = item.items()
    known = [key for key, value in vars(A).items() if isinstance(value, type) and issubclass(value, A.BasicTransform)]
    if name not in known:
        raise ConfigError(f"albumentations has no transform '{name}': {nearest_names(name, known)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # albumentations only warns of unknown arguments
            return getattr(A, name)(**(arguments or {}))
    except (TypeError, ValueError, UserWarning) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"The arguments {dict(arguments or {})} do not fit albumentations.{name}: {reason}"
        ) from error

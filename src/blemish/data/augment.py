"""Augmentation of training tiles by albumentations; the only file that imports it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from blemish.data.images import Pixels, to_unit
from blemish.errors import ConfigError, nearest_names

# Without it the import asks the network for a newer version.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import albumentations as A
import numpy as np


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

"""What densities of normal features share: they say how usual a place is, and expect nothing in particular."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from blemish.errors import ConfigError
from blemish.models.arguments import check_counts
from blemish.models.contracts import FeatureSource, Output
from blemish.models.feature_cache import FeatureCache
from blemish.models.features import FeatureModel


class Density(FeatureModel):
    """Base: fitted to random patches of normal tiles, and carried as tensors.

    Evidence is `highest` - `score_samples`, not below 0: scikit-learn's score with its sign turned, since here larger
    is worse, plus a constant. Calibration sets the threshold, so that an estimator's own is not carried.

    Args:
        backbone, projection, dimensions, cache_gb, seed: those of `FeatureModel`.
        samples: random patches to fit to, or all where there are fewer.

    Raises:
        ConfigError: an argument is out of range, or (in `fit`) scikit-learn is needed and not installed.
    """

    fitted_by: str | None = "scikit-learn"
    growing: tuple[str, ...]
    """Buffers whose length only fitting tells."""
    highest: Tensor

    def __init__(
        self,
        backbone: FeatureSource,
        samples: int,
        projection: str,
        dimensions: int | None,
        cache_gb: float,
        seed: int,
    ) -> None:
        super().__init__(backbone, projection, dimensions, cache_gb, seed)
        check_counts(samples=samples)
        self.samples = samples
        self.register_buffer("highest", torch.zeros(()))

    def check_installed(self) -> None:
        """As `Needing`."""
        if self.fitted_by and find_spec("sklearn") is None:
            raise ConfigError(
                f"{type(self).__name__} is fitted by scikit-learn, which is not installed: pip install "
                "'blemish[features]' (what is trained needs it no more), or choose another model."
            )

    def fit(self, batches: Iterable[Tensor], labels: Sequence[str | None] = ()) -> None:
        """As `Fittable`."""
        self.check_installed()
        super().fit(batches, labels)

    def learn(self, cache: FeatureCache) -> None:
        self.estimate(self.prepared(cache.sample(self.samples, self.generator())))

    @abstractmethod
    def estimate(self, patches: Tensor) -> None:
        """From normal patches (N, D)."""

    @abstractmethod
    def score_samples(self, places: Tensor) -> Tensor:
        """Features (Q, D), prepared -> (Q,), larger is more usual: what scikit-learn's method of this name gives."""

    def expect(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        return observed, observed

    def forward(self, x: Tensor) -> Output:
        """(B, 1 or 3, H, W) in [0, 1] -> observed, twice, (B, D, h, w), and the evidence (B, 1, h, w)."""
        output = super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            places = output.observed.movedim(1, -1)
            scores = self.score_samples(places.reshape(-1, self.dimensions))
            evidence = (self.highest - scores).clamp(min=0).reshape(places.shape[:-1])
        return output._replace(evidence=evidence[:, None])

    def fill(self, **tensors: Any) -> None:
        """Give buffers their content, of whatever length: tensors, arrays or numbers."""
        for name, values in tensors.items():
            own: Tensor = getattr(self, name)
            setattr(self, name, torch.tensor(values, dtype=own.dtype, device=own.device))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in self.growing:
            own, found = getattr(self, name), state.get(prefix + name)
            if isinstance(found, Tensor) and found.ndim == own.ndim:
                setattr(self, name, own.new_zeros(len(found), *own.shape[1:]))
        super()._load_from_state_dict(state, prefix, *rest)


def squared_distances(places: Tensor, points: Tensor) -> Tensor:
    """(Q, D), (N, D) -> (Q, N), Euclidean."""
    lengths = places.square().sum(dim=1, keepdim=True) + points.square().sum(dim=1)
    return torch.addmm(lengths, places, points.T, alpha=-2).clamp(min=0)  # rounding may leave less than nothing

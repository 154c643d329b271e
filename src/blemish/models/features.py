"""What models share that look at features, such as those of a frozen network, instead of pixels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from blemish.errors import ConfigError, nearest_names
from blemish.models.arguments import check_positive
from blemish.models.contracts import FeatureSource, Output
from blemish.models.feature_cache import DTYPES, FeatureCache, KnownGrids, cached

PROJECTIONS = ("none", "random", "pca")
_MOST_FOR_PCA = 100_000  # patches
_MOST_VALUES = 2**24  # held at once, 64 MiB


def random_projection(dimensions: int, features: int, generator: torch.Generator) -> Tensor:
    """(D, K), normally distributed; keeps distances on average (Johnson and Lindenstrauss)."""
    matrix: Tensor = torch.randn(dimensions, features, generator=generator) / dimensions**0.5
    return matrix


class FeatureSpace(nn.Module):
    """Base: what is observed is a grid of features (B, D, h, w), each in deviations from its mean over normal tiles.

    Args:
        backbone: gives the features, such as a frozen network.
        projection: to fewer features: none; random (Gaussian, which keeps distances, as Johnson and Lindenstrauss
            have shown); or pca, the principal components of normal tiles.
        dimensions: how many features are left; null where projection is none.
        cache_gb: largest size of the temporary file of normal features, in GiB.
        seed: of the projection, and of what is drawn while learning.

    Raises:
        ConfigError: an argument is out of range.
    """

    mean: Tensor
    deviation: Tensor
    projection: Tensor | None

    def __init__(
        self, backbone: FeatureSource, projection: str, dimensions: int | None, cache_gb: float, seed: int
    ) -> None:
        super().__init__()
        if projection not in PROJECTIONS:
            raise ConfigError(f"Unknown model.projection '{projection}': {nearest_names(projection, PROJECTIONS)}")
        if projection == "none" and dimensions is not None:
            raise ConfigError(
                f"model.dimensions={dimensions} needs model.projection=random or pca, found none: add "
                "model.dimensions=null."
            )
        if projection != "none" and (not isinstance(dimensions, int) or not 1 <= dimensions <= backbone.features):
            raise ConfigError(
                f"Expected model.dimensions from 1 to the backbone's {backbone.features}, found {dimensions}."
            )
        check_positive(cache_gb=cache_gb)
        self.backbone = backbone
        self.dimensions = dimensions or backbone.features
        self.kind, self.cache_gb, self.seed = projection, cache_gb, seed
        self.register_buffer("mean", torch.zeros(backbone.features))
        self.register_buffer("deviation", torch.ones(backbone.features))
        matrix = torch.eye(self.dimensions, backbone.features)
        if projection == "random":
            matrix = random_projection(self.dimensions, backbone.features, self.generator())
        self.register_buffer("projection", None if projection == "none" else matrix)

    def generator(self) -> torch.Generator:
        """A new one, of the model's own seed."""
        return torch.Generator().manual_seed(self.seed)

    @contextmanager
    def normal(self, batches: Iterable[Tensor]) -> Iterator[FeatureCache]:
        """What `learn_normal` gives, in float32, for as long as the context lasts."""
        with torch.autocast(self.mean.device.type, enabled=False), ExitStack() as opened:
            yield self.learn_normal(batches, opened)

    def learn_normal(self, batches: Iterable[Tensor], opened: ExitStack) -> FeatureCache:
        """The features of normal tiles, in a temporary file of at most `cache_gb` that lasts until `opened` is closed;
        mean and deviation are learned."""
        device = self.mean.device
        with torch.autocast(device.type, enabled=False):
            cache = opened.enter_context(
                cached(
                    self.backbone,
                    batches,
                    self.cache_gb,
                    device,
                    folder=getattr(self.backbone, "cache", None),
                    dtype=getattr(self.backbone, "cache_dtype", DTYPES[0]),
                    instead="set backbone.cache_dtype=float32, where the backbone has it, or choose another one",
                )
            )
            self.mean.copy_(cache.mean)
            self.deviation.copy_(cache.unit)
            if self.kind == "pca":
                self._learn_components(cache.sample(_MOST_FOR_PCA, self.generator()))
        return cache

    def observe(self, x: Tensor) -> Tensor:
        """Tiles (B, 1 or 3, H, W) in [0, 1] -> (B, D, h, w), float32."""
        with torch.autocast(x.device.type, enabled=False):
            return self.look(x)

    def look(self, x: Tensor) -> Tensor:
        """The same in whatever precision autocast asks for."""
        return self.prepared(self.backbone(x.float()).movedim(1, -1)).movedim(-1, 1)

    def prepared(self, features: Tensor) -> Tensor:
        """What the backbone gives, features last (..., K), on any device -> in deviations, projected (..., D)."""
        features = (features.to(self.mean) - self.mean) / self.deviation
        return features if self.projection is None else features @ self.projection.T

    def _learn_components(self, patches: Tensor) -> None:
        assert self.projection is not None
        apart = (patches.to(self.mean) - self.mean) / self.deviation
        _, vectors = torch.linalg.eigh(apart.T.double() @ apart.double())
        vectors = vectors.flip(1)[:, : self.dimensions].T
        # A component's sign is nobody's choice: the largest entry is made positive.
        signs = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)).sign()
        self.projection.copy_(vectors * signs)


class TrainedInFeatureSpace(FeatureSpace):
    """Base of those that the trainer trains towards features, whose mean and deviation are learned before.

    On the CPU, what the backbone says of whole normal images is kept for the training, in a temporary file of at most
    `cache_gb`: they come again in every epoch, and asking it costs more than the file.

    Args, Raises: those of `FeatureSpace`.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._known: KnownGrids | None = None
        self._opened = ExitStack()

    def prepare(self, batches: Iterable[Tensor]) -> None:
        """As `Preparing`."""
        self.release()
        cache = self.learn_normal(batches, self._opened)
        if self.mean.device.type == "cpu":
            self._known = KnownGrids(cache, batches)
        else:
            self.release()

    def release(self) -> None:
        """As `Preparing`."""
        self._known = None
        self._opened.close()

    def observe(self, x: Tensor) -> Tensor:
        """As `FeatureSpace`, but in training no gradient passes, and half precision will do: it halves the time."""
        if not self.training:
            return super().observe(x)
        with torch.no_grad():
            if self._known is None or x.device.type != "cpu" or torch.compiler.is_compiling():
                return self.look(x)
            known, grids = self._known.of(x)
            if not known.any():
                return self.look(x)
            observed = self.prepared(grids).movedim(-1, 1)
            if known.all():
                return observed
            others = self.look(x[~known])
            whole = others.new_empty(len(x), *others.shape[1:])
            whole[known], whole[~known] = observed.to(whole), others
            return whole

    def __getstate__(self) -> dict[str, Any]:
        """Copies, and other processes, ask the backbone."""
        return {**self.__dict__, "_known": None, "_opened": ExitStack()}


class FeatureModel(FeatureSpace, ABC):
    """Base of those that learn by themselves: subclasses say what they learn of normal features, and what they expect.

    Args, Raises: those of `FeatureSpace`.
    """

    whole_image = False

    def fit(self, batches: Iterable[Tensor], labels: Sequence[str | None] = ()) -> None:
        """As `Fittable`."""
        with self.normal(batches) as cache:
            self.learn(cache)

    def moments(self, cache: FeatureCache) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D), float64, of all normal patches, as `prepared` gives them."""
        d = self.dimensions
        total = torch.zeros(d, dtype=torch.float64, device=self.mean.device)
        products = torch.zeros(d, d, dtype=torch.float64, device=self.mean.device)
        height, width = cache.values.shape[1:3]
        step = max(1, _MOST_VALUES // (cache.tiles * len(self.mean)))
        for first in tqdm(range(0, height * width, step), "covariance", unit="part", leave=False):
            features = self.prepared(cache.places(first, first + step)).flatten(0, 1)
            total += features.sum(dim=0, dtype=torch.float64)
            products += features.T @ features
        mean = total / cache.patches
        return mean, products / cache.patches - mean[:, None] * mean

    @abstractmethod
    def learn(self, cache: FeatureCache) -> None:
        """From normal tiles' features, which `prepared` brings to the form that `expect` sees."""

    @abstractmethod
    def expect(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D, h, w) -> observed and expected, in the space in which they are compared."""

    def forward(self, x: Tensor) -> Output:
        """(B, 1 or 3, H, W) in [0, 1] -> observed and expected (B, D, h, w)."""
        with torch.autocast(x.device.type, enabled=False):
            return Output(*self.expect(self.observe(x)))


def in_parts(function: Callable[[Tensor], Tensor], places: Tensor, width: int) -> Tensor:
    """function(places), (Q, D) -> (Q,), so many places at a time that memory stays bounded.

    width: the values that it holds for each place.
    """
    if torch.compiler.is_compiling():  # a graph with a number of parts would be one for a number of tiles
        return function(places)
    return torch.cat([function(part) for part in torch.split(places, max(1, _MOST_VALUES // width))])

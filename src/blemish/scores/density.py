"""The score that knows what a network's own activations look like on normal tiles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.errors import ConfigError
from blemish.models.feature_cache import cached
from blemish.models.features import random_projection
from blemish.models.places import nearest_of_places, places_of
from blemish.scores.combinations import Remembering, check_quantile, quantile_of
from blemish.scores.contracts import (
    ExplainedScore,
    FittableScore,
    check_counts,
    check_positive,
    enlarged,
    explain,
)

_LEARNED = "projection", "centre", "whitening", "bank", "lengths"  # their sizes follow from model and tiles


class DensityScore(ExplainedScore):
    """How far a model's activations at each place are from those of normal tiles there, times 1 + another score.

    A network that learned to repair has learned to see what is not normal: where its layers say something unusual,
    something is, though it painted what was there. The distance is Mahalanobis's, / sqrt(D), to the nearest of what a
    bank of normal tiles showed at that place, less the median of normal tiles, and not below 0. Where parts do not lie
    alike, places differ from image to image and the distance says less; what the model repaired still says something,
    so the other score amplifies, at its largest in each place, in units of what normal tiles show.

    Sources: Li et al., CutPaste (CVPR 2021), a density of the features of a network that was trained to tell synthetic
    defects; Defard et al., PaDiM (arXiv 2011.08785), one normal distribution for each place, over random projections;
    Roth et al., PatchCore (arXiv 2106.08265), the nearest of a bank.

    `learn` learns the distributions of training tiles, `fit` median and unit of held-out ones. Before that,
    while the model trains, and for models that show no activations, the other score stands alone.

    Args:
        other: that other score.
        stride: pixels between two places, rounded to what the model's layers allow; not less than its finest layer has.
        dimensions: D, to which all layers together are projected at random, at most: a place costs 4 * D^2 bytes.
        shrinkage: added to the diagonal of the covariance, whose entries are about 1; > 0.
        bank: how many training tiles each place remembers, evenly spread, or as many as there are, at 2 * D + 4 bytes
            each; 0 takes the distance to the mean instead.
        quantile: of the other score over the places of normal tiles, which is its unit; between 0.5 and 1.
        cache_gb: largest size of the temporary file of activations, in GiB. seed: of the projection.

    Raises:
        ConfigError: an argument is out of range, or (in use) tiles have another size than those that were learned.
    """

    projection: Tensor
    centre: Tensor
    whitening: Tensor
    bank: Tensor
    lengths: Tensor
    median: Tensor
    unit: Tensor

    def __init__(
        self,
        other: nn.Module,
        stride: int = 4,
        dimensions: int = 50,
        shrinkage: float = 0.1,
        bank: int = 500,
        quantile: float = 0.999,
        cache_gb: float = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_counts(stride=stride, dimensions=dimensions)
        check_positive(shrinkage=shrinkage, cache_gb=cache_gb)
        check_quantile(quantile)
        if not isinstance(bank, int) or bank < 0:
            raise ConfigError(f"Expected score.bank to be a whole number, or 0 for none, found {bank}.")
        self.other, self.stride, self.dimensions, self.shrinkage = other, stride, dimensions, shrinkage
        self.most, self.quantile, self.cache_gb, self.seed = bank, quantile, cache_gb, seed
        for name in _LEARNED:
            self.register_buffer(name, torch.zeros(0))
        self.register_buffer("median", torch.zeros(()))
        self.register_buffer("unit", torch.ones(()))

    @property
    def remembers_tiles(self) -> bool:
        """As `remembering` asks."""
        return self.most > 0

    @torch.inference_mode()
    def explain(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        other, expected, distance = self._ask(model, x)
        if distance is None:
            return other, expected
        return enlarged((distance - self.median).clamp(min=0) * (1 + other / self.unit), x), expected

    def _ask(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The other score and what it expected; the distance, or None if there is none.

        Both are (B, 1, h, w), of places, the other score at its largest in each; alone it is (B, 1, H, W).
        """
        model = Remembering(model)
        other, expected = explain(self.other, model, x)
        activations = model(x).activations
        if not (activations and self.centre.numel()):
            return other, expected, None
        grid = self._grid(activations, x)
        if grid.shape[-2:] != self.centre.shape[:2]:
            raise ConfigError(
                f"DensityScore has learned a grid of {self.centre.shape[0]} x {self.centre.shape[1]} places, the tile "
                f"has {grid.shape[-2]} x {grid.shape[-1]}: score tiles of the size that was trained."
            )
        projected = torch.einsum("dk,bkhw->bhwd", self.projection, grid) - self.centre
        apart = torch.einsum("hwij,bhwj->bihw", self.whitening, projected)
        if self.bank.numel():
            apart = apart - nearest_of_places(apart, self.bank, self.lengths)
        # What was repaired shows at outlines, the distance inside them, too: pixel by pixel they would miss each other.
        return _largest(other, grid.shape[-2:]), expected, apart.square().mean(dim=1, keepdim=True).sqrt()

    @torch.no_grad()
    def fit(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """As `FittableScore`."""
        batches = list(batches)  # the other score goes through them, too
        if isinstance(self.other, FittableScore):
            self.other.fit(model, batches)
        if not self.centre.numel():
            return
        others, distances = [], []
        for x in batches:
            other, _, distance = self._ask(model, x)
            assert distance is not None  # it has learned of this model's activations
            others.append(other.flatten())
            distances.append(distance.flatten())
        self.median.copy_(quantile_of(torch.cat(distances), 0.5))
        self.unit.copy_(quantile_of(torch.cat(others), self.quantile).clamp(min=1e-6))

    @torch.no_grad()
    def learn(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """As `LearningScore`."""
        some = next(iter(batches))[:1]
        if not model(some).activations:
            return
        self.to(some.device)

        def grid(x: Tensor) -> Tensor:
            return self._grid(model(x).activations, x)

        with cached(grid, batches, self.cache_gb, some.device, "score.cache_gb") as cache:
            count = len(cache.mean)
            dimensions = min(self.dimensions, count)
            projection = random_projection(dimensions, count, torch.Generator().manual_seed(self.seed)) / cache.unit

            mean, matrix = cache.mean.to(some.device), projection.T.to(some.device)

            def prepared(features: Tensor) -> Tensor:
                return (features.to(mean) - mean) @ matrix

            places = places_of(cache, prepared, dimensions, self.shrinkage, self.most)
            height, width = cache.values.shape[1:3]
            self.projection = projection.to(self.centre)
            self.bank, self.lengths = places.bank.to(self.centre.device), places.lengths.to(self.centre)
            self.whitening = places.whitening.view(height, width, dimensions, dimensions).to(self.centre)
            self.centre = (places.centre + projection @ cache.mean).view(height, width, dimensions).to(self.centre)

    def _grid(self, activations: Sequence[Tensor], x: Tensor) -> Tensor:
        """All layers at one size, float32: (B, K, h, w)."""
        finest = max(activations, key=lambda layer: layer.shape[-1])
        factor = max(1, self.stride * finest.shape[-1] // x.shape[-1])
        height, width = (max(1, side // factor) for side in finest.shape[-2:])
        layers = []
        for layer in activations:
            layer = layer.float()
            if (pooled := layer.shape[-1] // width) > 1:
                layer = F.avg_pool2d(layer, min(pooled, *layer.shape[-2:]))
            if layer.shape[-2:] != (height, width):
                layer = F.interpolate(layer, (height, width), mode="bilinear", align_corners=False)
            layers.append(layer)
        return torch.cat(layers, dim=1)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        for name in _LEARNED:
            if (stored := state_dict.get(prefix + name)) is not None:
                setattr(self, name, torch.empty_like(stored, device=self.centre.device))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _largest(values: Tensor, size: Sequence[int]) -> Tensor:
    """(B, 1, H, W) -> (B, 1, h, w), the largest of each place."""
    (height, width), (rows, columns) = values.shape[-2:], size
    if height % rows or width % columns:
        return F.adaptive_max_pool2d(values, (rows, columns))
    return F.max_pool2d(values, (height // rows, width // columns))

"""Normal features as a normal distribution, at each place or everywhere."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from blemish.errors import ConfigError
from blemish.models.arguments import check_positive
from blemish.models.contracts import FeatureSource
from blemish.models.feature_cache import FeatureCache
from blemish.models.features import FeatureModel
from blemish.models.places import Places, places_of, whitener


class _Whitened(FeatureModel):
    """Base: the mean is expected, and both are whitened, so that their squared distance is Mahalanobis's.

    With residual=l2, which takes a mean over features, a score is the squared Mahalanobis distance / D.
    """

    centre: Tensor
    whitening: Tensor

    def __init__(
        self,
        backbone: FeatureSource,
        places: tuple[int, ...],
        shrinkage: float,
        projection: str,
        dimensions: int | None,
        cache_gb: float,
        seed: int,
    ) -> None:
        super().__init__(backbone, projection, dimensions, cache_gb, seed)
        check_positive(shrinkage=shrinkage)
        self.shrinkage = shrinkage
        d = self.dimensions
        self.register_buffer("centre", torch.zeros(*places, d))
        self.register_buffer("whitening", torch.eye(d).repeat(*places, 1, 1))

    @abstractmethod
    def learn(self, cache: FeatureCache) -> None:
        """Fill `centre` and `whitening`."""


class PlaceGaussian(_Whitened):
    """Expects at each place the mean of normal tiles there, and knows how features vary together.

    Source: Defard et al., PaDiM, arXiv 2011.08785, which adds 0.01 to the covariance's diagonal, too. For aligned
    parts: a place must show the same in every image, so images are of one size, and a tile is an image.

    Args:
        backbone, projection, dimensions, cache_gb, seed: those of `FeatureModel`.
        size: side of a tile, which is a whole image.
        shrinkage: added to the diagonal of the covariance, whose entries are about 1; > 0.

    Raises:
        ConfigError: an argument is out of range, or (in `forward`) the tile has another size.
    """

    whole_image = True
    most = 0  # tiles that a place remembers

    def __init__(
        self,
        backbone: FeatureSource,
        size: int = 256,
        shrinkage: float = 0.01,
        projection: str = "random",
        dimensions: int | None = 100,
        cache_gb: float = 4.0,
        seed: int = 0,
    ) -> None:
        with torch.no_grad():
            height, width = backbone(torch.zeros(1, 1, size, size)).shape[-2:]
        super().__init__(backbone, (height, width), shrinkage, projection, dimensions, cache_gb, seed)

    def learn(self, cache: FeatureCache) -> None:
        self.keep(places_of(cache, self.prepared, self.dimensions, self.shrinkage, self.most))

    def keep(self, places: Places) -> None:
        self.centre.copy_(places.centre.view(self.centre.shape))
        self.whitening.copy_(places.whitening.view(self.whitening.shape))

    def expect(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        if observed.shape[-2:] != self.centre.shape[:2]:
            raise ConfigError(
                f"{type(self).__name__} knows a grid of {self.centre.shape[0]} x {self.centre.shape[1]} places, the "
                f"tile has {observed.shape[-2]} x {observed.shape[-1]}: set image.size and tiling.size to one size, "
                "that of training."
            )
        seen = torch.einsum("hwij,bjhw->bihw", self.whitening, observed)
        mean = torch.einsum("hwij,hwj->ihw", self.whitening, self.centre)
        return seen, mean.expand_as(seen)


class GlobalGaussian(_Whitened):
    """Expects the mean of normal features everywhere, and knows how they vary together.

    Source: Rippel et al., Modeling the distribution of normal data in pre-trained deep features, arXiv 2005.14140, who
    do so for whole images; here every place is judged on its own.

    Args:
        backbone, projection, dimensions, cache_gb, seed: those of `FeatureModel`.
        shrinkage: added to the diagonal of the covariance, whose entries are about 1; > 0.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        backbone: FeatureSource,
        shrinkage: float = 0.01,
        projection: str = "none",
        dimensions: int | None = None,
        cache_gb: float = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, (), shrinkage, projection, dimensions, cache_gb, seed)

    def learn(self, cache: FeatureCache) -> None:
        mean, covariance = self.moments(cache)
        self.centre.copy_(mean)
        self.whitening.copy_(whitener(covariance, self.shrinkage))

    def expect(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        seen = torch.einsum("ij,bjhw->bihw", self.whitening, observed)
        mean = self.whitening @ self.centre
        return seen, mean[:, None, None].expand_as(seen)

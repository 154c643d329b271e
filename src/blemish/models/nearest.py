"""The nearest normal feature, from a bank."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from blemish.errors import ConfigError, nearest_names
from blemish.models.arguments import check_counts
from blemish.models.contracts import FeatureSource
from blemish.models.feature_cache import FeatureCache
from blemish.models.features import FeatureModel, in_parts

CORESETS = ("greedy", "random")
SEARCHES = ("exact", "faiss")
_SKETCH = 64
_AT_ONCE = 8192  # patches of a bank
_LEAST_IN_CELL, _MOST_FOR_CELL = 39, 64  # patches, on average, and of those that its centre is learned from


class NearestFeature(FeatureModel):
    """Expects at each place, wherever it is, the nearest feature of a bank of normal ones.

    Source: Roth et al., Towards total recall in industrial anomaly detection (PatchCore), arXiv 2106.08265; its weight
    by the neighbourhood in the bank is left out.

    Args:
        backbone, projection, dimensions, cache_gb, seed: those of `FeatureModel`.
        bank: number of features to keep; where there are fewer patches, some are kept twice.
        coreset: which ones: greedy, always the one that is farthest from those already kept, so that what is rare among
            normal tiles is not called anomalous; or random. Distances for this choice are those of 64 random
            combinations of the features, as in PatchCore.
        candidates: of greedy choice, so many random patches.
        search: exact; or faiss, which looks into some cells of a large bank only, so that what it finds may be a little
            farther away (Johnson, Douze and Jegou, Billion-scale similarity search with GPUs, arXiv 1702.08734, the
            index IVF). Its index is made at the first tile.
        probes: of faiss, how many cells it looks into.

    Raises:
        ConfigError: an argument is out of range, or the package faiss-cpu is missing.
    """

    remembers_tiles = True
    bank: Tensor

    def __init__(
        self,
        backbone: FeatureSource,
        bank: int = 4000,
        coreset: str = "greedy",
        candidates: int = 60_000,
        projection: str = "none",
        dimensions: int | None = None,
        cache_gb: float = 4.0,
        seed: int = 0,
        search: str = SEARCHES[0],
        probes: int = 16,
    ) -> None:
        super().__init__(backbone, projection, dimensions, cache_gb, seed)
        check_counts(bank=bank, candidates=candidates, probes=probes)
        if search not in SEARCHES:
            raise ConfigError(f"Unknown model.search '{search}': {nearest_names(search, SEARCHES)}")
        self.cells: Cells | None = None
        if search == "faiss":
            self.cells = Cells(probes)
            self.unexportable = "model.search=faiss is outside of PyTorch"
        if coreset not in CORESETS:
            raise ConfigError(f"Unknown model.coreset '{coreset}': {nearest_names(coreset, CORESETS)}")
        if coreset == "greedy" and candidates < bank:
            raise ConfigError(f"Expected model.candidates of at least model.bank ({bank}), found {candidates}.")
        self.coreset, self.candidates = coreset, candidates
        self.register_buffer("bank", torch.zeros(bank, self.dimensions))

    def learn(self, cache: FeatureCache) -> None:
        if self.cells is not None:
            self.cells.forget()
        size = len(self.bank)
        if self.coreset == "greedy":
            patches = self.prepared(cache.sample(self.candidates, self.generator()))
            chosen = greedy_coreset(self._sketched(patches), size) if len(patches) > size else torch.arange(size)
            self.bank.copy_(patches[chosen % len(patches)])
            return
        places = cache.choose(size, self.generator())
        for part in torch.split(torch.arange(size), _AT_ONCE):  # so that a large bank is not held twice
            self.bank[part] = self.prepared(cache.read(places[part % len(places)]))

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if self.cells is not None:
            self.cells.forget()

    def _sketched(self, patches: Tensor) -> Tensor:
        """(N, D) -> (N, 64), distances nearly kept (Johnson and Lindenstrauss); fewer features stay as they are."""
        if self.dimensions <= _SKETCH:
            return patches
        directions = torch.randn(self.dimensions, _SKETCH, generator=self.generator()) / _SKETCH**0.5
        sketched: Tensor = patches @ directions.to(patches.device)
        return sketched

    def expect(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        places = observed.movedim(1, -1)
        search = nearest if self.cells is None else self.cells.nearest
        found = search(places.detach().reshape(-1, self.dimensions), self.bank)
        return observed, self.bank[found].reshape(places.shape).movedim(-1, 1)


def nearest(queries: Tensor, bank: Tensor) -> Tensor:
    """The number of the nearest of `bank` (K, D), by Euclidean distance, for each of `queries` (Q, D): (Q,) int64.

    All are compared, so many at a time that memory stays bounded. Float32 rounds: of two that are equally near but for
    that, either may be found.
    """
    width = min(len(bank), _AT_ONCE)  # of the bank is compared at once: reading it is what takes time

    def search(part: Tensor) -> Tensor:
        smallest = part.new_full(part.shape[:1], torch.inf)
        found = torch.zeros(part.shape[:1], dtype=torch.int64, device=part.device)
        for number, block in enumerate(torch.split(bank, width)):
            # A query's own length is the same for all of the bank.
            values, places = torch.addmm(block.square().sum(dim=1), part, block.T, alpha=-2).min(dim=1)
            found = torch.where(values < smallest, number * width + places, found)
            smallest = torch.minimum(values, smallest)
        return found

    return in_parts(search, queries, width)


class Cells:
    """A bank in cells around centres, of which those next to a query are searched: faiss's index IVF, on the CPU.

    Args:
        probes: how many cells.

    Raises:
        ConfigError: the package is missing.
    """

    def __init__(self, probes: int) -> None:
        if find_spec("faiss") is None:
            raise ConfigError(
                "model.search=faiss needs a package: pip install 'blemish[faiss]', or set model.search=exact."
            )
        self.probes = probes
        self._index: Any = None
        self._of: Tensor | None = None

    def forget(self) -> None:
        """The bank's content has changed."""
        self._of = None

    def nearest(self, queries: Tensor, bank: Tensor) -> Tensor:
        """As the function of this name, but what is found may be a little farther away than the nearest."""
        if self._of is not bank:
            self._index, self._of = self._made(bank), bank
        _, numbers = self._index.search(queries.cpu().contiguous().numpy(), 1)
        found = torch.from_numpy(numbers[:, 0]).to(bank.device)
        if len(lost := torch.nonzero(found < 0)[:, 0]):  # all cells next to it are empty
            found[lost] = nearest(queries[lost], bank)
        return found

    def _made(self, bank: Tensor) -> Any:
        import faiss

        features = bank.detach().cpu().contiguous().numpy()
        count, dimensions = features.shape
        # As faiss advises; it warns of cells with fewer features.
        cells = max(1, min(int(4 * count**0.5), count // _LEAST_IN_CELL))
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(dimensions), dimensions, cells)
        index.cp.max_points_per_centroid = _MOST_FOR_CELL
        index.train(features)
        index.add(features)
        index.nprobe = min(self.probes, cells)
        return index


def greedy_coreset(points: Tensor, count: int) -> Tensor:
    """The numbers of `count` of `points` (N, D), each the farthest from those before it; the first comes first.

    Source: Gonzalez, Clustering to minimize the maximum intercluster distance, 1985, as PatchCore uses it.
    """
    lengths = points.square().sum(dim=1)
    chosen = torch.zeros(count, dtype=torch.int64, device=points.device)
    distances = torch.full_like(lengths, torch.inf)
    for number in tqdm(range(1, count), "coreset", unit="patch", leave=False):
        last = chosen[number - 1]
        distances = torch.minimum(distances, lengths + lengths[last] - 2 * (points @ points[last]))
        distances[last] = -torch.inf  # though rounding may leave some distance to itself
        chosen[number] = distances.argmax()
    return chosen

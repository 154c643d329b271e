"""Trees that isolate what is unusual after few questions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blemish.errors import ConfigError
from blemish.models.arguments import check_counts
from blemish.models.contracts import FeatureSource
from blemish.models.densities import Density
from blemish.models.features import in_parts


class IsolationForest(Density):
    """Judges each place by how few random questions about its features set it apart from normal ones.

    Source: Liu, Ting and Zhou, Isolation forest, ICDM 2008, fitted by scikit-learn. Evidence is the anomaly score of
    the paper, in (0, 1]: scikit-learn's -score_samples. All trees' nodes lie one after the other in the same tensors:
    where each goes on below, a leaf to itself, and at leaves the share of the usual path.

    Args:
        backbone, samples, projection, dimensions, cache_gb, seed: those of `Density`.
        trees: how many. tree_samples: random patches, out of `samples`, that each tree sees.

    Raises:
        ConfigError: an argument is out of range, or (in `fit`) scikit-learn is not installed.
    """

    growing = ("feature", "threshold", "below", "share")
    roots: Tensor
    feature: Tensor
    threshold: Tensor
    below: Tensor
    share: Tensor

    def __init__(
        self,
        backbone: FeatureSource,
        trees: int = 100,
        tree_samples: int = 256,
        samples: int = 20_000,
        projection: str = "none",
        dimensions: int | None = None,
        cache_gb: float = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, samples, projection, dimensions, cache_gb, seed)
        check_counts(trees=trees)
        if not isinstance(tree_samples, int) or tree_samples < 2:
            raise ConfigError(f"Expected model.tree_samples to be a whole number of at least 2, found {tree_samples}.")
        self.trees, self.tree_samples = trees, tree_samples
        self.levels = math.ceil(math.log2(tree_samples))  # scikit-learn grows no tree further
        # Until it is fitted, every tree is one and the same leaf.
        self.register_buffer("roots", torch.zeros(trees, dtype=torch.int64))
        self.register_buffer("feature", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("threshold", torch.zeros(1))
        self.register_buffer("below", torch.zeros(1, 2, dtype=torch.int64))
        self.register_buffer("share", torch.full((1,), 1 / trees))

    def estimate(self, patches: Tensor) -> None:
        from sklearn.ensemble import IsolationForest as Estimator

        seen = min(self.tree_samples, len(patches))
        estimator = Estimator(n_estimators=self.trees, max_samples=seen, random_state=self.seed % 2**32)
        estimator.fit(patches.cpu().numpy())
        trees = [_tree(fitted.tree_) for fitted in estimator.estimators_]
        lengths = [len(tree["feature"]) for tree in trees]
        roots = np.cumsum([0, *lengths[:-1]])
        for root, tree in zip(roots, trees, strict=True):
            tree["below"] += root
        self.fill(roots=roots, **{name: np.concatenate([tree[name] for tree in trees]) for name in self.growing})
        # The paper's denominator, the mean path; of one patch, it is 0, and scikit-learn says 1/2.
        usual = float(_mean_path(np.array([seen]))[0])
        self.share = self.share / (self.trees * usual) if usual else torch.full_like(self.share, 1 / self.trees)

    def score_samples(self, places: Tensor) -> Tensor:
        return in_parts(self._scores, places, self.trees)

    def _scores(self, places: Tensor) -> Tensor:
        node = self.roots.expand(places.shape[0], -1)  # (Q, T)
        for _ in range(self.levels):
            beyond = places.gather(1, self.feature[node]) > self.threshold[node]
            node = self.below[node, beyond.long()]  # a leaf leads to itself
        return -torch.exp2(-self.share[node].sum(dim=1))


def _tree(tree: Any) -> dict[str, npt.NDArray[Any]]:
    """scikit-learn's tree as arrays over its nodes; `share` is a leaf's path, not yet a share of anything."""
    own = np.arange(tree.node_count)
    children = np.stack([tree.children_left, tree.children_right], axis=1).astype(np.int64)
    leaf = children[:, 0] < 0
    depth = np.zeros(tree.node_count)
    for node in own[~leaf]:  # a parent comes before its children
        depth[children[node]] = depth[node] + 1
    children[leaf] = own[leaf, None]
    # Features are float32 and thresholds float64: what is at most the one is at most the next float32 below it.
    threshold = tree.threshold.astype(np.float32)
    threshold = np.where(threshold > tree.threshold, np.nextafter(threshold, np.float32(-np.inf)), threshold)
    return {
        "feature": np.where(leaf, 0, tree.feature),
        "threshold": np.where(leaf, 0, threshold).astype(np.float32),
        "below": children,
        "share": np.where(leaf, depth + _mean_path(tree.n_node_samples), 0),
    }


def _mean_path(counts: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """c(n) of the paper: the mean length of a search that finds nothing, in a tree of n."""
    n = np.maximum(counts, 3).astype(np.float64)
    many = 2 * (np.log(n - 1) + np.euler_gamma) - 2 * (n - 1) / n
    return np.where(counts > 2, many, np.where(counts == 2, 1.0, 0.0))

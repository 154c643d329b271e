"""A boundary around normal features."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blemish.errors import ConfigError, nearest_names
from blemish.models.arguments import check_counts
from blemish.models.contracts import FeatureSource
from blemish.models.densities import Density, squared_distances
from blemish.models.features import in_parts

KERNELS = ("rbf", "nystroem", "linear")


class OneClassSVM(Density):
    """Judges each place by how far its features lie on the wrong side of a boundary around most normal ones.

    Sources: Schoelkopf et al., Estimating the support of a high-dimensional distribution, Neural Computation 2001;
    Williams and Seeger, Using the Nystroem method to speed up kernel machines, NIPS 2000. Fitted by scikit-learn. All
    kernels end as a sum over vectors v: score_samples = sum of c k(v, x), and evidence is scikit-learn's
    -decision_function plus a constant:

    - rbf: k = exp(-gamma |v - x|^2); v are the support vectors. Evidence is sum of c (1 - k), the highest score less
      this one. Far from all normal patches it ends at sum of c: what is very far is told from what is far by rounding.
    - nystroem: the same kernel on `components` random patches, and a linear machine on these by stochastic gradient
      descent, for many patches. Evidence is |w| less the score, |w| being the highest that a score can be.
    - linear: one vector, the weights. Evidence is the highest score of a patch it was fitted to less this one, and 0
      where a place scores higher still.

    Args:
        backbone, samples, projection, dimensions, cache_gb, seed: those of `Density`.
        kernel: rbf, nystroem or linear.
        nu: the share of the patches that may lie outside, in (0, 1); with rbf, at least as many are support vectors.
        gamma: of rbf and nystroem; None takes 1 / (D * variance of all values).
        components: of nystroem.

    Raises:
        ConfigError: an argument is out of range, or (in `fit`) scikit-learn is not installed.
    """

    growing = ("vectors", "weights")
    vectors: Tensor
    weights: Tensor
    gamma: Tensor

    def __init__(
        self,
        backbone: FeatureSource,
        kernel: str = "rbf",
        nu: float = 0.1,
        gamma: float | None = None,
        components: int = 300,
        samples: int = 5000,
        projection: str = "none",
        dimensions: int | None = None,
        cache_gb: float = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, samples, projection, dimensions, cache_gb, seed)
        if kernel not in KERNELS:
            raise ConfigError(f"Unknown model.kernel '{kernel}': {nearest_names(kernel, KERNELS)}")
        if not 0 < nu < 1:  # with 1, libsvm's offset may be anything
            raise ConfigError(f"Expected model.nu between 0 and 1, found {nu}.")
        if gamma is not None and not gamma > 0:
            raise ConfigError(f"Expected model.gamma > 0, or null, found {gamma}.")
        check_counts(components=components)
        self.kernel, self.nu, self.chosen_gamma, self.components = kernel, nu, gamma, components
        self.register_buffer("vectors", torch.zeros(1, self.dimensions))
        # float64: Nystroem's weights may be large, and cancel.
        self.register_buffer("weights", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("gamma", torch.ones(()))

    def estimate(self, patches: Tensor) -> None:
        values = patches.double().cpu().numpy()
        gamma = self.chosen_gamma or 1 / (values.shape[1] * float(values.var()) or 1.0)
        fit = {"rbf": self._fit_rbf, "nystroem": self._fit_nystroem, "linear": self._fit_linear}[self.kernel]
        vectors, weights, highest = fit(values, gamma)
        self.fill(vectors=vectors, weights=weights, gamma=gamma, highest=highest)

    def _fit_rbf(self, values: npt.NDArray[np.float64], gamma: float) -> tuple[Any, Any, float]:
        from sklearn.svm import OneClassSVM as Estimator

        fitted = Estimator(kernel="rbf", nu=self.nu, gamma=gamma).fit(values)
        weights = fitted.dual_coef_[0]
        return fitted.support_vectors_, weights, float(weights.sum())

    def _fit_linear(self, values: npt.NDArray[np.float64], gamma: float) -> tuple[Any, Any, float]:
        from sklearn.svm import OneClassSVM as Estimator

        fitted = Estimator(kernel="linear", nu=self.nu).fit(values)
        return fitted.coef_, [1.0], float((values @ fitted.coef_[0]).max())

    def _fit_nystroem(self, values: npt.NDArray[np.float64], gamma: float) -> tuple[Any, Any, float]:
        from sklearn.kernel_approximation import Nystroem
        from sklearn.linear_model import SGDOneClassSVM

        seed = self.seed % 2**32
        mapping = Nystroem(gamma=gamma, n_components=min(self.components, len(values)), random_state=seed)
        fitted = SGDOneClassSVM(nu=self.nu, random_state=seed).fit(mapping.fit_transform(values))
        # w . (N k) = (N^T w) . k. A mapped patch is no longer than 1, so that no score is above |w|.
        return mapping.components_, mapping.normalization_.T @ fitted.coef_, float(np.linalg.norm(fitted.coef_))

    def score_samples(self, places: Tensor) -> Tensor:
        return in_parts(self._scores, places, 2 * len(self.vectors)).float()

    def _scores(self, places: Tensor) -> Tensor:
        if self.kernel == "linear":
            return (places @ self.vectors.T).double() @ self.weights
        return torch.exp(-self.gamma * squared_distances(places, self.vectors)).double() @ self.weights

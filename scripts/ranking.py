"""How well the figures on synthetic defects rank trainings: for `rank_correlation.py` and the benchmark's page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

FIGURES = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC"}


def pairs(result: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """{figure: (synthetic, test)} of a run, where both are defined."""
    synthetic, test = result.get("synthetic") or {}, result.get("figures") or {}
    return {
        name: (synthetic[name], test[name])
        for name in FIGURES
        if synthetic.get(name) is not None and test.get(name) is not None
    }


def spearman(points: npt.NDArray[np.float64], draws: int = 2000) -> tuple[float, float, float]:
    """The rank correlation of (N, 2), and the 95 % interval of a bootstrap over its rows; NaN where undefined."""

    def correlation(rows: npt.NDArray[np.float64]) -> float:
        first, second = (stats.rankdata(column) for column in rows.T)
        if first.std() == 0 or second.std() == 0:
            return float("nan")
        return float(np.corrcoef(first, second)[0, 1])

    rng = np.random.default_rng(0)
    drawn = [correlation(points[rng.integers(len(points), size=len(points))]) for _ in range(draws)]
    usable = [value for value in drawn if np.isfinite(value)]
    low, high = np.quantile(usable, [0.025, 0.975]) if usable else (float("nan"), float("nan"))
    return correlation(points), float(low), float(high)

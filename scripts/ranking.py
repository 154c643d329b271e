"""How well the figures on synthetic defects rank trainings: for `rank_correlation.py` and the benchmark's page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats


class Compared(NamedTuple):
    """A figure on synthetic defects, the figure of the test part that it is held against, and both in words."""

    synthetic: str
    test: str
    title: str


FIGURES = {
    "image": Compared("image_auroc", "image_auroc", "image AUROC"),
    "pixel": Compared("pixel_auroc", "pixel_auroc", "pixel AUROC"),
    # What a sweep chooses by, unless told otherwise.
    "mean": Compared("mean", "image_auroc", "mean of both against image AUROC"),
    "outlines": Compared("mean", "aupro_0.3", "mean of both against AUPRO@0.3"),
}


def pairs(result: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """{name in FIGURES: (synthetic, test)} of a run, where both are defined."""
    synthetic, test = result.get("synthetic") or {}, result.get("figures") or {}
    both = (synthetic.get("image_auroc"), synthetic.get("pixel_auroc"))
    synthetic = synthetic | {"mean": None if None in both else sum(both) / 2}
    return {
        name: (synthetic[compared.synthetic], test[compared.test])
        for name, compared in FIGURES.items()
        if synthetic.get(compared.synthetic) is not None and test.get(compared.test) is not None
    }


def of_one_seed(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of the seed that most have: another seed holds out other images, so that it draws other defects."""
    seeds = Counter(result.get("seed") for result in results)
    return [result for result in results if result.get("seed") == seeds.most_common(1)[0][0]] if seeds else []


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

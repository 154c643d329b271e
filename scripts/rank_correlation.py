"""How well does the figure without labels rank runs, compared with the labelled test part?

    python scripts/rank_correlation.py DIR... [--out rank_correlation.png]

Over all finished runs below the folders that have both `synthetic.json` and `metrics.json`, prints Spearman's rank
correlation between the AUROC on synthetic defects and that on the test part, for images and for pixels, with a 95 %
interval by bootstrap over runs, and draws a scatter plot. Runs of one data set belong together: ranks across data sets
say which is easier. Needs the extra dev.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

FIGURES = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC"}


def read_runs(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """A row for each run: its folder, and {figure: (synthetic, test)} where both are defined."""
    rows = []
    for folder in folders:
        for file in sorted(folder.rglob("synthetic.json")):
            if not (file.parent / "metrics.json").is_file():
                continue
            synthetic = json.loads(file.read_text(encoding="utf-8"))
            overall = json.loads((file.parent / "metrics.json").read_text(encoding="utf-8"))["overall"]
            pairs = {name: (synthetic[name], overall[name]) for name in FIGURES if overall[name] is not None}
            rows.append({"run": str(file.parent), "folder": str(folder), **pairs})
    return rows


def spearman(pairs: npt.NDArray[np.float64], draws: int = 2000) -> tuple[float, float, float]:
    """The rank correlation of (N, 2), and the 95 % interval of a bootstrap over its rows; NaN where undefined."""

    def correlation(rows: npt.NDArray[np.float64]) -> float:
        first, second = (stats.rankdata(column) for column in rows.T)
        if first.std() == 0 or second.std() == 0:
            return float("nan")
        return float(np.corrcoef(first, second)[0, 1])

    rng = np.random.default_rng(0)
    drawn = [correlation(pairs[rng.integers(len(pairs), size=len(pairs))]) for _ in range(draws)]
    usable = [value for value in drawn if np.isfinite(value)]
    low, high = np.quantile(usable, [0.025, 0.975]) if usable else (float("nan"), float("nan"))
    return correlation(pairs), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("rank_correlation.png"))
    arguments = parser.parse_args()
    rows = read_runs(arguments.folders)
    if len(rows) < 3:
        sys.exit(f"Expected three or more finished runs with synthetic.json and metrics.json, found {len(rows)}.")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawing, axes = plt.subplots(1, len(FIGURES), figsize=(11, 5), layout="constrained")
    for axis, (name, title) in zip(axes, FIGURES.items(), strict=True):
        known = [row for row in rows if name in row]
        axis.set(xlabel=f"{title} on synthetic defects (no labels)", ylabel=f"{title} on the test part")
        if len(known) < 3:
            print(f"{title}: fewer than three runs have it")
            axis.set_title(f"{title}: fewer than three runs")
            continue
        value, low, high = spearman(np.array([row[name] for row in known]))
        said = f"{title}: Spearman {value:.3f} (95 % interval {low:.3f} to {high:.3f}), n = {len(known)}"
        print(said)
        axis.set_title(said, fontsize=9)
        for folder in dict.fromkeys(row["folder"] for row in known):
            points = np.array([row[name] for row in known if row["folder"] == folder])
            axis.scatter(points[:, 0], points[:, 1], label=folder, alpha=0.7)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    drawing.savefig(arguments.out, dpi=120)
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()

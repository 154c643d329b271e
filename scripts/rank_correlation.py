"""How well does the figure without labels rank runs, compared with the labelled test part?

    python scripts/rank_correlation.py DIR_OR_FILE... [--out rank_correlation.png]

A DIR is what `benchmark.py` wrote, whose results.jsonl has a row for each training (or such a FILE), or any folder with
finished runs below it that have both `synthetic.json` and `metrics.json`. For each data set, or each DIR, it prints
Spearman's rank correlation between figures on synthetic defects and those of the test part, with a 95 % interval by
bootstrap over runs, and draws scatter plots. Ranks across data sets would only say which is easier, and those across
seeds whose held-out images are; of several seeds, that of most runs is taken. Needs the extra dev.
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

from benchmark_report import latest, read_results
from ranking import FIGURES, of_one_seed, pairs, spearman


def read_runs(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """A row for each run: the group it belongs to, and {figure: (synthetic, test)} where both are defined."""
    rows = []
    for folder in folders:
        results = folder if folder.is_file() else folder / "results.jsonl"
        if results.is_file():
            done = [result for result in latest(read_results(results)) if result["status"] == "done"]
            for data in dict.fromkeys(result["data"] for result in done):
                alike = of_one_seed([result for result in done if result["data"] == data])
                rows += [{"group": f"{data}, seed {result['seed']}", **pairs(result)} for result in alike]
            continue
        runs = []
        for file in sorted(folder.rglob("synthetic.json")):
            if (file.parent / "metrics.json").is_file():
                synthetic = json.loads(file.read_text(encoding="utf-8"))
                test = json.loads((file.parent / "metrics.json").read_text(encoding="utf-8"))["overall"]
                about = file.parent / "run.json"
                seed = json.loads(about.read_text(encoding="utf-8")).get("seed") if about.is_file() else None
                runs.append({"synthetic": synthetic, "figures": test, "seed": seed})
        rows += [{"group": f"{folder}, seed {run['seed']}", **pairs(run)} for run in of_one_seed(runs)]
    return rows


def in_words(points: npt.NDArray[np.float64]) -> str:
    """Their rank correlation, or why there is none."""
    if len(points) < 3:
        return f"no ranking of {len(points)}"
    value, low, high = spearman(points)
    return f"{value:.2f} ({low:.2f} to {high:.2f}), n = {len(points)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR_OR_FILE")
    parser.add_argument("--out", type=Path, default=Path("rank_correlation.png"))
    arguments = parser.parse_args()
    rows = read_runs(arguments.folders)
    if len(rows) < 3:
        sys.exit(f"Expected three or more finished runs with synthetic defects and a test part, found {len(rows)}.")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawing, axes = plt.subplots(2, 2, figsize=(11, 9), layout="constrained")
    for axis, (name, (_, _, title)) in zip(axes.flat, FIGURES.items(), strict=True):
        axis.set(title=title, xlabel="on synthetic defects (no labels)", ylabel="on the test part")
        for group in dict.fromkeys(row["group"] for row in rows):
            points = np.array([row[name] for row in rows if row["group"] == group and name in row])
            if not len(points):
                continue
            said = f"{group}: {in_words(points)}"
            print(f"{title}, {said}")
            axis.scatter(points[:, 0], points[:, 1], label=said, alpha=0.7)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    drawing.savefig(arguments.out, dpi=120)
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()

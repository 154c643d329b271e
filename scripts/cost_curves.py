"""How time and peak memory grow: with images, their size, the tiles' overlap, and calibration scores.

    python scripts/cost_curves.py [--out costs.md] [--plot costs.png] [--images 100 1000 10000 100000]
                                  [--large 4 16 64] [--sides 256 1024 4096 16384]
                                  [--scores 10 1000 100000 1000000]

An untrained autoencoder of the smallest kind predicts with everything written, so that what is around the model counts;
tiles are 128 pixels. Every figure is taken in a process of its own. Images repeat, by links. Memory is the peak above
that of a process that has loaded the detector and done nothing. Growth is the exponent between neighbours: 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmark_cell import hardware
from benchmark_report import as_table
from invented_run import invent_run, random_images, save_images

SMALLEST = (
    *("model=conv_ae", "model.width=4", "model.depth=2", "model.latent_dim=4", "corruption=none", "score=residual"),
    *("residual=l1", "tiling.standardise=false"),
)
OWN_SIZE, SHRUNK = ("image.short_side=null", "image.square=null"), ("image.short_side=128",)
TILE, SIDE, LARGE_SIDE = 128, 64, 2048
OVERLAPS = (0.0, 0.25, 0.5, 0.75)
WORKER = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from benchmark_cell import peak_mib
what, *words = sys.argv[2:]
"""
PREDICT = """
from dataclasses import replace
from blemish import load_detector, pipeline
from blemish.data.images import allow_large_images
allow_large_images()
run, source, out, overlap = words
detector = load_detector(run, "cpu")
detector = replace(detector, tiling=replace(detector.tiling, overlap=float(overlap)))
idle, start = peak_mib(), time.perf_counter()
summary = pipeline.predict(detector, source, Path(out), progress=False)
if summary.errors:
    sys.exit(summary.errors[0])
print(json.dumps({"seconds": time.perf_counter() - start, "mib": peak_mib() - idle}))
"""
CALIBRATE = """
import numpy as np
from blemish.calibration import Calibration, Promise
scores = np.random.default_rng(0).random(int(words[0])).tolist()
units = [str(place) for place in range(len(scores))]
promise = Promise(alpha=0.1)
idle, start = peak_mib(), time.perf_counter()
card = Calibration.fit(scores, units, promise, "0" * 64)
fitted = time.perf_counter() - start
queries = np.random.default_rng(1).random(1000).tolist()
start = time.perf_counter()
for query in queries:
    card.p_value(query)
per_query = (time.perf_counter() - start) / len(queries)
print(json.dumps({"seconds": fitted, "mib": peak_mib() - idle, "query": per_query}))
"""


@dataclass(frozen=True)
class Point:
    """One measurement: at `size`, seconds of wall time and MiB above the idle process."""

    size: float
    seconds: float
    mib: float
    query: float | None = None


def measure(code: str, *words: object) -> dict[str, float]:
    """What a worker process printed."""
    arguments = [sys.executable, "-c", WORKER + code, str(Path(__file__).parent), "measure", *map(str, words)]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def by_images(run: Path, counts: Sequence[int], folder: Path, side: int, different: int) -> list[Point]:
    """Of `side` pixels; links to so many `different` ones."""
    originals = save_images(random_images(different, side), folder / f"originals {side}")
    points = []
    for count in tqdm(counts, f"images of {side} x {side}"):
        with tempfile.TemporaryDirectory(dir=folder) as name:
            links = Path(name) / "images"
            links.mkdir()
            for place in range(count):
                (links / f"{place:06}.png").symlink_to(originals[place % len(originals)])
            points.append(Point(count, **measure(PREDICT, run, links, Path(name) / "out", 0.25)))
    return points


def by_side(run: Path, sides: Sequence[int], folder: Path) -> list[Point]:
    points = []
    for side in tqdm(sides, "sides"):
        with tempfile.TemporaryDirectory(dir=folder) as name:
            save_images(random_images(1, side), Path(name) / "images")
            points.append(Point(side, **measure(PREDICT, run, Path(name) / "images", Path(name) / "out", 0.25)))
    return points


def by_overlap(run: Path, folder: Path, side: int = 1024) -> list[Point]:
    points = []
    images = save_images(random_images(1, side), folder / "overlap")[0].parent
    for overlap in tqdm(OVERLAPS, "overlaps"):
        with tempfile.TemporaryDirectory(dir=folder) as name:
            points.append(Point(overlap, **measure(PREDICT, run, images, Path(name) / "out", overlap)))
    return points


def by_scores(counts: Sequence[int]) -> list[Point]:
    return [Point(count, **measure(CALIBRATE, count)) for count in tqdm(counts, "calibration scores")]


def growths(points: Sequence[Point], work: Callable[[Point], float]) -> list[str]:
    """The exponent with which time grows with the work, from one point to the next."""
    exponents = [
        math.log(after.seconds / before.seconds) / math.log(work(after) / work(before))
        for before, after in pairwise(points)
    ]
    return ["", *(f"{exponent:.2f}" for exponent in exponents)]


def table(of: str, points: Sequence[Point], work: Callable[[Point], float], per: str) -> str:
    headers = [of, "seconds", f"ms per {per}", "growth", "MiB above idle"]
    rows: list[list[object]] = [
        [
            f"{point.size:g}" if point.size < 1 else f"{point.size:,.0f}",
            f"{point.seconds:.3g}",
            f"{1000 * point.seconds / work(point):.3g}",
            growth,
            f"{point.mib:,.0f}",
        ]
        for point, growth in zip(points, growths(points, work), strict=True)
    ]
    if points[0].query is not None:
        headers.append("us per p-value")
        for row, point in zip(rows, points, strict=True):
            assert point.query is not None
            row.append(f"{1e6 * point.query:.1f}")
    return as_table(headers, rows)


def draw(curves: dict[str, list[Point]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawing, axes = plt.subplots(2, len(curves), figsize=(14, 6), layout="constrained")
    for (above, below), (of, points) in zip(axes.T, curves.items(), strict=True):
        sizes = [point.size for point in points]
        scale = "linear" if min(sizes) < 1 else "log"
        for axis, values, label in (
            (above, [point.seconds for point in points], "seconds"),
            (below, [max(point.mib, 0.1) for point in points], "MiB above idle"),
        ):
            axis.plot(sizes, values, marker="o")
            axis.set(xlabel=of, ylabel=label, xscale=scale, yscale="log")
            axis.grid(alpha=0.3)
    drawing.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("costs.md"))
    parser.add_argument("--plot", type=Path, default=Path("costs.png"))
    parser.add_argument("--images", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--large", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--scores", type=int, nargs="+", default=[10, 1000, 100_000, 1_000_000])
    arguments = parser.parse_args()

    from blemish import __version__
    from blemish.files import write_text

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = invent_run(folder / "run", (*SMALLEST, *OWN_SIZE), TILE)
        shrinking = invent_run(folder / "shrinking", (*SMALLEST, *SHRUNK), TILE)
        curves = {
            "images": by_images(run, arguments.images, folder, SIDE, 100),
            "large images": by_images(shrinking, arguments.large, folder, LARGE_SIDE, 4),
            "side": by_side(run, arguments.sides, folder),
            "overlap": by_overlap(run, folder),
            "calibration scores": by_scores(arguments.scores),
        }
    works: dict[str, tuple[Callable[[Point], float], str, str]] = {
        "images": (lambda point: point.size, "image", f"Images of {SIDE} x {SIDE}, all files written."),
        "large images": (lambda point: point.size, "image", f"Images of {LARGE_SIDE} x {LARGE_SIDE}, each shrunk to "
                         "one tile; maps, heat maps and masks are of the image's own size."),
        "side": (lambda point: point.size**2 / 1e6, "megapixel", "One image; growth with its pixels."),
        "overlap": (lambda point: 1 / (1 - point.size) ** 2, "unit of tiles", "One image of 1024 x 1024; in units of "
                    "the tiles without overlap."),
        "calibration scores": (lambda point: point.size, "score", "Fitting a card, and asking it for a p-value."),
    }  # fmt: skip
    machine: dict[str, Any] = hardware("cpu")
    command = ["python scripts/cost_curves.py"]
    for name in ("images", "large", "sides", "scores"):
        command += [f"--{name}", *map(str, getattr(arguments, name))]
    parts = [
        f"# Costs: blemish {__version__}",
        f"Made by `{' '.join(command)}`. {machine['cpu']}, {machine['cores']} cores.",
        f"![Curves](images/{arguments.plot.name})",
    ]
    for of, points in curves.items():
        work, per, words = works[of]
        parts += [f"## {of.capitalize()}", words, table(of, points, work, per)]
    draw(curves, arguments.plot)
    text = "\n\n".join(parts) + "\n"
    write_text(arguments.out, text)
    print(f"{text}\nwritten: {arguments.out}, {arguments.plot}")


if __name__ == "__main__":
    main()

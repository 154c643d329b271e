"""Measures `blemish diff` on circuit boards whose defects are known, without any training, and where its time goes.

    python scripts/measure_difference.py DEEPPCB OUT [--pairs 24] [--skip 24] [--margin 8] [--seed 0] [KEY=VALUE ...]

DEEPPCB holds `template/NAME.jpg`, `test/NAME.jpg` and `boxes/NAME.txt`, a line `x1 y1 x2 y2 type` for each defect.
All pairs but the first --skip, on which the defaults of configs/diff.yaml were chosen, are compared as they are; of
--pairs of them, spread evenly, the test image is disturbed in known ways, its boxes moved with it. All are compared
with and without alignment. KEY=VALUE are settings of `blemish diff`. Pure noise is held against its law.
Writes difference.csv (every pair), difference.md, difference.png, and the worst pairs, true boxes in green, to worst/.
Needs the extra dev.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from tabulate import tabulate

from blemish.alignment import Motion
from blemish.data.images import FloatArray, list_images, read_image
from blemish.difference.build import build_comparison
from blemish.difference.compare import STEPS, Comparison, Difference
from blemish.difference.outputs import side_by_side
from blemish.errors import BlemishError, DataError
from blemish.files import write_csv, write_text
from blemish.noise import noise_level
from blemish.preprocess import Preprocess
from blemish.settings import settings_of
from disturbances import Disturbance, draw, observe

Boxes = npt.NDArray[np.float64]
"""(N, 4): left, top, right, bottom."""
Row = Mapping[str, Any]
Results = dict[tuple[Disturbance, str], dict[str, float]]

KINDS = ("open", "short", "mousebite", "spur", "copper", "pin-hole")  # DeepPCB's types 1 to 6
OVERLAP = 0.33  # of a box and a region, as DeepPCB asks for
FULL = {"shift": 12.0, "turn": 2.0, "scale": 2.0}
PLAIN, EVERY = Disturbance("none"), Disturbance("every pair")  # undisturbed: the pairs that are disturbed, and all
DISTURBANCES = [
    PLAIN,
    *(Disturbance("shift", shift=shift) for shift in (2, 6, 12)),
    *(Disturbance("turn", turn=turn) for turn in (0.5, 2)),
    *(Disturbance("scale", scale=scale) for scale in (0.5, 2)),
    *(Disturbance("noise", noise=noise) for noise in (10, 20, 30, 40)),
    Disturbance("light", gain=0.8, offset=-0.05),
    Disturbance("light", gain=0.5, offset=0.2),
    Disturbance("all together", noise=10, gain=0.8, offset=-0.05, **FULL),
    Disturbance("all together", noise=20, gain=0.5, offset=0.2, **FULL),
]
ALIGNMENTS = ("with", "without")
NOISE_PAIRS, NOISE_SIGMA, NOISE_SHAPE = 8, 5.0, (400, 400)
NOISE_SETTINGS = (
    "preprocessing.chain=[]",
    "tolerance=0",
    "alignment.motion=none",
    "alignment.illumination=none",
    "threshold.kind=noise",
    "threshold.visible=0",
    "threshold.least=0",
    "cleaning.min_area=1",
)
CONFIDENCES = (0.9, 0.95, 0.99, 0.999)
BAND = 0.99  # of the exact bounds
WORST = 6  # pairs that are written as pictures
GREEN = (0, 200, 0)


@dataclass(frozen=True, eq=False)
class Board:
    """A pair and the true boxes in its test image, (N, 4) and their kinds."""

    name: str
    template: FloatArray
    test: FloatArray
    boxes: Boxes
    kinds: Sequence[str]


def compared_by(words: Sequence[str]) -> Comparison:
    return build_comparison(settings_of("diff", ["reference=template", "query=test", *words]))


def read_boards(folder: Path, skip: int) -> list[Board]:
    grey, boards = Preprocess(channels=1), []
    for path in list_images(folder / "template")[skip:]:
        file = folder / "boxes" / f"{path.stem}.txt"
        if not file.is_file():
            raise DataError(f"There is no {file}: expected a line `x1 y1 x2 y2 type` for each defect.")
        table = np.loadtxt(file, ndmin=2).reshape(-1, 5)
        images = (grey(read_image(place)) for place in (path, folder / "test" / path.name))
        boards.append(Board(path.stem, *images, table[:, :4], [KINDS[int(kind) - 1] for kind in table[:, 4]]))
    if not boards:
        raise DataError(f"No pairs are left in {folder} after the first {skip}: lower --skip.")
    return boards


# --- boxes --------------------------------------------------------------------------------------------------------


def moved(boxes: Boxes, kinds: Sequence[str], motion: Motion, shape: Sequence[int]) -> tuple[Boxes, list[str]]:
    """Where the boxes of an image lie in what `observe` makes of it; those whose centre leaves it are left out."""
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2)
    corners = motion.inverse().apply(corners).reshape(-1, 4, 2)
    found = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    size = np.array(shape[1::-1])
    stays = ((centres(found) >= 0) & (centres(found) < size)).all(axis=1)
    return found[stays].clip(0, np.tile(size, 2)), [kind for kind, stay in zip(kinds, stays, strict=True) if stay]


def regions_of(found: Difference) -> Boxes:
    boxes = [[r.left, r.top, r.left + r.width, r.top + r.height] for r in found.regions]
    return np.array(boxes, np.float64).reshape(-1, 4)


def grown(boxes: Boxes, margin: float, shape: Sequence[int]) -> Boxes:
    return (boxes + margin * np.array([-1, -1, 1, 1])).clip(0, np.tile(shape[1::-1], 2))


def centres(boxes: Boxes) -> Boxes:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def inside(points: Boxes, boxes: Boxes) -> npt.NDArray[np.bool_]:
    """(N, 2) points and (M, 4) boxes -> (N, M), whether a point lies in a box."""
    place = points[:, None]
    return ((place >= boxes[None, :, :2]) & (place <= boxes[None, :, 2:])).all(axis=2)


def matches(found: Boxes, true: Boxes) -> int:
    """How many boxes can be told to belong together, each to one other: those of the largest overlap first."""
    low = np.maximum(found[:, None, :2], true[None, :, :2])
    high = np.minimum(found[:, None, 2:], true[None, :, 2:])
    common = (high - low).clip(0).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (found, true)]
    overlaps = common / np.maximum(areas[0][:, None] + areas[1] - common, 1e-9)
    count = 0
    while overlaps.size and overlaps.max() >= OVERLAP:
        row, column = np.unravel_index(overlaps.argmax(), overlaps.shape)
        overlaps[row], overlaps[:, column] = 0, 0
        count += 1
    return count


def judged(found: Boxes, true: Boxes, kinds: Sequence[str], margin: float, shape: Sequence[int]) -> dict[str, Any]:
    """One pair's counts: all `boxes` and `regions`, and which of them belong together."""
    hits = inside(centres(found), true)
    hit = Counter(kind for kind, is_hit in zip(kinds, hits.any(axis=0), strict=True) if is_hit)
    return {
        "boxes": len(true),
        "regions": len(found),
        "boxes_hit": int(hits.any(axis=0).sum()),
        "regions_right": int(hits.any(axis=1).sum()),
        "matched": matches(found, true),
        "matched_grown": matches(grown(found, margin, shape), true),
        **{f"{kind}_boxes": kinds.count(kind) for kind in KINDS},
        **{f"{kind}_hit": hit[kind] for kind in KINDS},
    }


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """Recall, precision and F1 over all boxes and regions of many pairs."""
    total = {name: sum(row[name] for row in rows) for name in rows[0] if isinstance(rows[0][name], int)}
    result = {}
    for name, recalled, right in (
        ("centre", "boxes_hit", "regions_right"),
        ("tight", "matched", "matched"),
        ("grown", "matched_grown", "matched_grown"),
    ):
        recall = total[recalled] / max(1, total["boxes"])
        precision = total[right] / max(1, total["regions"])
        f1 = 2 * recall * precision / max(recall + precision, 1e-9)
        result |= {f"{name}_recall": recall, f"{name}_precision": precision, f"{name}_f1": f1}
    return result | {f"{kind}_recall": total[f"{kind}_hit"] / (total[f"{kind}_boxes"] or np.nan) for kind in KINDS}


def summed_up(rows: Sequence[Row]) -> Results:
    """The figures of each disturbance, with and without alignment."""
    disturbed = {row["image"] for row in rows if row["query"] != label(PLAIN)}
    found = {}
    for disturbance in (EVERY, *DISTURBANCES):
        for alignment in ALIGNMENTS:
            query = label(PLAIN if disturbance == EVERY else disturbance)
            chosen = [row for row in rows if (row["query"], row["alignment"]) == (query, alignment)]
            if disturbance == PLAIN:
                chosen = [row for row in chosen if row["image"] in disturbed]
            found[disturbance, alignment] = figures(chosen)
    return found


# --- noise alone --------------------------------------------------------------------------------------------------


def noise_bounds(confidence: float, clean: int, defects: int) -> tuple[float, float]:
    """Between which counts the flagged ones of `clean` pixels lie.

    Sigma follows from the median of all pixels, an order statistic of the clean ones where every defect lies above it:
    its place among their quantiles is a Beta variable. Half of what the band leaves out goes to it, half to the
    binomial count above the lowest and the highest threshold.
    """
    rare = (1 - BAND) / 4
    rank = (clean + defects) / 2
    places = stats.beta.ppf([rare, 1 - rare], rank, clean + 1 - rank)
    low, high = stats.halfnorm.ppf(places) / noise_level(0.5) * noise_level(1 - confidence)
    fewest = stats.binom.ppf(rare, clean, stats.halfnorm.sf(high))
    most = stats.binom.isf(rare, clean, stats.halfnorm.sf(low))
    return float(fewest), float(most)


def measure_noise(seed: int) -> list[list[str]]:
    """A row for each confidence: flagged share, its bounds, and the share of single-pixel defects found."""
    lines = []
    for confidence in CONFIDENCES:
        comparison = compared_by([*NOISE_SETTINGS, f"threshold.confidence={confidence}"])
        rng = np.random.default_rng(seed)
        flagged, within, hit, single = [], 0, 0, 0
        for _ in range(NOISE_PAIRS):
            images = (0.5 + rng.normal(0, NOISE_SIGMA / 255, (2, *NOISE_SHAPE, 1))).astype(np.float32)
            defects = np.zeros(NOISE_SHAPE, bool)
            defects.flat[rng.choice(defects.size, defects.size // 1000, replace=False)] = True
            images[1][defects] += np.float32(6 * np.sqrt(2) * NOISE_SIGMA / 255)  # sigma of the difference
            found = comparison(*images)
            count = int(defects.sum())
            fewest, most = noise_bounds(confidence, defects.size - count, count)
            flagged.append(int(found.mask[~defects].sum()))
            within += fewest <= flagged[-1] <= most
            hit, single = hit + int(found.mask[defects].sum()), single + count
        clean = defects.size - count
        lines.append(
            [
                f"{confidence:g}",
                f"{100 * (1 - confidence):g}",
                f"{100 * np.mean(flagged) / clean:.4f}",
                f"{100 * fewest / clean:.4f} to {100 * most / clean:.4f}",
                f"{within} of {NOISE_PAIRS}",
                f"{100 * hit / single:.2f}",
                f"{100 * stats.norm.cdf(6 - noise_level(1 - confidence)):.2f}",
            ]
        )
    return lines


# --- tables and plot ----------------------------------------------------------------------------------------------


def label(disturbance: Disturbance) -> str:
    if disturbance == EVERY:
        return "none, every pair"
    if disturbance.group == "all together":
        return f"all together: contrast x {disturbance.gain:g}, noise {disturbance.noise:g}"
    said = [f"{name} {value:g} {unit}" for name, value, unit in amounts(disturbance) if value]
    if disturbance.gain != 1 or disturbance.offset:
        said.append(f"contrast x {disturbance.gain:g}, brightness {disturbance.offset:+g}")
    return ", ".join(said) or "none"


def amounts(disturbance: Disturbance) -> list[tuple[str, float, str]]:
    units = {"shift": "px", "turn": "°", "scale": "%", "noise": "grey levels"}
    return [(name, getattr(disturbance, name), unit) for name, unit in units.items()]


def as_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return tabulate(rows, headers, "github", disable_numparse=True)


def main_table(results: Results) -> str:
    names = [f"{way}_{figure}" for way in ("centre", "grown") for figure in ("recall", "precision", "f1")]
    rows = [
        [label(disturbance), alignment, *(f"{found[name]:.3f}" for name in (*names, "tight_f1"))]
        for (disturbance, alignment), found in results.items()
    ]
    judged_by = (f"{figure}, {way}" for way in ("centre", "IoU grown") for figure in ("recall", "precision", "F1"))
    return as_table(["query", "alignment", *judged_by, "F1, IoU tight"], rows)


def kind_table(results: Results, every: Sequence[Row]) -> str:
    """Recall by kind of defect, aligned: undisturbed, in the strongest noise alone, and under everything at once."""
    noisiest = max((one for one, _ in results if one.group == "noise"), key=lambda one: one.noise)
    shown = [EVERY, PLAIN, noisiest, *(one for one in DISTURBANCES if one.group == "all together")]
    lines = [
        [
            kind,
            sum(row[f"{kind}_boxes"] for row in every),
            *(f"{results[one, 'with'][f'{kind}_recall']:.3f}" for one in shown),
        ]
        for kind in KINDS
    ]
    return as_table(["defect", "boxes of every pair", *(label(one) for one in shown)], lines)


def time_table(rows: Sequence[Row]) -> str:
    """Median time of each step; shares hold on a busy machine, too."""
    medians = {step: float(np.median([row[f"{step}_s"] for row in rows])) for step in STEPS}
    total = sum(medians.values())
    lines = [[step, f"{1e3 * value:.0f}", f"{100 * value / total:.0f} %"] for step, value in medians.items()]
    cpu = float(np.median([row["cpu_s"] for row in rows]))
    lines.append(["all", f"{1e3 * total:.0f}", "100 %"])
    return (
        as_table(["step", "ms, wall", "share"], lines)
        + f"\n\nA pair takes {1e3 * cpu:.0f} ms of one core's time: {1 / cpu:.1f} pairs per second of an idle core, "
        f"{1 / total:.1f} here by the clock."
    )


def markdown(
    results: Results,
    rows: Sequence[Row],
    noise: Sequence[Sequence[str]],
    arguments: argparse.Namespace,
) -> str:
    every = [row for row in rows if row["query"] == label(PLAIN) and row["alignment"] == "with"]
    disturbed = len({row["image"] for row in rows if row["query"] != label(PLAIN)})
    own = f" Settings: {' '.join(arguments.settings)}." if arguments.settings else " All settings are the defaults."
    size = " x ".join(map(str, NOISE_SHAPE[::-1]))
    headers = ["confidence", "promised, %", "flagged, %", "exact bounds, %", "pairs inside", "6 sigma found, %"]
    return f"""{main_table(results)}

{len(every)} pairs of DeepPCB, 640 x 640 pixels, with {sum(row["boxes"] for row in every)} boxes; {disturbed} of them,
spread evenly, were disturbed. No training.{own} The first {arguments.skip} pairs (sorted
by name), on which the defaults of configs/diff.yaml were chosen, are left out. Shift, turn and scale are drawn at
random, up to what is said; all together: up to {FULL["shift"]:g} px, {FULL["turn"]:g}° and {FULL["scale"]:g} %.

- Centre: a box is hit if a region's centre lies in it, a region is right if its centre lies in a box.
- IoU: box and region overlap by at least {OVERLAP:g}, each taken once. DeepPCB's boxes leave some 10 pixels around a
  defect, a region's box leaves none: tight, it cannot overlap so much with the box of a small defect, whatever is
  found. Grown: by {arguments.margin:g} pixels on each side.

Share of boxes hit (centre), with alignment, by kind of defect:

{kind_table(results, every)}

Time on one core, every pair undisturbed, with alignment; the clock counts whatever else ran on that core, too:

{time_table(every)}

Noise alone: {NOISE_PAIRS} pairs of {size} pixels that differ by Gaussian noise, but for one pixel in 1000 that differs
by 6 standard deviations of the difference and by its own noise. The bounds hold for a pair with probability {BAND:g},
the error of the estimated sigma included. Settings: {" ".join(NOISE_SETTINGS[:3])}
{" ".join(NOISE_SETTINGS[3:])}.

{as_table([*headers, "expected, %"], noise)}
"""


def draw_plot(results: Results, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes_of = {"shift": "px", "turn": "degrees", "scale": "%", "noise": "grey levels"}
    figure, axes = pyplot.subplots(
        1, 5, figsize=(16, 4), sharey=True, layout="constrained", width_ratios=(1, 1, 1, 1, 1.6), facecolor="white"
    )
    style = {"with": ("#0072B2", "o"), "without": ("#D55E00", "s")}
    ways = {"centre_f1": ("by centre", "-"), "grown_f1": ("by IoU, boxes grown", ":")}
    for axis, (group, unit) in zip(axes, axes_of.items(), strict=False):
        chosen = [PLAIN, *(one for one in DISTURBANCES if one.group == group)]
        for alignment, (colour, marker) in style.items():
            for way, (words, line) in ways.items():
                axis.plot(
                    [getattr(one, group) for one in chosen],
                    [results[one, alignment][way] for one in chosen],
                    marker + line,
                    color=colour,
                    fillstyle="full" if alignment == "with" else "none",
                    label=f"{alignment} alignment, {words}",
                )
        axis.set(title=group, xlabel=f"{'sigma' if group == 'noise' else 'up to'}, {unit}")
    chosen = [one for one in DISTURBANCES if one.group in ("light", "all together")]
    for alignment, (colour, _) in style.items():
        for way, (_, line) in ways.items():
            shift = (-0.3 if alignment == "with" else 0.1) + (0.2 if way == "grown_f1" else 0)
            axes[-1].bar(
                np.arange(len(chosen)) + shift,
                [results[one, alignment][way] for one in chosen],
                0.19,
                align="edge",
                facecolor=colour if line == "-" else "white",
                edgecolor=colour,
                linestyle=line,
            )
    names = [f"{one.group}\ncontrast x {one.gain:g}" + f"\nnoise {one.noise:g}" * bool(one.noise) for one in chosen]
    axes[-1].set_xticks(range(len(chosen)), names, fontsize=8)
    axes[-1].set(title="light, and all together")
    axes[0].set(ylabel="F1", ylim=(0, 1.03))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(out / "difference.png", dpi=110)


def picture(found: Difference, true: Boxes) -> npt.NDArray[np.uint8]:
    """Reference, query and overlay, true boxes in green on the last."""
    shown = np.ascontiguousarray(side_by_side(found)[..., ::-1])
    left = shown.shape[1] - found.mask.shape[1]
    for box in np.rint(true).astype(int):
        cv2.rectangle(shown, (left + box[0], box[1]), (left + box[2], box[3]), GREEN)
    return shown


# --- the measurement ----------------------------------------------------------------------------------------------


def measure(
    disturbance: Disturbance,
    boards: Sequence[Board],
    ways: Mapping[str, Comparison],
    margin: float,
    seed: int,
    out: Path,
) -> list[dict[str, Any]]:
    """A row for each pair and alignment; the worst aligned pairs become pictures."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    pictures: list[tuple[int, str, Difference, Boxes]] = []
    for board in boards:
        shape = (board.test.shape[0], board.test.shape[1])
        motion = draw(disturbance, shape, rng)
        query = observe(board.test[..., 0], motion, disturbance, rng)
        true, kinds = moved(board.boxes, board.kinds, motion, shape)
        for alignment, comparison in ways.items():
            begin = time.process_time()
            found = comparison(board.template, query)
            cpu = time.process_time() - begin
            counts = judged(regions_of(found), true, kinds, margin, shape)
            wrong = counts["boxes"] - counts["boxes_hit"] + counts["regions"] - counts["regions_right"]
            if alignment == "with":
                pictures = sorted([*pictures, (wrong, board.name, found, true)], key=lambda entry: -entry[0])[:WORST]
            rows.append(
                {
                    "group": disturbance.group,
                    "query": label(disturbance),
                    "alignment": alignment,
                    "image": board.name,
                    **counts,
                    "motion": found.motion.kind,
                    "verdict": found.verdict.overall,
                    "threshold": found.threshold,
                    **{f"{step}_s": seconds for step, seconds in found.seconds.items()},
                    "cpu_s": cpu,
                }
            )
    folder = out / "worst" / label(disturbance).translate(str.maketrans(" ", "_", ",:"))
    folder.mkdir(parents=True, exist_ok=True)
    for place, (wrong, name, found, true) in enumerate(pictures):
        if wrong:
            cv2.imwrite(str(folder / f"{place}_{name}_{wrong}.png"), picture(found, true))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("deeppcb", type=Path, help="folder with template/, test/ and boxes/")
    parser.add_argument("out", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of blemish diff")
    parser.add_argument("--pairs", type=int, default=24, help="of so many pairs the query is disturbed")
    parser.add_argument("--skip", type=int, default=24, help="pairs at the start that are left out")
    parser.add_argument("--margin", type=float, default=8, help="pixels by which boxes grow")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    try:
        ways = {
            name: compared_by([*arguments.settings, *more])
            for name, more in zip(ALIGNMENTS, ([], ["alignment.motion=none"]), strict=True)
        }
        boards = read_boards(arguments.deeppcb, arguments.skip)
        places = np.linspace(0, len(boards) - 1, min(arguments.pairs, len(boards))).round().astype(int)
        arguments.out.mkdir(parents=True, exist_ok=True)
        for disturbance in DISTURBANCES:
            chosen = boards if disturbance == PLAIN else [boards[place] for place in places]
            found = measure(disturbance, chosen, ways, arguments.margin, arguments.seed, arguments.out)
            rows += found
            for alignment in ALIGNMENTS:
                own = figures([row for row in found if row["alignment"] == alignment])
                said = ", ".join(f"{way} {own[f'{way}_f1']:.3f}" for way in ("centre", "grown", "tight"))
                print(f"{label(disturbance)}, {alignment} alignment: F1 {said}", flush=True)
        noise = measure_noise(arguments.seed)
    except BlemishError as error:
        sys.exit(str(error))
    write_csv(arguments.out / "difference.csv", tuple(rows[0]), rows)
    results = summed_up(rows)
    write_text(arguments.out / "difference.md", markdown(results, rows, noise, arguments))
    draw_plot(results, arguments.out)
    print(f"\n{arguments.out / 'difference.md'}")


if __name__ == "__main__":
    main()

"""Measures the alignment on circuit boards whose motion is known, and where its time goes.

    python scripts/measure_alignment.py DEEPPCB OUT [--pairs 30] [--motion auto] [--seed 0]

DEEPPCB holds `template/NAME.jpg` and `test/NAME.jpg`. Each template is seen through a random motion, with noise and a
change of brightness and contrast: the error is the mean distance in pixels between the motion found and the true one.
A query made of the test image, with its defects, is held against the motion between the unmoved pair, found without
noise, since these images lie only roughly on each other: that line shows consistency, and not accuracy.
Writes alignment.csv (every pair), alignment.md (medians), alignment.png and one pair's difference. Needs the extra dev.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tabulate import tabulate

from blemish.alignment import Alignment, Motion, compensate, judge, warp
from blemish.alignment.translation import cross_correlation, phase_correlation
from blemish.data.images import FloatArray, list_images, read_image
from blemish.errors import BlemishError
from blemish.files import write_csv
from blemish.preprocess import Preprocess
from disturbances import Disturbance, draw, observe


@dataclass(frozen=True)
class Condition(Disturbance):
    """A disturbance, and how it is met."""

    shift: float = 12.0
    noise: float = 10.0
    defects: bool = False
    settings: tuple[tuple[str, Any], ...] = ()


FULL = {"turn": 2.0, "scale": 2.0}
CONDITIONS = [
    *(Condition("shift", shift=shift) for shift in (1, 4, 8, 12)),
    *(Condition("turn", turn=turn) for turn in (0.5, 1, 2)),
    *(Condition("scale", scale=scale) for scale in (0.5, 1, 2)),
    *(Condition("noise, shift only", noise=noise) for noise in (0, 10, 20, 30, 40)),
    *(Condition("noise, full motion", noise=noise, **FULL) for noise in (0, 10, 20, 30, 40)),
    Condition("light, full motion", gain=0.5, offset=0.2, **FULL),
    Condition("light, full motion", gain=0.8, offset=-0.05, **FULL),
    Condition("light, full motion", ramp=0.5, **FULL),
    Condition("light, full motion", ramp=0.5, settings=(("illumination", "blocks"),), **FULL),
    Condition("defects", defects=True, settings=(("motion", "translation"),)),
    Condition("defects", defects=True, settings=(("motion", "affine"),), **FULL),
    Condition("defects", defects=True, **FULL),
    Condition("settings", noise=20, settings=(("motion", "translation"),)),
    Condition("settings", noise=20, settings=(("motion", "affine"),), **FULL),
    Condition("settings", noise=20, settings=(("start", "phase"),), **FULL),
    Condition("settings", noise=20, settings=(("start", "features"),), **FULL),
    Condition("settings", noise=20, settings=(("refine_by_verdict", True),), **FULL),
]


def measure(condition: Condition, pairs: list[tuple[FloatArray, FloatArray]], motion: str, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    alignment = Alignment(**{"motion": motion, **dict(condition.settings)})
    errors, times, kinds, verdicts = [], [], [], []
    for template, test in pairs:
        shape = (template.shape[0], template.shape[1])
        truth = draw(condition, shape, rng)
        query = observe((test if condition.defects else template)[..., 0], truth, condition, rng)
        if condition.defects:
            truth = alignment.find(template[..., 0], test[..., 0]) @ truth
        begin = time.process_time()
        found = alignment(template, query)
        times.append(1e3 * (time.process_time() - begin))
        errors.append(found.motion.displacement(truth, shape)[0])
        kinds.append(found.motion.kind)
        verdicts.append(found.verdict.overall)
    return {"errors": errors, "times": times, "kinds": kinds, "verdicts": verdicts}


def steps(template: FloatArray, motion: Motion, query: FloatArray) -> list[tuple[str, float]]:
    """Milliseconds of processor time for each part, median of 7."""
    grey, target, shape = template[..., 0], query[..., 0], (query.shape[0], query.shape[1])
    quarter, quarter_target = (cv2.resize(each, None, fx=0.25, fy=0.25) for each in (grey, target))
    warped, valid = warp(template, motion, shape)
    parts: list[tuple[str, Callable[[], object]]] = [
        ("cross-correlation, whole image", lambda: cross_correlation(grey, target, 0.1)),
        ("phase correlation, whole image", lambda: phase_correlation(grey, target, 0.1)),
        ("cross-correlation, quarter of the side", lambda: cross_correlation(quarter, quarter_target, 0.1)),
        *((f"motion {kind}", lambda kind=kind: Alignment(motion=kind).find(grey, target)) for kind in KINDS),
        ("warp", lambda: warp(template, motion, shape)),
        *((f"light {how}", lambda how=how: compensate(warped, query, valid, how)) for how in LIGHTS),
        ("verdict", lambda: judge(target, warped[..., 0], grey, valid)),
        ("auto, everything", lambda: Alignment()(template, query)),
    ]
    found = []
    for name, call in parts:
        times = []
        for _ in range(7):
            begin = time.process_time()
            call()
            times.append(1e3 * (time.process_time() - begin))
        found.append((name, float(np.median(times))))
    return found


KINDS = ("translation", "euclidean", "affine", "homography", "auto")
LIGHTS = ("global", "blocks", "clahe")


def label(condition: Condition) -> str:
    said = [f"shift {condition.shift:g} px", f"turn {condition.turn:g}°", f"scale {condition.scale:g} %"]
    said += [f"noise {condition.noise:g}"]
    if condition.gain != 1 or condition.offset:
        said.append(f"contrast x {condition.gain:g}, brightness {condition.offset:+g}")
    if condition.ramp:
        said.append(f"contrast falls by {condition.ramp:.0%} across")
    said += [f"{name}={value}" for name, value in condition.settings]
    return ", ".join(said)


def draw_plot(results: list[tuple[Condition, dict[str, Any]]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = ["shift", "turn", "scale", "noise, shift only", "noise, full motion"]
    figure, axes = pyplot.subplots(1, len(groups), figsize=(16, 3.6), sharey=True, layout="constrained")
    for axis, group in zip(axes, groups, strict=True):
        chosen = [(condition, found) for condition, found in results if condition.group == group]
        field = group.split(",")[0]
        axis.boxplot(
            [found["errors"] for _, found in chosen],
            tick_labels=[f"{getattr(condition, field):g}" for condition, _ in chosen],
            whis=(0, 100),
        )
        axis.axhline(0.5 if chosen[0][0].full else 0.1, color="tab:red", linestyle=":")
        axis.set(
            yscale="log", title=group, xlabel={"shift": "px", "turn": "degrees", "scale": "%"}.get(field, "grey levels")
        )
    axes[0].set_ylabel("error, px (boxes: quartiles; whiskers: all)")
    figure.savefig(out / "alignment.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("deeppcb", type=Path, help="folder with template/ and test/")
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--motion", default="auto", choices=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    try:
        paths = list_images(arguments.deeppcb / "template")
        chosen = [paths[place] for place in np.linspace(0, len(paths) - 1, arguments.pairs).round().astype(int)]
        grey = Preprocess(channels=1)
        pairs = [(grey(read_image(path)), grey(read_image(arguments.deeppcb / "test" / path.name))) for path in chosen]
        arguments.out.mkdir(parents=True, exist_ok=True)
        results, lines, rows = [], [], []
        for condition in CONDITIONS:
            found = measure(condition, pairs, arguments.motion, arguments.seed)
            results.append((condition, found))
            errors = found["errors"]
            kinds = ", ".join(f"{found['kinds'].count(kind)} {kind}" for kind in dict.fromkeys(found["kinds"]))
            figures = [np.median(errors), np.quantile(errors, 0.9), max(errors), np.median(found["times"])]
            improved = found["verdicts"].count("improved")
            lines.append([condition.group, label(condition), *(f"{value:.3g}" for value in figures), improved, kinds])
            print(" | ".join(map(str, lines[-1])), flush=True)
            for place, path in enumerate(chosen):
                row = {name[:-1]: values[place] for name, values in found.items()}
                rows.append({"condition": label(condition), "group": condition.group, "image": path.name, **row})
    except BlemishError as error:
        sys.exit(str(error))
    write_csv(arguments.out / "alignment.csv", tuple(rows[0]), rows)
    headers = ["group", "condition", "median px", "90 % px", "worst px", "ms", f"improved of {len(pairs)}", "kinds"]
    text = tabulate(lines, headers, tablefmt="github", disable_numparse=True)
    rng = np.random.default_rng(arguments.seed)
    condition = Condition("example", noise=20, gain=0.8, offset=0.1, defects=True, **FULL)
    template, test = pairs[0]
    motion = draw(condition, (template.shape[0], template.shape[1]), rng)
    query = observe(test[..., 0], motion, condition, rng)
    times = tabulate(steps(template, motion, query), ["step", "ms"], tablefmt="github", floatfmt=".1f")
    (arguments.out / "alignment.md").write_text(f"{text}\n\n{times}\n", encoding="utf-8")
    aligned = Alignment()(template, query)
    difference = np.abs(aligned.reference - aligned.query) * aligned.valid[..., None]
    strip = np.hstack([aligned.query, aligned.reference, difference])
    cv2.imwrite(str(arguments.out / "example.png"), np.rint(strip * 255).astype(np.uint8))
    draw_plot(results, arguments.out)
    print(f"\n{times}\n\n{arguments.out / 'alignment.md'}")


if __name__ == "__main__":
    main()

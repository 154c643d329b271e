"""Writes what `prove_calibration.py` found: proof.json, two CSV files, proof.md, and one figure (PNG and SVG)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullFormatter
from scipy import stats
from tabulate import tabulate

from blemish.files import atomic, write_csv, write_json, write_text

# Okabe and Ito, Color universal design, 2008.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
MARKERS = {"plain": "o", "denoising": "s", "vae": "^"}
SHOWN = 0.05  # the alpha of the middle and right panel
METHODS = (
    "blemish, pac",
    "blemish, marginal",
    "largest normal score",
    "mean + 3 sigma",
    "Gaussian quantile of image scores",
    "parametric noise (assumption)",
    "pooled pixel quantile",
)


def write_proof(proof: dict[str, Any], out: Path) -> str:
    """Write everything to `out`. Returns the verdict for the terminal."""
    kept = [row for row in proof["cells"] if not row["refused"]]
    with atomic(out / "proof_counts.npz") as temporary, temporary.open("wb") as stream:
        split, population = (np.array([row["counts"][place] for row in kept]) for place in (0, 1))
        np.savez_compressed(stream, split=split, population=population)
    plain = [{key: value for key, value in row.items() if key != "counts"} for row in proof["cells"]]
    write_json(out / "proof.json", proof | {"cells": plain})
    flat = [_flatten(row) for row in plain]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    write_csv(out / "proof.csv", columns, flat)
    write_csv(out / "proof_contrast.csv", list(proof["contrast"][0]), proof["contrast"])
    text = markdown(proof, kept)
    write_text(out / "proof.md", text)
    draw(proof, kept, out)
    files = "proof.md, proof.json, proof.csv, proof_contrast.csv, proof_counts.npz, proof.png, proof.svg"
    return f"{verdict(proof, 'simple')}\n\nwritten to {out}: {files}"


def _flatten(row: Mapping[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in row.items() if not isinstance(value, dict)}
    nested = {key: value for key, value in row.items() if isinstance(value, dict)}
    return flat | {f"{name}_{key}": value for name, inner in nested.items() for key, value in inner.items()}


# --- tables -------------------------------------------------------------------------------------------------------


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def span(values: Iterable[float]) -> str:
    low, *_, high = sorted([*values] * 2)
    return percent(low) if percent(low) == percent(high) else f"{percent(low)} to {percent(high)}"


def verdict(proof: Mapping[str, Any], style: str) -> str:
    headers = ["check", "cells", "outside of 99 %", "expected by chance", "chance of so many or more"]
    rows = [
        [row["check"], row["cells"], row["outside"], f"{row['expected']:.1f}", f"{row['chance']:.3f}"]
        for row in proof["checks"]
    ]
    return as_table(headers, rows, style)


def as_table(headers: Sequence[str], rows: Sequence[Sequence[object]], style: str = "github") -> str:
    return tabulate(rows, headers, style, disable_numparse=True)


def markdown(proof: Mapping[str, Any], kept: Sequence[Mapping[str, Any]]) -> str:
    made, data = proof["made"], proof["data"]
    groups: dict[tuple[str, str, float], list[Mapping[str, Any]]] = {}
    for row in proof["cells"]:
        groups.setdefault((row["data"], row["rule"], row["alpha"]), []).append(row)
    rates, pac = [], []
    for (name, rule, alpha), rows in groups.items():
        start = [name, rule, percent(alpha)]
        if rows[0]["refused"]:
            rates.append([*start, rows[0]["n"], *[""] * 4, rows[0]["refused"]])
            continue
        first = rows[0]["split"]
        inside = f"{sum(row['split']['inside'] for row in rows)} of {len(rows)}"
        rates.append(
            [
                *start,
                f"{rows[0]['n']}, {rows[0]['m']}",
                rows[0]["k"],
                percent(first["expected"]),
                f"{percent(first['low'])} to {percent(first['high'])}",
                span(row["split"]["rate"] for row in rows),
                inside,
            ]
        )
        population = [row["population"] for row in rows]
        limit = rows[0]["pac_limit"]
        pac.append(
            [
                *start,
                percent(first["above_expected"]),
                span(row["split"]["above_alpha"] for row in rows),
                percent(population[0]["above_expected"]),
                span(row["above_alpha"] for row in population),
                "no promise" if limit is None else f"at most {percent(limit)}",
                "" if limit is None else f"{sum(row['pac_kept'] for row in rows)} of {len(rows)}",
            ]
        )
    outside = [
        f"- {row['data']}, {row['model']}, {row['mask_rule']}, {row['rule']}, alpha {row['alpha']:g}: "
        + "; ".join(_outside(row))
        for row in kept
        if _outside(row)
    ]
    broken = ", ".join(f"by {off} in {count} of {len(kept)}" for off, count in proof["caught"].items())
    doubts = {f"{name}, {model}": d for name, entry in data.items() for model, d in entry["doubts"].items() if d}
    first_doubt = next((f", the first because\n{d[0]}" for d in doubts.values()), "")
    equal = [row["equal_scores"] for row in kept if row["equal_scores"]]
    return f"""# Proof of the calibration, blemish {made["version"]}

    {made["command"]}

Seed {made["seed"]}, {made["splits"]} repetitions, {
        made["steps"]
    } training steps. A cell is one data set, model, mask rule,
rule of the promise and alpha; each draws from a random stream of its own. All rates are in percent; all bands hold
{
        100
        * made[
            "band"
        ]:g} % and are exact (sums of counts by convolution, shares by the binomial law), but for the chi-square
tests of whole distributions, which are asymptotic.

## Verdict

{verdict(proof, "github")}

With this many cells about one in a hundred leaves its band by chance; the last column is the binomial chance of at
least as many. No band is widened. In {proof["cards_agree"]} of {
        len(kept)
    } cells blemish's calibration card has the very
threshold of these experiments. They can fail: the mean rate gives away a rank too low {broken} cells.

Cells outside:

{chr(10).join(outside) or "none"}

## Data and models

{
        as_table(
            ["data", "trained on", "pool", "n", "m"],
            [[name, *list(entry.values())[:4]] for name, entry in data.items()],
        )
    }

Models: {", ".join(f"{name} ({' '.join(overrides)})" for name, overrides in made["models"].items())}. Mask rules:
{
        ", ".join(" ".join(str(value) for value in rule.values()) for rule in made["mask_rules"])
    }. No image of the pool has been
seen in training. Each is scored once. {len(equal)} of {len(kept)} cells have equal scores (at most {
        max(equal, default=0)
    }),
which can only make alarms rarer: there the upper side of a band is held against the counts as they came, the lower side
against those with ties broken.

## Experiment 1: random splits of the pool

False alarms among m test images, threshold from n others. Without ties the exact law is BetaBinomial(m, n + 1 - k, k),
with mean (n + 1 - k) / (n + 1). Mean rates from the lowest to the highest of three models and three mask rules.

{as_table(["data", "rule", "alpha", "n, m", "k", "expected", "band of the mean", "mean rate", "inside"], rates)}

## Experiment 2: the pool as the population, and the pac promise

n calibration images drawn with replacement, so that the true rate of each threshold is known. The pac promise: it
exceeds alpha in at most {
        percent(made["delta"])
    } % of calibrations. Rates in a split exceed alpha more often, as the m test
images add noise of their own. The marginal rule makes no such promise.

{
        as_table(
            [
                "data",
                "rule",
                "alpha",
                "splits above alpha: exact",
                "found",
                "true rates above alpha: exact",
                "found",
                "limit with band",
                "kept",
            ],
            pac,
        )
    }

## What other thresholds do

Share of normal test images with any pixel above the threshold, from the lowest to the highest model, at alpha =
{percent(SHOWN)} %; all thresholds of a model on the same {proof["contrast"][0]["splits"]} splits (other alphas in
proof_contrast.csv).

{_contrast_table(proof)}

The largest normal score and mean + 3 sigma have no alpha: their rate is what n and the scores make of it. The pooled
pixel quantile bounds the share of pixels, not of images. Parametric noise is an assumption, and has no verdict; it is
meant for residual=l1 without smoothing. Its own warnings call it doubtful for {len(doubts)} of the
{len(data) * len(made["models"])} models here{first_doubt}.

## What this does not show

Images drawn at random from one pool are exchangeable by construction. So this proves ranks, thresholds and comparisons,
with the scores that blemish gives to real images, for any model, good or bad. It does not prove that tomorrow's images
resemble the calibration images. Nor does it say anything of defects found: a valid threshold on a useless model finds
nothing.
"""


def _outside(row: Mapping[str, Any]) -> list[str]:
    found = []
    for name in ("split", "population"):
        part = row[name]
        checks = {
            "mean": (part["inside"], part["rate"], part["low"], part["high"]),
            "share above alpha": (part["above_inside"], part["above_alpha"], part["above_low"], part["above_high"]),
        }
        for what, (inside, value, low, high) in checks.items():
            if not inside:
                found.append(f"{name}, {what}: {100 * value:.3f} % not in {100 * low:.3f} to {100 * high:.3f} %")
        if part["fit_p"] < 0.01:
            found.append(f"{name}, distribution: p = {part['fit_p']:.4f}")
    if row["pac_kept"] is False:
        found.append(f"pac fails in {percent(row['population']['above_alpha'])} %")
    return found


def _contrast_table(proof: Mapping[str, Any]) -> str:
    rows = []
    for method in METHODS:
        cells = [
            [entry["rate"] for entry in proof["contrast"] if _is_shown(entry, method) and entry["data"] == name]
            for name in proof["data"]
        ]
        rows.append([method, *(span(rates) if rates else "refused" for rates in cells)])
    return as_table(["threshold", *proof["data"]], rows)


def _is_shown(entry: Mapping[str, Any], method: str) -> bool:
    return entry["method"] == method and entry["alpha"] in (None, SHOWN)


# --- the figure ---------------------------------------------------------------------------------------------------


def draw(proof: Mapping[str, Any], kept: Sequence[Mapping[str, Any]], out: Path) -> None:
    style = {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 12,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "svg.hashsalt": "blemish",
        "svg.fonttype": "path",
    }
    names = list(proof["data"])
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    with plt.rc_context(style):
        figure, (left, middle, right) = plt.subplots(
            1, 3, figsize=(16, 6), width_ratios=(1.25, 0.9, 0.85), layout="constrained", facecolor="white"
        )
        draw_rates(left, kept, names, colours)
        draw_true_rates(middle, kept)
        draw_contrast(right, proof["contrast"], colours)
        handles: list[Any] = [
            Rectangle((0, 0), 1, 1, color=colours[name], label=f"{name}, n = {proof['data'][name]['n']}")
            for name in names
        ]
        handles += [
            Line2D([], [], color="0.3", marker=marker, linestyle="", label=model) for model, marker in MARKERS.items()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
        # Without dates, so that the same numbers give the same files.
        for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            with atomic(out / f"proof.{suffix}") as temporary:
                figure.savefig(temporary, format=suffix, dpi=100, metadata=metadata)
        plt.close(figure)


def draw_rates(axes: Axes, kept: Sequence[Mapping[str, Any]], names: Sequence[str], colours: Mapping[str, str]) -> None:
    """Mean false-alarm rates of the splits, in units of alpha."""
    groups = [(rule, alpha) for rule in ("marginal", "pac") for alpha in sorted({row["alpha"] for row in kept})]
    width = 0.86 / len(names)
    for row in kept:
        start = groups.index((row["rule"], row["alpha"])) - 0.43 + names.index(row["data"]) * width
        part, alpha, colour = row["split"], row["alpha"], colours[row["data"]]
        own = [other for other in kept if all(other[key] == row[key] for key in ("data", "rule", "alpha"))]
        if own[0] is row:
            height = (part["high"] - part["low"]) / alpha
            band = Rectangle((start + 0.01, part["low"] / alpha), width - 0.02, height, color=colour, alpha=0.3, lw=0)
            axes.add_patch(band)
        place = start + width * (own.index(row) + 1) / (len(own) + 1)
        axes.plot(place, part["rate"] / alpha, MARKERS[row["model"]], color=colour, markersize=3.2, mew=0)
    axes.axhline(1, color="black", lw=1.2)
    axes.text(len(groups) - 0.55, 1.015, "promised: alpha", ha="right", va="bottom")
    axes.axvline(2.5, color="0.8", lw=0.8)
    axes.set_xticks(range(len(groups)), [f"{100 * alpha:g} %" for _, alpha in groups])
    axes.set(xlim=(-0.55, len(groups) - 0.45), ylim=(0, 1.25), ylabel="mean false-alarm rate / alpha")
    for place, label in ((1, "marginal\non average at most alpha"), (4, "pac\nbelow alpha with 95 % confidence")):
        axes.text(place, -0.075, label, transform=axes.get_xaxis_transform(), ha="center", va="top")
    inside = sum(row["split"]["inside"] for row in kept)
    axes.set_title(f"Found = predicted: {inside} of {len(kept)} mean rates lie\nin their exact 99 % bands (boxes)")


def draw_true_rates(axes: Axes, kept: Sequence[Mapping[str, Any]]) -> None:
    """Distribution of the true rate over calibrations, for one setting."""
    setting = {"data": "poly", "model": "denoising", "mask_rule": "any_pixel", "alpha": SHOWN}
    rows = [row for row in kept if all(row[key] == value for key, value in setting.items())]
    grid = np.linspace(0, 0.12, 500)
    for row, colour in zip(rows, ("#D55E00", "#56B4E9"), strict=True):
        n, k = row["n"], row["k"]
        rates = row["counts"][1] / (n + row["m"])
        axes.ecdf(100 * rates, color=colour, lw=3.5, label=f"{row['rule']}, found")
        axes.plot(100 * grid, stats.beta.cdf(grid, n + 1 - k, k), "--", color="black", lw=1.2, label="exact Beta law")
        share = float((rates > SHOWN).mean())
        text = f"{row['rule']}: {100 * share:.1f} % of the\ntrue rates exceed alpha"
        height = {"marginal": 0.42, "pac": 0.72}[row["rule"]]
        text += {"marginal": "\n(promised on average only)", "pac": "\n(promised: at most 5 %)"}[row["rule"]]
        arrow = {"arrowstyle": "->", "color": "0.3"}
        axes.annotate(text, (100 * SHOWN, 1 - share), (6.9, height), arrowprops=arrow, fontsize=10, va="center")
    axes.axvline(100 * SHOWN, color="black", lw=1.2)
    axes.text(100 * SHOWN + 0.1, 0.01, "alpha", va="bottom")
    axes.set(xlim=(0, 11.5), ylim=(0, 1.01), xlabel="true false-alarm rate, %", ylabel="share of calibrations below")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[:3], labels[:3], loc="lower right", bbox_to_anchor=(1, 0.07), frameon=False, fontsize=10)
    axes.set_title(
        f"True rates of {len(rates)} calibrations follow\nthe Beta law (poly, denoising, any pixel, n = {n})"
    )


def draw_contrast(axes: Axes, contrast: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    """Image false-alarm rates of other thresholds on the same splits."""
    least = 1e-4
    for place, method in enumerate(METHODS):
        entries = [entry for entry in contrast if _is_shown(entry, method)]
        for number, entry in enumerate(entries):
            shift = 0.3 * (2 * (number + 0.5) / len(entries) - 1)
            rate = max(entry["rate"], least)
            style = {"color": colours[entry["data"]], "markersize": 5.5, "mew": 0, "clip_on": False}
            axes.plot(rate, place + shift, MARKERS[entry["model"]], **style)
        if place % 2:
            axes.axhspan(place - 0.5, place + 0.5, color="0.96", zorder=-1)
    axes.axvline(SHOWN, color="black", lw=1.2)
    axes.text(SHOWN * 1.08, -0.62, f"alpha = {100 * SHOWN:g} %", va="bottom")
    labels = [method.replace(" of image scores", "\nof image scores").replace(" (", "\n(") for method in METHODS]
    axes.set_yticks(range(len(METHODS)), labels)
    axes.set(
        xscale="log",
        xlim=(least, 1.3),
        ylim=(len(METHODS) - 0.5, -0.65),
        xlabel="mean false-alarm rate of images (0: left edge)",
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title("Other thresholds: the rate\nis whatever comes out")

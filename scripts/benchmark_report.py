"""Writes what `benchmark.py` found as one Markdown page, from results.jsonl and nothing else."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from blemish.files import write_text
from ranking import FIGURES as RANKED
from ranking import of_one_seed, pairs, spearman

Result = Mapping[str, Any]
FEWEST_RANKED = 5  # trainings; an interval of fewer would say nothing
BUSY = 0.2  # cores; others that use more have slowed what was timed
DOUBTFUL = 0.01  # chance below which false alarms are more than the promise explains
FIGURES = {
    "image AUROC": "image_auroc",
    "pixel AUROC": "pixel_auroc",
    "AUPRO@0.3": "aupro_0.3",
    "AUPRO@0.05": "aupro_0.05",
    "F1": "f1",
}


def read_results(file: Path) -> list[dict[str, Any]]:
    """The lines of results.jsonl; one torn by a kill is left out."""
    results = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
        with suppress(json.JSONDecodeError):
            result = json.loads(line)
            if isinstance(result, dict) and {"data", "row", "seed", "status", "key"} <= result.keys():
                results.append(result)
    return results


def latest(results: Sequence[Result]) -> list[Result]:
    """The results that count, rows in order of their first appearance.

    Of a row on a data set, those that were asked for as its newest line was: seeds are never mixed over settings. Of a
    seed the last line, but a failure never hides what is done.
    """
    newest: dict[tuple[str, str], Result] = {}
    for result in results:
        newest[result["data"], result["row"]] = result
    # A failed line lacks the settings' fingerprint: those of the last that was done are meant.
    meant = dict(newest)
    for result in results:
        place = (result["data"], result["row"])
        if result["status"] == "done" and _asked(result) == _asked(newest[place]):
            meant[place] = result
    kept: dict[tuple[str, str, int], Result] = {}
    for result in results:
        place = (result["data"], result["row"])
        exactly = result["status"] == "failed" or _settings(result) == _settings(meant[place])
        if _asked(result) == _asked(meant[place]) and exactly:
            cell = (*place, result["seed"])
            if result["status"] == "done" or cell not in kept or kept[cell]["status"] == "failed":
                kept[cell] = result
    order = list(dict.fromkeys((result["data"], result["row"]) for result in results))
    return sorted(kept.values(), key=lambda result: (order.index((result["data"], result["row"])), result["seed"]))


def _asked(result: Result) -> tuple[Any, ...]:
    return result.get("software"), tuple(result.get("overrides", ()))


def _settings(result: Result) -> Any:
    return result.get("config_fingerprint")


def write_table(file: Path, results: Sequence[Result]) -> None:
    write_text(file, markdown(latest(results)))


# --- cells of the tables ------------------------------------------------------------------------------------------


def spread(values: Sequence[float | None], show: Callable[[float], str]) -> str:
    """The mean, and of several values the lowest and the highest; "-" if one is not defined."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    mean = show(statistics.fmean(known))
    low, high = show(min(known)), show(max(known))
    return mean if low == high else f"{mean} ({low} to {high})"


def three(value: float) -> str:
    return f"{value:.3f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def whole(value: float) -> str:
    return f"{value:,.0f}"


def speed(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _take(group: Sequence[Result], *names: str) -> list[Any]:
    """A value inside each result, None where there is none."""
    values: list[Any] = []
    for result in group:
        value: Any = result
        for name in names:
            value = value.get(name) if isinstance(value, Mapping) else None
        values.append(value)
    return values


def false_alarms(group: Sequence[Result]) -> str:
    """The rate, and its counts over all seeds; "!" where exchangeable images would hardly give so many."""
    alarms, normals = _take(group, "figures", "false_alarms"), _take(group, "figures", "normals")
    rate = spread(_take(group, "figures", "false_alarm_rate"), percent)
    counts = f"{alarms[0]} of {normals[0]}" if len(group) == 1 else f"{', '.join(map(str, alarms))} of {normals[0]}"
    chances = [chance for chance in _take(group, "figures", "chance") if chance is not None]
    return f"{rate}, {counts}{' !' if min(chances, default=1.0) < DOUBTFUL else ''}"


def training_time(group: Sequence[Result]) -> str:
    seconds = _take(group, "training", "seconds")
    text = spread(seconds, duration)
    if any(_take(group, "training", "interrupted")):
        text += " *"
    over = any(60 * (result.get("minutes") or float("inf")) < (_work_seconds(result) or 0.0) for result in group)
    return f"{text}, **over budget**" if over else text


def core_time(group: Sequence[Result]) -> str:
    return spread(_take(group, "training", "core_seconds"), duration)


def _work_seconds(result: Result) -> float | None:
    """What counts against the time allowed: on the CPU that of its cores, which other processes cannot lengthen."""
    training = result.get("training") or {}
    core_seconds = training.get("core_seconds") if result["hardware"]["device"] == "cpu" else None
    return training.get("seconds") if core_seconds is None else core_seconds


# --- the page -----------------------------------------------------------------------------------------------------


def markdown(results: Sequence[Result]) -> str:
    done = [result for result in results if result["status"] == "done"]
    failed = [result for result in results if result["status"] == "failed"]
    software = ", ".join(dict.fromkeys(str(result.get("software")) for result in results))
    commands = joined([result["command"] for result in results if result.get("command")])
    sections = [
        f"# Benchmark: {software}",
        "\n".join(f"    {command}" for command in commands),
        _intro(done),
        *(_section(name, _of_data(done, name), _of_data(failed, name)) for name in _names(results, "data")),
        "## Rows and budgets",
        _rows(results),
        "## Hardware",
        _hardware(done),
        "## What is measured",
        MEASURED,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def joined(commands: Sequence[str]) -> list[str]:
    """Each command once; those that differ in their rows only are one, with all of these."""
    found: dict[tuple[str, bool], list[str]] = {}  # without any, a command runs all rows
    for command in commands:
        rest, rows = [], []
        for word in command.split(" "):
            (rows if word.startswith("rows=") else rest).append(word)
        found.setdefault((" ".join(rest), bool(rows)), []).extend(row for word in rows for row in word[5:].split(","))
    return [f"{rest} rows={','.join(dict.fromkeys(rows))}" if rows else rest for (rest, _), rows in found.items()]


def _intro(done: Sequence[Result]) -> str:
    dates = sorted(str(result["finished"])[:10] for result in done)
    between = "" if not dates else dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return (
        f"{len(done)} trainings are behind these figures{f' ({between})' if between else ''}. Of several seeds: the "
        "mean, and in brackets the lowest and the highest; n is their number. Every threshold was calibrated on "
        "held-out normal images, none was chosen with labels. One seed says nothing of the spread: differences smaller "
        "than that of the row with several seeds are none."
    )


def _section(name: str, done: Sequence[Result], failed: Sequence[Result]) -> str:
    groups = [[result for result in done if result["row"] == row] for row in _names(done, "row")]
    lines = [f"## {name}"]
    if groups:
        lines += [_data_words(done), _figures_table(groups), *_kinds_tables(groups), *_ranking(done)]
        lines += [_costs_table(groups), *_remarks(done)]
    if failed:
        lines.append(
            "Failed:\n\n"
            + "\n".join(f"- {result['row']}, seed {result['seed']}: {result['sentence']}" for result in failed)
        )
    return "\n\n".join(lines)


def _data_words(done: Sequence[Result]) -> str:
    def counts(*names: str) -> str:
        found = sorted({value for value in _take(done, *names) if value is not None})
        return " or ".join(map(str, found)) or "no"

    alphas = " or ".join(sorted({percent(alpha) for alpha in _take(done, "calibration", "alpha")}))
    rules = " or ".join(sorted({str(rule) for rule in _take(done, "calibration", "rule")}))
    masks = counts("figures", "masks")
    return (
        f"Trained on {counts('images', 'train')} normal images ({counts('images', 'validation')} more for validation), "
        f"calibrated on {counts('calibration', 'n')} to a false-alarm rate of {alphas} ({rules}); tested on "
        f"{counts('figures', 'normals')} normal and {counts('figures', 'defects')} defective images, {masks} of them "
        "with a mask."
    )


def _figures_table(groups: Sequence[Sequence[Result]]) -> str:
    columns = [
        (title, name)
        for title, name in FIGURES.items()
        if any(value is not None for group in groups for value in _take(group, "figures", name))
    ]
    synthetic = any(result.get("synthetic") for group in groups for result in group)
    headers = ["row", "n", *(title for title, _ in columns), "false alarms"]
    rows = []
    for group in groups:
        row = [_title(group), str(len(group))]
        row += [spread(_take(group, "figures", name), three) for _, name in columns]
        row.append(false_alarms(group))
        if synthetic:
            row.append(spread(_take(group, "synthetic", "image_auroc"), three))
            row.append(spread(_take(group, "synthetic", "pixel_auroc"), three))
        rows.append(row)
    return as_table(headers + (["synthetic image AUROC", "synthetic pixel AUROC"] if synthetic else []), rows)


def _kinds_tables(groups: Sequence[Sequence[Result]]) -> list[str]:
    """Each kind of defect against all normal images; nothing where there is one kind."""
    groups = [known for group in groups if (known := [result for result in group if result.get("kinds")])]
    kinds = list(dict.fromkeys(kind for group in groups for result in group for kind in result["kinds"]))
    tables = []
    for title, name in (("image AUROC", "image_auroc"), ("AUPRO@0.3", "aupro_0.3")):
        rows = []
        for group in groups:
            found = [_take(group, "kinds", kind, name) for kind in kinds]
            if any(value is not None for values in found for value in values):
                rows.append([_title(group), *(spread(values, three) for values in found)])
        if rows and len(kinds) > 1:
            tables += [f"By kind of defect, {title}:", as_table(["row", *kinds], rows)]
    return tables


def _ranking(done: Sequence[Result]) -> list[str]:
    """How well the figures without labels rank the trainings; nothing where there are few."""
    found = []
    alike = of_one_seed(done)
    for name, compared in RANKED.items():
        points = np.array([both[name] for result in alike if name in (both := pairs(result))])
        if len(points) >= FEWEST_RANKED:
            value, low, high = spearman(points)
            found.append(f"{compared.title} {value:.2f} (95 % interval {low:.2f} to {high:.2f}, n = {len(points)})")
    if not found:
        return []
    return [
        "Rank correlation (Spearman) of the figures on synthetic defects with those of the test part, among "
        f"trainings of seed {alike[0]['seed']}: {'; '.join(found)}."
    ]


def _costs_table(groups: Sequence[Sequence[Result]]) -> str:
    headers = ["row", "training", "of cores", "steps", "tiles/s", "peak MiB"]
    headers += ["images/s, 1 tile", "32 tiles", "peak MiB predicting", "parameters", "all numbers"]
    rows = []
    for group in groups:
        rows.append(
            [
                _title(group),
                training_time(group),
                core_time(group),
                spread(_take(group, "training", "steps"), whole),
                spread(_take(group, "training", "tiles_per_second"), speed),
                spread(_take(group, "training", "peak_mib"), whole),
                spread(_take(group, "inference", "batch_1", "images_per_second"), speed),
                spread(_take(group, "inference", "batch_32", "images_per_second"), speed),
                spread(_take(group, "inference", "peak_mib"), whole),
                whole(group[0]["parameters"]),
                spread([group[0].get("numbers")], whole),
            ]
        )
    return as_table(headers, rows)


def _title(group: Sequence[Result]) -> str:
    return f"**{group[0]['row']}**" if group[0].get("headline") else str(group[0]["row"])


def _remarks(done: Sequence[Result]) -> list[str]:
    """What a reader must know before comparing rows."""
    remarks = []
    for part in ("test", "calibration"):
        seen: dict[int, set[str]] = {}
        for result in done:
            if isinstance(found := _take([result], "data_fingerprint", part)[0], str):
                # The test part is the same for all seeds.
                seen.setdefault(-1 if part == "test" else result["seed"], set()).add(found)
        if any(len(found) > 1 for found in seen.values()):
            remarks.append(f"**Not comparable: the {part} images are not the same for all rows.**")
    unusable = {result["row"]: n for result in done if (n := _take([result], "figures", "unusable")[0])}
    if unusable:
        counts = ", ".join(f"{row} {n}" for row, n in unusable.items())
        remarks.append(f"Test images that could not be used, and do not count: {counts}.")
    doubts = [
        f"{result['row']}, seed {result['seed']} (chance {chance:.2g})"
        for result in done
        if (chance := _take([result], "figures", "chance")[0]) is not None and chance < DOUBTFUL
    ]
    if doubts:
        remarks.append(
            "! More false alarms than the promise explains: were test and calibration normals alike, so many or more "
            f"would be rare: {'; '.join(doubts)}. The test normals then differ from the training's, for this row."
        )
    sources = _grouped(done, lambda result: result.get("source"))
    if len(sources) > 1:
        states = "; ".join(
            f"{group[0].get('source') or 'not recorded'}: {', '.join(_names(group, 'row'))}" for group in sources
        )
        remarks.append(
            f"Measured with {len(sources)} states of the source (a fingerprint of code and configs): {states}."
        )
    busy = {result["row"]: others for result in done if (others := _cores_of_others(result)) > BUSY}
    if busy:
        remarks.append(
            "**The machine was not left alone:** other processes kept cores busy meanwhile, at most, on average over a "
            f"measurement: {', '.join(f'{row} {others:.1f}' for row, others in busy.items())}. Times and speeds of "
            "these rows are those of a slower machine."
        )
    if any(_take(done, "training", "interrupted")):
        remarks.append("\\* interrupted and resumed: what a killed process lost is not in its seconds.")
    return remarks


def _cores_of_others(result: Result) -> float:
    places = (("training",), ("inference", "batch_1"), ("inference", "batch_32"))
    return max(_take([result], *place, "cores_of_others")[0] or 0.0 for place in places)


def _rows(results: Sequence[Result]) -> str:
    # The alphas are those of the data sets, above.
    own = {id(result): [w for w in result["overrides"] if "alpha=" not in w] for result in results}
    trained = [own[id(result)] for result in results if not result.get("note")]
    common = [word for word in (trained[0] if trained else []) if all(word in words for words in trained)]
    rows = []
    for group in _grouped(results, lambda result: (result["row"], *own[id(result)])):
        seeds = sorted({result["seed"] for result in group})
        note, words = group[0].get("note"), own[id(group[0])]
        settings = f"`{' '.join(words if note else [word for word in words if word not in common])}`"
        minutes = group[0].get("minutes")
        allowed = f"{minutes:g} min" if minutes else "-"
        data = ", ".join(_names(group, "data"))
        rows.append([_title(group), data, ", ".join(map(str, seeds)), allowed, f"{note}: " * bool(note) + settings])
    shared = f" and `{' '.join(common)}`" if common else ""
    return (
        "A row is `blemish train data=mvtec data.root=FOLDER out=RUN seed=SEED calibration.alpha=ALPHA` with its "
        f"settings below{shared}, unless it names something else. The time allowed is for `fit` alone, validations "
        "included, summed over the cores of a CPU; the row in bold is given more.\n\n"
        + as_table(["row", "data", "seeds", "allowed", "settings"], rows)
    )


def _hardware(done: Sequence[Result]) -> str:
    lines = []
    for group in _grouped(done, lambda result: json.dumps(result["hardware"], sort_keys=True)):
        machine = group[0]["hardware"]
        gpu = "" if machine["device"] == "cpu" else f", {machine['device']}"
        lines.append(
            f"- {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads{gpu}; torch "
            f"{machine['torch']}, Python {machine['python']}, {machine['system']}: {', '.join(_names(group, 'row'))}"
        )
    if len(lines) > 1:
        lines.append("\n**Speeds, times and memory compare within one of these lines only.**")
    return "\n".join(lines)


def _names(results: Iterable[Result], key: str) -> list[str]:
    return list(dict.fromkeys(str(result[key]) for result in results))


def _of_data(results: Sequence[Result], name: str) -> list[Result]:
    return [result for result in results if result["data"] == name]


def _grouped(results: Sequence[Result], key: Callable[[Result], Any]) -> list[list[Result]]:
    groups: dict[Any, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return list(groups.values())


def as_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return tabulate(rows, headers, "github", disable_numparse=True)


MEASURED = """\
- F1 and false alarms: at the calibrated threshold. False alarms are counted on the test part's normal images; "!" marks
  a rate that the promise does not explain (chance below 1 % by the beta-binomial law of a calibration on n images).
- AUROC and AUPRO: over all thresholds. AUPRO@0.3 and @0.05 are areas under the per-region overlap up to that share of
  false-positive pixels, divided by it. Pixel figures count defective images with a mask, and all normal ones.
- Synthetic AUROC: on normal images with made-up defects. It needs no labels; it is no measure of real defects.
- Training: wall seconds inside `fit` and of what the score learns of training tiles, with validations and checkpoints,
  without reading the data set, calibration and evaluation. Of cores: the processor time of all threads meanwhile, which
  other processes do not lengthen.
  tiles/s: optimiser steps times batch size, divided by the wall seconds. Peak MiB: resident memory of the whole
  `blemish train`, evaluation included.
- images/s: images of the test part (64 at most), decoded and in memory, from pixels to score map, decision and mask;
  the median of several passes in a fresh process after a warm-up. "1 tile": one tile at a time; "32 tiles": up to 32
  tiles at a time, where neighbouring images are equal in size. Reading and writing files is not in it. (A tile of the
  peer is a whole image.)
- Parameters: what gradients trained. All numbers: these, frozen weights, and what model and score learned without
  gradients, as banks, means and covariances are ("-": not counted then).
- Peak MiB predicting: a fresh process that loads the detector and predicts these images, files written."""

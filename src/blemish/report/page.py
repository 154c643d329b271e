"""From a results folder to `report.html`: everything is computed here, the page only shows and sorts it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from blemish.calibration import Calibration, count_units
from blemish.data.records import NORMAL
from blemish.errors import CalibrationError, DataError
from blemish.evaluation.metrics import clopper_pearson
from blemish.files import GALLERY_FILE, write_text
from blemish.report.folder import Row, interest, links, read_card, read_gallery, read_json, read_rows

REPORT_FILE = "report.html"

_HERE = Path(__file__).parent
_LARGEST_PAGE = 30_000_000  # bytes
_LARGEST_GALLERY = 22_000_000  # bytes of base64
_REST_OF_PAGE = 500_000  # more than template, style, script and curves take
_PARTS = {"style": "style.css", "script": "script.js"}
_NBSP = "\N{NO-BREAK SPACE}"
_BINS = 40
_WIDE = 30.0  # largest / smallest score from which the axis is logarithmic
_ROUND_ALPHAS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_COLUMNS = {
    "images": "images",
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "pixel_auroc": "pixel AUROC",
    "aupro_0.3": "AUPRO@0.3",
}
_CALIBRATED_COLUMNS = {"image_precision": "precision", "image_recall": "recall", "image_f1": "F1", "pixel_dice": "Dice"}


def write_report(folder: Path) -> Path:
    """Write `report.html` into a results folder, and return its path.

    Raises:
        DataError: the card is missing, a file is damaged, or the scores are of another mask rule than the card's, or
            of classes that it does not know.
    """
    card = read_card(folder)
    table, images, errors = read_rows(folder)
    metrics, curves = read_json(folder / "metrics.json"), read_json(folder / "curves.json")
    scored_by = ((metrics.get("made") or {}).get("calibration") or {}).get("mask_rule")
    if scored_by not in (None, card.mask_rule.to_dict()):
        raise DataError(
            f"The scores in {folder} are those of the mask rule {scored_by}, the calibration has "
            f"{card.mask_rule.to_dict()}: run `blemish evaluate` again."
        )
    if card.classes and any(image.label not in card.classes for image in images):
        raise DataError(
            f"The calibration is by class, and {folder / table} has images of no class that it knows: run the verb "
            "that wrote the table again."
        )
    addresses = {image.path: links(folder, image) for image in images}
    rest = len(get_plotlyjs()) + len(_json(list(addresses.items()))) + 100 * len(images) + _REST_OF_PAGE
    gallery = read_gallery(folder / GALLERY_FILE, min(_LARGEST_GALLERY, _LARGEST_PAGE - rest))
    place = {path: number for number, path in enumerate(gallery.order)}
    images = sorted(images, key=lambda i: (place.get(i.path, len(place)), interest(i.kind, i.flagged, i.score)))

    kinds = sorted({image.kind for image in images if image.kind is not None}, key=lambda kind: (kind != NORMAL, kind))
    steps = _steps(card, [image for image in images if image.kind == NORMAL])
    parts = list(card.parts)
    facts = {
        "steps": steps,
        "own": next(place for place, step in enumerate(steps) if step["alpha"] == card.promise.alpha),
        "kinds": kinds,
        "good": NORMAL,
        "histogram": _histogram(card, images, steps),
        "curves": dict(_curves(curves)),
    }
    rows = [
        (
            *(i.path, kinds.index(i.kind) if i.kind else None, i.score, i.p_value, i.q_value, *addresses[i.path]),
            *(i.label, parts.index(i.label) if card.classes else 0),
        )
        for i in images
    ]
    page = _template().render(
        name=folder.absolute().name,
        table=table,
        card=card,
        units=count_units(card.n, card.images),
        in_plain_words=_in_plain_words(card),
        tiles=_tiles(card, table, images, metrics),
        warnings=_warnings(card, images, gallery.threshold),
        figures=_figures(metrics),
        errors=errors,
        image_count=len(images),
        drawn_at=card.thresholds if gallery.threshold is None else gallery.threshold,
        made=_made(card, metrics.get("made") or read_json(folder / "predict.json")),
        unpromised=sum(not step["promised"] for step in steps),
        has_masks=any(curve.get("pro") for _, curve in _curves(curves)),
        **{key: facts[key] for key in ("steps", "own", "kinds", "curves")},
        data={
            "facts": _json(facts),
            "rows": _json(rows),
            "pictures": _json(
                {n: gallery.pictures[i.path] for n, i in enumerate(images) if i.path in gallery.pictures}
            ),
        },
        plotly=Markup(get_plotlyjs()),
        **{name: Markup((_HERE / file).read_text("utf-8")) for name, file in _PARTS.items()},
    )
    path = folder / REPORT_FILE
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))  # file names may not be valid Unicode
    return path


def _template() -> Template:
    return Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    ).get_template("page.html")


def _json(data: Any) -> Markup:
    """JSON for a script element: no "<", so that no text can end it."""
    return Markup(json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))


def _unit(card: Calibration) -> float:
    """What scores are shown in: where each class has a threshold of its own, in units of it."""
    return card.threshold or 1.0


def _steps(card: Calibration, normals: Sequence[Row]) -> list[dict[str, Any]]:
    """What holds at each position of the slider: alpha, thresholds, promise in words, false alarms among `normals`.

    `thresholds` has one for each of the card's parts, `lines` those to draw in the histogram.
    """
    between = (float(f"{alpha:.2g}") for alpha in np.geomspace(_ROUND_ALPHAS[0], _ROUND_ALPHAS[-1], 54))
    fewest = min(card.parts.values(), key=lambda part: part.n)
    steps = []
    for alpha in sorted({*between, *_ROUND_ALPHAS, card.promise.alpha}):
        promise = replace(card.promise, alpha=alpha)
        try:
            moved = card.with_promise(promise)
        except CalibrationError:
            thresholds, promised = {label: part.scores[-1] for label, part in card.parts.items()}, False
            words = (
                f"No promise at alpha = {alpha:g}: {promise.needed} needed, {fewest.n} available"
                f"{' in the smallest class' if card.classes else ''}. The decisions shown are those at the largest "
                f"calibration score{' of each class' if card.classes else ''}."
            )
        else:
            thresholds = {label: part.threshold for label, part in moved.parts.items()}
            promised, words = moved.noise is None, _in_plain_words(moved)
        alarms = sum(image.score > thresholds[image.label if card.classes else None] for image in normals)
        units = [_unit(part) if card.classes else 1.0 for part in card.parts.values()]
        steps.append(
            {
                "alpha": alpha,
                "thresholds": list(thresholds.values()),
                "lines": sorted({value / unit for value, unit in zip(thresholds.values(), units, strict=True)}),
                "promised": promised,
                "words": words,
                "normals": _of_normals(alarms, len(normals)) if normals else "",
            }
        )
    return steps


def _in_plain_words(card: Calibration) -> str:
    if card.noise is not None:
        return f"An assumption, not a promise: {card.in_words().partition(': ')[2]}."
    expected = (1000 * rate for rate in card.expected_rates())
    about = " to ".join(dict.fromkeys(f"{rate:.{0 if rate >= 10 else 1}f}" for rate in expected))
    most = math.ceil(1000 * card.rate_limit())
    things = "good parts" if card.n == card.images else "good groups of images"
    things += " of each class" if card.classes else ""
    return f"Of 1000 {things} expect about {about} false alarms; with 95{_NBSP}% confidence no more than {most}."


def _of_normals(alarms: int, count: int) -> str:
    low, high = clopper_pearson(alarms, count)
    return f"{alarms / count:.1%} of {count} good images (95{_NBSP}% interval {low:.1%} to {high:.1%})"


def _tiles(
    card: Calibration, table: str, images: Sequence[Row], metrics: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """(label, value, note) of each figure in the summary, the most important first."""
    normals = [image.flagged for image in images if image.kind == NORMAL]
    defects = [image.flagged for image in images if image.kind not in (None, NORMAL)]
    if defects:
        yield "Missed defects", f"{defects.count(False)} of {len(defects)}", f"{np.mean(defects):.1%} of defects found"
    if normals:
        yield "False alarms", f"{sum(normals)} of {len(normals)}", _of_normals(sum(normals), len(normals))
    if not (images or table):
        yield "Calibration images", str(card.images), "no other images yet: run blemish evaluate or blemish predict"
    elif not (normals or defects):
        flagged = sum(image.flagged for image in images)
        yield "Images", str(len(images)), "predicted"
        yield "Flagged", str(flagged), f"{flagged / max(len(images), 1):.1%} of the images are anomalous"
        yield "Passed", str(len(images) - flagged), "nothing beyond what good parts show"
    overall = metrics.get("overall") or {}
    for figures, key, label, note in (
        (overall, "image_auroc", "Image AUROC", "over all thresholds; 0.5 is chance"),
        (overall, "aupro_0.3", "AUPRO@0.3", "overlap with defect regions; 1 is perfect"),
        (overall.get("calibrated", {}), "image_f1", "F1", "at the calibrated threshold"),
    ):
        if figures.get(key) is not None:
            yield label, _decimals(figures[key]), note


def _decimals(figure: float) -> str:
    """Three decimals, or four where three would make a perfect figure of one that is not."""
    return f"{figure:.4f}" if 0.9995 <= figure < 1 else f"{figure:.3f}"


def _figures(metrics: Mapping[str, Any]) -> list[list[str]]:
    """The table of metrics: a row of headers, overall, and each kind of defect."""
    if not metrics.get("overall"):
        return []
    rows = [["kind", *_COLUMNS.values(), *_CALIBRATED_COLUMNS.values()]]
    for name, figures in (("all defects", metrics["overall"]), *metrics.get("kinds", {}).items()):
        decided = figures.get("calibrated", {})
        cells = [*(figures.get(key) for key in _COLUMNS), *(decided.get(key) for key in _CALIBRATED_COLUMNS)]
        rows.append([name, *("-" if c is None else _decimals(c) if isinstance(c, float) else str(c) for c in cells)])
    return rows


def _warnings(card: Calibration, images: Sequence[Row], drawn_at: float | Mapping[str, float] | None) -> Iterator[str]:
    if card.noise is not None:
        yield "The threshold assumes Gaussian noise. It is not calibrated: no false-alarm rate is promised."
        yield from (f"{warning[0].upper()}{warning[1:]}." for warning in card.noise.warnings())
    changed = sum(image.flagged != (image.score > card.of(image.label).threshold) for image in images)
    if changed:
        yield (
            f"{changed} of {len(images)} decisions in the table are not those of this card: it was recalibrated since. "
            "Run `blemish evaluate` or `blemish predict` again."
        )
    if drawn_at is not None and drawn_at != card.thresholds:
        yield "The pictures were drawn at another threshold than the card's: it was recalibrated since."


def _histogram(card: Calibration, images: Sequence[Row], steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares (percent) and counts of each group of scores (by class: in units of its threshold), over common bins."""

    def shown(image: Row) -> float:
        return image.score / _unit(card.of(image.label)) if card.classes else image.score

    by_class = [score / _unit(part) for part in card.classes.values() for score in part.scores]
    groups = {
        "calibration, good": by_class or card.scores,
        "test, good": [shown(image) for image in images if image.kind == NORMAL],
        "test, defective": [shown(image) for image in images if image.kind not in (None, NORMAL)],
        "predicted": [shown(image) for image in images if image.kind is None],
    }
    every = [score for scores in groups.values() for score in scores] + [x for step in steps for x in step["lines"]]
    low, high = min(every), max(every)
    logarithmic = low > 0 and high / low > _WIDE
    edges = np.geomspace(low, high, _BINS + 1) if logarithmic else np.histogram_bin_edges([low, high], _BINS)
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)  # geomspace may end a hair inside
    counts = {name: np.histogram(scores, edges)[0] for name, scores in groups.items() if len(scores)}
    return {
        "axis": "image score / threshold of its class" if card.classes else "image score",
        "logarithmic": logarithmic,
        "edges": edges.tolist(),
        "groups": [
            {"name": name, "counts": count.tolist(), "shares": (100 * count / count.sum()).tolist()}
            for name, count in counts.items()
        ],
    }


def _curves(curves: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    if any((overall := curves.get("overall") or {}).values()):
        yield "all defects", overall
        yield from curves.get("kinds", {}).items()


def _made(card: Calibration, run: Mapping[str, Any]) -> dict[str, str]:
    made = {**card.made, **run, "fingerprint": card.fingerprint}
    return {key.replace("_", " "): str(value) for key, value in made.items() if isinstance(value, (str, int, float))}

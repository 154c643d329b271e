"""Reading a results folder: card, table of images, thumbnails and the optional files beside them."""

from __future__ import annotations

import base64
import csv
import json
import math
import posixpath
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blemish.calibration import Calibration
from blemish.data.records import NORMAL
from blemish.errors import BlemishError, DataError
from blemish.files import CARD_FILE

_SHOWN_BY_BROWSERS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}


@dataclass(frozen=True)
class Row:
    """An image of the table; `kind` is None where the truth is not known, `label` where no class of part is."""

    path: str
    kind: str | None
    score: float
    p_value: float
    q_value: float | None
    flagged: bool
    heatmap: str
    mask: str
    label: str | None


def interest(kind: str | None, flagged: bool, score: float) -> tuple[bool, bool, float]:
    """Sorts missed defects first, then false alarms, then the others, each from the highest score down."""
    missed, false_alarm = kind not in (None, NORMAL) and not flagged, kind == NORMAL and flagged
    return not missed, not false_alarm, -score


def read_card(folder: Path) -> Calibration:
    path = folder / CARD_FILE
    try:
        return Calibration.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise DataError(
            f"Expected a calibration card at {path}, found none: give a folder that `blemish train`, `evaluate` or "
            "`predict` wrote."
        ) from None
    except (OSError, ValueError, TypeError, BlemishError) as error:
        raise DataError(
            f"Expected a calibration card at {path}, found a damaged one ({error}): run the verb that wrote it again."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The content of an optional file, empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(
            f"Expected JSON in {path}, found a damaged file ({error}): delete it or write it anew."
        ) from error
    return content


def read_rows(folder: Path) -> tuple[str, list[Row], list[tuple[str, str]]]:
    """The table's name, its images, and (path, reason) of those that could not be used; empty without a table."""
    table = next((name for name in ("evaluation.csv", "predictions.jsonl") if (folder / name).is_file()), None)
    if table is None:
        return "", [], []  # a training without a test part
    rows, errors = [], []
    try:
        with (folder / table).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            for cells in csv.DictReader(file) if table.endswith(".csv") else map(json.loads, file):
                if cells["error"]:
                    errors.append((str(cells["path"]), str(cells["error"])))
                else:
                    rows.append(_row(cells))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise DataError(
            f"Expected a table of images in {folder / table}, found a damaged one (after {len(rows) + len(errors)} "
            f"good rows, {type(error).__name__}: {error}): run the verb that wrote it again."
        ) from error
    return table, rows, errors


def _row(cells: Mapping[str, Any]) -> Row:
    score, p_value, q_value = float(cells["image_score"]), float(cells["p_value"]), cells.get("q_value")
    if not (math.isfinite(score) and math.isfinite(p_value)):
        raise ValueError(f"the score or p-value of {cells['path']} is not finite")
    return Row(
        path=str(cells["path"]),
        kind=cells.get("kind") or None,
        score=score,
        p_value=p_value,
        q_value=None if q_value in (None, "") else float(q_value),
        flagged=cells["decision"] == "anomalous",
        heatmap=cells.get("heatmap") or "",
        mask=cells.get("mask") or "",
        label=cells.get("class") or None,
    )


def links(folder: Path, row: Row) -> tuple[str, str, str, bool]:
    """Relative addresses of the original, the heat map and the mask, "" where there is no such file."""
    base = folder.absolute()

    def link(path: Path) -> str:
        return posixpath.relpath(path.as_uri(), base.as_uri()) if path.is_file() else ""

    original = Path(row.path).absolute()
    heatmap, mask = (link(base / name) if name else "" for name in (row.heatmap, row.mask))
    return link(original), heatmap, mask, original.suffix.lower() in _SHOWN_BY_BROWSERS


@dataclass(frozen=True)
class Gallery:
    """Pictures as data addresses by path and name, paths in order of interest, and the threshold of the heat maps.

    `threshold`: by class, where the calibration was.
    """

    threshold: float | dict[str, float] | None = None
    order: Sequence[str] = ()
    pictures: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def read_gallery(path: Path, budget: int) -> Gallery:
    """The first pictures, in order, that fit into `budget` bytes; nothing where there is no such file."""
    pictures = {}
    try:
        with zipfile.ZipFile(path) as archive:
            index = json.loads(archive.read("index.json"))
            for entry in index["images"]:
                made = {name: _address(file, archive.read(file)) for name, file in entry["pictures"].items()}
                budget -= sum(len(name) + len(address) + 6 for name, address in made.items()) + 12
                if budget < 0:
                    break
                pictures[entry["path"]] = made
            threshold = index["threshold"]
            if not isinstance(threshold, dict):
                threshold = float(threshold)
            return Gallery(threshold, [entry["path"] for entry in index["images"]], pictures)
    except FileNotFoundError:
        return Gallery()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"Expected pictures in {path}, found a damaged file ({type(error).__name__}: {error}): delete it or write "
            "it anew."
        ) from error


def _address(file: str, content: bytes) -> str:
    return f"data:image/{file.rpartition('.')[2]};base64,{base64.b64encode(content).decode()}"

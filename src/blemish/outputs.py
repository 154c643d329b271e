"""The files that `predict` writes: maps, heat maps, masks, and the rows of predictions.csv and .jsonl."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin
from PIL.PngImagePlugin import PngInfo

from blemish.calibration import Calibration, q_values
from blemish.data.images import Pixels
from blemish.detector import Prediction
from blemish.errors import BlemishError
from blemish.files import CARD_FILE, GALLERY_FILE, atomic, explain_write_errors, write_json
from blemish.pictures import heat_map

COLUMNS = (
    "path",
    "class",
    "image_score",
    "p_value",
    "q_value",
    "decision",
    "fdr_decision",
    "regions",
    "boxes",
    "region_p_values",
    "map",
    "heatmap",
    "mask",
    "seconds",
    "error",
)
_PICTURES = (("map", ".tiff"), ("heatmap", ".png"), ("mask", ".png"))
_IMAGE_DESCRIPTION = 270  # the TIFF tag


@dataclass(frozen=True)
class Scored:
    """One input image with its prediction, or with the sentence that says why there is none."""

    path: Path
    pixels: Pixels | None
    prediction: Prediction | None
    seconds: float
    error: str = ""


def unique_stems(names: Sequence[Path]) -> list[Path]:
    """Names without suffix; where two files differ by suffix only, both keep it ("a.png", "a.jpg")."""
    seen: dict[Path, int] = {}
    for name in names:
        seen[name.with_suffix("")] = seen.get(name.with_suffix(""), 0) + 1
    stems = [name.with_suffix("") if seen[name.with_suffix("")] == 1 else name for name in names]
    if len(set(stems)) < len(stems):
        double = next(stem for stem in stems if stems.count(stem) > 1)
        raise BlemishError(f"Two inputs are called {double}: predict their folders one at a time, into different out=.")
    return stems


class PredictionFiles:
    """Writes one image's files at a time; rows survive a kill in a `.part` file, from which a rerun goes on.

    Raises:
        BlemishError: `out` already holds predictions, or unfinished ones of another detector.
    """

    def __init__(self, out: Path, made: Mapping[str, Any], card: Calibration, overwrite: bool) -> None:
        self._out = out
        self._note = json.dumps({key: made[key] for key in ("software", "version", "fingerprint")})
        self._part = out / ".predictions.jsonl.part"
        self._made = out / "predict.json"
        other = next((name for name in ("run.json", "evaluation.csv") if (out / name).exists()), None)
        if other:
            raise BlemishError(f"{out} holds a run or an evaluation ({other}): choose another out= for predictions.")
        if overwrite and self._made.is_file():
            for old in (self._part, *(out / name for name in ("predictions.jsonl", "predictions.csv", GALLERY_FILE))):
                old.unlink(missing_ok=True)
            for name, _ in _PICTURES:
                shutil.rmtree(out / f"{name}s", ignore_errors=True)
        if (out / "predictions.jsonl").exists():
            raise BlemishError(f"{out} already holds predictions: choose another out=, or set overwrite=true.")
        if self._part.exists() and self._made.is_file():
            before = json.loads(self._made.read_text(encoding="utf-8"))
            if any(before.get(key) != made[key] for key in ("fingerprint", "calibration")):
                raise BlemishError(
                    f"{out} holds unfinished predictions of another detector or calibration: choose another out=, "
                    "or set overwrite=true."
                )
        write_json(self._made, dict(made))
        write_json(out / CARD_FILE, card.to_dict())

    def done(self) -> list[dict[str, Any]]:
        """The rows that an interrupted run has finished; one torn by a kill is cut off."""
        if not self._part.exists():
            return []
        with explain_write_errors(self._part):
            content = self._part.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                self._part.write_bytes(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def write_images(self, scored: Scored, stem: Path) -> dict[str, Any]:
        """Write the score map (float32 TIFF), heat map and mask (PNG) of one image; return its row."""
        prediction = scored.prediction
        places: dict[str, str] = {}
        if prediction is not None and scored.pixels is not None:
            places = {name: f"{name}s/{stem.as_posix()}{suffix}" for name, suffix in _PICTURES}
            picture = heat_map(prediction.score_map, prediction.threshold, scored.pixels, prediction.mask)
            with atomic(self._out / places["map"]) as path:
                tags = TiffImagePlugin.ImageFileDirectory_v2()
                tags[_IMAGE_DESCRIPTION] = self._note
                Image.fromarray(prediction.score_map).save(path, "TIFF", tiffinfo=tags)
            info = PngInfo()
            info.add_text("Software", self._note)
            with atomic(self._out / places["heatmap"]) as path:
                Image.fromarray(picture).save(path, "PNG", compress_level=1, pnginfo=info)
            with atomic(self._out / places["mask"]) as path:
                mask = Image.fromarray(prediction.mask.astype(np.uint8) * 255)
                mask.save(path, "PNG", compress_level=1, pnginfo=info)
        return _row(scored) | places

    def append(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Append rows to the `.part` file, each flushed before it is handed on."""
        with explain_write_errors(self._part):
            file = self._part.open("a", encoding="utf-8")
        with file:
            for row in rows:
                with explain_write_errors(self._part):
                    file.write(json.dumps(row, allow_nan=False) + "\n")
                    file.flush()
                yield row

    def finish(self, fdr: float | None = None) -> int | None:
        """Turn the rows into predictions.csv and predictions.jsonl, with what only the whole batch can say.

        Returns:
            the number of images called anomalous at the false discovery rate `fdr`; None without one.
        """
        with self._part.open(encoding="utf-8") as lines:
            p_values = [json.loads(line)["p_value"] for line in lines]
        adjusted = iter(q_values([p for p in p_values if p is not None]))
        discoveries = 0
        with (
            atomic(self._out / "predictions.jsonl") as lines_path,  # appears last: it says that all is done
            atomic(self._out / "predictions.csv") as table_path,
            table_path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as table,
            lines_path.open("w", encoding="utf-8") as lines,
            self._part.open(encoding="utf-8") as before,
        ):
            writer = csv.DictWriter(table, COLUMNS)
            writer.writeheader()
            for line in before:
                row = json.loads(line)
                if row["p_value"] is not None:
                    row["q_value"] = next(adjusted)
                    if fdr is not None:
                        row["fdr_decision"] = "anomalous" if row["q_value"] <= fdr else "normal"
                        discoveries += row["q_value"] <= fdr
                lines.write(json.dumps(row, allow_nan=False) + "\n")
                writer.writerow(row | {key: json.dumps(row[key]) for key in ("boxes", "region_p_values")})
        with explain_write_errors(self._out):
            self._part.unlink()
        return None if fdr is None else discoveries


def _row(scored: Scored) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS) | {
        "path": str(scored.path),
        "boxes": [],
        "region_p_values": [],
        "seconds": round(scored.seconds, 6),
        "error": scored.error,
    }
    if scored.prediction is not None:
        row |= {
            "class": scored.prediction.label,
            "image_score": scored.prediction.image_score,
            "p_value": scored.prediction.p_value,
            "decision": "anomalous" if scored.prediction.is_anomalous else "normal",
            "regions": len(scored.prediction.regions),
            # left, top, width, height in pixels
            "boxes": [[r.left, r.top, r.width, r.height] for r in scored.prediction.regions],
            "region_p_values": [r.p_value for r in scored.prediction.regions],
        }
    return row

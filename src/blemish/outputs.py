"""The files that `predict` writes: maps, heat maps, masks, and the rows of predictions.csv and .jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin

from blemish.calibration import Calibration, q_values
from blemish.data.images import FloatArray, Pixels
from blemish.detector import Prediction
from blemish.errors import BlemishError
from blemish.files import CARD_FILE, GALLERY_FILE, atomic, write_json
from blemish.pictures import heat_map
from blemish.png import encode
from blemish.rows import UnfinishedRows

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
    """One input image with its prediction, or with the sentence that says why there is none.

    `expected`: as in `ScoredImage`.
    """

    path: Path
    pixels: Pixels | None
    prediction: Prediction | None
    seconds: float
    error: str = ""
    expected: FloatArray | None = None


def unique_stems(names: Sequence[Path]) -> list[Path]:
    """Names without suffix; where two files differ by suffix only, both keep it ("a.png", "a.jpg")."""
    seen: dict[Path, int] = {}
    for name in names:
        seen[name.with_suffix("")] = seen.get(name.with_suffix(""), 0) + 1
    stems = [name.with_suffix("") if seen[name.with_suffix("")] == 1 else name for name in names]
    if len(set(stems)) < len(stems):
        double = next(stem for stem in stems if stems.count(stem) > 1)
        raise BlemishError(f"Two inputs are called {double}: give their folders one at a time, with different out=.")
    return stems


class PredictionFiles:
    """Writes one image's files at a time; see `UnfinishedRows` for what a kill leaves.

    Raises:
        BlemishError: `out` already holds predictions, or unfinished ones of another detector.
    """

    def __init__(self, out: Path, made: Mapping[str, Any], card: Calibration, overwrite: bool) -> None:
        self._out = out
        self._note = note_of(made)
        owned = (GALLERY_FILE, *(f"{name}s" for name, _ in _PICTURES))
        same, others = ("fingerprint", "calibration"), "another detector or calibration"
        self.rows = UnfinishedRows(
            out, "predictions", "predict.json", made, same, owned, overwrite, "predictions", others
        )
        write_json(out / CARD_FILE, card.to_dict())

    def write_images(self, scored: Scored, stem: Path) -> dict[str, Any]:
        """Write the score map (float32 TIFF), heat map and mask (PNG) of one image; return its row."""
        prediction = scored.prediction
        places: dict[str, str] = {}
        if prediction is not None and scored.pixels is not None:
            places = {name: f"{name}s/{stem.as_posix()}{suffix}" for name, suffix in _PICTURES}
            picture = heat_map(prediction.score_map, prediction.threshold, scored.pixels, prediction.mask)
            save_map(self._out / places["map"], prediction.score_map, self._note)
            save_png(self._out / places["heatmap"], picture, self._note)
            save_png(self._out / places["mask"], prediction.mask.astype(np.uint8) * 255, self._note)
        return _row(scored) | places

    def finish(self, fdr: float | None = None) -> int | None:
        """Turn the rows into predictions.csv and predictions.jsonl, with what only the whole batch can say.

        Returns:
            the number of images called anomalous at the false discovery rate `fdr`; None without one.
        """
        adjusted = iter(q_values([row["p_value"] for row in self.rows if row["p_value"] is not None]))
        discoveries = 0

        def judged() -> Iterator[dict[str, Any]]:
            nonlocal discoveries
            for row in self.rows:
                if row["p_value"] is not None:
                    row["q_value"] = next(adjusted)
                    if fdr is not None:
                        row["fdr_decision"] = "anomalous" if row["q_value"] <= fdr else "normal"
                        discoveries += row["q_value"] <= fdr
                yield row

        self.rows.finish(COLUMNS, judged())
        return None if fdr is None else discoveries


def note_of(made: Mapping[str, Any]) -> str:
    """What each picture says of its making."""
    return json.dumps({key: made[key] for key in ("software", "version", "fingerprint")})


def save_map(path: Path, score_map: FloatArray, note: str) -> None:
    """Write (H, W) as float32 TIFF, with a note in its description."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[_IMAGE_DESCRIPTION] = note
    with atomic(path) as temporary:
        Image.fromarray(score_map).save(temporary, "TIFF", tiffinfo=tags)


def save_png(path: Path, picture: npt.NDArray[np.uint8], note: str) -> None:
    """Write (H, W) or (H, W, 3) RGB, with a note as its software."""
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.writelines(encode(picture, note))


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

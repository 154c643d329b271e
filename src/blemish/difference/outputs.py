"""The files that `diff` writes: maps, masks, overlays, pictures side by side, and a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from blemish.difference.compare import Difference
from blemish.difference.pairs import Pair
from blemish.errors import BlemishError
from blemish.files import CARD_FILE
from blemish.outputs import note_of, save_map, save_png
from blemish.pictures import Picture, as_rgb, hatched, heat_map
from blemish.rows import UnfinishedRows, check_own

TABLE, MADE_FILE = "differences", "diff.json"
PICTURES = {"map": ".tiff", "mask": ".png", "overlay": ".png", "side_by_side": ".png"}
TRUTH = ("dice", "jaccard", "precision", "recall", "roc_area")
COLUMNS = (
    "query",
    "reference",
    "decision",
    "image_score",
    "p_value",
    "threshold",
    "share",
    "regions",
    "boxes",
    "region_scores",
    "valid_share",
    "motion",
    "matrix",
    "verdict",
    *TRUTH,
    *PICTURES,
    *("seconds", "seconds_by_step", "error"),
)
_GAP = 8  # pixels between pictures side by side


class DifferenceFiles:
    """Writes one pair's files at a time; see `UnfinishedRows` for what a kill leaves.

    Raises:
        BlemishError: `out` already holds differences or a card, or unfinished differences made otherwise.
    """

    def __init__(self, out: Path, made: Mapping[str, Any], overwrite: bool) -> None:
        self._out = out
        self._note = note_of(made)
        owned = (CARD_FILE, *(folder_of(name) for name in PICTURES))
        check_own(out, MADE_FILE, "differences")
        if (out / CARD_FILE).exists() and not (out / MADE_FILE).exists():
            raise BlemishError(f"{out} holds a card, learned from pairs: choose another out= for differences.")
        same, others = ("fingerprint", "calibration", "asked"), "other images, settings or card"
        self.rows = UnfinishedRows(out, TABLE, MADE_FILE, made, same, owned, overwrite, "differences", others)

    def write_images(self, pair: Pair, found: Difference) -> dict[str, str]:
        """Write the four pictures of a pair; where they are, below the folder."""
        places = {name: f"{folder_of(name)}/{pair.name.as_posix()}{suffix}" for name, suffix in PICTURES.items()}
        save_map(self._out / places["map"], found.score_map, self._note)
        save_png(self._out / places["mask"], found.mask.astype(np.uint8) * 255, self._note)
        save_png(self._out / places["overlay"], overlay(found), self._note)
        save_png(self._out / places["side_by_side"], side_by_side(found), self._note)
        return places

    def finish(self) -> None:
        """Turn the rows into differences.csv and differences.jsonl."""
        self.rows.finish(COLUMNS)


def folder_of(picture: str) -> str:
    """Where the pictures of a kind are, below the folder of the results."""
    return picture if picture.endswith("side_by_side") else f"{picture}s"


def overlay(found: Difference) -> Picture:
    """The heat map laid over the query, its mask outlined; hatched where nothing can be compared."""
    picture = heat_map(found.score_map, found.threshold, found.observed, found.mask)
    return hatched(picture, found.valid)


def side_by_side(found: Difference) -> Picture:
    """Reference, query and overlay, from left to right."""
    height = found.score_map.shape[0]
    gap = np.full((height, _GAP, 3), 255, np.uint8)
    reference = hatched(as_rgb(found.expected), found.valid)
    return np.concatenate([reference, gap, as_rgb(found.observed), gap, overlay(found)], axis=1)


def row_of(pair: Pair, found: Difference | None, error: str = "") -> dict[str, Any]:
    """A row of the table but for pictures and truth; `found` is None if the pair could not be compared."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS) | {
        "query": str(pair.query),
        "reference": str(pair.reference),
        "boxes": [],
        "region_scores": [],
        "error": error,
    }
    if found is None:
        return row
    return row | {
        "decision": "different" if found.is_different else "same",
        "image_score": found.image_score,
        "p_value": found.p_value,
        "threshold": found.threshold,
        "share": found.share,
        "regions": len(found.regions),
        "boxes": [[r.left, r.top, r.width, r.height] for r in found.regions],  # pixels
        "region_scores": [r.score for r in found.regions],
        "valid_share": float(found.valid.mean()),
        "motion": found.motion.kind,
        "matrix": found.motion.matrix.tolist(),
        "verdict": found.verdict.overall,
        "seconds": round(sum(found.seconds.values()), 6),
        "seconds_by_step": {step: round(seconds, 6) for step, seconds in found.seconds.items()},
    }

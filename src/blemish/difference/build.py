"""From the settings of `blemish diff` to a `Comparison`, and what its artefacts say of how they were made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import nn

from blemish import __version__
from blemish.alignment import Alignment
from blemish.build import build, build_section
from blemish.calibration import Calibration
from blemish.checkpoint import pick_device
from blemish.difference.compare import Comparison
from blemish.difference.filters import Filters
from blemish.difference.map_filters import MapFilters
from blemish.difference.thresholds import MapThreshold
from blemish.errors import CalibrationError, ConfigError
from blemish.files import CARD_FILE
from blemish.models.reference import ReferencePair
from blemish.postprocess import Cleaning
from blemish.residuals import L1
from blemish.scores.engine import TorchScorer
from blemish.scores.residual import ResidualScore
from blemish.tiling import Tiling

_SHAPING = ("residual", "strategy", "image", "alignment", "preprocessing", "tolerance", "tiling", "postprocessing")


def build_comparison(settings: Mapping[str, Any]) -> Comparison:
    """Raises ConfigError if a setting is unknown or out of range, or settings contradict each other."""
    score = build(settings["strategy"], where="strategy")
    channels = settings["image"]["channels"]
    if channels not in (None, 1, 3):
        raise ConfigError(f"Expected image.channels to be 1 (grey), 3 (colour) or null, found {channels}.")
    is_l1 = isinstance(score, ResidualScore) and isinstance(score.residual, L1)
    kind = settings["threshold"]["kind"]
    if kind == "auto":
        kind = "noise" if is_l1 else "otsu"
    elif kind == "noise" and not is_l1:
        raise ConfigError(
            "threshold.kind=noise knows how noise shows in residual=l1 with strategy=difference only: choose these, or "
            "threshold.kind=otsu, or learn a card from normal pairs."
        )
    threshold = {"threshold": {**settings["threshold"], "kind": kind}}
    return Comparison(
        scorer=TorchScorer(ReferencePair(settings["tolerance"]), score, pick_device(settings["device"])),
        tolerance=settings["tolerance"],
        channels=channels,
        alignment=build_section(Alignment, settings, "alignment"),
        filters=build_section(Filters, settings, "preprocessing"),
        tiling=build_section(Tiling, settings, "tiling"),
        map_filters=build_section(MapFilters, settings, "postprocessing"),
        threshold=build_section(MapThreshold, threshold, "threshold"),
        cleaning=build_section(Cleaning, settings, "cleaning"),
    )


def made_by(settings: Mapping[str, Any], comparison: Comparison) -> dict[str, Any]:
    """What the results say of their making. The fingerprint is of all that shapes a difference map."""
    shaping = {name: settings[name] for name in _SHAPING}
    shaping["tiling"] = {key: value for key, value in shaping["tiling"].items() if key != "batch"}
    digest = hashlib.sha256(json.dumps([__version__, shaping], sort_keys=True).encode())
    score = comparison.scorer.score if isinstance(comparison.scorer, TorchScorer) else None
    for name, tensor in sorted(score.state_dict().items()) if isinstance(score, nn.Module) else ():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    card = comparison.card
    decided = asdict(card.promise) | {"threshold": card.threshold} if card else None
    return {
        "software": "blemish",
        "version": __version__,
        "fingerprint": digest.hexdigest(),
        "calibration": decided,
        "asked": {name: settings[name] for name in ("reference", "query", "mask", "threshold", "cleaning")},
        "settings": {key: value for key, value in settings.items() if key not in ("overwrite", "learn")},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def read_card(path: Path, fingerprint: str) -> Calibration:
    """The card that `learn=true` made, from its folder or file.

    Raises:
        CalibrationError: it is missing or damaged, or was learned with other settings.
    """
    file = path / CARD_FILE if path.is_dir() else path
    try:
        card = Calibration.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise CalibrationError(f"There is no {file}: card= takes the folder that learn=true made.") from error
    except (json.JSONDecodeError, UnicodeDecodeError, CalibrationError) as error:
        raise CalibrationError(f"{file} is damaged: learn it again with learn=true.") from error
    if card.fingerprint != fingerprint:
        raise CalibrationError(
            f"{file} was learned with other settings of {', '.join(_SHAPING)} (or by another version): its threshold "
            "says nothing here, so learn it again."
        )
    return card

"""Loading exported files: which engine reads which, the card beside them, and where a run keeps its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blemish.calibration import Calibration
from blemish.detector import Detector, TileDetector
from blemish.engines.onnx import load_onnx
from blemish.engines.openvino import load_openvino
from blemish.engines.program import load_program
from blemish.errors import ConfigError, ExportError, NotCalibrated, nearest_names
from blemish.files import CARD_FILE, write_json

EXPORT_FOLDER = "export"
"""Where a run keeps what was exported of it."""
FILES = {"onnx": "model.onnx", "openvino": "model.xml", "torch": "model.pt2"}
"""The name of an exported file, by its format."""
INT8_FOLDER, INT8 = f"{EXPORT_FOLDER}/int8", "onnx_int8"
"""Where a run keeps its export to 8 bits, which is another detector with another card, and the engine's name for it."""
ENGINES = ("torch", "onnx", "openvino", INT8)
"""What `engine=` may say: torch is the run's own detector."""
FLOAT_FINGERPRINT = "float_fingerprint"
"""Under which an export to 8 bits tells, in `about`, of which detector it was made."""
PROGRAMS = "torch.export"
"""What `load_detector(trusted=)` names to read `.pt2` files: PyTorch's reader runs what such a file tells it to."""
_LOADERS: Mapping[str, Callable[[Path], TileDetector]] = {
    ".onnx": load_onnx,
    ".xml": load_openvino,
    ".pt2": load_program,
}


def is_exported(path: Path) -> bool:
    """Whether a path names an exported file, rather than a run."""
    return path.suffix in _LOADERS and not path.is_dir()


def load_exported(path: Path, device: str = "auto", trusted: Sequence[str] = (), *, with_card: bool = True) -> Detector:
    """The detector in an exported file, calibrated by the `card.json` beside it, if there is one.

    Raises:
        ExportError: the file is missing, damaged or not one of ours, its engine is not installed, or it is a `.pt2`
            file and `trusted` does not name `PROGRAMS`. ConfigError: `device` is no CPU. CalibrationError: the card is
            damaged, or belongs to another detector.
    """
    if not path.is_file():
        raise ExportError(f"No exported detector found at {path}: make one with `blemish export run=RUN`.")
    if device not in ("auto", "cpu"):
        raise ConfigError(f"Exported detectors run on the CPU, found device={device}: leave it out.")
    if path.suffix == ".pt2" and PROGRAMS not in trusted:
        raise ExportError(
            f"{path} is read by PyTorch, which runs what such a file tells it to: if you trust its maker, load it with "
            f"trusted=['{PROGRAMS}'], else use an export to ONNX."
        )
    detector = _LOADERS[path.suffix](path)
    card = path.with_name(CARD_FILE)
    return detector.calibrated(read_card(card)) if with_card and card.is_file() else detector


def read_card(path: Path) -> Calibration:
    """A calibration card. Raises ExportError if it is damaged."""
    try:
        return Calibration.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ExportError(f"The calibration card {path} is damaged: export again.") from error


def load_for_run(
    run: Path, engine: str, card: Mapping[str, Any] | None, about: Mapping[str, Any], device: str = "auto"
) -> Detector:
    """The export of a run for an engine other than torch, with the run's own card, or in 8 bits with that beside it.

    Args:
        card, about: those of the run's checkpoint.

    Raises:
        ExportError: there is no such export, it was made of another detector, or in 8 bits is calibrated otherwise than
            the run. NotCalibrated: the run has no card. ConfigError: an unknown engine.
    """
    check_engine(engine)
    int8 = engine == INT8
    path = run / (INT8_FOLDER if int8 else EXPORT_FOLDER) / FILES["onnx" if int8 else engine]
    again = f"`blemish export run={run} {'precision=int8' if int8 else f'format={engine}'}`"
    if card is None:
        raise NotCalibrated(f"{run} has no calibration: run `blemish calibrate` and then {again}.")
    if not path.is_file():
        raise ExportError(f"engine={engine} expects {path}, which is not there: make it with {again}.")
    detector = load_exported(path, device, with_card=int8)
    made_of = str(detector.about.get(FLOAT_FINGERPRINT)) if int8 else detector.fingerprint
    if made_of != card["fingerprint"]:
        raise ExportError(
            f"{path} was made of another detector (fingerprint {made_of[:12]}, the run has "
            f"{card['fingerprint'][:12]}): export it again with {again}."
        )
    if not int8:
        return replace(detector, about=about, calibration=Calibration.from_dict(card))
    if detector.calibration is None or not _same_calibration(detector.calibration, Calibration.from_dict(card)):
        raise ExportError(
            f"{path} has no calibration like the run's, by the same images and promise: its scores are others, so that "
            f"it has a card of its own; export it again with {again}."
        )
    return replace(detector, about=about)


def renew_cards(run: Path, card: Calibration) -> list[str]:
    """Give the export of a run, whose scores are the run's, its new card; a sentence on each that keeps another one."""
    keep = []
    for folder in (run / EXPORT_FOLDER, run / INT8_FOLDER):
        path = folder / CARD_FILE
        if not path.is_file():
            continue
        if read_card(path).fingerprint == card.fingerprint:
            write_json(path, card.to_dict())
        else:
            precision = "precision=int8" if folder == run / INT8_FOLDER else "format=onnx"
            keep.append(
                f"{folder} keeps its former card, for its scores are not those of the run: make it anew with "
                f"`blemish export run={run} {precision}`."
            )
    return keep


def _same_calibration(one: Calibration, other: Calibration) -> bool:
    """Whether two cards, of other scores, promise the same by the same images."""
    first, second = ((card.promise, card.mask_rule, set(card.made.get("calibrated_on", ()))) for card in (one, other))
    return first == second


def results_folder(run: Path, engine: str = "torch") -> Path:
    """Where results of a run or an exported file go by default: what has a card of its own keeps its own."""
    if is_exported(run):
        return run.parent
    folder = run if run.is_dir() else run.parent
    return folder / INT8_FOLDER if engine == INT8 else folder


def check_engine(engine: str) -> None:
    """Raise ConfigError if there is no such engine."""
    if engine not in ENGINES:
        raise ConfigError(
            f"Expected engine to be one of {', '.join(ENGINES)}, found '{engine}'. {nearest_names(engine, ENGINES)}"
        )

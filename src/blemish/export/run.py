"""The verb `export`: trace, write under a temporary name, compare, and only then give the file its own."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from blemish.detector import Detector, TileDetector
from blemish.engines.description import Description
from blemish.engines.load import FILES, PROGRAMS, load_exported
from blemish.errors import ConfigError, DataError
from blemish.export.graph import check_exportable, input_shape, tiles_at_once, trace
from blemish.export.parity import Parity, compare
from blemish.export.writing import check_format, write
from blemish.files import CARD_FILE, explain_write_errors, write_json

_ABOUT = ("software", "version", "torch", "seed", "data_fingerprint", "created")


@dataclass(frozen=True)
class Exported:
    """The file that `export` wrote, the shape of its input (None where any will do), how it was compared."""

    path: Path
    shape: list[int | None]
    parity: Parity


def check(detector: Detector, form: str, images: int) -> None:
    """Raise, before any work is done, if an export is out of the question.

    Raises:
        ConfigError: an unknown format, or no images. ExportError: a package is missing, or a part of the detector says
            that no graph can hold it. NotCalibrated.
    """
    check_format(form)
    if images < 1:
        raise ConfigError(f"Expected images >= 1, to compare the exported file on, found {images}.")
    check_exportable(detector)
    _ = detector.card


def export(
    detector: Detector,
    config: Mapping[str, Any],
    form: str,
    out: Path,
    paths: Sequence[Path],
    images: int = 32,
    any_size: bool = True,
    progress: bool = True,
) -> Exported:
    """Write a calibrated detector as one file (for OpenVINO two), and its calibration card beside it.

    A file that scores otherwise than the detector is removed. An earlier one of that name goes only when this one is
    sound.

    Args:
        detector: of a run, on the CPU. config: what it was assembled from, for the record.
        form: a key of `FILES`. out: folder. paths: normal images, of which at most `images` are compared.
        any_size: as in `trace`.

    Raises:
        ExportError: the detector cannot be exported, or the file does not score as it does. As `check`, and `compare`.
    """
    check(detector, form, images)
    assert isinstance(detector, TileDetector)
    if not paths:
        raise DataError("Expected calibration images to compare the exported file on, found none: give data.root=DIR.")
    chosen = [paths[place] for place in np.linspace(0, len(paths) - 1, min(images, len(paths))).round().astype(int)]
    program = trace(detector, any_size)
    about = {"config": dict(config)} | {key: detector.about[key] for key in _ABOUT if key in detector.about}
    batch = tiles_at_once(program, detector.tiling.batch)
    text = Description.of(detector, about, batch).to_text()
    path = out / FILES[form]
    with explain_write_errors(path):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=out) as folder:
            made = Path(folder) / path.name
            write(form, program, text, made)
            other = load_exported(made, "cpu", [PROGRAMS], with_card=False)
            parity = compare(detector, replace(other, calibration=detector.card), chosen, progress)
            parity.check(path.name)
            path.unlink(missing_ok=True)  # of two files, never an old one beside a new one
            for part in sorted(Path(folder).iterdir(), key=lambda part: part.name == path.name):
                part.replace(out / part.name)
    write_json(out / CARD_FILE, detector.card.to_dict())
    return Exported(path, input_shape(program), parity)

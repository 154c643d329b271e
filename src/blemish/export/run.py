"""The verb `export`: trace, write under a temporary name, compare, and only then give the file its own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blemish.detector import Detector, TileDetector
from blemish.engines.description import Description
from blemish.engines.load import FILES, PROGRAMS, load_exported
from blemish.errors import ConfigError, DataError, nearest_names
from blemish.export.graph import check_exportable, input_shape, tiles_at_once, trace
from blemish.export.parity import Parity, compare
from blemish.export.quantise import spread
from blemish.export.writing import check_format, write
from blemish.files import CARD_FILE, explain_write_errors, write_json

PRECISIONS = ("float32", "int8")
_ABOUT = ("software", "version", "torch", "seed", "data_fingerprint", "created")


@dataclass(frozen=True)
class Exported:
    """The file that `export` wrote, the shape of its input (None where any will do), how it was compared."""

    path: Path
    shape: list[int | None]
    parity: Parity


def check(detector: Detector, form: str, images: int, precision: str = "float32") -> None:
    """Raise, before any work is done, if an export is out of the question.

    Raises:
        ConfigError: an unknown format or precision, two that do not go together, or no images. ExportError: a package
            is missing, or a part of the detector says that no graph can hold it. NotCalibrated.
    """
    check_format(form)
    if precision not in PRECISIONS:
        raise ConfigError(
            f"Expected precision to be one of {', '.join(PRECISIONS)}, found '{precision}'. "
            f"{nearest_names(precision, PRECISIONS)}"
        )
    if precision == "int8" and form != "onnx":
        raise ConfigError(f"precision=int8 expects format=onnx, found format={form}: leave one of them out.")
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
    path = out / FILES[form]
    with replacing(path) as folder:
        made = write_compared(detector, config, form, folder / path.name, paths, images, any_size, progress)
    write_json(out / CARD_FILE, detector.card.to_dict())
    return replace(made, path=path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary folder, whose files replace those beside `path`, that one last; or none does, if something fails."""
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as folder:
            yield Path(folder)
            path.unlink(missing_ok=True)  # of several files, never an old one beside a new one
            for part in sorted(Path(folder).iterdir(), key=lambda part: part.name == path.name):
                part.replace(path.with_name(part.name))


def write_compared(
    detector: Detector,
    config: Mapping[str, Any],
    form: str,
    path: Path,
    paths: Sequence[Path],
    images: int,
    any_size: bool,
    progress: bool,
) -> Exported:
    """Write a detector that `check` has passed to `path`, and see that the file scores as it does. As `export`."""
    assert isinstance(detector, TileDetector)
    if not paths:
        raise DataError("Expected calibration images to compare the exported file on, found none: give data.root=DIR.")
    program = trace(detector, any_size)
    about = {"config": dict(config)} | {key: detector.about[key] for key in _ABOUT if key in detector.about}
    batch = tiles_at_once(program, detector.tiling.batch)
    write(form, program, Description.of(detector, about, batch).to_text(), path)
    other = load_exported(path, "cpu", [PROGRAMS], with_card=False)
    parity = compare(detector, replace(other, calibration=detector.card), spread(paths, images), progress)
    parity.check(path.name)
    return Exported(path, input_shape(program), parity)

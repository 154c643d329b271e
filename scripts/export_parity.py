"""Whether every engine says the same of real images: each run exported in each format, and compared with itself.

    python scripts/export_parity.py RUN... [--out parity.md] [--images 48]

RUN: a folder of `blemish train`, whose images are still where they were. A file is first compared as `blemish export`
does, on calibration images; then decisions are compared on test images, evenly spread. The files are not kept.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from benchmark_cell import hardware, read_json
from benchmark_report import as_table

REFUSED = "refused, see below"
FORMATS = ("onnx", "openvino", "torch")
HEADERS = ("run", "format", "score maps", "image scores", "p-values", "decisions that differ", "MiB")


def parts_of(run: Path, images: int) -> tuple[list[Path], list[Path]]:
    """Some calibration images, and some test images."""
    import csv

    with (run / "splits.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))

    def some(part: str) -> list[Path]:
        paths = [Path(row["path"]) for row in rows if row["split"] == part]
        return paths[:: max(1, len(paths) // images)][:images]

    return some("calibration"), some("test")


def rows_of(run: Path, images: int) -> list[list[object]]:
    """A row for each format; of one that cannot hold the run, a short one that says why."""
    from blemish import load_detector
    from blemish.engines.load import PROGRAMS, load_exported
    from blemish.errors import BlemishError
    from blemish.export.parity import compare
    from blemish.export.run import export

    detector: Any = load_detector(run, "cpu")
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    calibration, test = parts_of(run, images)
    name = read_json(run / "run.json")["overrides"]
    model = next((word.partition("=")[2] for word in name if word.startswith("model=")), "defaults")
    rows: list[list[object]] = []
    for form in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                made = export(detector, settings, form, Path(folder), calibration, min(16, images), progress=False)
            except BlemishError as error:
                rows.append([model, form, str(error)])
                continue
            size = sum(file.stat().st_size for file in Path(folder).iterdir()) / 2**20
            other = replace(load_exported(made.path, "cpu", [PROGRAMS]), calibration=detector.card)
            found = compare(detector, other, test, progress=False)
        worst = [
            max(getattr(made.parity, figure), getattr(found, figure))
            for figure in ("score_map", "image_score", "p_value")
        ]
        differing = f"{found.decisions} of {found.images}"
        rows.append(
            [model, form, *(f"{value:.1e}" for value in worst[:2]), f"{worst[2]:.2g}", differing, f"{size:.1f}"]
        )
    return rows


def text_of(rows: Sequence[Sequence[object]], images: int) -> str:
    from blemish import __version__

    machine = hardware("cpu")
    return "\n\n".join(
        [
            f"# Engines against runs: blemish {__version__}",
            f"Made by `python scripts/export_parity.py RUN... --images {images}`. The largest differences over "
            "calibration and test images, scores in units of the largest one; decisions on the test images. A p-value "
            "moves by a rank where a score and a calibration score are equal but for rounding. "
            f"{machine['cpu']}, torch {machine['torch']}.",
            as_table(HEADERS, [row if len(row) == len(HEADERS) else [*row[:2], REFUSED] for row in rows]),
            *(f"`{model}`, {form}: {sentence}" for model, form, sentence, *rest in rows if not rest),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, default=Path("parity.md"))
    parser.add_argument("--images", type=int, default=48)
    arguments = parser.parse_args()

    from blemish.files import write_text

    rows: list[list[object]] = []
    for run in tqdm(arguments.runs, "runs"):
        rows += rows_of(run, arguments.images)
        write_text(arguments.out, text_of(rows, arguments.images) + "\n")
    print(text_of(rows, arguments.images))


if __name__ == "__main__":
    main()

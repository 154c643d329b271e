"""Writes a manifest of the monocrystalline solar cells in the PyPI package `elpv-dataset`, or copies them.

    python scripts/solar_cells.py FOLDER             # writes FOLDER/manifest.csv
    python scripts/solar_cells.py FOLDER --copy      # and FOLDER/train/good, FOLDER/test/good, FOLDER/test/defective

Defect probability 0 is normal, 1 is defective; the cells in between are left out. A fifth of the normal cells,
chosen by a fixed seed, and all defective ones are the test part.

The images are electroluminescence pictures of 300 x 300 pixels, CC BY-NC-SA 4.0. Source: Buerhop-Lutz et al.,
A benchmark for visual identification of defective solar cells in electroluminescence imagery, EU PVSEC 2018;
Deitsch et al., Segmentation of photovoltaic module cells, Machine Vision and Applications 2021.
"""

from __future__ import annotations

import csv
import importlib.util
import random
import shutil
import sys
from pathlib import Path

from blemish.files import write_csv


def package_folder() -> Path:
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        sys.exit("The package elpv-dataset is not installed: run `pip install 'blemish[demo]'`.")
    return Path(spec.origin).parent / "data"


def write_manifest(folder: Path) -> Path:
    source = package_folder()
    cells: dict[str, list[Path]] = {"0": [], "1": []}
    for line in (source / "labels.csv").read_text(encoding="utf-8").splitlines():
        name, probability, kind = line.split()
        if kind == "mono" and float(probability) in (0.0, 1.0):
            cells[str(int(float(probability)))].append(source / name)
    normals = sorted(cells["0"])
    random.Random(0).shuffle(normals)
    in_test = len(normals) // 5
    rows = [
        {"path": path, "label": "good", "split": "test" if place < in_test else ""}
        for place, path in enumerate(normals)
    ]
    rows += [{"path": path, "label": "defective", "split": "test"} for path in sorted(cells["1"])]
    manifest = folder / "manifest.csv"
    write_csv(manifest, ("path", "label", "split"), rows)
    return manifest


def copy_images(manifest: Path) -> None:
    """Beside the manifest, in the layout of MVTec AD, which `scripts/benchmark.py` reads."""
    with manifest.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            folder = manifest.parent / (row["split"] or "train") / row["label"]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(row["path"], folder)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[2:] not in ([], ["--copy"]):
        sys.exit(f"usage: python {sys.argv[0]} FOLDER [--copy]")
    written = write_manifest(Path(sys.argv[1]))
    if sys.argv[2:]:
        copy_images(written)
    print(written)

"""The main job on real images: train, calibrate, evaluate and predict on solar cells. `make demo` runs it.

    python scripts/demo.py [FOLDER]     # default: demo; a finished or partial demo in it is replaced

Everything goes through the `blemish` command, as a user would call it.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from solar_cells import write_manifest

SETTINGS = ["image.max_side=128", "training.steps=1000"]
SHOWN = 6  # pictures per row of the overview


def blemish(*arguments: str) -> None:
    print("\n$ blemish " + " ".join(arguments), flush=True)
    done = subprocess.run([sys.executable, "-m", "blemish", *arguments], check=False)
    if done.returncode:
        sys.exit(f"`blemish {arguments[0]}` ended with exit code {done.returncode}")


def overview(predictions: Path, shown: list[Path], out: Path) -> None:
    """Two rows of image, heat map and mask: normal cells above, the most anomalous ones below."""
    tiles = []
    for path in shown:
        image = Image.open(path).convert("RGB")
        heat = Image.open(predictions / "heatmaps" / f"{path.stem}.png")
        mask = Image.open(predictions / "masks" / f"{path.stem}.png").convert("RGB")
        column = [np.asarray(picture.resize((150, 150))) for picture in (image, heat, mask)]
        tiles.append(np.pad(np.vstack(column), ((2, 2), (2, 2), (0, 0)), constant_values=255))
    rows = [np.hstack(tiles[first : first + SHOWN]) for first in range(0, len(tiles), SHOWN)]
    Image.fromarray(np.vstack(rows)).save(out)


def main() -> None:
    start = time.perf_counter()
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")
    run, predictions = folder / "run", folder / "predictions"
    for old in (run, predictions):
        shutil.rmtree(old, ignore_errors=True)
    manifest = write_manifest(folder)
    print("Solar cells of the package elpv-dataset (Buerhop-Lutz et al., Deitsch et al.), CC BY-NC-SA 4.0.")
    blemish("train", "data=manifest", f"data.root={manifest}", f"out={run}", *SETTINGS)

    with (run / "evaluation.csv").open(encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: float(row["image_score"]))
    normal, defective = ([row for row in rows if (row["kind"] == "good") is good] for good in (True, False))
    # Evenly spread over the normal scores, so that the picture shows no chosen few; the worst of the defective.
    shown = [normal[place] for place in np.linspace(0, len(normal) - 1, SHOWN).round().astype(int)] + defective[-SHOWN:]
    paths = [Path(row["path"]) for row in shown]
    quoted = ",".join("'" + str(path).replace("'", "\\'") + "'" for path in paths)  # commas, too, may be in a path
    blemish("predict", f"run={run}", f"input=[{quoted}]", f"out={predictions}")
    overview(predictions, paths, folder / "overview.png")

    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    overall, normals = metrics["overall"], metrics["normals"]
    print(f"""
image AUROC                       {overall["image_auroc"]:.3f}
F1 at the calibrated threshold    {overall["calibrated"]["image_f1"]:.3f}
false alarms on normal test cells {normals["false_alarms"]} of {normals["images"]}
minutes                           {(time.perf_counter() - start) / 60:.1f}

Open {run / "report.html"} in a browser: the promise, scores, curves, and every test cell with its heat map. Open
{folder / "overview.png"}: image, heat map and mask of {SHOWN} normal cells (spread over their scores) and of the
{SHOWN} most anomalous ones; all heat maps are in {predictions / "heatmaps"}. Losses and panels over the training:
tensorboard --logdir {run / "tensorboard"}""")


if __name__ == "__main__":
    main()

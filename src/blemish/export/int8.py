"""`export precision=int8`: another detector, with a card of its own, held against the run that it was made of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from blemish.calibration import Calibration
from blemish.data.splits import SplitRecord
from blemish.detector import Detector, TileDetector
from blemish.engines.description import KEY, Description
from blemish.engines.load import FILES, FLOAT_FINGERPRINT
from blemish.engines.onnx import load_onnx
from blemish.errors import DataError
from blemish.evaluation.synthetic import check_images, synthetic_defects_figure
from blemish.evaluation.tables import table
from blemish.export.parity import Parity
from blemish.export.quantise import quantise, spread
from blemish.export.run import check, replacing, write_compared
from blemish.files import CARD_FILE, write_json
from blemish.pipeline import calibrate, check_enough, made_by
from blemish.scoring import score_files, usable

REPORT_FILE = "int8.json"
"""Beside the file: what became of the figures and of the promise."""


@dataclass(frozen=True)
class Images:
    """The normal images of a run: `train` gives the ranges of activations, `calibration` the card.

    On `validation` both detectors are measured. No two parts share an image or a unit: an image that had shaped the
    ranges would not be exchangeable with new ones, and no card could promise anything by it.

    Raises:
        DataError: a part is empty, or shares something with another.
    """

    train: Sequence[SplitRecord]
    validation: Sequence[SplitRecord]
    calibration: Sequence[SplitRecord]

    def __post_init__(self) -> None:
        parts = {"training": self.train, "validation": self.validation, "calibration": self.calibration}
        seen: set[str] = set()
        for name, records in parts.items():
            own = {key for item in records for key in (item.digest, item.unit)}
            if not records or own & seen:
                found = "some that serve for another part, too" if records else "none"
                raise DataError(f"Expected the {name} images of the run, found {found}: give data.root=DIR.")
            seen |= own


@dataclass(frozen=True)
class Quantised:
    """The 8 bit file, its card, how the float32 graph behind it was compared with the run, and what was measured."""

    path: Path
    card: Calibration
    parity: Parity
    report: Mapping[str, Any]

    def in_words(self) -> str:
        """The report as a table, and a sentence on where its figures come from."""
        sides = [self.report[name] for name in ("float32", "int8")]
        rows: list[list[object]] = []
        if sides[0]["synthetic"]:
            for name in ("image", "pixel"):
                figures = [side["synthetic"][f"{name}_auroc"] for side in sides]
                rows.append([f"{name} AUROC", *(f"{figure:.4f}" for figure in figures)])
                rows[-1].append(f"{figures[1] - figures[0]:+.4f}")
        rows += [
            ["threshold", *(f"{side['threshold']:.6g}" for side in sides)],
            ["false alarms", *(side["false_alarms"] for side in sides)],
            ["images per second", *(f"{side['images_per_second']:.1f}" for side in sides)],
            ["file in MB", *(f"{side['bytes'] / 1e6:.2f}" for side in sides)],
        ]
        return (
            f"{table(['', 'float32', 'int8', 'change'], rows)}\n"
            f"measured on {self.report['validation_images']} validation images, AUROC against synthetic defects; "
            f"{self.report['convolutions']} convolutions have 8 bits, by {self.report['range_images']} training images"
        )


def export_int8(
    detector: Detector,
    config: Mapping[str, Any],
    out: Path,
    images: Images,
    most: int = 32,
    synthetic: int = 100,
    any_size: bool = True,
    progress: bool = True,
) -> Quantised:
    """Write a calibrated detector with its convolutions in 8 bits, a new calibration card, and what that changed.

    Its scores are others, so it has a fingerprint of its own, and its card is fitted by the run's promise and mask
    rule to the run's calibration images. Maps are normalised as before, by what float32 maps showed. Nothing is kept
    if anything fails, and an earlier export goes only when this one is done.

    Args:
        detector, config, any_size: as `export`. out: folder.
        most: so many calibration images compare the float32 graph with the run, and so many training images give the
            ranges. synthetic: of so many validation images the figure without labels is made, 0 for none.

    Raises:
        CalibrationError: too few calibration images. As `export`, `quantise` and `calibrate`.
    """
    check(detector, "onnx", most, "int8")
    check_images(synthetic)
    before = detector.card
    check_enough(images.calibration, before.promise, before.mask_rule)
    normals = [item.record.path for item in images.validation]
    path = out / FILES["onnx"]
    with replacing(path) as folder:
        source = folder / "float32.onnx"
        compared = [item.record.path for item in images.calibration]
        made = write_compared(detector, config, "onnx", source, compared, most, any_size, progress)
        exact = load_onnx(source)
        # In the order of their content, so that the same images give the same file, wherever they lie.
        by_content = sorted(images.train, key=lambda item: item.digest)
        shown = spread([item.record.path for item in by_content], most)
        convolutions = quantise(source, exact, shown, folder / path.name, progress)
        describe(folder / path.name, exact)
        coarse = load_onnx(folder / path.name)
        card = calibrate(coarse, images.calibration, before.promise, before.mask_rule, progress)
        coarse = replace(coarse, calibration=card)
        sides = {"float32": (replace(exact, calibration=before), source), "int8": (coarse, folder / path.name)}
        report = {
            "made": made_by(coarse),
            "convolutions": convolutions,
            "range_images": len(shown),
            "validation_images": len(normals),
            **{
                name: {"bytes": file.stat().st_size, **measure(side, normals, synthetic, progress)}
                for name, (side, file) in sides.items()
            },
        }
        source.unlink()
        write_json(folder / CARD_FILE, card.to_dict())
        write_json(folder / REPORT_FILE, report)
    return Quantised(path, card, made.parity, report)


def describe(path: Path, exact: TileDetector) -> None:
    """Give an 8 bit graph the description of the float32 detector that it was made of, under its own fingerprint.

    That names what the old one does, and what the new graph computes: not the exporter's remarks, which may differ.
    """
    import onnx

    model = onnx.load(path)
    digest = hashlib.sha256(exact.fingerprint.encode())
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
        digest.update(node.SerializeToString(deterministic=True))
    for tensor in sorted(model.graph.initializer, key=lambda one: one.name):
        digest.update(tensor.SerializeToString(deterministic=True))
    about = {**exact.about, "precision": "int8", FLOAT_FINGERPRINT: exact.fingerprint}
    text = Description.of(replace(exact, fingerprint=digest.hexdigest()), about, exact.tiling.batch).to_text()
    onnx.helper.set_model_props(model, {KEY: text})  # alone: the quantiser's notes go
    path.write_bytes(model.SerializeToString())


def measure(detector: Detector, normals: Sequence[Path], synthetic: int, progress: bool = True) -> dict[str, Any]:
    """What a calibrated detector says of normal images that neither trained nor calibrated, and its promise.

    Raises:
        DataError: an image cannot be used.
    """
    alarms, seconds = 0, 0.0
    files = score_files(detector, normals)
    for scored in tqdm(files, "measuring", len(normals), unit="image", disable=not progress, leave=False):
        alarms += detector.decide(usable(scored), scored.label).is_anomalous
        seconds += scored.seconds
    figure = synthetic_defects_figure(detector, normals, synthetic, progress=progress) if synthetic else None
    return {
        "fingerprint": detector.fingerprint,
        "threshold": detector.card.threshold,
        "promise": detector.card.in_words(),
        "false_alarms": alarms,
        "images_per_second": len(normals) / seconds,
        "synthetic": figure,
    }

"""The verbs calibrate, evaluate, predict and compare. Objects in, files and results out; no config, no CLI.

(Training is in `training/run.py` and `training/fit.py`, beside Lightning, which these verbs do not need; `check` is in
`data/check.py`, which needs no torch.)
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm import tqdm

from blemish import __version__
from blemish.calibration import Calibration, Promise
from blemish.data.images import Pixels, expand_inputs, probe, read_mask, read_pixels
from blemish.data.records import Record
from blemish.data.splits import SplitRecord, digest_files, find_units
from blemish.detector import Detector, image_score
from blemish.errors import CalibrationError, DataError, ImageError
from blemish.evaluation.metrics import Evaluation
from blemish.files import write_csv, write_json
from blemish.outputs import PredictionFiles, Scored, unique_stems
from blemish.streaming import map_ahead

_PIXELS_AHEAD = 2**24  # decoded or waiting to be written at any time, beyond the images in hand


def made_by(detector: Detector) -> dict[str, Any]:
    """What every artefact says of its origin."""
    return {
        "software": "blemish",
        "version": __version__,
        "fingerprint": detector.fingerprint,
        "calibration": (
            asdict(detector.calibration.promise) | {"threshold": detector.calibration.image.value}
            if detector.calibration
            else None
        ),
        "seed": detector.about.get("seed"),
        "data_fingerprint": detector.about.get("data_fingerprint"),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


@dataclass(frozen=True)
class _Map:
    """A file with its pixels and raw score map, or the reason why there are none.

    `seconds`: to decode, tile and score, shared evenly by the images of a batch.
    """

    path: Path
    pixels: Pixels | None
    score_map: Any
    seconds: float
    error: str = ""


def score_files(detector: Detector, paths: Sequence[Path]) -> Iterator[_Map]:
    """Score files in order: decoding runs ahead in a thread; an unreadable file yields its error."""

    def decode(path: Path) -> Pixels | ImageError:
        try:
            return read_pixels(path)
        except ImageError as error:
            return error

    def area(path: Path) -> float:
        try:
            info = probe(path)
        except ImageError:
            return 0
        return info.width * info.height

    pending: deque[tuple[Path, Pixels | ImageError]] = deque()

    def readable() -> Iterator[Pixels]:
        for path, pixels in zip(paths, map_ahead(decode, paths, area, _PIXELS_AHEAD), strict=True):
            pending.append((path, pixels))
            if not isinstance(pixels, ImageError):
                yield pixels

    def errors() -> Iterator[_Map]:
        while pending and isinstance(pending[0][1], ImageError):
            path, error = pending.popleft()
            yield _Map(path, None, None, 0.0, str(error))

    start = time.perf_counter()
    for batch in detector.score_batches(readable()):
        seconds = (time.perf_counter() - start) / len(batch)
        for score_map in batch:
            yield from errors()
            path, pixels = pending.popleft()
            assert not isinstance(pixels, ImageError)
            yield _Map(path, pixels, score_map, seconds)
        start = time.perf_counter()
    yield from errors()


def calibrate(
    detector: Detector,
    records: Sequence[SplitRecord],
    promise: Promise,
    mask_rule: str = "any_pixel",
    progress: bool = True,
) -> Calibration:
    """Fit a calibration on held-out normal images.

    Raises:
        CalibrationError: too few units (said before any image is scored), or scores that are not finite.
        DataError: an image cannot be read, or is not normal.
    """
    promise.rank(len({item.unit for item in records}))
    defective = [item for item in records if not item.record.is_normal]
    if defective:
        raise DataError(f"{defective[0].record.path} is not defect-free: only normal images calibrate.")
    scores = []
    maps = score_files(detector, [item.record.path for item in records])
    for scored in tqdm(maps, "calibrating", len(records), unit="image", disable=not progress, leave=False):
        if scored.error:
            raise DataError(f"A calibration image cannot be used. {scored.error}")
        scores.append(image_score(scored.score_map))
    made = {key: value for key, value in made_by(detector).items() if key != "calibration"}
    digests = "".join(sorted(item.digest for item in records))
    made["calibration_fingerprint"] = hashlib.sha256(digests.encode()).hexdigest()
    return Calibration.fit(scores, [item.unit for item in records], promise, detector.fingerprint, mask_rule, made)


def normals_to_calibrate(
    records: Sequence[Record], trained_on: Sequence[str], trained_groups: Sequence[str] = (), progress: bool = True
) -> list[SplitRecord]:
    """The normal images among `records` as calibration records: those marked "calibration" or, if none is, all that
    are not of the test or validation part and share no content or group with the test part.

    Args:
        trained_on: SHA-256 of the files that trained or selected the model.
        trained_groups: the groups of those files.

    Raises:
        CalibrationError: some of them trained: their scores are too low to calibrate with.
    """
    digests = digest_files([record.path for record in records], progress)
    units = find_units(records, digests)
    in_test = {unit for record, unit in zip(records, units, strict=True) if record.split == "test"}
    named = any(record.split == "calibration" for record in records)
    chosen = [
        SplitRecord(record, digest, unit)
        for record, digest, unit in zip(records, digests, units, strict=True)
        if record.is_normal
        and unit not in in_test
        and (record.split == "calibration" if named else record.split in (None, "train"))
    ]
    files, groups = set(trained_on), set(trained_groups)
    seen = [item.record.path for item in chosen if item.digest in files or item.record.group in groups]
    if seen:
        raise CalibrationError(
            f"{len(seen)} of {len(chosen)} calibration images, or others of their group, took part in training (first: "
            f"{seen[0]}): their scores are too low to promise anything; give images that the model has not seen."
        )
    return chosen


def evaluate(detector: Detector, records: Sequence[Record], out: Path, progress: bool = True) -> dict[str, Any]:
    """Score the test images, and write metrics.json and evaluation.csv (a row per image) to `out`.

    Returns:
        the content of metrics.json; "unreadable" lists the files that could not be used.

    Raises:
        DataError: there are no test images, or none of them is readable. NotCalibrated.
    """
    test = [record for record in records if record.split == "test"]
    if not test:
        raise DataError("There are no test images: evaluation needs a test part (data=mvtec or data=manifest).")
    evaluation, rows, unreadable = Evaluation(), [], []
    maps = score_files(detector, [record.path for record in test])
    with tqdm(total=len(test), desc="evaluating", unit="image", disable=not progress, leave=False) as bar:
        for record, scored in zip(test, maps, strict=True):
            bar.update()
            error = scored.error
            row: dict[str, Any] = {"path": str(record.path), "kind": record.kind}
            if not error:
                prediction = detector.decide(scored.score_map)
                try:
                    truth = read_mask(record.mask, scored.score_map.shape) if record.mask else None
                    evaluation.add(record.kind, prediction, truth)
                    row |= {
                        "image_score": prediction.image_score,
                        "p_value": prediction.p_value,
                        "decision": "anomalous" if prediction.is_anomalous else "normal",
                    }
                except ImageError as problem:
                    error = str(problem)
            if error:
                unreadable.append(error)
            rows.append(row | {"error": error})
    if len(unreadable) == len(test):
        raise DataError(f"None of the {len(test)} test images can be used. {unreadable[0]}")
    metrics = {"made": made_by(detector), **evaluation.result(), "unreadable": unreadable}
    write_csv(out / "evaluation.csv", ("path", "kind", "image_score", "p_value", "decision", "error"), rows)
    write_json(out / "metrics.json", metrics)
    return metrics


@dataclass(frozen=True)
class PredictSummary:
    """What `predict` did, an earlier interrupted run included; `resumed` images were done by that.

    `errors` has a sentence for each image that could not be used.
    """

    images: int
    anomalous: int
    errors: list[str]
    resumed: int


def predict(
    detector: Detector,
    inputs: str | Path | Sequence[str | Path],
    out: Path,
    overwrite: bool = False,
    progress: bool = True,
) -> PredictSummary:
    """Predict images and write, below `out`, maps/, heatmaps/, masks/, predictions.csv and .jsonl.

    Raises:
        DataError: an input is missing. BlemishError: `out` cannot be used. NotCalibrated.
    """
    # Results of an earlier run are no inputs, should `out` lie inside the input folder.
    inside = out.absolute()
    pairs = [pair for pair in expand_inputs(inputs) if inside not in pair[0].absolute().parents]
    stems = dict(zip([path for path, _ in pairs], unique_stems([name for _, name in pairs]), strict=True))
    files = PredictionFiles(out, made_by(detector), detector.card.mask.value, overwrite)
    before = files.done()
    done = {row["path"] for row in before}
    todo = [path for path, _ in pairs if str(path) not in done]

    def scored() -> Iterator[Scored]:
        for item in score_files(detector, todo):
            prediction = None if item.error else detector.decide(item.score_map)
            yield Scored(item.path, item.pixels, prediction, item.seconds, item.error)

    def area(item: Scored) -> float:
        return 0 if item.pixels is None else item.pixels.shape[0] * item.pixels.shape[1]

    def write(item: Scored) -> dict[str, Any]:
        return files.write_images(item, stems[item.path])

    anomalous = sum(row["decision"] == "anomalous" for row in before)
    errors = [row["error"] for row in before if row["error"]]
    rows = files.append(map_ahead(write, scored(), area, _PIXELS_AHEAD, workers=2))
    for row in tqdm(rows, "predicting", len(pairs), initial=len(pairs) - len(todo), unit="image", disable=not progress):
        anomalous += row["decision"] == "anomalous"
        errors += [row["error"]] if row["error"] else []
    files.finish()
    return PredictSummary(len(before) + len(todo), anomalous, errors, len(before))


def compare(folder: Path) -> tuple[list[str], list[list[object]]]:
    """Headers and rows of a table over the runs below `folder`: what differs between them, and their figures.

    Raises:
        DataError: there is no run below `folder`.
    """
    runs = sorted(path.parent for path in folder.rglob("run.json"))
    if not runs:
        raise DataError(f"No run found below {folder}: expected folders with a run.json, as `blemish train` makes.")
    settings = [_overrides(json.loads((run / "run.json").read_text(encoding="utf-8"))) for run in runs]
    keys = sorted(set().union(*settings) - {"out"})
    differing = [key for key in keys if len({setting.get(key) for setting in settings}) > 1]
    figures = ("image_auroc", "image_ap", "pixel_auroc", "aupro_0.3")
    rows: list[list[object]] = []
    for run, setting in zip(runs, settings, strict=True):
        row: list[object] = [str(run.relative_to(folder)), *(setting.get(key) for key in differing)]
        if (run / "metrics.json").is_file():
            metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
            overall = metrics["overall"]
            row += [*(overall[name] for name in figures), overall["calibrated"]["image_f1"]]
            card = json.loads((run / "card.json").read_text(encoding="utf-8"))
            stale = metrics["made"]["calibration"]["threshold"] != card["image_threshold"]
            row += [metrics["normals"]["false_alarm_rate"], "recalibrated since: evaluate again" if stale else ""]
        else:
            finished = (run / "detector.pt").is_file()
            row += [None] * (len(figures) + 2) + ["no test part" if finished else "unfinished or failed"]
        rows.append(row)
    return ["run", *differing, *figures, "calibrated_f1", "false_alarm_rate", "note"], rows


def _overrides(about: Mapping[str, Any]) -> dict[str, str]:
    """["model=vae", ...] -> {"model": "vae", ...}"""
    return {key: value for key, _, value in (word.partition("=") for word in about["overrides"])}

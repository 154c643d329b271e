"""The verbs calibrate, evaluate, predict, monitor and compare. Objects in, files and results out; no config, no CLI.

(Training is in `training/run.py` and `training/fit.py`, beside Lightning, which these verbs do not need; `check` is in
`data/check.py`, which needs no torch.)
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from blemish import __version__
from blemish.calibration import Calibration, Promise, count_units
from blemish.data.images import FloatArray, expand_inputs, read_mask
from blemish.data.records import Record
from blemish.data.splits import SplitRecord, Splits, digest_files, find_units
from blemish.detector import Detector, TileDetector
from blemish.drift import Drift
from blemish.errors import BlemishError, CalibrationError, ConfigError, DataError, ImageError
from blemish.evaluation.metrics import Evaluation
from blemish.evaluation.synthetic import read_metric, synthetic_defects_figure, write_figure
from blemish.files import CARD_FILE, DETECTOR_FILE, GALLERY_FILE, write_csv, write_json
from blemish.mask_rules import MaskRule
from blemish.monitoring import Monitor
from blemish.noise import NoiseEstimator
from blemish.normalisation import MapRecorder, NormalisationSettings, SpatialNormalisation
from blemish.outputs import PredictionFiles, Scored, unique_stems
from blemish.report.folder import interest
from blemish.report.gallery import Drawn, Shown, draw, draws_at_once, write_gallery
from blemish.rows import check_apart
from blemish.scoring import PIXELS_AHEAD, score_files, usable
from blemish.seen import Seen
from blemish.streaming import map_ahead

_EVALUATION = ("path", "kind", "class", "image_score", "p_value", "decision", "error")


def made_by(detector: Detector) -> dict[str, Any]:
    """What every artefact says of its origin."""
    return {
        "software": "blemish",
        "version": __version__,
        "fingerprint": detector.fingerprint,
        "calibration": (
            asdict(detector.calibration.promise)
            | {"mask_rule": detector.calibration.mask_rule.to_dict(), "threshold": detector.calibration.thresholds}
            if detector.calibration
            else None
        ),
        "seed": detector.about.get("seed"),
        "data_fingerprint": detector.about.get("data_fingerprint"),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def fit_normalisation(
    detector: TileDetector, paths: Sequence[Path], settings: NormalisationSettings, progress: bool = True
) -> SpatialNormalisation:
    """Location and scale of each pixel of the score maps, from normal images that do not calibrate.

    Args:
        detector: one that does not normalise yet.

    Raises:
        DataError: an image cannot be read. ImageError: they differ in size. ConfigError: fewer than two.
    """
    chosen = settings.choose(paths)
    recorder = MapRecorder()
    files = score_files(replace(detector, normalisation=recorder), chosen)

    def maps() -> Iterator[FloatArray]:
        for scored in tqdm(files, "normalising", len(chosen), unit="image", disable=not progress, leave=False):
            usable(scored)
            yield recorder.maps.popleft()

    return SpatialNormalisation.fit(maps(), settings.kind)


def check_enough(records: Sequence[SplitRecord], promise: Promise, mask_rule: MaskRule) -> None:
    """Raise CalibrationError if there are too few calibration images for the promise, before any is scored."""
    if mask_rule.name == "parametric_noise":  # promises nothing
        if not records:
            raise CalibrationError("There is no calibration image: expected at least one normal image.")
    else:
        promise.rank(len({item.unit for item in records}), len(records))


def check_classes_told(promise: Promise, classes: Sequence[str], images: int) -> None:
    """Raise, before any image is scored, if a promise by class is out of the question.

    Args:
        classes: those that the model tells apart. images: to calibrate with.

    Raises:
        ConfigError: the model tells none. CalibrationError: they are more than the images suffice for.
    """
    if not promise.by_class:
        return
    if not classes:
        raise ConfigError(
            "calibration.by_class=true expects a model that tells classes of parts apart, such as model=template_bank, "
            "found one that does not: choose another model, or calibration.by_class=false."
        )
    if images < promise.needed * len(classes):
        raise CalibrationError(
            f"{count_units(images)} are too few for alpha = {promise.alpha:g} ({promise.rule}) in each of "
            f"{len(classes)} classes: it needs {promise.needed} of each; add normal images, train with fewer templates "
            "or a larger split.calibration, or set calibration.by_class=false."
        )


def calibrate(
    detector: Detector,
    records: Sequence[SplitRecord],
    promise: Promise,
    mask_rule: MaskRule | None = None,
    progress: bool = True,
) -> Calibration:
    """Fit a calibration on held-out normal images.

    Raises:
        CalibrationError: too few units (said before any image is scored; by class, after), or scores that are not
            finite.
        ConfigError: the promise is by class, and the detector tells none.
        DataError: an image cannot be read, or is not normal.
    """
    mask_rule = mask_rule or MaskRule()
    check_enough(records, promise, mask_rule)
    check_classes_told(promise, detector.classes, len(records))
    defective = [item for item in records if not item.record.is_normal]
    if defective:
        raise DataError(f"{defective[0].record.path} is not defect-free: only normal images calibrate.")
    scores, labels = [], []
    noise = NoiseEstimator() if mask_rule.name == "parametric_noise" else None
    maps = score_files(detector, [item.record.path for item in records])
    for scored in tqdm(maps, "calibrating", len(records), unit="image", disable=not progress, leave=False):
        score_map = usable(scored)
        if not np.isfinite(score_map).all():
            raise CalibrationError(
                f"The score map of {scored.path} has NaN or infinite values: the model diverged; train it again."
            )
        mask_rule.check_size(score_map.size, scored.path)
        scores.append(mask_rule.score(score_map))
        labels.append(scored.label)
        if noise:
            noise.add(score_map)
    made = {key: value for key, value in made_by(detector).items() if key != "calibration"}
    made["calibrated_on"] = digests_of(records)
    made["calibration_fingerprint"] = _joined_digest(made["calibrated_on"])
    units = [item.unit for item in records]
    if promise.by_class:
        return Calibration.fit_by_class(
            scores, units, labels, detector.classes, promise, detector.fingerprint, mask_rule, made
        )
    estimate = noise.result() if noise else None
    return Calibration.fit(scores, units, promise, detector.fingerprint, mask_rule, estimate, made)


def digests_of(records: Sequence[SplitRecord]) -> list[str]:
    """The SHA-256 of the files, in an order of their own, so that equal lists mean equal files."""
    return sorted(item.digest for item in records)


def normals_to_calibrate(
    records: Sequence[Record], seen: Seen, calibrated_on: Sequence[str] = (), progress: bool = True
) -> list[SplitRecord]:
    """The normal images among `records` as calibration records: those marked "calibration" or, if none is, all that
    are not of the test or validation part and share no content or group with the test part.

    Where images of a run's training are among them, they are the run's images, moved: those that calibrated it are
    taken, if all are there.

    Args:
        seen: by the model.
        calibrated_on: SHA-256 of the files that calibrated it before.

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
    if known := seen.among(chosen):
        before = set(calibrated_on)
        if before and before <= {item.digest for item in chosen}:
            return [item for item in chosen if item.digest in before]
        raise CalibrationError(
            f"{len(known)} of {len(chosen)} calibration images, or others of their group, took part in training "
            f"(first: {known[0]}): their scores are too low to promise anything; give images that it has not seen."
        )
    return chosen


def check_new(detector: Detector, paths: Sequence[Path], why: str, progress: bool = True) -> dict[Path, str]:
    """The SHA-256 of each of these files, none of which the detector has seen.

    Args:
        why: what is wrong with images that it has seen, and what to do, without a full stop.

    Raises:
        CalibrationError: some took part in training or calibration. DataError: one cannot be read.
    """
    files = dict(zip(paths, digest_files(paths, progress), strict=True))
    known = {*detector.about.get("trained_on", ()), *detector.card.made.get("calibrated_on", ())}
    seen = [path for path, digest in files.items() if digest in known]
    if seen:
        raise CalibrationError(
            f"{len(seen)} of {len(paths)} images took part in training or calibration (first: {seen[0]}): {why}."
        )
    return files


def evaluate(
    detector: Detector, records: Sequence[Record], out: Path, gallery: int = 0, progress: bool = True
) -> dict[str, Any]:
    """Score the test images, and write metrics.json, curves.json and evaluation.csv (a row per image) to `out`.

    Args:
        gallery: of so many images, thumbnails for the report are written to gallery.zip.

    Returns:
        the content of metrics.json; "unreadable" lists the files that could not be used.

    Raises:
        ConfigError: `gallery` is negative.
        DataError: there are no test images, or none of them is readable. NotCalibrated.
    """
    check_gallery(gallery)
    test = [record for record in records if record.split == "test"]
    if not test:
        raise DataError("There are no test images: evaluation needs a test part (data=mvtec or data=manifest).")
    evaluation, rows, unreadable = Evaluation(), [], []
    paths = [record.path for record in test]
    at_once, drawn = draws_at_once(paths, gallery), dict[Path, Drawn]()
    maps = score_files(detector, paths, explain=at_once)
    with tqdm(total=len(test), desc="evaluating", unit="image", disable=not progress, leave=False) as bar:
        for record, scored in zip(test, maps, strict=True):
            bar.update()
            error = scored.error
            row: dict[str, Any] = {"path": str(record.path), "kind": record.kind}
            if scored.score_map is not None:
                prediction = detector.decide(scored.score_map, scored.label)
                if at_once and scored.pixels is not None:
                    drawn[record.path] = draw(scored.pixels, prediction, scored.expected)
                try:
                    truth = read_mask(record.mask, scored.score_map.shape) if record.mask else None
                    evaluation.add(record.kind, prediction, truth)
                    row |= {
                        "class": prediction.label,
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
    write_csv(out / "evaluation.csv", _EVALUATION, rows)
    write_json(out / "curves.json", evaluation.curves())
    write_json(out / "metrics.json", metrics)
    write_json(out / CARD_FILE, detector.card.to_dict())
    shown = [Shown(record.path, record.mask) for record in _worth_showing(test, rows)[:gallery]]
    write_gallery(out / GALLERY_FILE, detector, shown, progress, drawn)
    return metrics


@dataclass(frozen=True)
class Finished:
    """What a new run came to; `metrics` is None where the data have no test part.

    `synthetic` (see `evaluation.synthetic`) is None where that figure was not wanted.
    """

    calibration: Calibration
    metrics: dict[str, Any] | None
    synthetic: dict[str, Any] | None


def measure(run: Path, detector: Detector, splits: Splits, synthetic: int, gallery: int) -> Finished:
    """The figures of a calibrated detector, into its run folder: without labels, and where there is a test part.

    Args:
        synthetic: of so many validation images the figure without labels is made, 0 for none. gallery: as `evaluate`.
    """
    figure = metrics = None
    if synthetic:
        figure = synthetic_defects_figure(detector, [item.record.path for item in splits.of("validation")], synthetic)
        if figure:
            write_figure(run, figure, made_by(detector))
    if test := [item.record for item in splits.of("test")]:
        metrics = evaluate(detector, test, run, gallery=gallery)
    return Finished(detector.card, metrics, figure)


def check_gallery(images: int) -> None:
    """Raise ConfigError if so many images cannot be shown."""
    if images < 0:
        raise ConfigError(f"Expected report.images >= 0, found {images}.")


def _worth_showing(records: Sequence[Record], rows: Sequence[Mapping[str, Any]]) -> list[Record]:
    """The records of usable images, the most interesting ones first."""
    usable = [(record, row) for record, row in zip(records, rows, strict=True) if not row["error"]]
    usable.sort(key=lambda pair: interest(pair[1]["kind"], pair[1]["decision"] == "anomalous", pair[1]["image_score"]))
    return [record for record, _ in usable]


@dataclass(frozen=True)
class PredictSummary:
    """What `predict` did, an earlier interrupted run included; `resumed` images were done by that.

    `discoveries` is the number of images called anomalous at the false discovery rate, None without one.
    `errors` has a sentence for each image that could not be used.
    """

    images: int
    anomalous: int
    errors: list[str]
    resumed: int
    discoveries: int | None = None


def predict(
    detector: Detector,
    inputs: str | Path | Sequence[str | Path],
    out: Path,
    overwrite: bool = False,
    fdr: float | None = None,
    gallery: int = 0,
    progress: bool = True,
) -> PredictSummary:
    """Predict images and write, below `out`, maps/, heatmaps/, masks/, predictions.csv and .jsonl.

    Args:
        fdr: the false discovery rate over the batch at which images are called anomalous in the column
            `fdr_decision`, in (0, 1); None leaves it empty.
        gallery: of so many images, thumbnails for the report are written to gallery.zip.

    Raises:
        DataError: an input is missing. BlemishError: `out` cannot be used. ConfigError: `fdr` or `gallery` is out of
            range. NotCalibrated.
    """
    check_gallery(gallery)
    if fdr is not None and not (isinstance(fdr, (int, float)) and 0 < fdr < 1):
        raise ConfigError(f"Expected fdr between 0 and 1, found {fdr}.")
    pairs = [(path.absolute(), name) for path, name in expand_inputs(inputs)]
    check_apart(out, (path for path, _ in pairs))
    stems = dict(zip([path for path, _ in pairs], unique_stems([name for _, name in pairs]), strict=True))
    files = PredictionFiles(out, made_by(detector) | {"fdr": fdr}, detector.card, overwrite)
    before = files.rows.done()
    done = {row["path"] for row in before}
    if done - {str(path) for path in stems}:
        raise BlemishError(
            f"{out} holds unfinished predictions of other images: choose another out=, or set overwrite=true."
        )
    todo = [path for path, _ in pairs if str(path) not in done]
    at_once, drawn = draws_at_once(todo, gallery - len(done)), dict[Path, Drawn]()

    def scored() -> Iterator[Scored]:
        for item in score_files(detector, todo, explain=at_once):
            prediction = None if item.score_map is None else detector.decide(item.score_map, item.label)
            yield Scored(item.path, item.pixels, prediction, item.seconds, item.error, item.expected)

    def area(item: Scored) -> float:
        return 0 if item.pixels is None else item.pixels.shape[0] * item.pixels.shape[1]

    def write(item: Scored) -> dict[str, Any]:
        row = files.write_images(item, stems[item.path])
        if at_once and item.pixels is not None and item.prediction is not None:
            drawn[item.path] = draw(item.pixels, item.prediction, item.expected)
        return row

    def shown(row: Mapping[str, Any]) -> Shown:
        return Shown(Path(row["path"]), score_map=out / row["map"], label=row["class"])

    anomalous = sum(row["decision"] == "anomalous" for row in before)
    errors = [row["error"] for row in before if row["error"]]
    rows = files.rows.append(map_ahead(write, scored(), area, PIXELS_AHEAD))
    for row in tqdm(rows, "predicting", len(pairs), initial=len(pairs) - len(todo), unit="image", disable=not progress):
        anomalous += row["decision"] == "anomalous"
        if row["error"]:
            errors.append(row["error"])
    scored_rows = (row for row in files.rows if not row["error"])  # from the disk: they may be very many
    worst = heapq.nsmallest(gallery, scored_rows, key=lambda row: (-row["image_score"], row["path"]))
    write_gallery(out / GALLERY_FILE, detector, [shown(row) for row in worst], progress, drawn)
    discoveries = files.finish(fdr)
    return PredictSummary(len(before) + len(todo), anomalous, errors, len(before), discoveries)


def monitor(
    detector: Detector,
    inputs: str | Path | Sequence[str | Path],
    state: Path,
    level: float = 0.01,
    seed: int = 0,
    by_folder: bool | None = None,
    order: str = "shuffled",
    progress: bool = True,
) -> tuple[Drift, list[str]]:
    """Test whether images believed normal still match the calibration, and go on with the journal `state`.

    Args:
        level: the chance of a false verdict on unchanged images (see `Drift`). seed: breaks ties.
        by_folder: whether the images of one folder are one unit, with its largest score, as the calibration's groups.
            None is False, but refused if several calibration images are one unit.
        order: "shuffled" asks whether the images as a whole match; "name", where names sort by time, whether they
            do at every moment, so that neighbours which resemble each other count as a change, too.

    Returns:
        the verdict, and a sentence for each image that could not be used.

    Raises:
        ConfigError: `by_folder` must be settled. CalibrationError: an image trained the model, or see `Monitor`.
        DataError: see `Monitor`. NotCalibrated.
    """
    if order not in ("shuffled", "name"):
        raise ConfigError(f"Expected order to be shuffled or name, found '{order}'.")
    card = detector.card
    if card.classes:
        raise ConfigError(
            "`blemish monitor` tests one list of calibration scores, and this calibration is by class: monitor with a "
            "copy of the run that `blemish calibrate calibration.by_class=false` recalibrated."
        )
    if by_folder is None and card.images != card.n:
        raise ConfigError(
            f"The calibration has {count_units(card.n, card.images)}: set by_folder=true if the images of one folder "
            "are one such unit, or by_folder=false if each image is one."
        )
    paths = [path.absolute() for path, _ in expand_inputs(inputs)]
    files = check_new(detector, paths, "they say nothing about new images; give others", progress)
    units: dict[Path, list[tuple[Path, str]]] = {}
    for path, digest in files.items():
        units.setdefault(path.parent if by_folder else path, []).append((path, digest))
    digests = {unit: _joined_digest(digest for _, digest in members) for unit, members in units.items()}
    errors: list[str] = []
    with Monitor.open(
        state,
        card.scores,
        card.fingerprint,
        card.mask_rule.to_dict(),
        card.threshold,
        card.promise.alpha,
        seed,
        level,
        unit="folder" if by_folder else "image",
    ) as journal:
        for unit in units:
            if journal.seen(digests[unit]):
                journal.repeat(digests[unit])
        new = [unit for unit in units if not journal.seen(digests[unit])]
        changed = [unit for unit in new if by_folder and journal.knows(unit)]
        errors += [
            f"{unit} was monitored before with other images: give new images in a new folder." for unit in changed
        ]
        new = [unit for unit in new if unit not in changed]
        if order == "shuffled":
            new.sort(key=lambda unit: digests[unit])  # as good as random, and the same after a kill
        maps = score_files(detector, [path for unit in new for path, _ in units[unit]])
        with tqdm(total=len(new), desc="monitoring", unit="image", disable=not progress, leave=False) as bar:
            for unit in new:
                bar.update()
                score, usable = 0.0, True
                for scored in itertools.islice(maps, len(units[unit])):
                    if scored.score_map is None:
                        errors.append(scored.error)
                        usable = False
                    else:
                        score = max(score, card.mask_rule.score(scored.score_map))
                if usable:  # the largest score of a unit is not known without all its images
                    journal.add(unit, digests[unit], score)
        return journal.result(), errors


def _joined_digest(digests: Iterable[str]) -> str:
    """The SHA-256 of a single file stays what it is; several make one, whatever their order."""
    ordered = sorted(digests)
    return ordered[0] if len(ordered) == 1 else hashlib.sha256("".join(ordered).encode()).hexdigest()


def compare(folder: Path) -> tuple[list[str], list[list[object]]]:
    """Headers and rows of a table over the runs below `folder`: what differs between them, and their figures.

    Raises:
        DataError: there is no run below `folder`.
    """
    runs = sorted(path.parent for path in folder.rglob("run.json"))
    if not runs:
        raise DataError(f"No run found below {folder}: expected folders with a run.json, as `blemish train` makes.")
    about = [json.loads((run / "run.json").read_text(encoding="utf-8")) for run in runs]
    settings = [_overrides(one) for one in about]
    keys = sorted(set().union(*settings) - {"out"})
    differing = [key for key in keys if len({setting.get(key) for setting in settings}) > 1]
    figures = ("image_auroc", "image_ap", "pixel_auroc", "aupro_0.3")
    rows: list[list[object]] = []
    for run, setting, one in zip(runs, settings, about, strict=True):
        row: list[object] = [str(run.relative_to(folder)), *(setting.get(key) for key in differing)]
        row.append(read_metric(run, "synthetic/mean"))
        if (run / "metrics.json").is_file():
            metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
            overall = metrics["overall"]
            row += [*(overall[name] for name in figures), overall["calibrated"]["image_f1"]]
            card = Calibration.from_dict(json.loads((run / CARD_FILE).read_text(encoding="utf-8")))
            stale = metrics["made"]["calibration"]["threshold"] != card.thresholds
            row += [metrics["normals"]["false_alarm_rate"], "recalibrated since: evaluate again" if stale else ""]
        else:
            finished = (run / DETECTOR_FILE).is_file()
            stopped = "stopped early by the sweep" if one["status"] == "pruned" else "unfinished or failed"
            row += [None] * (len(figures) + 2) + ["no test part" if finished else stopped]
        rows.append(row)
    return ["run", *differing, "synthetic_mean", *figures, "calibrated_f1", "false_alarm_rate", "note"], rows


def _overrides(about: Mapping[str, Any]) -> dict[str, str]:
    """["model=vae", ...] -> {"model": "vae", ...}"""
    return {key: value for key, _, value in (word.partition("=") for word in about["overrides"])}

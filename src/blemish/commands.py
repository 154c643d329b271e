"""What each verb does with its composed settings: checks them, builds the objects, calls the pipeline, prints."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blemish.errors import ConfigError, DataError
from blemish.files import DETECTOR_FILE
from blemish.settings import plain
from blemish.sweep import LOG_FILE, Report

if TYPE_CHECKING:
    from blemish.calibration import Calibration
    from blemish.data.records import Records, Split
    from blemish.data.splits import SplitRecord
    from blemish.export.int8 import Images
    from blemish.pipeline import Finished

DONE, SOME_FAILED, MISTAKE, DRIFT, BUG, INTERRUPTED, UNREAD = 0, 1, 2, 3, 70, 130, 141
"""Exit codes: all done; done, but some images could not be used; a user's mistake; `monitor` found that the promise no
longer holds; our mistake; Ctrl-C; what was to be printed has no reader any more, as a shell says of other programs."""


def _required(config: Any, name: str, example: str) -> Any:
    from omegaconf import OmegaConf

    value = OmegaConf.select(config, name)  # None for a missing value, too
    if value is None or value == "":
        raise ConfigError(f"The setting {name} is missing: give it, as in `blemish {example}`.")
    return value


def _inputs(config: Any, example: str) -> str | list[str]:
    """The setting `input`: a path, or a list of them."""
    from omegaconf import OmegaConf

    value = _required(config, "input", example)
    return [str(item) for item in value] if OmegaConf.is_list(value) else str(value)


def dated(folder: str | Path) -> Path:
    return Path(folder) / datetime.now(timezone.utc).astimezone().strftime("%Y-%m-%d_%H-%M-%S")


def _read(data: dict[str, Any]) -> Records:
    from blemish.build import build

    data = {**data, "root": str(Path(data["root"]).expanduser().absolute())}
    records: Records = build(data, where="data")
    return records


def train(config: Any, overrides: list[str], report: Report | None = None) -> int:
    """The verb `train`; in a search, `report` is told a figure after every epoch, and may end it (`Pruned`)."""
    if config.resume is not None:
        run = Path(config.resume)
        others = [word for word in overrides if not word.startswith("resume=")]
        if others:
            raise ConfigError(
                f"resume takes all settings from {run}: leave out {' '.join(others)}, or start a new run."
            )
        from blemish.training.run import resume

        finished = resume(run, lambda data: _read(data).sound(), report)
    else:
        _required(config, "data.root", "train data=folder data.root=DIR")
        run = Path(config.out) if config.out is not None else dated("runs")
        _check_new(run, f", or continue it with resume={run}")
        from blemish.training.run import fit_to_images, name_classes, start

        config.data.root = str(Path(config.data.root).expanduser().absolute())
        _settle_backbone(config)
        records = _read(plain(config.data)).sound()
        name_classes(config, records)
        if not any(word.startswith("image.short_side=") for word in overrides) and (
            config.image.size is not None or config.image.max_side is not None
        ):
            config.image.short_side = None  # a default, which another way to size images replaces
        fit_to_images(config, [record.path for record in records if record.is_normal and record.split != "test"])
        settings = {key: value for key, value in plain(config).items() if key != "sweep"}
        try:
            finished = start(run, settings, records, overrides, report)
        except KeyboardInterrupt:
            if run.exists():
                raise
            raise KeyboardInterrupt("; nothing was begun: the same command begins anew") from None
    return _print_finished(run, finished)


def _settle_backbone(config: Any) -> None:
    """Make its paths absolute: the run is used from other folders, too."""
    from omegaconf import OmegaConf

    for name in ("run", "weights"):
        value = OmegaConf.select(config, f"backbone.{name}")
        if isinstance(value, str) and (path := Path(value).expanduser()).exists():
            path = path.parent if name == "run" and path.name == DETECTOR_FILE else path
            config.backbone[name] = str(path.absolute())
    if isinstance(cache := OmegaConf.select(config, "backbone.cache"), str):
        config.backbone.cache = str(Path(cache).expanduser().absolute())


def _check_new(run: Path, otherwise: str = "") -> None:
    """Raise ConfigError if a run cannot begin in this folder."""
    if "::" in str(run.absolute()):  # which Lightning takes for a chain of URLs
        raise ConfigError(f"Expected a folder without '::' in its path for the run, found {run.absolute()}.")
    if run.exists() and (not run.is_dir() or any(item.name != LOG_FILE for item in run.iterdir())):
        raise ConfigError(f"{run} exists and is not empty: choose another out={otherwise}.")


def _print_finished(run: Path, finished: Finished) -> int:
    """Say what a new run came to, and write its report."""
    _print_calibration(finished.calibration)
    if finished.synthetic:
        from blemish.evaluation.synthetic import in_words

        print(in_words(finished.synthetic))
    code = _print_metrics(finished.metrics, finished.calibration) if finished.metrics else DONE
    _write_report(run)
    print(f"run folder: {run}")
    return code


def _ensemble(config: Any, overrides: list[str]) -> int:
    from omegaconf import OmegaConf

    from blemish.ensemble import check_number

    given = _required(config, "runs", "ensemble runs=[RUN,RUN]")
    runs = [Path(str(run)) for run in (given if OmegaConf.is_list(given) else [given])]
    check_number(len(runs))
    out = Path(config.out) if config.out is not None else dated("runs")
    there = (out / DETECTOR_FILE).is_file()  # a killed one may lack its figures
    _check_new(out, f", or measure the ensemble that is there by `blemish evaluate run={out}`" if there else "")
    other_data = not OmegaConf.is_missing(config.data, "root")
    if other_data:
        config.data.root = str(Path(config.data.root).expanduser().absolute())
    else:
        for_other = [word for word in overrides if word.startswith(("seed=", "split."))]
        if for_other:
            raise ConfigError(
                f"'{for_other[0]}' is for other images: without data.root=DIR, the parts are those of the first run."
            )
        first = _run_settings(runs[0])
        config.data, config.seed, config.split = (first[name] for name in ("data", "seed", "split"))
    from blemish.combine import combine

    settings = plain(config)
    settings["runs"] = [str(run.absolute()) for run in runs]
    finished = combine(out, runs, settings, _read(settings["data"]).sound(), other_data, overrides)
    return _print_finished(out, finished)


def _print_calibration(calibration: Calibration) -> None:
    print(f"calibrated: {calibration.in_words()}")
    if calibration.noise:
        for sentence in calibration.noise.warnings():
            print(f"blemish: warning: the assumption of calibration.mask_rule is doubtful: {sentence}", file=sys.stderr)


def _write_report(folder: Path) -> None:
    from blemish.report.page import write_report

    print(f"report: {write_report(folder)}")


def _print_metrics(metrics: dict[str, Any], calibration: Calibration) -> int:
    from blemish.evaluation.tables import metrics_table

    unreadable = metrics["unreadable"]
    figures = {key: value for key, value in metrics.items() if key not in ("made", "unreadable")}
    print(metrics_table(figures, calibration.in_words()))
    return _print_unusable(unreadable)


def _print_unusable(sentences: list[str]) -> int:
    """A line for each image that could not be used; the exit code that this gives."""
    for sentence in sentences:
        print(f"blemish: {sentence}", file=sys.stderr)
    return SOME_FAILED if sentences else DONE


def _run_of(config: Any, usage: str) -> Path:
    """The folder of a run, be its detector named or the folder; or an exported file."""
    run = Path(_required(config, "run", usage))
    return run.parent if run.name == DETECTOR_FILE else run


def _run_settings(run: Path) -> dict[str, Any]:
    import yaml

    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} has no config.yaml: run= takes the folder that `blemish train` made.")
    settings: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    return settings


def _calibrate(config: Any, overrides: list[str]) -> int:
    from omegaconf import OmegaConf

    from blemish import pipeline
    from blemish.calibration import Promise, read_settings
    from blemish.checkpoint import load_detector, read_checkpoint, replace_calibration
    from blemish.data.splits import SPLITS_FILE, read_part
    from blemish.engines.load import renew_cards
    from blemish.files import CARD_FILE
    from blemish.mask_rules import SETTINGS
    from blemish.report.page import REPORT_FILE
    from blemish.seen import Seen

    run = _run_of(config, "calibrate run=RUN data.root=DIR")
    content = read_checkpoint(run)
    card = content["calibration"]
    before: dict[str, Any] = {}
    if card:
        rule = dict(card["mask_rule"])
        before = {**card["promise"], "mask_rule": rule.pop("name"), **rule}
    wanted = {key: value for key, value in plain(config.calibration).items() if value is not None}
    promise, mask_rule = read_settings(before | wanted)
    for rule_name, setting in SETTINGS.items():
        if setting in wanted and mask_rule.name != rule_name:
            raise ConfigError(
                f"calibration.{setting} is for the mask rule {rule_name}, the run has {mask_rule.name}: leave it out, "
                f"or add calibration.mask_rule={rule_name}."
            )
    own = OmegaConf.is_missing(config.data, "root")
    # Scores of another mask rule, and classes, come from the images; another alpha or rank needs the scores only.
    rescore = not own or not card or mask_rule.to_dict() != card["mask_rule"]
    rescore = rescore or promise.by_class != Promise(**card["promise"]).by_class
    detector = load_detector(run, config.device, config.trusted, with_card=not rescore)
    if not rescore:
        calibration = detector.card.with_promise(promise)
    else:
        if own:
            records = read_part(run / SPLITS_FILE, "calibration")
            if card and card["made"]["calibrated_on"] != pipeline.digests_of(records):
                raise ConfigError(
                    f"{run} was calibrated on other images than those set aside in its training: another mask rule or "
                    "by_class needs these images again; give them by data.root=DIR."
                )
        else:
            moved = card and not _has_part(run / SPLITS_FILE, "calibration")
            calibrated_on = card["made"]["calibrated_on"] if moved else ()
            records = pipeline.normals_to_calibrate(
                _read(plain(config.data)).sound(), Seen.read(content["about"]), calibrated_on
            )
        calibration = pipeline.calibrate(detector, records, promise, mask_rule)
    replace_calibration(run, calibration)
    _print_calibration(calibration)
    for sentence in renew_cards(run, calibration):
        print(f"blemish: warning: {sentence}", file=sys.stderr)
    thresholds = ", ".join(
        f"{part.threshold:.6g}" if label is None else f"{label} {part.threshold:.6g}"
        for label, part in calibration.parts.items()
    )
    print(f"threshold{'s' if calibration.classes else ''}: {thresholds}; card: {run / CARD_FILE}")
    if (run / REPORT_FILE).is_file():
        try:
            _write_report(run)
        except DataError as error:  # scores of another mask rule: what the page tells is of before
            (run / REPORT_FILE).unlink()
            print(f"removed: {run / REPORT_FILE}, for it told of the former calibration. {error}")
    return DONE


def _has_part(splits: Path, part: Split) -> bool:
    """Whether the images of this part are where they were."""
    from blemish.data.splits import read_part

    try:
        return bool(read_part(splits, part))
    except DataError:
        return False


def _evaluate(config: Any, overrides: list[str]) -> int:
    from omegaconf import OmegaConf

    from blemish import pipeline
    from blemish.engines.load import results_folder
    from blemish.loading import load_detector
    from blemish.rows import check_own

    run = _run_of(config, "evaluate run=RUN data=mvtec data.root=DIR")
    detector = load_detector(run, config.device, config.trusted, engine=config.engine)
    own = OmegaConf.is_missing(config.data, "root")
    records = _read(_run_settings(run)["data"] if own else plain(config.data)).sound()
    own_folder = results_folder(run, config.engine)
    out = Path(config.out) if config.out is not None else own_folder
    if out.resolve() != own_folder.resolve():
        check_own(out, "evaluation.csv", "an evaluation")
    # What cannot be read is counted by the evaluation itself.
    test = [record.path for record in records if record.split == "test" and os.access(record.path, os.R_OK)]
    pipeline.check_new(detector, test, "their scores are too low, so that every figure would be too good; give others")
    metrics = pipeline.evaluate(detector, records, out, gallery=config.report.images)
    code = _print_metrics(metrics, detector.card)
    print(f"written: {out / 'metrics.json'}")
    _write_report(out)
    return code


def _predict(config: Any, overrides: list[str]) -> int:
    from blemish import pipeline
    from blemish.engines.load import results_folder
    from blemish.loading import load_detector

    run = _run_of(config, "predict run=RUN input=DIR out=OUT")
    inputs = _inputs(config, "predict run=RUN input=DIR out=OUT")
    out = Path(config.out) if config.out is not None else dated(results_folder(run, config.engine) / "predictions")
    detector = load_detector(run, config.device, config.trusted, engine=config.engine)
    print(f"writing to: {out}", flush=True)
    summary = pipeline.predict(detector, inputs, out, config.overwrite, config.fdr, config.report.images)
    resumed = f" ({summary.resumed} of them before the interruption)" if summary.resumed else ""
    print(f"{summary.images} images{resumed}: {summary.anomalous} anomalous, {len(summary.errors)} unusable")
    if summary.discoveries is not None:
        print(f"at a false discovery rate of {config.fdr:g}: {summary.discoveries} anomalous (column fdr_decision)")
        # The smallest p-value is 1 / (n + 1); Benjamini and Hochberg call k of m images if p <= fdr k / m.
        usable = summary.images - len(summary.errors)
        n = max(part.n for part in detector.card.parts.values())
        least = math.ceil(usable / ((n + 1) * config.fdr))
        if summary.discoveries < least > 1:
            can = "none can" if least > usable else f"no fewer than {least} can"
            print(
                f"(with {n} calibration scores, {can} be called anomalous among {usable} images at this "
                "rate: add calibration images, or predict fewer at once)"
            )
    code = _print_unusable(summary.errors)
    _write_report(out)
    print(f"written: {out}")
    return code


def _export(config: Any, overrides: list[str]) -> int:
    from omegaconf import OmegaConf

    from blemish.checkpoint import load_detector, read_checkpoint
    from blemish.data.splits import SPLITS_FILE, digest_files, read_part
    from blemish.engines.load import EXPORT_FOLDER, INT8_FOLDER
    from blemish.export.run import check, export
    from blemish.files import CARD_FILE

    run = _run_of(config, "export run=RUN format=onnx")
    detector = load_detector(run, "cpu", config.trusted)
    check(detector, config.format, config.images, config.precision)
    settings = read_checkpoint(run)["config"]
    if config.precision == "int8":
        from blemish.export.int8 import export_int8

        out = Path(config.out) if config.out is not None else run / INT8_FOLDER
        parts = _parts_of(run, detector.card, config)
        quantised = export_int8(detector, settings, out, parts, config.images, config.synthetic.images, config.any_size)
        print(f"compared before, in float32, {quantised.parity.in_words()}")
        print(quantised.in_words())
        _print_calibration(quantised.card)
        print(f"written: {quantised.path}, card: {out / CARD_FILE}")
        return DONE
    out = Path(config.out) if config.out is not None else run / EXPORT_FOLDER
    if OmegaConf.is_missing(config.data, "root"):
        try:
            paths = [item.record.path for item in read_part(run / SPLITS_FILE, "calibration")]
        except DataError as error:
            raise DataError(
                f"The calibration images of {run}, on which the exported file is compared, are not as they were: give "
                "them, or other defect-free ones, by data.root=DIR."
            ) from error
    else:
        paths = [record.path for record in _read(plain(config.data)).sound() if record.is_normal]
        own = set(detector.card.made.get("calibrated_on", ()))
        paths = [path for path, digest in zip(paths, digest_files(paths), strict=True) if digest in own] or paths
    made = export(detector, settings, config.format, out, paths, config.images, config.any_size)
    print(f"compared {made.parity.in_words()}")
    shape = " x ".join("any" if side is None else str(side) for side in made.shape)
    print(f"written: {made.path} (tiles of {shape}), card: {out / CARD_FILE}")
    return DONE


def _parts_of(run: Path, card: Calibration, config: Any) -> Images:
    """The images that a run was trained, validated and calibrated on: where they were, or in data.root, if it is given.

    Raises:
        DataError: some of those that calibrated it are missing, or a part is.
    """
    from omegaconf import OmegaConf

    from blemish.data.splits import SPLITS_FILE, SplitRecord, digest_files, find_units, part_digests, read_part
    from blemish.export.int8 import Images

    given: list[SplitRecord] = []
    if not OmegaConf.is_missing(config.data, "root"):
        records = [record for record in _read(plain(config.data)).sound() if record.is_normal]
        digests = digest_files([record.path for record in records])
        given = [SplitRecord(*item) for item in zip(records, digests, find_units(records, digests), strict=True)]
    splits, wanted = run / SPLITS_FILE, set(card.made.get("calibrated_on", ()))

    def part(name: Split) -> list[SplitRecord]:
        own = wanted if name == "calibration" else part_digests(splits, name)
        if found := [item for item in given if item.digest in own]:
            return found
        try:
            return read_part(splits, name)
        except DataError as error:
            raise DataError(
                f"The {name} images of {run}, which precision=int8 wants, too, are not as they were: give the images "
                "of the run by data.root=DIR."
            ) from error

    calibration = [item for item in part("calibration") if item.digest in wanted]
    missing = len(wanted) - len({item.digest for item in calibration})
    if missing:
        raise DataError(
            f"precision=int8 wants the {len(wanted)} images that calibrated {run}, and {missing} of them are missing: "
            "give all by data.root=DIR."
        )
    return Images(part("train"), part("validation"), calibration)


def _check(config: Any, overrides: list[str]) -> int:
    from blemish.build import build_section
    from blemish.calibration import Promise
    from blemish.data.check import check

    _required(config, "data.root", "check data.root=DIR")
    settings = plain(config)
    promise = build_section(Promise, settings, "calibration")
    report = check(_read(settings["data"]), promise, settings["seed"], **settings["split"])
    print("\n".join(report.facts))
    for sentence in report.problems:
        print(f"problem: {sentence}")
    print(f"{len(report.problems)} problems found" if report.problems else "no problem found")
    return SOME_FAILED if report.problems else DONE


def _monitor(config: Any, overrides: list[str]) -> int:
    from blemish import pipeline
    from blemish.engines.load import results_folder
    from blemish.loading import load_detector

    run = _run_of(config, "monitor run=RUN input=DIR")
    inputs = _inputs(config, "monitor run=RUN input=DIR")
    state = Path(config.state) if config.state is not None else results_folder(run, config.engine) / "monitor.jsonl"
    detector = load_detector(run, config.device, config.trusted, engine=config.engine)
    drift, errors = pipeline.monitor(detector, inputs, state, config.level, config.seed, config.by_folder, config.order)
    unit = "folders" if config.by_folder else "images"
    print(f"{drift.batch} different {unit}, {drift.new} of them new; {drift.images} in the journal {state}")
    print(drift.in_words())
    code = _print_unusable(errors)
    return code if drift.holds else DRIFT


def _diff(config: Any, overrides: list[str]) -> int:
    from blemish.calibration import read_settings
    from blemish.difference.build import build_comparison, made_by, read_card
    from blemish.difference.pairs import find_pairs
    from blemish.difference.run import diff, in_words, learn
    from blemish.files import CARD_FILE, write_json
    from blemish.rows import check_own

    example = "diff REFERENCE QUERY out=OUT"
    reference, query = (
        Path(_required(config, name, example)).expanduser().absolute() for name in ("reference", "query")
    )
    settings = plain(config)
    mask = Path(settings["mask"]).expanduser().absolute() if settings["mask"] is not None else None
    settings |= {"reference": str(reference), "query": str(query), "mask": mask and str(mask)}
    out = Path(settings["out"]) if settings["out"] is not None else dated("differences")
    comparison = build_comparison(settings)
    made = made_by(settings, comparison)
    pairs = find_pairs(reference, query, mask)
    if settings["learn"]:
        if settings["card"] is not None:
            raise ConfigError("learn=true makes a card, card= uses one: leave one of them out.")
        if mask is not None:
            raise ConfigError("learn=true takes pairs without a defect, which have no mask: leave mask= out.")
        check_own(out, CARD_FILE, "a card")
        if (out / CARD_FILE).exists() and not settings["overwrite"]:
            raise ConfigError(f"{out} has a {CARD_FILE} already: choose another out=, or set overwrite=true.")
        promise, mask_rule = read_settings(settings["calibration"])
        card = learn(comparison, pairs, promise, mask_rule, made)
        write_json(out / CARD_FILE, card.to_dict())
        _print_calibration(card)
        print(f"threshold: {card.threshold:.6g}; card: {out / CARD_FILE}")
        return DONE
    if settings["card"] is not None:
        comparison = replace(comparison, card=read_card(Path(settings["card"]), made["fingerprint"]))
        made = made_by(settings, comparison)
    print(f"writing to: {out}", flush=True)
    summary = diff(comparison, pairs, out, made, settings["overwrite"])
    print(in_words(summary, comparison.card))
    code = _print_unusable(summary.errors)
    print(f"written: {out}")
    return code


def _report(config: Any, overrides: list[str]) -> int:
    _write_report(Path(_required(config, "run", "report run=RUN")))
    return DONE


def _compare(config: Any, overrides: list[str]) -> int:
    from blemish.evaluation.tables import table
    from blemish.files import write_csv
    from blemish.pipeline import compare

    folder = Path(_required(config, "dir", "compare dir=DIR"))
    headers, rows = compare(folder)
    print(table(headers, [[f"{cell:.4f}" if isinstance(cell, float) else cell for cell in row] for row in rows]))
    write_csv(folder / "compare.csv", headers, (dict(zip(headers, row, strict=True)) for row in rows))
    return DONE


ACTIONS: dict[str, Callable[[Any, list[str]], int]] = {
    "train": train,
    "calibrate": _calibrate,
    "evaluate": _evaluate,
    "predict": _predict,
    "check": _check,
    "compare": _compare,
    "report": _report,
    "monitor": _monitor,
    "diff": _diff,
    "ensemble": _ensemble,
    "export": _export,
}

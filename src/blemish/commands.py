"""What each verb does with its composed settings: checks them, builds the objects, calls the pipeline, prints."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blemish import __version__
from blemish.errors import ConfigError

if TYPE_CHECKING:
    from blemish.data.records import Records
    from blemish.data.splits import Splits

DONE, SOME_FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: all done; done, but some images could not be used; a user's mistake; Ctrl-C."""


def _required(config: Any, name: str, example: str) -> Any:
    from omegaconf import OmegaConf

    value = OmegaConf.select(config, name)  # None for a missing value, too
    if value is None:
        raise ConfigError(f"The setting {name} is missing: give it, as in `blemish {example}`.")
    return value


def _plain(config: Any) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"The settings cannot be resolved: {str(error).splitlines()[0]}") from error


def dated(folder: str | Path) -> Path:
    return Path(folder) / datetime.now(timezone.utc).astimezone().strftime("%Y-%m-%d_%H-%M-%S")


def _read(data: dict[str, Any]) -> Records:
    from blemish.build import build

    data = {**data, "root": str(Path(data["root"]).expanduser().absolute())}
    records: Records = build(data, where="data")
    return records


def _train(config: Any, overrides: list[str]) -> int:
    from blemish.data.records import of_split

    if config.resume is not None:
        return _resume(Path(config.resume), overrides)
    _required(config, "data.root", "train data=folder data.root=DIR")
    run = Path(config.out) if config.out is not None else dated("runs")
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise ConfigError(f"{run} exists and is not empty: choose another out=, or continue it with resume={run}.")
    records = _read(_plain(config.data)).sound()
    normals = [record for record in records if record.is_normal and record.split != "test"]
    if config.image.channels is None:
        config.image.channels = _common_channels([record.path for record in normals])
    settings = _plain(config)
    print(f"run folder: {run}")
    splits = _split(records, settings)
    _prepare(run, settings, splits, overrides)
    return _train_in(run, settings, splits, has_test=bool(of_split(records, "test")))


def _resume(run: Path, overrides: list[str]) -> int:
    """Continue a training with the settings it was started with."""
    import json

    import yaml

    others = [word for word in overrides if not word.startswith(("resume=", "hydra"))]
    if others:
        raise ConfigError(f"resume takes all settings from the run: leave out {' '.join(others)}, or start a new run.")
    if not (run / "config.yaml").is_file() or not (run / "run.json").is_file():
        raise ConfigError(f"Nothing to resume in {run}: expected the folder of an interrupted `blemish train`.")
    if (run / "detector.pt").is_file() and json.loads((run / "run.json").read_text())["status"] == "done":
        raise ConfigError(f"The training in {run} is finished: nothing to resume.")
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    records = _read(settings["data"]).sound()
    splits = _split(records, settings)
    before = json.loads((run / "run.json").read_text(encoding="utf-8"))["data_fingerprint"]
    changed = [name for name, value in splits.fingerprint().items() if value != before[name]]
    if changed:
        raise ConfigError(f"The images changed since {run} was started (part: {', '.join(changed)}): start a new run.")
    print(f"run folder: {run} (resumed)")
    return _train_in(run, settings, splits, has_test=bool(splits.of("test")))


def _common_channels(paths: Iterable[Path]) -> int:
    """1 if every image is grey, 3 if every image has colour. Raises DataError for a mixture."""
    from blemish.data.images import probe
    from blemish.errors import DataError, ImageError

    first: dict[int, Path] = {}
    for path in paths:
        try:
            mode = probe(path).mode
        except ImageError:
            continue  # reported with all other unreadable images when they are decoded
        first.setdefault(1 if mode in ("1", "L", "LA", "La", "F", "I") or mode.startswith("I;16") else 3, path)
    if len(first) == 2:
        raise DataError(
            f"The images mix grey ({first[1]}) and colour ({first[3]}): set image.channels=1 to make all grey, or 3."
        )
    return next(iter(first), 1)


def _split(records: Any, settings: dict[str, Any]) -> Splits:
    """Split, and refuse before training what calibration would refuse after it."""
    from blemish.data.splits import split_records

    promise = _promise(settings["calibration"])
    splits = split_records(records, settings["seed"], **settings["split"], needed=promise.needed)
    promise.rank(len({item.unit for item in splits.of("calibration")}))
    if splits.dropped:
        print(f"left out: {splits.dropped} training images whose content or group is also in the test part")
    return splits


def _promise(calibration: dict[str, Any]) -> Any:
    from blemish.calibration import Promise

    return Promise(calibration["alpha"], calibration["rule"], calibration["delta"])


def _prepare(run: Path, settings: dict[str, Any], splits: Splits, overrides: list[str]) -> None:
    """Write what the run is: config.yaml, splits.csv and run.json."""
    import platform

    import torch
    import yaml

    from blemish.files import write_csv, write_json, write_text

    settings["data"]["root"] = str(Path(settings["data"]["root"]).expanduser().absolute())
    write_text(run / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    rows = [
        {
            "path": str(item.record.path),
            "split": item.record.split,
            "kind": item.record.kind,
            "unit": item.unit,
            "sha256": item.digest,
        }
        for item in splits.records
    ]
    write_csv(run / "splits.csv", ("path", "split", "kind", "unit", "sha256"), rows)
    about = {
        "software": "blemish",
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seed": settings["seed"],
        "overrides": overrides,
        "data_fingerprint": splits.fingerprint(),
        "images": {name: len(splits.of(name)) for name in ("train", "validation", "calibration", "test")},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "status": "training",
    }
    write_json(run / "run.json", about)


def _train_in(run: Path, settings: dict[str, Any], splits: Splits, has_test: bool) -> int:
    """Train, calibrate, evaluate: from a prepared run folder to a finished one."""
    import json

    import torch

    from blemish import pipeline
    from blemish.build import build
    from blemish.checkpoint import assemble, build_model, save_detector
    from blemish.files import write_json
    from blemish.preprocess import Preprocess
    from blemish.tiling import Tiling
    from blemish.training.fit import TrainingSettings, fit

    about = json.loads((run / "run.json").read_text(encoding="utf-8"))
    torch.manual_seed(settings["seed"])
    model = build_model(settings)
    augment = build(settings["augment"], where="augment")
    model = fit(
        run,
        splits,
        model,
        build(settings["objective"], where="objective"),
        build(settings["score"], where="score"),
        build(settings["corruption"], where="corruption"),
        augment if settings["augment"].get("transforms") else None,
        Preprocess(**settings["image"]),
        Tiling(**settings["tiling"]),
        TrainingSettings(**settings["training"]),
        settings["trainer"],
        settings["seed"],
    )
    about["trained_on"] = sorted(item.digest for name in ("train", "validation") for item in splits.of(name))
    detector = assemble(settings, model, about=about)
    calibration = pipeline.calibrate(
        detector, splits.of("calibration"), _promise(settings["calibration"]), settings["calibration"]["mask_rule"]
    )
    save_detector(run, settings, model, calibration, about)
    print(f"calibrated: {calibration.in_words()}")
    code = DONE
    if has_test:
        test = [item.record for item in splits.of("test")]
        code = _print_metrics(pipeline.evaluate(detector.calibrated(calibration), test, run), calibration)
    write_json(
        run / "run.json", {key: value for key, value in about.items() if key != "trained_on"} | {"status": "done"}
    )
    print(f"run folder: {run}")
    return code


def _print_metrics(metrics: dict[str, Any], calibration: Any) -> int:
    from blemish.evaluation.report import metrics_table

    unreadable = metrics["unreadable"]
    figures = {key: value for key, value in metrics.items() if key not in ("made", "unreadable")}
    print(metrics_table(figures, calibration.in_words()))
    for sentence in unreadable:
        print(f"blemish: {sentence}", file=sys.stderr)
    return SOME_FAILED if unreadable else DONE


def _run_settings(run: Path) -> dict[str, Any]:
    import yaml

    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} has no config.yaml: run= takes the folder that `blemish train` made.")
    settings: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    return settings


def _calibrate(config: Any, overrides: list[str]) -> int:
    from omegaconf import OmegaConf

    from blemish import pipeline
    from blemish.build import TRUSTED, build
    from blemish.calibration import Promise
    from blemish.checkpoint import load_detector, read_checkpoint, save_detector

    run = Path(_required(config, "run", "calibrate run=RUN data.root=DIR"))
    detector = load_detector(run, config.device, config.trusted)
    content = read_checkpoint(run)
    before = detector.calibration
    wanted = {key: value for key, value in config.calibration.items() if value is not None}
    rule = wanted.pop("mask_rule", before.mask_rule if before else "any_pixel")
    defaults = {} if before is None else vars(before.promise)
    promise = Promise(**{**defaults, **wanted})
    if OmegaConf.is_missing(config.data, "root"):
        if before is None:
            raise ConfigError("The run has no calibration scores yet: give normal images with data.root=DIR.")
        calibration = before.with_promise(promise)
    else:
        records = pipeline.normals_to_calibrate(_read(_plain(config.data)).sound(), content["about"]["trained_on"])
        calibration = pipeline.calibrate(detector, records, promise, rule)
    model = build(content["config"]["model"], (*TRUSTED, *config.trusted), "model")
    model.load_state_dict(content["state_dict"])
    save_detector(run, content["config"], model, calibration, content["about"])
    print(f"calibrated: {calibration.in_words()}")
    print(f"threshold: {calibration.image.value:.6g}; card: {run / 'card.json'}")
    return DONE


def _evaluate(config: Any, overrides: list[str]) -> int:
    from omegaconf import OmegaConf

    from blemish import pipeline
    from blemish.checkpoint import load_detector

    run = Path(_required(config, "run", "evaluate run=RUN data=mvtec data.root=DIR"))
    detector = load_detector(run, config.device, config.trusted)
    own = OmegaConf.is_missing(config.data, "root")
    records = _read(_run_settings(run)["data"] if own else _plain(config.data)).sound()
    out = Path(config.out) if config.out is not None else run
    metrics = pipeline.evaluate(detector, records, out)
    code = _print_metrics(metrics, detector.calibration)
    print(f"written: {out / 'metrics.json'}")
    return code


def _predict(config: Any, overrides: list[str]) -> int:
    from omegaconf import OmegaConf

    from blemish import pipeline
    from blemish.checkpoint import load_detector

    run = Path(_required(config, "run", "predict run=RUN input=DIR out=OUT"))
    inputs = _required(config, "input", "predict run=RUN input=DIR out=OUT")
    inputs = [str(item) for item in inputs] if OmegaConf.is_list(inputs) else str(inputs)
    out = Path(config.out) if config.out is not None else dated(run / "predictions")
    detector = load_detector(run, config.device, config.trusted)
    summary = pipeline.predict(detector, inputs, out, config.overwrite)
    resumed = f" ({summary.resumed} were done before)" if summary.resumed else ""
    print(f"{summary.images} images{resumed}: {summary.anomalous} anomalous, {len(summary.errors)} unusable")
    for sentence in summary.errors:
        print(f"blemish: {sentence}", file=sys.stderr)
    print(f"written: {out}")
    return SOME_FAILED if summary.errors else DONE


def _check(config: Any, overrides: list[str]) -> int:
    from blemish.data.check import check

    _required(config, "data.root", "check data.root=DIR")
    settings = _plain(config)
    report = check(_read(settings["data"]), _promise(settings["calibration"]), settings["seed"], **settings["split"])
    print("\n".join(report.facts))
    for sentence in report.problems:
        print(f"problem: {sentence}")
    print(f"{len(report.problems)} problems found" if report.problems else "no problem found")
    return SOME_FAILED if report.problems else DONE


def _compare(config: Any, overrides: list[str]) -> int:
    from blemish.evaluation.report import table
    from blemish.files import write_csv
    from blemish.pipeline import compare

    folder = Path(_required(config, "dir", "compare dir=DIR"))
    headers, rows = compare(folder)
    print(table(headers, [[f"{cell:.4f}" if isinstance(cell, float) else cell for cell in row] for row in rows]))
    write_csv(folder / "compare.csv", headers, (dict(zip(headers, row, strict=True)) for row in rows))
    return DONE


ACTIONS: dict[str, Callable[[Any, list[str]], int]] = {
    "train": _train,
    "calibrate": _calibrate,
    "evaluate": _evaluate,
    "predict": _predict,
    "check": _check,
    "compare": _compare,
}

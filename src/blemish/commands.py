"""What each verb does with its composed settings: checks them, builds the objects, calls the pipeline, prints."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blemish.errors import ConfigError

if TYPE_CHECKING:
    from blemish.data.records import Records

DONE, SOME_FAILED, MISTAKE, BUG, INTERRUPTED = 0, 1, 2, 70, 130
"""Exit codes: all done; done, but some images could not be used; a user's mistake; ours; Ctrl-C."""


def _required(config: Any, name: str, example: str) -> Any:
    from omegaconf import OmegaConf

    value = OmegaConf.select(config, name)  # None for a missing value, too
    if value is None or value == "":
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
    if config.resume is not None:
        run = Path(config.resume)
        others = [word for word in overrides if not word.startswith("resume=")]
        if others:
            raise ConfigError(
                f"resume takes all settings from {run}: leave out {' '.join(others)}, or start a new run."
            )
        from blemish.training.run import resume

        finished = resume(run, lambda data: _read(data).sound())
    else:
        _required(config, "data.root", "train data=folder data.root=DIR")
        run = Path(config.out) if config.out is not None else dated("runs")
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise ConfigError(f"{run} exists and is not empty: choose another out=, or continue it with resume={run}.")
        from blemish.training.run import common_channels, start

        config.data.root = str(Path(config.data.root).expanduser().absolute())
        records = _read(_plain(config.data)).sound()
        if config.image.channels is None:
            normals = [record.path for record in records if record.is_normal and record.split != "test"]
            config.image.channels = common_channels(normals)
        finished = start(run, _plain(config), records, overrides)
    print(f"calibrated: {finished.calibration.in_words()}")
    code = _print_metrics(finished.metrics, finished.calibration) if finished.metrics else DONE
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
    from blemish.calibration import Promise, check_mask_rule
    from blemish.checkpoint import load_detector, read_checkpoint, replace_calibration

    run = Path(_required(config, "run", "calibrate run=RUN data.root=DIR"))
    own = OmegaConf.is_missing(config.data, "root")
    detector = load_detector(run, config.device, config.trusted, with_card=own)
    content = read_checkpoint(run)
    card = content["calibration"]
    wanted = {key: value for key, value in config.calibration.items() if value is not None}
    rule = wanted.pop("mask_rule", card["mask_rule"] if card else "any_pixel")
    check_mask_rule(rule)
    promise = Promise(**{**(card["promise"] if card else {}), **wanted})
    if own:
        calibration = detector.card.with_promise(promise)
    else:
        about = content["about"]
        records = pipeline.normals_to_calibrate(
            _read(_plain(config.data)).sound(), about["trained_on"], about["trained_groups"]
        )
        calibration = pipeline.calibrate(detector, records, promise, rule)
    replace_calibration(run, calibration)
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
    print(f"writing to: {out}", flush=True)
    summary = pipeline.predict(detector, inputs, out, config.overwrite)
    resumed = f" ({summary.resumed} of them before the interruption)" if summary.resumed else ""
    print(f"{summary.images} images{resumed}: {summary.anomalous} anomalous, {len(summary.errors)} unusable")
    for sentence in summary.errors:
        print(f"blemish: {sentence}", file=sys.stderr)
    print(f"written: {out}")
    return SOME_FAILED if summary.errors else DONE


def _check(config: Any, overrides: list[str]) -> int:
    from blemish.build import build_section
    from blemish.calibration import Promise
    from blemish.data.check import check

    _required(config, "data.root", "check data.root=DIR")
    settings = _plain(config)
    promise = build_section(Promise, settings, "calibration")
    report = check(_read(settings["data"]), promise, settings["seed"], **settings["split"])
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

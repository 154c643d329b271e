"""`blemish VERB [KEY=VALUE ...]`: tidies the words, composes the settings, calls the verb, says what went wrong."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from blemish import __version__
from blemish.commands import ACTIONS, BUG, DONE, INTERRUPTED, MISTAKE, UNREAD, dated, train
from blemish.errors import BlemishError, ConfigError, nearest_names
from blemish.settings import compose_settings, config_folder, defaults_of, varied
from blemish.sweep import Choice, Ending, Interval, Report, read_settings, sweep

_VERBS = {
    "train": "train, calibrate and, where there is a test part, evaluate",
    "calibrate": "recalibrate a trained run on other normal images or to another false-alarm rate",
    "evaluate": "measure a run on a labelled test part",
    "predict": "score maps, heat maps, masks and a table for new images",
    "check": "look a data set over before training",
    "compare": "one table over the runs of a sweep",
    "report": "one page about a run or its predictions: promise, scores, curves, pictures",
    "monitor": "do images believed normal still match the calibration?",
    "diff": "where does an image differ from a reference? no training needed",
    "ensemble": "several trained runs as one detector, calibrated as one",
    "export": "a run as one file that predicts without PyTorch",
}
_GOES_ON = {
    "train": "; every finished epoch is kept: `blemish train resume=RUN` goes on with the run folder named above",
    "predict": "; what was finished is kept: the same command goes on, with out= as named above",
    "monitor": "; the images done are kept in the state file: the same command goes on",
    "diff": "; what was finished is kept: the same command goes on, with out= as named above",
}
_POSITIONAL = {
    "compare": ("dir",),
    "check": ("data.root",),
    "report": ("run",),
    "diff": ("reference", "query"),
}
_PATHS = (
    *("data.root", "data.manifest", "out", "run", "runs", "input", "dir", "resume", "state", "reference", "query"),
    *("mask", "card", "backbone.run", "backbone.weights", "backbone.cache", "strategy.run"),
)
_HYDRA = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra.job.chdir=false",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `blemish` command; its exit codes are in `commands.py`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        raise SystemExit(DONE if words else MISTAKE)
    if words[0] == "--version":
        print(f"blemish {__version__}")
        raise SystemExit(DONE)
    try:
        with _terminated_like_interrupted():
            code = _explained(lambda: _run(words[0], words[1:])).code
    except KeyboardInterrupt as stopped:
        goes_on = stopped.args[0] if stopped.args else _GOES_ON.get(words[0], "")
        print(f"blemish: interrupted{goes_on}.", file=sys.stderr)
        code = INTERRUPTED
    raise SystemExit(code)


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM, by which containers and schedulers end a process, cleans up as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _explained(action: Callable[[], int]) -> Ending:
    """Do it; whatever goes wrong is said on stderr in one sentence, after a traceback if the mistake is ours."""
    try:
        with _bars_cleared():
            code = action()
            sys.stdout.flush()
            return Ending(code)
    except BlemishError as error:
        ending = Ending(MISTAKE, str(error))
    except BrokenPipeError:  # whoever read the output, as `head` does, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return Ending(UNREAD)
    except OSError as error:
        ending = Ending(MISTAKE, f"{error.filename or 'A file'}: {error.strerror or error}.")
    except Exception as error:
        if type(error).__name__ == "Pruned":  # like the next one, of a module that is heavy to import
            return Ending(DONE, str(error), pruned=True)
        if type(error).__name__ == "OutOfMemoryError":
            advice = "lower training.batch_size, tiling.batch or tiling.size."
            ending = Ending(MISTAKE, f"the device is out of memory: {advice}")
        else:
            traceback.print_exc()
            ending = Ending(BUG, "this is a bug in blemish, not in what you asked; please report the lines above.")
    print(f"blemish: {ending.sentence}", file=sys.stderr)
    return ending


@contextmanager
def _bars_cleared() -> Iterator[None]:
    """Clear progress bars that an exception leaves open: what is said of it begins on a line of its own."""
    try:
        yield
    except BaseException:
        module = sys.modules.get("tqdm.std")
        bars = sorted(module.tqdm._instances, key=lambda bar: -abs(bar.pos)) if module else ()
        for bar in bars:  # the lowest line first
            with suppress(ValueError):  # its stream is closed
                bar.close()
        if bars:
            print(end="\r", file=sys.stderr)
        raise


def _usage() -> str:
    verbs = "\n".join(f"  {verb:<10} {text}" for verb, text in _VERBS.items())
    return (
        f"blemish {__version__}: visual anomaly detection with calibrated false-alarm rates\n\n"
        f"usage: blemish VERB [KEY=VALUE ...]\n\n{verbs}\n\n"
        "`blemish VERB --help` lists a verb's settings, `blemish VERB --cfg job` prints them as they would be used."
    )


def _run(verb: str, words: list[str]) -> int:
    if verb not in _VERBS:
        raise ConfigError(f"There is no verb '{verb}': {nearest_names(verb, _VERBS)}")
    flags = {word for word in words if word.startswith("-")}
    many = bool(flags & {"--multirun", "-m"})
    overrides, options = [], []
    given = {word.partition("=")[0] for word in words}
    places = [place for place in _POSITIONAL.get(verb, ()) if place not in given]
    for word, before in zip(words, ["", *words], strict=False):
        if word.startswith("-") or before in ("--cfg", "-c"):  # which take a word of their own
            options.append(word)
        else:
            overrides.append(_tidy(verb, word, many, places))
    if many and verb != "train":
        raise ConfigError(f"Only `blemish train` sweeps: call `blemish {verb}` once for each value.")
    config = compose_settings(verb, overrides, many)
    if many and flags <= {"--multirun", "-m"} and not any(word.startswith("hydra") for word in overrides):
        return _sweep(config, overrides)
    if flags:
        return _hand_to_hydra(verb, overrides, options, many)
    for_sweeps = [word for word in overrides if verb == "train" and _is_for_sweeps(word)]
    if for_sweeps:
        raise ConfigError(f"'{for_sweeps[0]}' is for a sweep: add --multirun.")
    return _act(verb, config, overrides)


def _act(verb: str, config: Any, overrides: list[str]) -> int:
    from blemish.data.images import allow_large_images

    allow_large_images()
    return ACTIONS[verb](config, overrides)


def _is_for_sweeps(word: str) -> bool:
    return word.partition("=")[0].partition(".")[0] == "sweep"


def _sweep(config: Any, words: list[str]) -> int:
    """Divide the words into what stays and what varies, and train every run."""
    from omegaconf import OmegaConf

    from blemish.evaluation.synthetic import check_metric, read_metric

    settings = read_settings(dict(config.sweep))
    metric = check_metric(config.optimized_metric)
    if config.resume is not None:
        raise ConfigError("resume= continues one run: a sweep goes on when its command is given again, with its out=.")
    if OmegaConf.is_missing(config.data, "root"):
        raise ConfigError("The setting data.root is missing: give it, as in `blemish train --multirun data.root=DIR`.")
    if settings.sampler != "grid" and not config.synthetic.images:
        raise ConfigError("sweep=optuna looks for synthetic defects: set synthetic.images above 0.")
    defaults = defaults_of("train", words)
    fixed: list[str] = []
    space: list[Choice | Interval] = []
    for word in words:
        part = varied(word, defaults)
        key = word.partition("=")[0]
        if part is None:
            if not _is_for_sweeps(word) and key != "out":
                fixed.append(word)
        elif _is_for_sweeps(word) or key in ("out", "optimized_metric", "synthetic.images"):
            raise ConfigError(f"'{word}' names several values: in a sweep, {key} takes one.")
        elif isinstance(part, Choice) and len(part.values) == 1:
            fixed.append(f"{part.key}={part.values[0]}")
        else:
            space.append(part)
    out = Path(config.out) if config.out is not None else dated("runs")
    print(f"sweep folder: {out}", flush=True)
    return sweep(out, settings, fixed, space, metric, train_one, read_metric)


def train_one(words: list[str], folder: Path, resume: bool, report: Report | None) -> Ending:
    """One run of a sweep: a mistake in it is said, and ends that run only."""

    def action() -> int:
        config = compose_settings("train", words, False)
        config["resume" if resume else "out"] = str(folder)
        return train(config, words, report)

    return _explained(action)


def _hand_to_hydra(verb: str, overrides: list[str], options: list[str], many: bool) -> int:
    """--help, --cfg and the like, and sweeps by a sweeper or launcher of Hydra's: these are told the figure."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    from blemish.evaluation.synthetic import check_metric, read_metric

    if many:
        out = next((word.partition("=")[2] for word in overrides if word.startswith("out=")), str(dated("runs")))
        overrides = [*overrides, f"hydra.sweep.dir={out}", "hydra.sweep.subdir=${hydra.job.num}"]
    codes: list[int] = []

    def task(config: Any) -> float | None:
        job = HydraConfig.get()
        if many:
            config.out = str(Path(job.sweep.dir) / str(job.sweep.subdir))
            print(f"run {job.job.num}: {' '.join(job.overrides.task)}")
        words = [str(word) for word in job.overrides.task]
        codes.append(_explained(lambda: _act(verb, config, words)).code)  # Hydra would print a traceback
        return read_metric(Path(config.out), check_metric(config.optimized_metric)) if many else None

    run = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=verb)(task)
    before = sys.argv
    sys.argv = [f"blemish {verb}", *options, *_HYDRA, *overrides]
    try:
        run()
    except ValueError as error:  # the action's own are explained in there
        raise ConfigError(f"The options {' '.join(options)} do not go together: {error}.") from error
    finally:
        sys.argv = before
    return max(codes, default=DONE)


# --- the command line: paths, positionals, unknown names ------------------------------------------------------


def _tidy(verb: str, word: str, many: bool, places: list[str]) -> str:
    """Turn a positional into KEY=VALUE, and quote paths, so that spaces, commas and brackets in them are literal.

    `places` names the positionals to come; the one taken is removed.
    """
    key, equals, value = word.partition("=")
    if not equals or not re.fullmatch(r"[+~]{0,2}\w[\w.@/]*", key) or (places and _exists(word)):
        if not places:
            raise ConfigError(f"Expected settings as KEY=VALUE, found '{word}'; see `blemish {verb} --help`.")
        key, value = places.pop(0), word
    if key in _PATHS and value not in ("", "null") and value[0] not in "'\"":
        is_list = value[0] == "[" or (many and "," in value)
        if not is_list or _exists(value):
            value = _quoted(value)
        elif re.fullmatch(r"\[[^\[\]'\"]+\]", value):
            value = f"[{','.join(_quoted(path.strip()) for path in value[1:-1].split(','))}]"
    return f"{key}={value}"


def _quoted(path: str) -> str:
    """As Hydra reads it back, unchanged but for the home folder, which not every shell puts in place of ~."""
    path = os.path.expanduser(path) if path.startswith("~") else path  # noqa: PTH111 (a word may be no valid path)
    # Inside Hydra's quotes a backslash is itself, unless it stands before a quote; ${ would be looked up.
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", path).replace("${", "\\${")
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{chr(92) * trailing}'"


def _exists(word: str) -> bool:
    return os.path.exists(word)  # noqa: PTH110 (a word may be no valid path; this says no to those, too)

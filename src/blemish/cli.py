"""`blemish VERB [KEY=VALUE ...]`: composes the settings, builds the objects, calls the verb. Alone imports Hydra."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from blemish import __version__
from blemish.commands import ACTIONS, BUG, DONE, INTERRUPTED, MISTAKE, UNREAD, dated, train
from blemish.errors import BlemishError, ConfigError, nearest_names
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
_PATHS = ("data.root", "out", "run", "runs", "input", "dir", "resume", "state", "reference", "query", "mask", "card")
_MAY_BE_NULL = ("training.patience", "image.short_side", "image.size", "image.square")
_MAY_BE_A_WORD = {"training.batch_size": "auto"}
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
        code = _explained(lambda: _run(words[0], words[1:])).code
    except KeyboardInterrupt as stopped:
        goes_on = stopped.args[0] if stopped.args else _GOES_ON.get(words[0], "")
        print(f"blemish: interrupted{goes_on}.", file=sys.stderr)
        code = INTERRUPTED
    raise SystemExit(code)


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


def config_folder() -> Path:
    """The Hydra tree: inside the installed package, or beside `src` in a checkout."""
    package = Path(__file__).resolve().parent
    shipped, checkout = package / "configs", package.parents[1] / "configs"
    return shipped if shipped.is_dir() else checkout


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
    config = _compose(verb, overrides, many)
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
    defaults = _defaults("train", words)
    fixed: list[str] = []
    space: list[Choice | Interval] = []
    for word in words:
        part = _varied(word, defaults)
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
        config = _compose("train", words, False)
        config["resume" if resume else "out"] = str(folder)
        return train(config, words, report)

    return _explained(action)


def _varied(word: str, defaults: dict[str, Any]) -> Choice | Interval | None:
    """What a word of a sweep leaves open; None if it names one value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import IntervalSweep
    from hydra.errors import HydraException

    parsed = OverridesParser.create().parse_override(word)
    if not parsed.is_sweep_override():
        return None
    key, value = parsed.get_key_element(), parsed.value()
    if not isinstance(value, IntervalSweep):
        try:
            return Choice(key, tuple(parsed.sweep_string_iterator()))
        except HydraException as error:
            raise ConfigError(f"The setting '{word}' cannot be used: name its values one by one.") from error
    assert value.start is not None and value.end is not None
    low, high = value.start, value.end
    default = defaults
    for name in key.split("."):
        default = default.get(name) if isinstance(default, dict) else None  # type: ignore[assignment]
    log = "log" in value.tags
    if not low < high or (log and low <= 0):
        raise ConfigError(f"Expected '{word}' to go from a smaller to a larger number{', above 0' * log}.")
    integer = isinstance(low, int) or (isinstance(default, int) and not isinstance(default, bool))
    if integer and (low != int(low) or high != int(high)):
        raise ConfigError(f"The setting {key} expects whole numbers, found '{word}'.")
    return Interval(key, float(low), float(high), integer, log)


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
            # Inside Hydra's quotes a backslash is itself, unless it stands before a quote; ${ would be looked up.
            escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", value).replace("${", "\\${")
            trailing = len(escaped) - len(escaped.rstrip("\\"))
            value = f"'{escaped}{chr(92) * trailing}'"
    return f"{key}={value}"


def _exists(word: str) -> bool:
    return os.path.exists(word)  # noqa: PTH110 (a word may be no valid path; this says no to those, too)


def _compose(verb: str, words: Sequence[str], many: bool) -> Any:
    """The settings of a verb; in a sweep, those of its first run, all other choices having been tried."""
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    failures = (HydraException, OmegaConfBaseException)
    first: list[str] = []  # the words of the first run
    others: list[str] = []  # the further choices of a sweep
    runs: list[Any] = []
    defaults = _defaults(verb, words)
    for word in words:
        try:
            parsed = OverridesParser.create().parse_override(word)
        except failures as error:
            raise ConfigError(_explain(verb, word, str(error), defaults)) from error
        if not parsed.is_sweep_override():
            first.append(word)
            continue
        if not many:
            raise ConfigError(f"'{word}' names several values: add --multirun to sweep over them.")
        part = _varied(word, defaults)
        assert part is not None
        ends = () if isinstance(part, Choice) else (part.low, part.high)
        values = part.values if isinstance(part, Choice) else [str(int(x) if part.integer else x) for x in ends]
        choices = [f"{part.key}={value}" for value in values]
        first.append(choices[0])
        others += choices[1:]
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        for extra in [[], *([other] for other in others)]:
            changed = {other.partition("=")[0] for other in extra}
            run = [*(word for word in first if word.partition("=")[0] not in changed), *extra]
            try:
                composed = compose(verb, run)
            except failures as mistake:
                # Composing takes a while; only now is it worth looking for the word at fault.
                word, reason = _at_fault(verb, run, mistake)
                raise ConfigError(_explain(verb, word, str(reason), defaults)) from reason
            _check_types(defaults, OmegaConf.to_container(composed, resolve=False))
            runs.append(composed)
    return runs[0]


def _at_fault(verb: str, words: Sequence[str], mistake: Exception) -> tuple[str, Exception]:
    """The word that makes `words` fail to compose, which all do together with `mistake`; and what Hydra says of it."""
    from hydra import compose
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    # Those that choose an option first: others may be settings of it.
    words = sorted(words, key=lambda word: not _is_option(*word.partition("=")[::2]))
    sound, failing = 0, len(words)  # so many of the first words
    while failing - sound > 1:
        middle = (sound + failing) // 2
        try:
            compose(verb, list(words[:middle]))
            sound = middle
        except (HydraException, OmegaConfBaseException) as error:
            failing, mistake = middle, error
    return words[failing - 1], mistake


def _defaults(verb: str, words: Sequence[str]) -> dict[str, Any]:
    """The settings of a verb before any override but those that choose a group's option, without Hydra's help."""
    chosen = {key: value.partition(",")[0] for key, _, value in (word.partition("=") for word in words)}
    return _with_options(verb, tuple(f"{key}={value}" for key, value in chosen.items() if _is_option(key, value)))


@cache  # a sweep asks for every run; nobody changes the answer
def _with_options(verb: str, options: tuple[str, ...]) -> dict[str, Any]:
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        try:
            composed = compose(verb, list(options))
        except HydraException:  # a group of another verb's: which word is at fault is found later
            composed = compose(verb)
    settings: Any = OmegaConf.to_container(composed, resolve=False)
    return dict(settings)


def _is_option(group: str, name: str) -> bool:
    """Whether a group of settings has an option of this name."""
    return bool(group) and name in (path.stem for path in (config_folder() / group).glob("*.yaml"))


def _known_names(config: Any, prefix: str = "") -> set[str]:
    names: set[str] = set()
    for key, value in config.items():
        names.add(f"{prefix}{key}")
        if isinstance(value, dict):
            names |= _known_names(value, f"{prefix}{key}.")
    return names


def _check_types(default: Any, composed: Any, prefix: str = "") -> None:
    """Refuse text where the default is a number or a yes or no, and fractions where it is a whole number."""
    for key in default.keys() & composed.keys():
        before, after = default[key], composed[key]
        if isinstance(before, dict) and isinstance(after, dict):
            if before.get("_target_") == after.get("_target_"):
                _check_types(before, after, f"{prefix}{key}.")
            continue
        if isinstance(before, dict):
            raise ConfigError(f"{prefix}{key} is a group of settings, found '{after}': set one of its keys.")
        for kind, name in ((bool, "true or false"), (int, "a whole number"), (float, "a number")):
            if isinstance(before, kind):
                fits = isinstance(after, (int, float) if kind is float else kind)
                may_be_null = prefix == "trainer." or f"{prefix}{key}" in _MAY_BE_NULL
                word = _MAY_BE_A_WORD.get(f"{prefix}{key}")
                if not fits and not (after is None and may_be_null) and not (word and after == word):
                    expected = f"{name} or {word}" if word else name
                    raise ConfigError(f"The setting {prefix}{key} expects {expected}, found '{after}'.")
                break


def _explain(verb: str, word: str, message: str, defaults: dict[str, Any]) -> str:
    known = _known_names(defaults)
    key, _, value = word.lstrip("+~").partition("=")
    options = sorted(path.stem for path in (config_folder() / key).glob("*.yaml")) if key else []
    if options and value not in options:
        return f"There is no {key} '{value}': {nearest_names(value, options)} ({key} is one of {', '.join(options)})"
    if key not in known:
        return f"blemish {verb} has no setting '{key}': {nearest_names(key, known)}"
    return f"The setting '{word}' cannot be used: {message.splitlines()[0].strip()}"

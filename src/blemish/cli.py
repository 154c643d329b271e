"""`blemish VERB [KEY=VALUE ...]`: composes the settings, builds the objects, calls the verb. Alone imports Hydra."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blemish import __version__
from blemish.commands import ACTIONS, DONE, INTERRUPTED, MISTAKE, dated
from blemish.errors import BlemishError, ConfigError, nearest_names

_VERBS = {
    "train": "train, calibrate and, where there is a test part, evaluate",
    "calibrate": "recalibrate a trained run on other normal images or to another false-alarm rate",
    "evaluate": "measure a run on a labelled test part",
    "predict": "score maps, heat maps, masks and a table for new images",
    "check": "look a data set over before training",
    "compare": "one table over the runs of a sweep",
}
_POSITIONAL = {"compare": "dir", "check": "data.root"}
_PATHS = ("data.root", "out", "run", "input", "dir", "resume")
_HYDRA = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra.job.chdir=false",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `blemish` command; exits with 0, 1 (some images failed), 2 (a mistake) or 130 (Ctrl-C)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        raise SystemExit(DONE if words else MISTAKE)
    if words[0] == "--version":
        print(f"blemish {__version__}")
        raise SystemExit(DONE)
    try:
        code = _run(words[0], words[1:])
    except BlemishError as error:
        print(f"blemish: {error}", file=sys.stderr)
        code = MISTAKE
    except KeyboardInterrupt:
        print(
            "blemish: interrupted; what was finished is kept, the same command (or resume=RUN) goes on.",
            file=sys.stderr,
        )
        code = INTERRUPTED
    raise SystemExit(code)


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
    import hydra

    words = [_tidy(verb, word) for word in words]
    _validate(verb, words)
    if "--multirun" in words or "-m" in words:
        out = next((word.partition("=")[2] for word in words if word.startswith("out=")), str(dated("runs")))
        words += [f"hydra.sweep.dir={out}", "hydra.sweep.subdir=${hydra.job.num}"]
    codes: list[int] = []

    def task(config: Any) -> None:
        codes.append(_one(verb, config))

    run = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=verb)(task)
    before = sys.argv
    sys.argv = [f"blemish {verb}", *_HYDRA, *words]
    try:
        run()
    finally:
        sys.argv = before
    return max(codes, default=DONE)


def _one(verb: str, config: Any) -> int:
    """Run a verb on one composed config and return its exit code. In a sweep, a mistake ends this run only."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    job = HydraConfig.get()
    if job.mode == RunMode.MULTIRUN:
        config.out = str(Path(job.sweep.dir) / str(job.sweep.subdir))
        print(f"run {job.job.num}: {' '.join(job.overrides.task)}")
    try:
        return int(ACTIONS[verb](config, [str(word) for word in job.overrides.task]))
    except BlemishError as error:  # said here: Hydra would print a traceback
        print(f"blemish: {error}", file=sys.stderr)
        return MISTAKE


# --- the command line: paths, positionals, unknown names ------------------------------------------------------


def _tidy(verb: str, word: str) -> str:
    """Turn a positional into KEY=VALUE, and quote paths, so that spaces, commas and brackets in them are literal."""
    if word.startswith("-"):
        return word
    if "=" not in word and verb in _POSITIONAL:
        word = f"{_POSITIONAL[verb]}={word}"
    key, _, value = word.partition("=")
    if key in _PATHS and value and value[0] not in "['\"" and value != "null":
        plain = re.fullmatch(r"[\w./~+-]+", value)
        if not plain and (os.path.exists(value) or "," not in value):  # noqa: PTH110 (no Path: the word may be no path)
            escaped = value.replace("\\", "\\\\").replace("'", "\\'")
            return f"{key}='{escaped}'"
    return word


def _validate(verb: str, words: Sequence[str]) -> None:
    """Compose the settings once, every choice of a sweep included, to explain what Hydra would only report."""
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    flags = [word for word in words if word.startswith("-")]
    strays = [word for word in words if word not in overrides and word not in flags and word != "job"]
    if strays and "--cfg" not in flags and "-c" not in flags:
        raise ConfigError(f"Expected settings as KEY=VALUE, found '{strays[0]}'; see `blemish {verb} --help`.")
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        default = OmegaConf.to_container(compose(verb), resolve=False)
        known = _known_names(default)
        fixed: list[str] = []
        for word in overrides:
            try:
                parsed = OverridesParser.create().parse_override(word)
                swept = parsed.is_sweep_override()
                choices = [str(v) for v in parsed.sweep_string_iterator()] if swept else [None]
                if swept and not {"--multirun", "-m"} & set(flags):
                    raise ConfigError(f"'{word}' names several values: add --multirun to sweep over them.")
                for choice in choices:
                    candidate = word if choice is None else f"{parsed.get_key_element()}={choice}"
                    composed = compose(verb, [*fixed, candidate])
                    _check_types(default, OmegaConf.to_container(composed, resolve=False), candidate)
                fixed.append(word if choices[0] is None else f"{parsed.get_key_element()}={choices[0]}")
            except (HydraException, OmegaConfBaseException) as error:
                raise ConfigError(_explain(verb, word, str(error), known)) from error


def _known_names(config: Any, prefix: str = "") -> set[str]:
    names: set[str] = set()
    for key, value in config.items():
        names.add(f"{prefix}{key}")
        if isinstance(value, dict):
            names |= _known_names(value, f"{prefix}{key}.")
    return names


def _check_types(default: Any, composed: Any, word: str) -> None:
    """Refuse text where the default is a number or a yes or no, and fractions where it is a whole number."""
    for key in default.keys() & composed.keys():
        before, after = default[key], composed[key]
        if isinstance(before, dict) and isinstance(after, dict):
            if before.get("_target_") == after.get("_target_"):
                _check_types(before, after, word)
            continue
        for kind, name in ((bool, "true or false"), (int, "a whole number"), (float, "a number")):
            if isinstance(before, kind):
                fits = isinstance(after, (int, float) if kind is float else kind)
                if after is not None and not fits:
                    raise ConfigError(f"The setting '{word}' cannot be used: expected {name}, found '{after}'.")
                break


def _explain(verb: str, word: str, message: str, known: set[str]) -> str:
    key, _, value = word.lstrip("+~").partition("=")
    options = sorted(path.stem for path in (config_folder() / key).glob("*.yaml")) if key else []
    if options and value not in options:
        return f"There is no {key} '{value}': {nearest_names(value, options)} ({key} is one of {', '.join(options)})"
    if key not in known:
        return f"blemish {verb} has no setting '{key}': {nearest_names(key, known)}"
    return f"The setting '{word}' cannot be used: {message.splitlines()[0].strip()}"

"""Settings: what the configs and a verb's KEY=VALUE words make of each other, checked. Imports Hydra when asked."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from blemish.errors import ConfigError, nearest_names
from blemish.sweep import Choice, Interval

_MAY_BE_NULL = (
    *("training.patience", "training.max_tiles", "model.dimensions"),
    *("image.short_side", "image.size", "image.square"),
)
_MAY_BE_A_WORD = {"training.batch_size": "auto"}
_MAY_BE_LISTS = ("input", "runs")
_PATHS_BY_DEFAULT_NULL = ("out", "resume", "mask", "card", "backbone.cache")
_KINDS: tuple[tuple[type, Any, str], ...] = (  # of a default, what fits it, and its name
    (bool, bool, "true or false"),
    (int, int, "a whole number"),
    (float, (int, float), "a number"),
    (str, (str, int, float), "text"),
)


def config_folder() -> Path:
    """The Hydra tree: inside the installed package, or beside `src` in a checkout."""
    package = Path(__file__).resolve().parent
    shipped, checkout = package / "configs", package.parents[1] / "configs"
    return shipped if shipped.is_dir() else checkout


def settings_of(verb: str, words: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of `blemish VERB WORDS` as plain values, each resolved.

    Args:
        verb: such as train. words: settings as KEY=VALUE, as on the command line.

    Raises:
        ConfigError: a word is no setting or of a wrong kind, or a value that is needed is missing.
    """
    settings: dict[str, Any] = plain(compose_settings(verb, words))
    return settings


def plain(config: Any) -> Any:
    """Composed settings, or a part of them, as plain values, each resolved.

    Raises:
        ConfigError: a value is missing, or refers to one that is.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"The settings cannot be resolved: {str(error).splitlines()[0]}") from error


def compose_settings(verb: str, words: Sequence[str], many: bool = False) -> Any:
    """The settings of a verb, as OmegaConf has them; in a sweep (many), of its first run, all others tried.

    Raises:
        ConfigError: as `settings_of`, but values may be missing.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    failures = (HydraException, OmegaConfBaseException)
    first: list[str] = []  # the words of the first run
    others: list[str] = []  # the further choices of a sweep
    runs: list[Any] = []
    defaults = defaults_of(verb, words)
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
        part = varied(word, defaults)
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
            _check_types(defaults, OmegaConf.to_container(composed, resolve=False), defaults)
            runs.append(composed)
    return runs[0]


def defaults_of(verb: str, words: Sequence[str]) -> dict[str, Any]:
    """The settings of a verb before any override but those that choose a group's option, without Hydra's help."""
    chosen = {key: value.partition(",")[0] for key, _, value in (word.partition("=") for word in words)}
    return _with_options(verb, tuple(f"{key}={value}" for key, value in chosen.items() if _is_option(key, value)))


def varied(word: str, defaults: dict[str, Any]) -> Choice | Interval | None:
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
    """Whether a group of settings, which may say where it goes (GROUP@PLACE), has an option of this name."""
    return name in _options(group)


def _options(group: str) -> list[str]:
    group = group.partition("@")[0]
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml")) if group else []


def _known_names(config: Any, prefix: str = "") -> set[str]:
    names: set[str] = set()
    for key, value in config.items():
        names.add(f"{prefix}{key}")
        if isinstance(value, dict):
            names |= _known_names(value, f"{prefix}{key}.")
    return names


def _check_types(default: Any, composed: Any, root: dict[str, Any], prefix: str = "") -> None:
    """Refuse what is not of the default's kind: text, infinity and nan for a number, a fraction for a whole one, text
    for a yes or no, lists and nothing for text. A default that refers to another setting is of its kind; `root` has
    all of them."""
    for key in default.keys() & composed.keys():
        name, before, after = f"{prefix}{key}", _referred(default[key], root), composed[key]
        if after == default[key]:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            if before.get("_target_") == after.get("_target_"):
                _check_types(before, after, root, f"{name}.")
            continue
        if isinstance(before, dict):
            if isinstance(default[key], dict):
                raise ConfigError(f"{name} is a group of settings, found '{after}': set one of its keys.")
            continue
        if before is None and name in _PATHS_BY_DEFAULT_NULL:
            before = "text"
        if isinstance(after, float) and not math.isfinite(after) and isinstance(before, (int, float)):
            raise ConfigError(f"The setting {name} expects a finite number, found '{after}'.")
        if (after is None and (prefix == "trainer." or name in _MAY_BE_NULL)) or name in _MAY_BE_LISTS:
            continue
        if isinstance(after, str) and (after.startswith("${") or after == _MAY_BE_A_WORD.get(name)):
            continue
        for kind, fitting, what in _KINDS:
            if isinstance(before, kind):
                if not isinstance(after, fitting):
                    word = f" or {_MAY_BE_A_WORD[name]}" if name in _MAY_BE_A_WORD else ""
                    found = "nothing" if after is None else f"'{after}'"
                    raise ConfigError(f"The setting {name} expects {what}{word}, found {found}.")
                break


def _referred(value: Any, root: dict[str, Any]) -> Any:
    """A default, or the one that it refers to, as in ${seed}."""
    found = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    if not found:
        return value
    other: Any = root
    for name in found[1].split("."):
        other = other.get(name) if isinstance(other, dict) else None
    return _referred(other, root)


def _explain(verb: str, word: str, message: str, defaults: dict[str, Any]) -> str:
    known = _known_names(defaults)
    key, _, value = word.lstrip("+~").partition("=")
    options = _options(key)
    if options and value not in options:
        suggested = nearest_names(value, options)
        others = "" if suggested.startswith("known") else f" ({key} is one of {', '.join(options)})"
        return f"There is no {key} '{value}': {suggested}{others}"
    if key not in known:
        return f"blemish {verb} has no setting '{key}': {nearest_names(key, known)}"
    return f"The setting '{word}' cannot be used: {message.splitlines()[0].strip()}"

"""From a plain config to objects: `_target_` names a class or function, the other keys are its arguments."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from blemish.errors import BlemishError, ConfigError

TRUSTED = ("blemish.models", "blemish.residuals", "blemish.perceptual", "blemish.scores", "torch.nn")
"""Where a checkpoint may take classes from. Not all of blemish: a class to build is no licence to run a command."""


def build(config: Any, trusted: Sequence[str] | None = None, where: str = "config") -> Any:
    """Instantiate `config`, depth first; anything without `_target_` is returned as it is.

    Args:
        config: dicts, lists and scalars, as YAML gives them.
        trusted: packages whose classes `_target_` may name; None trusts every callable (a config that the user wrote).
        where: the config's name, for messages.

    Raises:
        ConfigError: the target is unknown or not trusted, or its arguments do not fit.
    """
    if isinstance(config, Mapping):
        arguments = {key: build(value, trusted, f"{where}.{key}") for key, value in config.items() if key != "_target_"}
        if "_target_" not in config:
            return arguments
        target = locate(str(config["_target_"]), trusted, where)
        try:
            return target(**arguments)
        except BlemishError:
            raise
        except TypeError as error:
            raise ConfigError(f"{where} does not fit {config['_target_']}: {error}.") from error
    if isinstance(config, (list, tuple)):
        return [build(value, trusted, f"{where}[{position}]") for position, value in enumerate(config)]
    return config


def build_section(cls: type, config: Mapping[str, Any], name: str, trusted: Sequence[str] | None = None) -> Any:
    """Build `cls`, whose arguments are the section `name` of a config. Raises ConfigError if they do not fit."""
    if "_target_" in config[name]:
        raise ConfigError(f"{name} takes no _target_: it is always a {cls.__name__}.")
    arguments = build(config[name], trusted, name)
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ConfigError(f"{name} does not fit {cls.__name__}: {error}.") from error


def locate(path: str, trusted: Sequence[str] | None, where: str) -> Any:
    """What a `_target_` names. Raises ConfigError if there is no such thing, or it is not trusted."""
    if trusted is not None and not _lies_in(path, trusted):
        raise ConfigError(
            f"{where} wants to load '{path}', outside the trusted packages {', '.join(trusted)}: if you trust it, "
            f"add its package (load_detector(run, trusted=['{path.split('.')[0]}']) or trusted=[{path.split('.')[0]}])."
        )
    module_name, _, name = path.rpartition(".")
    try:
        target = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"{where}._target_ is '{path}', which cannot be imported: {error}.") from error
    # A trusted module may have imported something that is not; and of our own and torch's, only classes are needed.
    if trusted is not None and not _lies_in(f"{getattr(target, '__module__', '')}.", trusted):
        raise ConfigError(f"{where} wants to load '{path}', which comes from outside the trusted packages.")
    if trusted is not None and _lies_in(path, TRUSTED) and not isinstance(target, type):
        raise ConfigError(f"{where} wants to load '{path}', which is no class.")
    return target


def _lies_in(path: str, packages: Sequence[str]) -> bool:
    return any(path.startswith(package + ".") for package in packages)

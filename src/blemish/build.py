"""From a plain config to objects: `_target_` names a class or function, the other keys are its arguments."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from blemish.errors import BlemishError, ConfigError

TRUSTED = ("blemish", "torch.nn")


def build(config: Any, trusted: Sequence[str] | None = None, where: str = "config") -> Any:
    """Instantiate `config`, depth first; anything without `_target_` is returned as it is.

    Args:
        config: dicts, lists and scalars, as YAML gives them.
        trusted: packages that `_target_` may lie in; None trusts all (a config that the user wrote).
        where: the config's name, for messages.

    Raises:
        ConfigError: the target is unknown or not trusted, or its arguments do not fit.
    """
    if isinstance(config, Mapping):
        arguments = {key: build(value, trusted, f"{where}.{key}") for key, value in config.items() if key != "_target_"}
        if "_target_" not in config:
            return arguments
        target = _locate(str(config["_target_"]), trusted, where)
        try:
            return target(**arguments)
        except BlemishError:
            raise
        except TypeError as error:
            raise ConfigError(f"{where} does not fit {config['_target_']}: {error}.") from error
    if isinstance(config, (list, tuple)):
        return [build(value, trusted, f"{where}[{position}]") for position, value in enumerate(config)]
    return config


def build_section(cls: type, config: Mapping[str, Any], name: str) -> Any:
    """Build `cls`, whose arguments are the section `name` of a config. Raises ConfigError if they do not fit."""
    return build({"_target_": f"{cls.__module__}.{cls.__qualname__}", **config[name]}, where=name)


def _locate(path: str, trusted: Sequence[str] | None, where: str) -> Any:
    if trusted is not None and not any(path.startswith(package + ".") for package in trusted):
        raise ConfigError(
            f"{where} wants to load '{path}', outside the trusted packages {', '.join(trusted)}: if you trust it, "
            f"add its package (load_detector(run, trusted=['{path.split('.')[0]}']) or trusted=[{path.split('.')[0]}])."
        )
    module_name, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}._target_ is '{path}', which cannot be imported: {error}.") from error

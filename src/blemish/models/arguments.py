"""What models ask of their numbers, in the words that users read."""

from __future__ import annotations

from blemish.errors import ConfigError


def check_counts(**numbers: object) -> None:
    """Raise ConfigError if one of a model's numbers is no count."""
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise ConfigError(f"Expected model.{name} to be a positive whole number, found {number}.")


def check_positive(**numbers: float) -> None:
    """Raise ConfigError if one of a model's weights, rates or sizes is not above 0."""
    for name, number in numbers.items():
        if not number > 0:
            raise ConfigError(f"Expected model.{name} > 0, found {number}.")

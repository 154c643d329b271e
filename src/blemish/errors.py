"""The mistakes that a user can mend: each message says what was expected, what was found and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BlemishError(Exception):
    """Base of every error that is shown to the user as one sentence, without a traceback."""


class ConfigError(BlemishError):
    """A setting is unknown, missing or out of range."""


class ImageError(BlemishError):
    """An image or a mask cannot be used as it is."""


class DataError(BlemishError):
    """A data set as a whole cannot be used as it is."""


class CalibrationError(BlemishError):
    """The calibration images cannot support the promise that was asked for."""


class NotCalibrated(BlemishError):
    """A decision was asked of a detector that has no calibration."""


class CheckpointError(BlemishError):
    """A run folder or checkpoint is missing, damaged or of another version."""


class ExportError(BlemishError):
    """A detector cannot be exported, or an exported file cannot be used."""


def nearest_names(name: str, known: Iterable[str], most: int = 3) -> str:
    """Suggest the known names closest to `name`, as the tail of a sentence ('' if there are none)."""
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=most, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(f"'{candidate}'" for candidate in close) + "?"
    return f"known: {', '.join(known[:20])}{', ...' if len(known) > 20 else ''}" if known else ""

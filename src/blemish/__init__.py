"""Deep unsupervised visual anomaly detection with calibrated false-alarm rates."""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

__version__ = "0+unknown"  # of a source tree that was never installed
for _name in ("blemish-runtime", "blemish"):  # the smaller one is a part of the other
    with suppress(PackageNotFoundError):
        __version__ = version(_name)

__all__ = ["Detector", "Prediction", "__version__", "load_detector"]

if TYPE_CHECKING:
    from blemish.detector import Detector, Prediction
    from blemish.loading import load_detector


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `import blemish` and `blemish --help` do not wait for torch.
    if name == "load_detector":
        from blemish.loading import load_detector

        return load_detector
    if name in ("Detector", "Prediction"):
        from blemish import detector

        return getattr(detector, name)
    raise AttributeError(f"module 'blemish' has no attribute '{name}'")

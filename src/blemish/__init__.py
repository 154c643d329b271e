"""Deep unsupervised visual anomaly detection with calibrated false-alarm rates."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("blemish")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["Detector", "Prediction", "__version__", "load_detector"]

if TYPE_CHECKING:
    from blemish.checkpoint import load_detector
    from blemish.detector import Detector, Prediction


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `import blemish` and `blemish --help` do not wait for torch.
    if name == "load_detector":
        from blemish.checkpoint import load_detector

        return load_detector
    if name in ("Detector", "Prediction"):
        from blemish import detector

        return getattr(detector, name)
    raise AttributeError(f"module 'blemish' has no attribute '{name}'")

"""One way to load a detector, whatever keeps it: a run, or an exported file, which needs no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from blemish.detector import Detector
from blemish.engines.load import is_exported, load_exported, load_for_run
from blemish.errors import ExportError


def load_detector(
    run: str | Path,
    device: str = "auto",
    trusted: Sequence[str] = (),
    *,
    with_card: bool = True,
    engine: str = "torch",
) -> Detector:
    """Load the detector of a run, or one that `blemish export` made of it, calibrated if there is a card.

    Args:
        run: the folder that `blemish train` made, or its `detector.pt`; or an exported `.onnx`, `.xml` or `.pt2` file,
            with `card.json` beside it.
        device: cpu, cuda, ... or auto (the GPU if there is one); exported files run on the CPU.
        trusted: packages besides blemish's own models and torch.nn that the checkpoint may take classes from;
            "torch.export" lets PyTorch read `.pt2` files.
        with_card: False leaves the calibration out, whatever its state, so that a new one can be made.
        engine: torch; or onnx, openvino or onnx_int8, to take what was exported of the run.

    Raises:
        CheckpointError, ConfigError: the checkpoint cannot be used. CalibrationError: its card is not its own.
        ExportError: the exported file cannot be used.
    """
    path = Path(run)
    if is_exported(path):
        return load_exported(path, device, trusted, with_card=with_card)
    if find_spec("torch") is None:
        raise ExportError(f"{path} is no exported file, and loading a run needs the package blemish with PyTorch.")
    from blemish import checkpoint

    if engine == "torch":
        return checkpoint.load_detector(path, device, trusted, with_card=with_card)
    content = checkpoint.read_checkpoint(path)
    folder = path if path.is_dir() else path.parent
    return load_for_run(folder, engine, content["calibration"], content["about"], device)

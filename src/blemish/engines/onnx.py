"""The engine of `.onnx` files: ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blemish.data.images import FloatArray
from blemish.detector import TileDetector
from blemish.engines.description import EXPECTED, KEY, SCORE, TILES, Description
from blemish.engines.scorer import GraphScorer
from blemish.errors import ExportError


class OnnxScorer(GraphScorer):
    """The tile scorer that runs a graph in ONNX Runtime."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.outputs = [output.name for output in session.get_outputs()]

    def run(self, tiles: FloatArray, explain: bool) -> list[FloatArray]:
        found: list[FloatArray] = self.session.run(self.outputs if explain else [SCORE], {TILES: tiles})
        return found


def load_onnx(path: Path) -> TileDetector:
    """The detector in an exported ONNX file, without calibration.

    Raises:
        ExportError: ONNX Runtime is not installed, or the file is damaged or not one of ours.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(
            f"{path} needs the package onnxruntime: pip install onnxruntime, or 'blemish[export]'."
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # warnings of its optimiser say nothing to a user
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class
        raise ExportError(f"Cannot load {path}: it is damaged or no ONNX file; export it again.") from error
    description = Description.from_text(session.get_modelmeta().custom_metadata_map.get(KEY), path)
    names = [put.name for put in session.get_inputs()], [put.name for put in session.get_outputs()]
    if names not in (([TILES], [SCORE]), ([TILES], [SCORE, EXPECTED])):
        raise ExportError(f"{path} has other inputs or outputs than a tile scorer: export it again.")
    return description.detector(OnnxScorer(session))

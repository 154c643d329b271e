"""The engine of OpenVINO's `.xml` files, each with its `.bin` beside it: OpenVINO on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from blemish.data.images import FloatArray
from blemish.detector import TileDetector
from blemish.engines.description import EXPECTED, KEY, SCORE, TILES, Description
from blemish.engines.scorer import GraphScorer
from blemish.errors import ExportError

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
"""Some processors would else compute with 8 bits of mantissa, and scores would not be those that were calibrated."""


class OpenVinoScorer(GraphScorer):
    """The tile scorer that runs a graph in OpenVINO."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self.outputs = [name for name in (SCORE, EXPECTED) if _has(compiled, name)]

    def run(self, tiles: FloatArray, explain: bool) -> list[FloatArray]:
        results = self.compiled({TILES: tiles})
        # Its own memory is used again.
        return [np.array(results[name]) for name in (self.outputs if explain else [SCORE])]


def load_openvino(path: Path) -> TileDetector:
    """The detector in an exported `.xml` file, without calibration.

    Raises:
        ExportError: OpenVINO is not installed, or the files are damaged or not ours.
    """
    try:
        import openvino
    except ImportError as error:
        raise ExportError(f"{path} needs the package openvino: pip install openvino, or 'blemish[export]'.") from error
    if not path.with_suffix(".bin").is_file():
        raise ExportError(f"{path} needs {path.with_suffix('.bin').name} beside it: copy both files.")
    core = openvino.Core()
    try:
        model = core.read_model(path)
        text = model.get_rt_info(KEY).astype(str) if model.has_rt_info(KEY) else None
    except Exception as error:  # its errors have no common class
        raise ExportError(f"Cannot load {path}: it is damaged or no OpenVINO file; export it again.") from error
    description = Description.from_text(text, path)
    try:
        # Of one tile size, it need not plan anew for each batch.
        size = description.tiling.size
        model.reshape({TILES: [-1, description.image.channels, size, size]})
        compiled = core.compile_model(model, "CPU", EXACT)
    except Exception as error:
        raise ExportError(f"OpenVINO cannot run {path} here: export it again, or use engine=onnx.") from error
    if not _has(compiled, SCORE):
        raise ExportError(f"{path} has other inputs or outputs than a tile scorer: export it again.")
    return description.detector(OpenVinoScorer(compiled))


def _has(compiled: Any, name: str) -> bool:
    return any(name in output.get_names() for output in compiled.outputs)

"""The engine of `.pt2` files: PyTorch, without the classes of blemish's models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blemish.data.images import FloatArray
from blemish.detector import TileDetector
from blemish.engines.description import KEY, Description
from blemish.engines.scorer import GraphScorer
from blemish.errors import ExportError

EXTRA_FILE = f"{KEY}.json"
"""Holds the description, inside the file."""


class ProgramScorer(GraphScorer):
    """The tile scorer that runs an exported program; it always computes all."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def run(self, tiles: FloatArray, explain: bool) -> list[FloatArray]:
        import torch

        with torch.inference_mode():
            return [part.numpy() for part in self.module(torch.from_numpy(tiles))]


def load_program(path: Path) -> TileDetector:
    """The detector in an exported `.pt2` file, without calibration.

    Raises:
        ExportError: PyTorch is not installed, or the file is damaged or not one of ours.
    """
    try:
        import torch
    except ImportError as error:
        raise ExportError(f"{path} needs PyTorch: pip install torch, or use an export to ONNX.") from error
    extra = {EXTRA_FILE: ""}
    try:
        program = torch.export.load(path, extra_files=extra)
        description = Description.from_text(extra[EXTRA_FILE], path)
        return description.detector(ProgramScorer(program.module()))
    except ExportError:
        raise
    except Exception as error:  # its errors have no common class
        raise ExportError(f"Cannot load {path}: it is damaged or no exported program; export it again.") from error

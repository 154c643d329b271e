"""What of a detector becomes a graph: light, model and score, from tiles to score tiles."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from blemish.detector import Detector, TileDetector
from blemish.engines.description import TILES
from blemish.errors import ExportError
from blemish.models.contracts import Unexportable
from blemish.scores.contracts import Score, explain
from blemish.scores.engine import TorchScorer
from blemish.standardise import Light

_EXAMPLES = 2  # tiles; of a single one, the exporter would take 1 for the number that is meant
_MOST_VALUES = 2**26  # of the largest tensor in the graph, 256 MiB


class TileGraph(nn.Module):
    """Tiles (b, C, t, t) in [0, 1] -> score (b, 1, t, t) and, where it is in pixels, expected (b, C, t, t)."""

    def __init__(self, model: nn.Module, score: Score, standardise: bool) -> None:
        super().__init__()
        self.model, self.score, self.standardise = model, score, standardise

    def forward(self, tiles: Tensor) -> tuple[Tensor, ...]:
        light = Light.of(tiles) if self.standardise else None
        x = light.remove(tiles) if light else tiles
        score, expected = explain(self.score, self.model, x)
        if expected.shape != x.shape:
            return (score.float(),)
        return score.float(), (light.restore(expected) if light else expected).float()


def check_exportable(detector: Detector) -> TorchScorer:
    """The scorer of a detector that may become a graph.

    Raises:
        ExportError: it is an ensemble, or a part of it says that no graph can hold it.
    """
    if not isinstance(detector, TileDetector):
        raise ExportError(
            f"{type(detector).__name__} cannot be exported, because it joins several detectors: export each of its "
            "runs, or predict with engine=torch."
        )
    scorer = detector.scorer
    if not isinstance(scorer, TorchScorer):
        raise ExportError("Expected a detector that runs in PyTorch, found an exported one: export its run.")
    for kind, part in (("model", scorer.model), ("score", scorer.score)):
        for module in part.modules() if isinstance(part, nn.Module) else ():
            if isinstance(module, Unexportable):
                raise ExportError(
                    f"{type(module).__name__} cannot be exported, because {module.unexportable}: predict with "
                    f"engine=torch, or train with another {kind}."
                )
    return scorer


def trace(detector: TileDetector, any_size: bool = True) -> ExportedProgram:
    """The tile graph of a detector on the CPU, for any number of tiles.

    Args:
        any_size: of any size that the model takes, too, if it can be told in general; else of `tiling.size` alone.

    Raises:
        ExportError: as `check_exportable`, or PyTorch's exporter cannot follow the model or the score.
    """
    scorer = check_exportable(detector)
    graph = TileGraph(scorer.model, scorer.score, scorer.standardise).eval()
    size = detector.tiling.size
    generator = torch.Generator().manual_seed(0)
    tiles = torch.rand(_EXAMPLES, detector.preprocess.channels, size, size, generator=generator)
    sizes = [{2: Dim.AUTO, 3: Dim.AUTO}] if any_size else []
    failure: Exception = AssertionError()
    for free in (*sizes, {}):
        try:
            with torch.no_grad():
                shapes = {TILES: {0: Dim("batch", min=1), **free}}
                program = torch.export.export(graph, (tiles,), dynamic_shapes=shapes)
                if free and None in input_shape(program)[2:]:
                    # A side that is called free may be so between bounds that only one size lies between.
                    larger = tiles.repeat(1, 1, 2, 2)
                    torch.testing.assert_close(program.module()(larger)[0], graph(larger)[0], rtol=1e-3, atol=1e-3)
                return program
        except Exception as error:  # whatever an exporter, or a model of someone else's, raises
            failure = error
    raise cannot("PyTorch's exporter", failure)


def cannot(who: str, failure: Exception) -> ExportError:
    """The sentence for what an exporter raised."""
    text = re.sub(r"\x1b\[[\d;]*m", "", str(failure))  # they colour it
    said = next((line.strip() for line in text.splitlines() if line.strip()), type(failure).__name__)
    said = said if len(said) <= 200 else f"{said[:200]}..."
    return ExportError(
        f"The detector cannot be exported, because {who} cannot follow its model or score ({said.rstrip('.')}): "
        "predict with engine=torch, or choose another format, model or score."
    )


def input_shape(program: ExportedProgram) -> list[int | None]:
    """The shape of the graph's input; None where it is free."""
    (node,) = (node for node in program.graph.nodes if node.op == "placeholder" and node.name == TILES)
    return [side if isinstance(side, int) else None for side in node.meta["val"].shape]


def tiles_at_once(program: ExportedProgram, most: int) -> int:
    """How many tiles a graph may be given so that its largest tensor stays bounded: from 1 to `most`."""
    largest = 1
    for node in program.graph.nodes:
        value = node.meta.get("val")
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            counted = isinstance(tensor, Tensor) and node.op == "call_function"
            if counted and not all(isinstance(side, int) for side in tensor.shape):  # else it does not grow with tiles
                largest = max(largest, math.prod(_hint(side) for side in tensor.shape))
    return max(1, min(most, _MOST_VALUES * _EXAMPLES // largest))


def _hint(side: Any) -> int:
    """A side of a tensor at the example's size."""
    return side if isinstance(side, int) else int(side.node.hint)

"""An ONNX tile graph whose model convolves in 8 bits; all else in it, above all the score, stays float32."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from blemish.data.images import FloatArray, probe
from blemish.detector import TileDetector
from blemish.engines.description import TILES
from blemish.errors import BlemishError, ExportError, ImageError
from blemish.export.graph import cannot
from blemish.export.writing import quiet
from blemish.scoring import score_files, usable

Item = TypeVar("Item")

_TILES = 8  # of an image, at most, whose activations give limits
_KIND, _CUTS = "Conv", ("Clip", "Relu")
_MODEL = "model."  # how the names of a model's own weights begin in a `TileGraph`; a score's filters are not its


def quantise(source: Path, detector: TileDetector, paths: Sequence[Path], target: Path, progress: bool = True) -> int:
    """Write the graph of `source` with 8 bits in the convolutions of the model; how many these are.

    Weights have a scale for each channel and 7 bits, symmetric; activations 8 bits, between limits that keep the most
    of how the values of normal images are distributed: from the smallest to the largest, rare values would take the
    bits of all others. 255 x 64 x 2 stays within 16 bits, in which processors without VNNI add up pairs of products:
    with 8 bits of weight they would clamp, and scores would be others there than where they were calibrated.

    Args:
        source, target: ONNX files in one folder, which holds whatever is written in between.
        detector: the one in `source`, which makes tiles of images. paths: normal images that do not calibrate.

    Raises:
        ExportError: no convolution is the model's own, or ONNX Runtime cannot follow the graph. DataError: an image
            cannot be used.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    model = onnx.load(source)
    nodes = convolutions(model)
    if not nodes:
        raise ExportError(
            "precision=int8 expects a model with convolutions, which alone become 8 bits, found one without: export it "
            "without precision=int8."
        )
    with tqdm(total=len(paths), desc="ranges", unit="image", disable=not progress, leave=False) as bar:
        try:
            with quiet(), _silent(), _temporary_files_in(target.parent):
                quantize_static(
                    source,
                    target,
                    TileReader(detector, paths, bar),
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=[_KIND, *_CUTS],
                    nodes_to_quantize=nodes + cuts_after(model, nodes),
                    per_channel=True,
                    reduce_range=True,
                    weight_type=QuantType.QInt8,
                    activation_type=QuantType.QUInt8,
                    calibrate_method=CalibrationMethod.Entropy,
                    extra_options={"CalibStridedMinMax": 1},  # one image at a time, whatever the method
                )
        except (OSError, BlemishError):
            raise
        except Exception as error:  # it raises whatever it likes
            raise cannot("ONNX Runtime's quantisation", error) from error
    return len(nodes)


def convolutions(model: Any) -> list[str]:
    """The names of the nodes of an ONNX graph that become 8 bits: convolutions by weights of the model's own.

    Residuals and smoothing convolve, too, by few and fixed numbers: nothing is gained there. And what follows a
    difference of what convolutions gave, as heads do that see where observed and expected differ, stays as exact as
    the score: of nearly equal numbers little more remains than their rounding.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    weights = {name for name in constants if name.startswith(_MODEL)}
    after, differing, chosen = set[str](), set[str](), []  # names of tensors that a convolution, a difference, shaped
    for node in model.graph.node:  # in the order of their computation
        inputs = set(node.input)
        own = node.op_type == _KIND and node.input[1] in weights
        if own or inputs & after:
            after.update(node.output)
        if inputs & differing or (node.op_type == "Sub" and inputs & after and not inputs & constants):
            differing.update(node.output)
        elif own:
            chosen.append(node.name)
    return chosen


def cuts_after(model: Any, nodes: Sequence[str]) -> list[str]:
    """The names of the nodes that cut off what these convolutions give: their 8 bits are then for what is left."""
    given = {name for node in model.graph.node if node.name in set(nodes) for name in node.output}
    return [node.name for node in model.graph.node if node.op_type in _CUTS and node.input[0] in given]


class TileReader:
    """What ONNX Runtime asks for inputs: the very tiles that a detector makes of images, at most 8 of each image.

    It keeps every activation of an image until it has looked at all of them.
    """

    def __init__(self, detector: TileDetector, paths: Sequence[Path], bar: Any = None) -> None:
        self._detector = replace(detector, scorer=self._keep)
        self._paths, self._bar = paths, bar
        self._tiles: list[FloatArray] = []
        self._seen, self._chosen = 0, set[int]()

    def __len__(self) -> int:
        return len(self._paths)

    def set_range(self, start_index: int, end_index: int) -> None:
        """The images that `get_next` goes through next. Raises DataError if one of them cannot be used."""
        self._tiles.clear()
        paths = self._paths[start_index:end_index]
        self._seen, self._chosen = 0, set(spread(range(sum(map(self._count, paths))), _TILES))
        for scored in score_files(self._detector, paths):
            usable(scored)
            if self._bar is not None:
                self._bar.update()

    def get_next(self) -> dict[str, FloatArray] | None:
        """A tile (1, C, t, t) in [0, 1] under the name of the graph's input; None when there are no more."""
        return {TILES: self._tiles.pop(0)} if self._tiles else None

    def _count(self, path: Path) -> int:
        """The tiles of an image; 0 if it cannot be read, which scoring says."""
        try:
            info = probe(path)
        except ImageError:
            return 0
        return self._detector.tiling.count(*self._detector.preprocess.scored_size(info.height, info.width))

    def _keep(self, tiles: FloatArray) -> FloatArray:
        for place in range(len(tiles)):
            if self._seen + place in self._chosen:  # of a huge image, all would not fit into memory
                self._tiles.append(np.array(tiles[place : place + 1], np.float32, order="C"))
        self._seen += len(tiles)
        return np.zeros((len(tiles), *tiles.shape[2:]), np.float32)


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of them, evenly spread."""
    return [items[place] for place in np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)]


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Where the quantiser, which takes no folder of ours, puts the models that it makes on its way."""
    before = tempfile.tempdir
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


@contextmanager
def _silent() -> Iterator[None]:
    """Without the quantiser's advice to preprocess: the exporter has folded and inferred shapes already."""
    root = logging.getLogger()
    handlers, before = root.handlers[:], logging.root.manager.disable
    root.handlers = root.handlers or [logging.NullHandler()]  # else the first warning would install one for good
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
        root.handlers = handlers

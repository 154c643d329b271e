"""Writing a tile graph in each format, with the description inside."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from blemish.engines.description import EXPECTED, KEY, SCORE, TILES
from blemish.engines.program import EXTRA_FILE
from blemish.errors import ConfigError, ExportError, nearest_names
from blemish.export.graph import cannot


def write_onnx(program: ExportedProgram, text: str, path: Path) -> None:
    """One `.onnx` file with weights and description."""
    path.write_bytes(_onnx(program, text).SerializeToString())


def write_openvino(program: ExportedProgram, text: str, path: Path) -> None:
    """An `.xml` file and, beside it, the weights in a `.bin` file; by way of ONNX."""
    import openvino

    model = openvino.Core().read_model(_onnx(program, text).SerializeToString())
    model.set_rt_info(text, KEY)
    openvino.save_model(model, path, compress_to_fp16=False)  # scores would be others


def write_torch(program: ExportedProgram, text: str, path: Path) -> None:
    """One `.pt2` file of torch.export's."""
    torch.export.save(program, path, extra_files={EXTRA_FILE: text})


def _onnx(program: ExportedProgram, text: str) -> Any:
    made = torch.onnx.export(
        program,
        dynamo=True,
        input_names=[TILES],
        output_names=[SCORE, EXPECTED][: len(program.graph_signature.user_outputs)],
        external_data=False,
        verbose=False,
    )
    assert made is not None
    model = made.model_proto
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, text
    return model


_WRITERS: dict[str, tuple[Callable[[ExportedProgram, str, Path], None], tuple[str, ...]]] = {
    "onnx": (write_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "openvino": (write_openvino, ("onnx", "onnxscript", "openvino")),
    "torch": (write_torch, ()),
}
"""For each format, what writes it, and the packages that this and the check afterwards need."""


def check_format(form: str) -> None:
    """Raise ConfigError if there is no such format, ExportError if its packages are not installed."""
    if form not in _WRITERS:
        raise ConfigError(
            f"Expected format to be one of {', '.join(_WRITERS)}, found '{form}'. {nearest_names(form, _WRITERS)}"
        )
    missing = [package for package in _WRITERS[form][1] if find_spec(package) is None]
    if missing:
        raise ExportError(f"format={form} needs the package {missing[0]}: pip install 'blemish[export]'.")


def write(form: str, program: ExportedProgram, text: str, path: Path) -> None:
    """Write a graph and the text of its description.

    Raises:
        ExportError: the format has no counterpart for a part of the graph. OSError: of the file.
    """
    try:
        with quiet():
            _WRITERS[form][0](program, text, path)
    except OSError:
        raise
    except Exception as error:  # converters raise whatever they like
        raise cannot(f"the converter to {form}", error) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' progress and warnings, which speak of their own insides."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        yield

"""What becomes 8 bits, and by which tiles."""

from __future__ import annotations

import tempfile

import numpy as np
import pytest

from blemish.data.images import read_pixels
from blemish.data.records import Record
from blemish.data.splits import SplitRecord
from blemish.detector import TileDetector
from blemish.errors import DataError, ExportError
from blemish.postprocess import Cleaning, Smoothing
from blemish.preprocess import Preprocess
from blemish.tiling import Tiling

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from blemish.export import quantise as module  # noqa: E402
from blemish.export.int8 import Images  # noqa: E402


def graph(*weights, kind="Conv"):
    """One node after the other on the tiles, with these names of weights."""
    helper, number = onnx.helper, onnx.TensorProto.FLOAT
    names = ["tiles", *(f"x{place}" for place in range(len(weights) - 1)), "score"]
    nodes = [helper.make_node(kind, [names[i], w], [names[i + 1]], name=f"node{i}") for i, w in enumerate(weights)]
    values = [onnx.numpy_helper.from_array(np.full((1, 1, 1, 1), 0.5, np.float32), name) for name in weights]
    ends = [helper.make_tensor_value_info(name, number, ["b", 1, 16, 16]) for name in ("tiles", "score")]
    made = helper.make_graph(nodes, "tiles", ends[:1], ends[1:], values)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def detector(scorer):
    return TileDetector(
        scorer=scorer,
        preprocess=Preprocess(1, max_side=100),
        tiling=Tiling(16, 0.5, 4, False),
        smoothing=Smoothing(1.5),
        cleaning=Cleaning(1),
        fingerprint="print",
    )


@pytest.fixture
def paths(tmp_path, save, texture):
    return [save(tmp_path / f"images/{number}.png", texture(number, (30, 20 + 8 * number))) for number in range(3)]


def test_filters_of_the_score_stay_as_they_are():
    assert module.convolutions(graph("model.encoder.0.weight", "score.residual.kernel", "model.paint.weight")) == [
        "node0",
        "node2",
    ]
    assert module.convolutions(graph("model.scale", kind="Mul")) == []


def test_what_sees_a_difference_stays_as_it_is():
    made = graph("model.a", "model.b", "model.c")
    first, second, _ = made.graph.node
    second.op_type = "Sub"
    assert module.convolutions(made) == ["node0", "node2"]  # from a constant, as features are standardised
    second.input[1] = "tiles"
    assert module.convolutions(made) == ["node0"]  # of what is observed and expected
    first.op_type = "Sub"
    assert module.convolutions(made) == ["node2"]  # of the input alone, as light is taken off


def test_what_is_cut_off_takes_no_bits(paths, tmp_path):
    made = graph("model.a", "model.b", "model.c")
    _, second, third = made.graph.node
    for node in (second, third):
        node.op_type = "Relu"
        del node.input[1]
    assert module.cuts_after(made, module.convolutions(made)) == ["node1"]
    onnx.save(made, tmp_path / "float32.onnx")
    module.quantise(tmp_path / "float32.onnx", detector(None), paths, tmp_path / "model.onnx", progress=False)
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert kinds.count("Relu") == 1  # the other one is in the limits of the convolution's 8 bits


def test_the_graph_is_rounded_by_what_the_images_show(paths, tmp_path):
    onnx.save(graph("model.weight", "score.kernel"), tmp_path / "float32.onnx")
    target = tmp_path / "model.onnx"
    assert module.quantise(tmp_path / "float32.onnx", detector(None), paths, target, progress=False) == 1
    import onnxruntime

    x = np.random.default_rng(0).random((2, 1, 16, 16), np.float32)
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"tiles": np.clip(x, 0.3, 0.55)})
    error = abs(found - 0.25 * np.clip(x, 0.3, 0.55)).max()
    assert 0 < error < 0.01  # rounded, but not much
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["float32.onnx", "model.onnx"]


def test_a_model_without_convolutions_is_refused(paths, tmp_path):
    onnx.save(graph("score.kernel"), tmp_path / "float32.onnx")
    with pytest.raises(ExportError, match="precision=int8 expects a model with convolutions"):
        module.quantise(tmp_path / "float32.onnx", detector(None), paths, tmp_path / "model.onnx", progress=False)
    assert not (tmp_path / "model.onnx").exists()


def test_the_reader_gives_the_tiles_that_the_detector_scores(paths, tmp_path, save, texture):
    scored = []

    def scorer(tiles):
        scored.extend(tiles.copy())
        return tiles[:, 0]

    paths = [*paths, save(tmp_path / "large.png", texture(9, (90, 90)))]
    reader = module.TileReader(detector(None), paths)
    assert len(reader) == 4 and reader.get_next() is None
    for place, path in enumerate(paths):
        scored.clear()
        detector(scorer).score_map(read_pixels(path))
        reader.set_range(place, place + 1)
        given = []
        while (inputs := reader.get_next()) is not None:
            given.append(inputs["tiles"])
        assert len(given) == min(8, len(scored))  # those of this image alone
        chosen = np.linspace(0, len(scored) - 1, len(given)).round().astype(int)
        np.testing.assert_array_equal(np.concatenate(given), np.stack(scored)[chosen], strict=True)
    assert len(scored) > 100


def test_an_unreadable_image_is_said_and_nothing_stays(paths, tmp_path):
    paths[1].write_bytes(b"none")
    onnx.save(graph("model.weight"), tmp_path / "float32.onnx")
    before = tempfile.tempdir
    with pytest.raises(DataError, match=r"A normal image cannot be used\. .*1\.png"):
        module.quantise(tmp_path / "float32.onnx", detector(None), paths, tmp_path / "model.onnx", progress=False)
    assert tempfile.tempdir == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float32.onnx", "images"]


def test_what_onnx_runtime_cannot_follow_is_said_in_a_sentence(paths, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no such thing")

    monkeypatch.setattr("onnxruntime.quantization.quantize_static", fail)
    onnx.save(graph("model.weight"), tmp_path / "float32.onnx")
    with pytest.raises(ExportError, match=r"ONNX Runtime's quantisation cannot follow .* \(no such thing\)"):
        module.quantise(tmp_path / "float32.onnx", detector(None), paths, tmp_path / "model.onnx", progress=False)


def records(*names):
    return [SplitRecord(Record(name, "good"), f"sha {name}", f"unit {name[0]}") for name in names]


def test_parts_serve_for_one_thing_each():
    parts = {"train": records("a1", "a2"), "validation": records("b"), "calibration": records("c1", "c2")}
    Images(**parts)
    for name, found, sentence in (
        ("train", [], "Expected the training images of the run, found none"),
        ("calibration", records("a1"), "Expected the calibration images of the run, found some that serve for another"),
        ("calibration", records("b2"), "found some that serve for another part, too"),  # of a unit
        ("validation", records("a1"), "Expected the validation images"),
    ):
        with pytest.raises(DataError, match=sentence):
            Images(**parts | {name: found})

"""Exported files are read as data: what they say of the detector, and every way in which they can be unusable."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict

import numpy as np
import pytest

import blemish
from blemish.calibration import Calibration, Promise
from blemish.detector import TileDetector
from blemish.engines.description import KEY, Description
from blemish.engines.load import ENGINES, FILES, INT8, load_for_run
from blemish.errors import BlemishError, CalibrationError, ConfigError, ExportError, NotCalibrated
from blemish.export.parity import TOLERANCE, Parity, compare
from blemish.files import write_json
from blemish.normalisation import SpatialNormalisation
from blemish.postprocess import Cleaning, Smoothing
from blemish.preprocess import Preprocess
from blemish.tiling import Tiling

IMAGE = np.random.default_rng(0).random((21, 30), np.float32)
NORMALISATION = SpatialNormalisation(np.full((21, 30), 0.25, np.float32), np.full((21, 30), 0.5, np.float32))
ABOUT = {"version": "1", "seed": 3, "config": {"model": {"_target_": "os.system"}}}


def brightness(tiles):
    """The score of a pixel is its value."""
    return tiles.mean(axis=1)


def detector(normalisation=NORMALISATION, **changed):
    parts = {
        "scorer": brightness,
        "preprocess": Preprocess(1, max_side=100),
        "tiling": Tiling(16, 0.5, 8, True),
        "smoothing": Smoothing(1.5),
        "normalisation": normalisation,
        "cleaning": Cleaning(2),
        "fingerprint": "print",
    }
    return TileDetector(**parts | changed)


def card(fingerprint="print"):
    return Calibration.fit(
        [number / 10 for number in range(1, 11)], list("abcdefghij"), Promise(0.1), fingerprint=fingerprint
    )


def described(**changed):
    return Description.of(detector(**changed), ABOUT, batch=4)


@pytest.fixture
def write_onnx(tmp_path):
    """(description's text, name, expected) -> an ONNX file whose score is the mean over channels."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    def write(text, name="model.onnx", output="score", expected=False):
        shape = ["batch", 1, 16, 16]
        nodes = [helper.make_node("ReduceMean", ["tiles", "axes"], [output], keepdims=1)]
        outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)]
        if expected:
            nodes.append(helper.make_node("Neg", ["tiles"], ["expected"]))
            outputs.append(helper.make_tensor_value_info("expected", TensorProto.FLOAT, shape))
        axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
        tiles = helper.make_tensor_value_info("tiles", TensorProto.FLOAT, shape)
        graph = helper.make_graph(nodes, "tiles", [tiles], outputs, [axes])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        if text is not None:
            helper.set_model_props(model, {KEY: text})
        onnx.save(model, tmp_path / name)
        return tmp_path / name

    return write


@pytest.mark.parametrize("normalisation", [NORMALISATION, None])
def test_a_description_survives_its_text(tmp_path, normalisation):
    before = described(normalisation=normalisation)
    after = Description.from_text(before.to_text(), tmp_path / "model.onnx")
    assert asdict(after) | {"normalisation": None} == asdict(before) | {"normalisation": None}
    assert after.tiling == Tiling(16, 0.5, 4, True)  # the batch that was asked for
    if normalisation:
        np.testing.assert_array_equal(after.normalisation.location, normalisation.location, strict=True)
        np.testing.assert_array_equal(after.normalisation.scale, normalisation.scale, strict=True)
    one, other = detector(normalisation=normalisation), after.detector(brightness)
    np.testing.assert_array_equal(one.score_map(IMAGE), other.score_map(IMAGE), strict=True)
    assert other.fingerprint == "print" and other.about == ABOUT


def test_what_a_file_says_of_its_making_builds_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("os.system", lambda *_: pytest.fail("a class of the file's choice was called"))
    Description.from_text(described().to_text(), tmp_path / "model.onnx").detector(brightness).score_map(IMAGE)


CHANGES = {
    "a missing section": lambda content: content.pop("tiling"),
    "a section that is no section": lambda content: content.update(image=3),
    "an unknown setting": lambda content: content["image"].update(colour=1),
    "text for a number": lambda content: content["tiling"].update(size="16"),
    "a fraction for a whole number": lambda content: content["tiling"].update(size=16.5),
    "a class to build": lambda content: content["smoothing"].update(sigma={"_target_": "os.system", "command": "id"}),
    "a number for yes or no": lambda content: content["tiling"].update(standardise=1),
    "yes for a number": lambda content: content["tiling"].update(batch=True),
    "a value out of range": lambda content: content["tiling"].update(overlap=2),
    "no number": lambda content: content["smoothing"].update(sigma=float("nan")),
    "another type of fingerprint": lambda content: content.update(fingerprint=7),
    "arrays of another size": lambda content: content["normalisation"].update(shape=[2, 2]),
    "arrays without a size": lambda content: content["normalisation"].update(shape=[]),
    "arrays of a negative size": lambda content: content["normalisation"].update(shape=[-21, -30]),
    "arrays that are none": lambda content: content["normalisation"].update(location="%%%"),
    "spreads of 0": lambda content: content["normalisation"].update(scale=content["normalisation"]["location"][:0]),
    "nothing told of its making": lambda content: content.update(about=None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_damaged_settings_are_refused_in_a_sentence(tmp_path, change):
    content = json.loads(described().to_text())
    change(content)
    with pytest.raises(ExportError, match=r"The settings in .*model\.onnx are damaged: export it again\."):
        Description.from_text(json.dumps(content), tmp_path / "model.onnx")


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", "3", '{"format": 99}'])
def test_text_of_anything_else_is_refused(tmp_path, text):
    with pytest.raises(ExportError, match="export it again"):
        Description.from_text(text, tmp_path / "model.onnx")


@pytest.mark.parametrize("expected", [False, True])
def test_an_onnx_file_is_the_detector_it_was_made_of(write_onnx, expected):
    path = write_onnx(described().to_text(), expected=expected)
    loaded = blemish.load_detector(path)
    np.testing.assert_allclose(loaded.score_map(IMAGE), detector().score_map(IMAGE), atol=1e-6)
    score_map, picture = loaded.explain(IMAGE)
    np.testing.assert_allclose(score_map, loaded.score_map(IMAGE), atol=1e-6)
    assert (picture is None) is not expected
    if expected:
        np.testing.assert_allclose(picture[..., 0], -IMAGE, atol=1e-6)
    with pytest.raises(NotCalibrated):
        loaded(IMAGE)


def test_the_card_beside_a_file_calibrates_it(write_onnx, tmp_path):
    path = write_onnx(described(normalisation=None).to_text())
    write_json(tmp_path / "card.json", card().to_dict())
    prediction = blemish.load_detector(str(path))(IMAGE)
    assert (prediction.threshold, prediction.is_anomalous) == (card().threshold, False)
    assert prediction.p_value == card().p_value(prediction.image_score)
    assert blemish.load_detector(path, with_card=False).calibration is None
    write_json(tmp_path / "card.json", card("other").to_dict())
    with pytest.raises(CalibrationError, match="another detector"):
        blemish.load_detector(path)
    for damage in ("{", "[]", '{"n": 3}'):
        (tmp_path / "card.json").write_text(damage)
        with pytest.raises(BlemishError, match=r"card.*damaged"):
            blemish.load_detector(path)


def test_unusable_files_are_refused_in_a_sentence(write_onnx, tmp_path):
    pytest.importorskip("openvino")
    sound = write_onnx(described().to_text())
    for name in ("cut.onnx", "cut.xml", "cut.pt2"):
        (tmp_path / name).write_bytes(sound.read_bytes()[:100])
    (tmp_path / "cut.bin").write_bytes(b"")
    (tmp_path / "alone.xml").write_text("<net/>")
    for path, trusted, sentence in (
        (tmp_path / "none.onnx", (), "No exported detector found at"),
        (write_onnx(None, "plain.onnx"), (), "was not made by `blemish export`"),
        (write_onnx(described().to_text(), "other.onnx", output="y"), (), "other inputs or outputs"),
        (tmp_path / "cut.onnx", (), "damaged"),
        (tmp_path / "cut.xml", (), "damaged"),
        (tmp_path / "alone.xml", (), r"needs alone\.bin beside it"),
        (tmp_path / "cut.pt2", (), r"trusted=\['torch\.export'\]"),
        (tmp_path / "cut.pt2", ["torch.export"], "damaged"),
    ):
        with pytest.raises(ExportError, match=sentence):
            blemish.load_detector(path, trusted=trusted)
    with pytest.raises(ConfigError, match="run on the CPU"):
        blemish.load_detector(sound, device="cuda")


@pytest.mark.parametrize(("package", "suffix"), [("onnxruntime", ".onnx"), ("openvino", ".xml"), ("torch", ".pt2")])
def test_a_missing_engine_is_named(tmp_path, monkeypatch, package, suffix):
    path = tmp_path / f"model{suffix}"
    path.touch()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf"pip install {package}"):
        blemish.load_detector(path, trusted=["torch.export"])


def test_a_run_finds_its_own_export(write_onnx, tmp_path):
    run = tmp_path / "run"
    own = card().to_dict()
    with pytest.raises(ConfigError, match="engine to be one of torch, onnx, openvino"):
        load_for_run(run, "onix", own, {})
    with pytest.raises(ExportError, match=r"not there: make it with `blemish export run=.* format=onnx`"):
        load_for_run(run, "onnx", own, {})
    (run / "export").mkdir(parents=True)
    shutil.copy(write_onnx(described().to_text()), run / "export")
    loaded = load_for_run(run, "onnx", own, {"trained_on": ["x"]})
    assert loaded.card.threshold == card().threshold and loaded.about == {"trained_on": ["x"]}
    with pytest.raises(ExportError, match="made of another detector"):
        load_for_run(run, "onnx", card("other").to_dict(), {})
    with pytest.raises(NotCalibrated):
        load_for_run(run, "onnx", None, {})
    assert {*FILES, INT8} == set(ENGINES)


def test_what_differs_is_told_and_what_differs_much_is_refused(tmp_path, save):
    pixels = (IMAGE * 255).astype(np.uint8)
    paths = [save(tmp_path / f"{number}.png", np.roll(pixels, number, 0)) for number in range(3)]
    one = detector(normalisation=None).calibrated(card())
    same = compare(one, one, paths, progress=False)
    assert (same.images, same.score_map, same.image_score, same.p_value, same.decisions) == (3, 0, 0, 0, 0)
    same.check("model.onnx")
    other = detector(normalisation=None, scorer=lambda tiles: brightness(tiles) * 1.5).calibrated(card())
    apart = compare(one, other, paths, progress=False)
    assert apart.unit == pytest.approx(one.score_map(pixels).max(), rel=0.2)
    assert apart.score_map == pytest.approx(0.5, rel=0.01)
    assert apart.p_value > 0
    with pytest.raises(ExportError, match=r"model\.onnx does not score as the run does"):
        apart.check("model.onnx")
    for value in (2 * TOLERANCE, float("nan")):
        with pytest.raises(ExportError):
            Parity(1, 1.0, value, 0.0, 0.0, 0).check("model.onnx")
        with pytest.raises(ExportError):
            Parity(1, 1.0, 0.0, value, 0.0, 0).check("model.onnx")
    for none in ([], [tmp_path / "none.png"]):
        with pytest.raises(BlemishError, match=r"data\.root=DIR"):
            compare(one, other, none, progress=False)

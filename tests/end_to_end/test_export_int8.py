"""`blemish export precision=int8`: another detector, with a card of its own, or no file at all."""

import errno
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import blemish
from blemish.data.splits import SPLITS_FILE, part_digests, read_part
from blemish.export import int8 as export_int8
from blemish.export import run as export_run

pytestmark = pytest.mark.skipif(
    any(find_spec(package) is None for package in ("onnx", "onnxscript", "onnxruntime")),
    reason="pip install 'blemish[export]'",
)
FILES = ["card.json", "int8.json", "model.onnx"]
QUICK = ("any_size=false", "synthetic.images=3", "images=4")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def exported(run_cli, tiny_run, tmp_path_factory):
    """A copy of the tiny run with its exports in 32 and 8 bits, what the second printed, what gave its ranges."""
    run = Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("exported") / "run"))
    assert run_cli(["export", f"run={run}", "any_size=false", "images=1"]).code == 0
    before = {path.name: path.read_bytes() for path in (run / "export").iterdir()}
    shown = []

    def quantise(source, detector, paths, *rest):
        shown.extend(paths)
        return original(source, detector, paths, *rest)

    original, export_int8.quantise = export_int8.quantise, quantise
    try:
        result = run_cli(["export", f"run={run}", "precision=int8", *QUICK])
    finally:
        export_int8.quantise = original
    assert result.code == 0, result.err
    assert {name: (run / "export" / name).read_bytes() for name in before} == before  # left alone
    return run, result.out, shown


def test_it_is_another_detector_with_its_own_card_and_all_else_as_before(exported):
    run, printed, _ = exported
    assert names(run / "export") == ["card.json", "int8", "model.onnx"] and names(run / "export/int8") == FILES
    exact, coarse = (blemish.load_detector(run / "export" / name) for name in ("model.onnx", "int8/model.onnx"))
    assert coarse.fingerprint not in (exact.fingerprint, "") and coarse.card.fingerprint == coarse.fingerprint
    assert coarse.card.scores != exact.card.scores
    assert (coarse.card.promise, coarse.card.mask_rule) == (exact.card.promise, exact.card.mask_rule)
    assert coarse.card.made["calibrated_on"] == exact.card.made["calibrated_on"]
    for part in ("preprocess", "tiling", "smoothing", "cleaning", "normalisation"):
        assert getattr(coarse, part) == getattr(exact, part)
    added = {"precision": "int8", "float_fingerprint": exact.fingerprint}
    assert dict(coarse.about) == {**exact.about, **added}
    assert f"written: {run / 'export/int8/model.onnx'}" in printed and "calibrated: of 1000" in printed
    assert coarse.card.in_words() in printed


def test_only_the_models_convolutions_are_rounded_and_their_sums_cannot_saturate(exported):
    onnx = pytest.importorskip("onnx")
    run, *_ = exported
    exact, coarse = (onnx.load(run / "export" / name) for name in ("model.onnx", "int8/model.onnx"))
    own = [node for node in exact.graph.node if node.op_type == "Conv" and node.input[1].startswith("model.")]
    weights = [
        onnx.numpy_helper.to_array(tensor)
        for tensor in coarse.graph.initializer
        if tensor.name.endswith("_quantized") and tensor.data_type == onnx.TensorProto.INT8
    ]
    assert len(weights) == len(own) > 0
    assert max(abs(values.astype(int)).max() for values in weights) <= 64
    assert [entry.key for entry in coarse.metadata_props] == ["blemish"]
    report = json.loads((run / "export/int8/int8.json").read_text())
    assert report["convolutions"] == len(own)


def test_ranges_come_from_images_that_calibrate_nothing(exported):
    run, _, shown = exported
    assert len(shown) == 4 and set(shown) < {item.record.path for item in read_part(run / SPLITS_FILE, "train")}
    card = blemish.load_detector(run).card
    assert not part_digests(run / SPLITS_FILE, "train") & set(card.made["calibrated_on"])


def test_the_report_holds_both_sides_against_each_other(exported):
    run, printed, _ = exported
    report = json.loads((run / "export/int8/int8.json").read_text())
    coarse, exact = blemish.load_detector(run / "export/int8/model.onnx"), blemish.load_detector(run)
    assert report["made"]["fingerprint"] == coarse.fingerprint and report["made"]["software"] == "blemish"
    paths = [item.record.path for item in read_part(run / SPLITS_FILE, "validation")]
    assert report["validation_images"] == len(paths) > 0
    for name, detector in (("float32", exact), ("int8", coarse)):
        side = report[name]
        assert (side["fingerprint"], side["threshold"]) == (detector.fingerprint, detector.card.threshold)
        assert side["promise"] == detector.card.in_words()
        assert side["false_alarms"] == sum(detector(path).is_anomalous for path in paths)
        assert side["synthetic"]["images"] == 3 and side["bytes"] > 0 and side["images_per_second"] > 0
        assert f"{side['synthetic']['image_auroc']:.4f}" in printed and f"{side['threshold']:.6g}" in printed
    assert f"measured on {len(paths)} validation images" in printed


def test_prediction_takes_it_by_its_engine_or_by_its_file(exported, run_cli, tiny_data):
    run, *_ = exported
    detector = blemish.load_detector(run / "export/int8/model.onnx")
    for words in ([f"run={run}", "engine=onnx_int8"], [f"run={run / 'export/int8/model.onnx'}"]):
        out = run / "export/int8/predictions" / str(len(words))
        given = [f"out={out}"] if len(words) == 2 else []
        result = run_cli(["predict", *words, f"input={tiny_data / 'test'}", "report.images=0", *given])
        assert result.code == 0, result.err
        if not given:
            (out,) = (path for path in (run / "export/int8/predictions").iterdir() if path.name != "2")
        rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
        assert len(rows) == 13
        for row in rows[:3]:
            assert row["p_value"] == detector(row["path"]).p_value
        assert json.loads((out / "card.json").read_text())["fingerprint"] == detector.fingerprint
    shutil.rmtree(run / "export/int8/predictions")


def test_evaluation_in_8_bits_leaves_the_runs_own_figures_alone(exported, run_cli, tmp_path):
    run = Path(shutil.copytree(exported[0], tmp_path / "run"))
    before = {name: (run / name).read_bytes() for name in ("metrics.json", "card.json")}
    result = run_cli(["evaluate", f"run={run}", "engine=onnx_int8", "report.images=0"])
    assert result.code == 0, result.err
    metrics = json.loads((run / "export/int8/metrics.json").read_text())
    assert metrics["made"]["fingerprint"] == blemish.load_detector(run / "export/int8/model.onnx").fingerprint
    assert {name: (run / name).read_bytes() for name in before} == before


def test_a_run_calibrated_anew_wants_a_new_export(exported, run_cli, tiny_data, tmp_path):
    run = Path(shutil.copytree(exported[0], tmp_path / "run"))
    calibrated = run_cli(["calibrate", f"run={run}", "calibration.alpha=0.3"])
    assert calibrated.code == 0 and f"{run / 'export/int8'} keeps its former card" in calibrated.err
    words = ["predict", f"run={run}", "engine=onnx_int8", f"input={tiny_data / 'test'}", "report.images=0"]
    stale = run_cli(words)
    assert stale.code == 2 and "has no calibration like the run's" in stale.sentences[-1]
    assert f"`blemish export run={run} precision=int8`" in stale.err
    assert run_cli(["export", f"run={run}", "precision=int8", *QUICK]).code == 0
    assert run_cli(words).code == 0
    assert blemish.load_detector(run, engine="onnx_int8").card.promise.alpha == 0.3
    (run / "export/int8/card.json").unlink()
    assert "has no calibration like the run's" in run_cli(words).err
    shutil.rmtree(run / "export/int8")
    assert "which is not there: make it with" in run_cli(words).err


def test_mistakes_are_said_before_any_work(run_copy, run_cli, make_mvtec, tmp_path, monkeypatch):
    monkeypatch.setattr(export_run, "trace", lambda *_: pytest.fail("traced"))
    for words, sentence in (
        (["precision=int4"], "Expected precision to be one of float32, int8, found 'int4'"),
        (["precision=int8", "format=openvino"], "precision=int8 expects format=onnx, found format=openvino"),
        (["precision=int8", "synthetic.images=-1"], "Expected synthetic.images >= 0"),
    ):
        result = run_cli(["export", f"run={run_copy}", *words])
        assert result.code == 2 and sentence in result.err and len(result.sentences) == 1, result.err
    other = make_mvtec(tmp_path / "some", train=40, good=1, blob=1)  # the first 40 of 60
    splits = run_copy / SPLITS_FILE
    splits.write_text(splits.read_text().replace("/train/good/", "/moved/"))
    for words in ([], [f"data.root={other}", "data=mvtec"]):
        result = run_cli(["export", f"run={run_copy}", "precision=int8", *words])
        assert result.code == 2 and len(result.sentences) == 1 and "by data.root=DIR" in result.err, result.err
    assert "images that calibrated" in result.err and "of them are missing" in result.err
    assert not (run_copy / "export").exists()


def test_a_failure_leaves_what_was_there_before(exported, run_cli, monkeypatch, tmp_path):
    run = Path(shutil.copytree(exported[0], tmp_path / "run"))
    before = {path: path.read_bytes() for path in (run / "export").rglob("*") if path.is_file()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for part in ("describe", "calibrate", "write_json"):
        with monkeypatch.context() as patch:
            patch.setattr(export_int8, part, full)
            for out in (run / "export/int8", tmp_path / "new"):
                result = run_cli(["export", f"run={run}", "precision=int8", f"out={out}", *QUICK])
                assert result.code == 2 and "the disk is full" in result.sentences[-1], result.err
    assert {path: path.read_bytes() for path in (run / "export").rglob("*") if path.is_file()} == before
    assert list((tmp_path / "new").iterdir()) == []


def test_moved_images_are_found_again(run_copy, run_cli, tiny_data, exported):
    splits = run_copy / SPLITS_FILE
    splits.write_text(splits.read_text().replace("/train/good/", "/moved/"))
    words = ["data=mvtec", f"data.root={tiny_data}", *QUICK]
    result = run_cli(["export", f"run={run_copy}", "precision=int8", *words])
    assert result.code == 0, result.err
    again, before = (blemish.load_detector(run, engine="onnx_int8") for run in (run_copy, exported[0]))
    assert again.fingerprint == before.fingerprint and again.card.scores == before.card.scores


def test_it_predicts_where_pytorch_cannot_be_imported(exported, tiny_data):
    run, *_ = exported
    path = tiny_data / "test/blob/000.png"
    blocked = ["torch", "onnx", "pytorch_lightning", "hydra", "omegaconf", "albumentations", "torchvision", "tqdm"]
    program = f"""
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
import blemish
prediction = blemish.load_detector({str(run / "export/int8/model.onnx")!r})({str(path)!r})
print(json.dumps([prediction.image_score, prediction.p_value]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    prediction = blemish.load_detector(run / "export/int8/model.onnx")(path)
    np.testing.assert_allclose(json.loads(done.stdout), [prediction.image_score, prediction.p_value], rtol=1e-6)

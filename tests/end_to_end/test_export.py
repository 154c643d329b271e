"""`blemish export`: from a run to a file that decides as the run does, or to no file."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import blemish
from blemish.engines.onnx import OnnxScorer
from blemish.export import run as export_run

pytestmark = pytest.mark.skipif(
    any(find_spec(package) is None for package in ("onnx", "onnxscript", "onnxruntime", "openvino")),
    reason="pip install 'blemish[export]'",
)
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def exported(run_cli, tiny_run, tmp_path_factory):
    """A copy of the tiny run with its ONNX export, and what that printed; read only."""
    run = Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("exported") / "run"))
    result = run_cli(["export", f"run={run}", "any_size=false"])
    assert result.code == 0, result.err
    return run, result.out


def decisions(folder):
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["path"]: (row["decision"], row["p_value"], row["regions"]) for row in rows}


def predict(run_cli, run, data, out, *words):
    result = run_cli(["predict", f"run={run}", f"input={data / 'test'}", f"out={out}", "report.images=0", *words])
    assert result.code == 0, result.err
    return decisions(out)


def test_the_export_is_one_file_with_the_card_beside_it(exported, tiny_run):
    run, printed = exported
    assert sorted(path.name for path in (run / "export").iterdir()) == ["card.json", "model.onnx"]
    assert (run / "export/card.json").read_text() == (tiny_run / "card.json").read_text()
    assert "compared on 12 images" in printed and "score maps differ by at most" in printed
    assert f"written: {run / 'export/model.onnx'} (tiles of any x 1 x 32 x 32)" in printed
    detector = blemish.load_detector(run / "export/model.onnx")
    assert isinstance(detector.scorer, OnnxScorer)
    before = json.loads((tiny_run / "run.json").read_text())
    assert detector.about["seed"] == before["seed"] and detector.about["version"] == blemish.__version__
    assert detector.about["data_fingerprint"] == before["data_fingerprint"]
    assert detector.about["config"]["model"]["_target_"] == "blemish.models.autoencoder.ConvAutoencoder"
    assert "trained_on" not in detector.about and str(tiny_run) not in json.dumps(dict(detector.about))


def test_every_decision_is_the_same(exported, run_cli, tiny_data, tmp_path):
    run, _ = exported
    before = predict(run_cli, run, tiny_data, tmp_path / "torch")
    after = predict(run_cli, run, tiny_data, tmp_path / "onnx", "engine=onnx")
    assert len(before) == 13 and {decision for decision, *_ in before.values()} == {"normal", "anomalous"}
    assert after == before
    maps = sorted((tmp_path / "torch/maps").rglob("*.tiff"))
    assert len(maps) == 13
    for path in maps:
        same = tmp_path / "onnx" / path.relative_to(tmp_path / "torch")
        one, other = (np.asarray(Image.open(file)) for file in (path, same))
        np.testing.assert_allclose(one, other, atol=1e-5 * one.max())


def test_evaluate_and_monitor_take_the_export_too(exported, run_cli, tiny_data, tmp_path):
    run, _ = exported
    for engine in ("torch", "onnx"):
        result = run_cli(["evaluate", f"run={run}", f"out={tmp_path / engine}", f"engine={engine}"])
        assert result.code == 0, result.err
    one, other = (json.loads((tmp_path / engine / "metrics.json").read_text()) for engine in ("torch", "onnx"))
    assert other["overall"]["calibrated"] == pytest.approx(one["overall"]["calibrated"], rel=1e-3)
    for figure in ("image_auroc", "pixel_auroc"):
        assert other["overall"][figure] == pytest.approx(one["overall"][figure], rel=1e-4)
    words = [f"run={run}", f"input={tiny_data / 'test/good'}", f"state={tmp_path / 'journal.jsonl'}", "engine=onnx"]
    assert run_cli(["monitor", *words]).code == 0
    refused = run_cli(
        ["monitor", f"run={run}", f"input={tiny_data / 'train'}", f"state={tmp_path / 'j'}", "engine=onnx"]
    )
    assert refused.code == 2 and "took part in training" in refused.err  # which the run knows, not the file


def test_an_export_follows_the_runs_calibration_but_not_another_run(exported, run_cli, tiny_data, tmp_path):
    run = Path(shutil.copytree(exported[0], tmp_path / "run"))
    assert run_cli(["calibrate", f"run={run}", "calibration.alpha=0.3"]).code == 0
    before = predict(run_cli, run, tiny_data, tmp_path / "torch")
    assert predict(run_cli, run, tiny_data, tmp_path / "onnx", "engine=onnx") == before
    card = json.loads((run / "export/card.json").read_text())
    assert card == json.loads((run / "card.json").read_text()) and card["promise"]["alpha"] == 0.3

    missing = run_cli(["predict", f"run={run}", f"input={tiny_data}", "engine=openvino"])
    assert missing.code == 2 and f"make it with `blemish export run={run} format=openvino`" in missing.err
    unknown = run_cli(["predict", f"run={run}", f"input={tiny_data}", "engine=tensorrt"])
    assert unknown.code == 2 and "Expected engine to be one of torch, onnx, openvino" in unknown.err


def test_a_file_that_scores_otherwise_is_not_kept(exported, run_cli, monkeypatch, tmp_path):
    run = Path(shutil.copytree(exported[0], tmp_path / "run"))
    sound = (run / "export/model.onnx").read_bytes()

    def spoiled(form, program, text, path):
        path.write_bytes(sound)

    class Brighter(OnnxScorer):
        def __call__(self, tiles):
            return super().__call__(tiles) * 1.001

    monkeypatch.setattr(export_run, "trace", lambda *_: None)
    monkeypatch.setattr(export_run, "tiles_at_once", lambda *_: 8)
    monkeypatch.setattr(export_run, "write", spoiled)
    monkeypatch.setattr("blemish.engines.onnx.OnnxScorer", Brighter)
    for out in (run / "export", tmp_path / "new"):
        result = run_cli(["export", f"run={run}", f"out={out}"])
        assert result.code == 2, result.err
        assert "does not score as the run does" in result.sentences[-1]
    assert (run / "export/model.onnx").read_bytes() == sound  # the earlier one
    assert sorted(path.name for path in (run / "export").iterdir()) == ["card.json", "model.onnx"]
    assert list((tmp_path / "new").iterdir()) == []


def test_mistakes_are_said_before_any_work(run_copy, run_cli, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(export_run, "trace", lambda *_: pytest.fail("traced"))
    for words, sentence in (
        (["format=tflite"], "Expected format to be one of onnx, openvino, torch, found 'tflite'"),
        (["images=0"], "Expected images >= 1"),
        ([f"data.root={tmp_path / 'none'}"], "none"),
    ):
        result = run_cli(["export", f"run={run_copy}", *words])
        assert result.code == 2 and sentence in result.err, result.err
    splits = run_copy / "splits.csv"
    splits.write_text(splits.read_text().replace("/train/good/", "/moved/"))
    result = run_cli(["export", f"run={run_copy}"])
    assert result.code == 2 and len(result.sentences) == 1 and "data.root=DIR" in result.err
    monkeypatch.setattr("blemish.export.writing.find_spec", lambda name: None)
    result = run_cli(["export", f"run={run_copy}"])
    assert result.code == 2 and "pip install 'blemish[export]'" in result.err


@pytest.mark.slow
@pytest.mark.parametrize(("form", "name"), [("openvino", "model.xml"), ("torch", "model.pt2")])
def test_other_formats_decide_the_same(run_copy, run_cli, tiny_data, form, name, tmp_path):
    result = run_cli(["export", f"run={run_copy}", f"format={form}", "data=mvtec", f"data.root={tiny_data}"])
    assert result.code == 0, result.err
    exported = blemish.load_detector(run_copy / "export" / name, trusted=["torch.export"])
    detector = blemish.load_detector(run_copy)
    paths = sorted((tiny_data / "test").rglob("*.png"))
    for path in paths:
        one, other = detector(path), exported(path)
        assert (one.is_anomalous, one.p_value) == (other.is_anomalous, other.p_value)
        np.testing.assert_allclose(one.score_map, other.score_map, atol=1e-5 * one.score_map.max())
    if form == "openvino":
        before = predict(run_cli, run_copy, tiny_data, tmp_path / "torch")
        assert predict(run_cli, run_copy, tiny_data, tmp_path / "openvino", "engine=openvino") == before


@pytest.mark.slow
def test_a_normalised_detector_carries_its_statistics(run_cli, tiny, tiny_data, tmp_path):
    words = [f"data.root={tiny_data}", "normalisation.kind=robust", "synthetic.images=0", f"out={tmp_path / 'run'}"]
    assert run_cli(["train", "data=mvtec", *words, *tiny]).code == 0
    for form in ("onnx", "openvino"):
        result = run_cli(["export", f"run={tmp_path / 'run'}", f"format={form}", "any_size=false"])
        assert result.code == 0, result.err


@pytest.mark.slow
def test_the_runtime_alone_predicts_the_same(exported, tiny_data, tmp_path):
    """The small distribution, built and unpacked elsewhere, where PyTorch and its like cannot be imported."""
    run, _ = exported
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "wheel"]
    subprocess.run([*build, REPOSITORY / "packaging/runtime"], check=True, capture_output=True, timeout=600)
    (wheel,) = (tmp_path / "wheel").glob("blemish_runtime-*.whl")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", tmp_path / "target"]
    subprocess.run([*install, wheel], check=True, capture_output=True, timeout=600)
    program = f"""
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(NOT_NEEDED)}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
sys.path.insert(0, {str(tmp_path / "target")!r})
from pathlib import Path
import blemish
assert Path(blemish.__file__).is_relative_to({str(tmp_path / "target")!r}), blemish.__file__
detector = blemish.load_detector({str(run / "export/model.onnx")!r})
found = {{}}
for path in sorted(Path({str(tiny_data / "test")!r}).rglob("*.png")):
    prediction = detector(path)
    found[str(path)] = [prediction.is_anomalous, prediction.p_value, len(prediction.regions)]
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    detector = blemish.load_detector(run)
    for path, answer in json.loads(done.stdout).items():
        prediction = detector(path)
        assert answer == [prediction.is_anomalous, prediction.p_value, len(prediction.regions)]


NOT_NEEDED = {"torch", "torchvision", "pytorch_lightning", "hydra", "omegaconf", "albumentations", "skimage", "tqdm"}

"""Densities from the command to a detector that is loaded where scikit-learn is not installed."""

import subprocess
import sys

import pytest

from blemish import load_detector

ARGUMENTS = (
    *("backbone=colour_histogram", "backbone.cell=12", "image.size=32"),
    *("synthetic.images=0", "trainer=cpu", "calibration.alpha=0.1", "report.images=2"),
)
KINDS = {
    "isolation_forest": ("model.trees=10",),
    "one_class_svm": ("model.samples=300",),
    "kde": (),
    "pca": (),
}
SCORED = """
import sys
sys.modules["sklearn"] = None  # as if it were not installed
from blemish import load_detector
print(load_detector(sys.argv[1], device="cpu")(sys.argv[2]).score_map.max())
"""


@pytest.fixture
def data(make_mvtec, tmp_path):
    return make_mvtec(tmp_path / "mvtec", train=40, good=2, blob=2)


@pytest.fixture
def train(run_cli, data, tmp_path):
    def run(kind, *overrides):
        arguments = (*ARGUMENTS, *KINDS[kind], *overrides, "data=mvtec", f"data.root={data}")
        return run_cli(["train", f"model={kind}", *arguments, f"out={tmp_path / 'run'}"]), tmp_path / "run"

    return run


def test_a_trained_run_is_loaded_without_scikit_learn(train, data, monkeypatch):
    result, run = train("isolation_forest")
    assert result.code == 0, result.err
    image = sorted(data.glob("test/blob/*.png"))[0]
    wanted = load_detector(run, device="cpu")(image).score_map
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert (load_detector(run, device="cpu")(image).score_map == wanted).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_train_evaluate_and_load_in_a_process_of_its_own(train, data, kind):
    result, run = train(kind)
    assert result.code == 0, result.err
    image = sorted(data.glob("test/blob/*.png"))[0]
    wanted = load_detector(run, device="cpu")(image).score_map.max()
    program = [sys.executable, "-c", SCORED, str(run), str(image)]
    finished = subprocess.run(program, capture_output=True, text=True, encoding="utf-8")
    assert finished.returncode == 0, finished.stderr
    assert float(finished.stdout) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "overrides", "sentence"),
    [
        ("kde", ("score=residual", "residual=l2"), "judges without expecting anything: set score=evidence"),
        ("pca", ("score=evidence",), "EvidenceScore expects a model that judges without saying what it expects"),
        ("kde", ("backbone.cell=36",), "Expected sides of at least 36 pixels"),
    ],
)
def test_mistakes_are_told_before_any_work(train, kind, overrides, sentence):
    result, run = train(kind, *overrides)
    assert result.code == 2
    assert sentence in result.err
    assert not run.exists()

"""Densities from the command to a detector that is loaded where scikit-learn is not installed."""

import json
import subprocess
import sys

import numpy as np
import pytest
from scipy import ndimage
from skimage.color import hsv2rgb, rgb2hsv

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


REGION = (slice(30, 62), slice(40, 72))


def leaf(seed):
    """(96, 96, 3): green that varies in hue, saturation and value, along stripes."""
    rng = np.random.default_rng(seed)
    hue, saturation, value = (ndimage.gaussian_filter(rng.normal(size=(96, 96)), 3) * 3 for _ in range(3))
    stripes = np.sin(np.arange(96) / 3)[None]
    hsv = np.stack([0.33 + 0.02 * hue, 0.6 + 0.04 * saturation, 0.5 + 0.04 * value + 0.08 * stripes], axis=-1)
    return (hsv2rgb(hsv.clip(0, 1)) * 255).round().astype(np.uint8)


def shifted(pixels):
    """Another hue in the region, of the same saturation and value."""
    hsv = rgb2hsv(pixels)
    hsv[(*REGION, 0)] = (hsv[(*REGION, 0)] + 0.25) % 1
    return (hsv2rgb(hsv) * 255).round().astype(np.uint8)


def turned(pixels):
    """The stripes of the region run the other way; its colours are what they were."""
    pixels = pixels.copy()
    pixels[REGION] = pixels[REGION].transpose(1, 0, 2)
    return pixels


@pytest.mark.slow
def test_a_forest_on_colour_finds_a_wrong_colour_and_not_a_wrong_pattern(run_cli, save, tmp_path):
    root = tmp_path / "leaves"
    for number in range(60):
        save(root / f"train/good/{number:03}.png", leaf(number))
    for number in range(20):
        pixels = leaf(1000 + number)
        for kind, changed in (("good", pixels), ("hue", shifted(pixels)), ("pattern", turned(pixels))):
            save(root / f"test/{kind}/{number:03}.png", changed)
    arguments = ("data=mvtec", f"data.root={root}", "trainer=cpu", "calibration.alpha=0.1", "synthetic.images=0")
    words = ("model=isolation_forest", "backbone=colour_histogram", "image.size=96", "report.images=0")
    result = run_cli(["train", *words, *arguments, f"out={tmp_path / 'run'}"])
    assert result.code == 0, result.err
    by_kind = json.loads((tmp_path / "run/metrics.json").read_text())["kinds"]
    found = {kind: by_kind[kind]["image_auroc"] for kind in ("hue", "pattern")}
    assert found["hue"] > 0.99
    assert found["pattern"] < 0.8, "the colours are what they were"

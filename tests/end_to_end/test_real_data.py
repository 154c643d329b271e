"""Real images, where they are at hand: the commands as a user would run them, with bounds that a broken one misses."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

pytestmark = pytest.mark.usefixtures("in_tmp")

DATA = Path(os.environ.get("BLEMISH_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


@pytest.fixture
def data():
    """(name) -> the folder of that data set."""

    def find(name):
        if not (DATA / name).is_dir():
            pytest.skip(f"no data set {name}: set BLEMISH_DATA to the folder that holds it")
        return DATA / name

    return find


@pytest.mark.slow
def test_check_of_dice(data, run_cli):
    result = run_cli(["check", "data=mvtec", f"data.root={data('dice')}"])
    assert "images: 6271" in result.out and "6219 good" in result.out
    assert "128 x 128" in result.out and "Traceback" not in result.err
    problems = [line for line in result.out.splitlines() if line.startswith("problem: ")]
    assert (result.code == 0) == (problems == [])


def deal_anew(dice, folder):
    """The same defects beside defect-free images dealt at random to both parts.

    The test part as it comes is not exchangeable with the training part (`blemish monitor`: Kolmogorov-Smirnov
    p < 1e-6), so a promise for one is none for the other.
    """
    normal = sorted([*(dice / "train/good").iterdir(), *(dice / "test/good").iterdir()])
    random.Random(0).shuffle(normal)
    for part, chosen in (("train/good", normal[:1200]), ("test/good", normal[1200:1500])):
        (folder / part).mkdir(parents=True)
        for number, path in enumerate(chosen):
            (folder / part / f"{number:04}{path.suffix}").symlink_to(path)
    (folder / "test/anomalous").symlink_to(dice / "test/anomalous")
    return folder


@pytest.mark.slow
def test_dice_defects_are_found_and_the_promise_kept(data, run_cli, tmp_path):
    root = deal_anew(data("dice"), tmp_path / "dice")
    settings = ["training.steps=120", "training.steps_per_epoch=60", "training.batch_size=16", "report.images=0"]
    settings += ["trainer=cpu", "calibration.alpha=0.05"]
    result = run_cli(["train", "data=mvtec", f"data.root={root}", "out=run", *settings])
    assert result.code == 0, result.err
    metrics, card = (json.loads((tmp_path / f"run/{name}.json").read_text("utf-8")) for name in ("metrics", "card"))
    assert metrics["overall"]["image_auroc"] > 0.8
    # The exact law of the number of false alarms, whatever the model has learned: outside once in ten thousand draws.
    images, rank, tested = card["images"], card["rank"], metrics["normals"]["images"]
    law = stats.betabinom(tested, images + 1 - rank, rank)
    assert tested == 300
    low, high = law.interval(0.9999)
    assert low <= metrics["normals"]["false_alarms"] <= high


@pytest.mark.slow
def test_magnetic_tile_from_check_to_prediction(data, run_cli, tmp_path):
    root = data("magnetic_tile")
    assert "masks: 392" in run_cli(["check", "data=mvtec", f"data.root={root}"]).out
    settings = ["training.steps=20", "training.steps_per_epoch=10", "trainer=cpu", "model.width=8", "tiling.size=64"]
    settings += ["report.images=100"]
    result = run_cli(["train", "data=mvtec", f"data.root={root}", "out=run", *settings])
    assert result.code == 0, result.err
    metrics = json.loads((tmp_path / "run/metrics.json").read_text(encoding="utf-8"))
    assert metrics["overall"]["images"] == 392 and metrics["normals"]["images"] == 200
    assert metrics["normals"]["false_alarm_rate"] < 0.15
    assert {"blowhole", "break", "crack", "fray", "uneven"} == set(metrics["kinds"])

    result = run_cli(["predict", "run=run", f"input={root / 'test/crack'}", "out=out"])
    assert result.code == 0, result.err
    for path in sorted((root / "test/crack").iterdir())[:5]:
        score_map = np.asarray(Image.open(tmp_path / f"out/maps/{path.stem}.tiff"))
        assert score_map.shape == Image.open(path).size[::-1] and score_map.dtype == np.float32

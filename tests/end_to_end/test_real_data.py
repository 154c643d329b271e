"""Real images, where they are at hand: the commands as a user would run them, with bounds that a broken one misses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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


@pytest.mark.slow
def test_dice_defects_are_found(data, run_cli, tmp_path):
    settings = ["training.steps=120", "training.steps_per_epoch=60", "training.batch_size=16", "report.images=0"]
    settings += ["trainer=cpu", "calibration.alpha=0.05"]
    result = run_cli(["train", "data=mvtec", f"data.root={data('dice')}", "out=run", *settings])
    assert result.code == 0, result.err
    metrics = json.loads((tmp_path / "run/metrics.json").read_text(encoding="utf-8"))
    assert metrics["overall"]["image_auroc"] > 0.8
    low, high = metrics["normals"]["false_alarm_rate_interval_95"]
    assert low <= 0.10 and high >= 0.01


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

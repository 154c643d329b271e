"""CONTRIBUTING's "Add a model in three steps", followed to the letter in a copy of the tree."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_adding_a_model_takes_what_contributing_says(tmp_path):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("## Add a model in three steps")[1].split("\n## ")[0]
    blocks = re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)
    assert [language for language, _ in blocks] == ["python", "yaml", "console"]
    class_file, config_file = re.findall(r"`((?:src|configs)/[\w/]+\.(?:py|yaml))`", section)

    for folder in ("src", "configs", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / class_file).write_text(blocks[0][1], encoding="utf-8")
    (tmp_path / config_file).write_text(blocks[1][1], encoding="utf-8")
    good = tmp_path / "good"
    good.mkdir()
    rng = np.random.default_rng(0)
    for place in range(40):
        Image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8)).save(good / f"{place}.png")

    train, test = blocks[2][1].splitlines()
    small = ["tiling.size=32", "training.steps=2", "training.steps_per_epoch=2", "out=run"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "src")}
    python = [sys.executable, "-m"]
    for command in (
        [*python, *train.replace("DIR", str(good)).split(), *small],
        [*python, *test.split(), "-q", "-k", "blur"],
    ):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "card.json").is_file()
    assert "passed" in done.stdout

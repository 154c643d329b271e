"""The wheel alone, installed elsewhere, is a working program: settings included, nothing taken from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*command, **keywords):
    result = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, encoding="utf-8", timeout=600, **keywords
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", folder, cwd=REPOSITORY)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """(arguments) -> stdout of the installed command, run far from the checkout."""
    target, elsewhere = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("elsewhere")
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel)
    environment = {**os.environ, "PYTHONPATH": str(target)}

    def call(*arguments):
        launch = "import sys; from blemish.cli import main; main(sys.argv[1:])"
        return run("-c", launch, *arguments, cwd=elsewhere, env=environment)

    place = run("-c", "import blemish; print(blemish.__file__)", cwd=elsewhere, env=environment)
    assert Path(place.strip()).is_relative_to(target)
    return call


def test_wheel_ships_the_package_and_its_settings_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"blemish"}
    for path in REPOSITORY.glob("configs/**/*.yaml"):
        assert f"blemish/{path.relative_to(REPOSITORY)}" in names
    for path in REPOSITORY.glob("src/blemish/**/*.py"):
        assert str(path.relative_to(REPOSITORY / "src")) in names
    assert not [name for name in names if "test" in name or name.endswith(".pyc")]


def test_installed_command_trains_and_predicts(installed, tiny_data, tiny, tmp_path):
    assert "blemish VERB" in installed("--help")
    assert "Settings" in installed("train", "--help")
    assert "no problem found" in installed("check", "data=mvtec", f"data.root={tiny_data}")
    installed("train", "data=mvtec", f"data.root={tiny_data}", f"out={tmp_path / 'run'}", *tiny)
    installed("predict", f"run={tmp_path / 'run'}", f"input={tiny_data / 'test'}", f"out={tmp_path / 'out'}")
    assert len((tmp_path / "out/predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 13

"""Tiny generated data sets in each layout, one trained run that tests share, and the command, called in-process."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

# One thread is the fastest for tiny models, here and in the processes that tests start; set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHAPE = (40, 48)
BLOB = (slice(12, 22), slice(20, 30))
TINY = (
    "model=conv_ae",
    "corruption=coarse_noise",
    "score=residual",
    "training.steps=4",
    "training.steps_per_epoch=2",
    "training.batch_size=4",
    "image.square=null",  # nothing is resized
    "tiling.size=32",
    "tiling.standardise=false",
    "model.width=4",
    "model.depth=2",
    "model.latent_dim=4",
    "trainer=cpu",
    "calibration.alpha=0.1",
)
LAUNCH = "import sys; from blemish.cli import main; main(sys.argv[1:])"


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def sentences(self) -> list[str]:
        """The lines of stderr that speak to the user; a progress bar's carriage returns end lines, too."""
        return [line for line in self.err.splitlines() if line.startswith("blemish: ")]


def _texture(seed: int, shape: tuple[int, int] = SHAPE) -> Any:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 3)
    return (110 + 12 * noise / noise.std()).clip(0, 255).astype(np.uint8)


def _save(path: Path, pixels: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def _make_mvtec(root: Path, train: int = 60, good: int = 8, blob: int = 5) -> Path:
    for number in range(train):
        _save(root / f"train/good/{number:03d}.png", _texture(number))
    for number in range(good):
        _save(root / f"test/good/{number:03d}.png", _texture(1000 + number))
    for number in range(blob):
        pixels, mask = _texture(2000 + number), np.zeros(SHAPE, np.uint8)
        pixels[BLOB], mask[BLOB] = 240, 255
        _save(root / f"test/blob/{number:03d}.png", pixels)
        _save(root / f"ground_truth/blob/{number:03d}_mask.png", mask)
    return root


def _run_cli(arguments: Sequence[object]) -> Result:
    from blemish.cli import main

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main([str(word) for word in arguments])
    return Result(int(ended.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """Settings that make a training take a moment."""
    return TINY


@pytest.fixture(scope="session")
def texture() -> Callable[..., Any]:
    """(seed, shape) -> (H, W) uint8, smooth and grey."""
    return _texture


@pytest.fixture(scope="session")
def save() -> Callable[[Path, Any], Path]:
    """Write pixels to a path, folders included."""
    return _save


@pytest.fixture(scope="session")
def make_mvtec() -> Callable[..., Path]:
    """(root, train, good, blob) -> root, in the MVTec AD layout."""
    return _make_mvtec


@pytest.fixture(scope="session")
def assert_same_rows() -> Callable[[Sequence[dict[str, Any]], Sequence[dict[str, Any]]], None]:
    """Rows of predictions, but for the time taken and the last bits of a score.

    Some processors add up the layers of a tile that is alone in its batch in another order than among others.
    """

    def check(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> None:
        loose = ("image_score", "seconds")
        exact = [[{k: v for k, v in row.items() if k not in loose} for row in table] for table in (rows, others)]
        assert exact[0] == exact[1]
        assert [row["image_score"] for row in rows] == pytest.approx([row["image_score"] for row in others], rel=1e-5)

    return check


@pytest.fixture(scope="session")
def run_cli() -> Callable[[Sequence[object]], Result]:
    """The command in this process: arguments -> (exit code, stdout, stderr)."""
    return _run_cli


@pytest.fixture(scope="session")
def spawn_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command in a process of its own: (arguments, code to start it with, keywords of subprocess.run)."""

    def spawn(arguments: Sequence[object], code: str = LAUNCH, **keywords: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=600, **keywords)

    return spawn


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a temporary folder, where default outputs (`runs/...`) land."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def normal_folder(tmp_path: Path) -> Path:
    """60 defect-free images in one folder."""
    for number in range(60):
        _save(tmp_path / f"normal/{number:03d}.png", _texture(number))
    return tmp_path / "normal"


@pytest.fixture
def mvtec_root(tmp_path: Path) -> Path:
    """The MVTec AD layout: 60 training images, 8 good and 5 defective test images with masks."""
    return _make_mvtec(tmp_path / "mvtec")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tiny_run` was trained on; read only."""
    return _make_mvtec(tmp_path_factory.mktemp("data") / "mvtec")


@pytest.fixture(scope="session")
def tiny_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained, calibrated and evaluated run; read only."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    result = _run_cli(["train", "data=mvtec", f"data.root={tiny_data}", f"out={run}", *TINY])
    assert result.code == 0, result.err
    return run


@pytest.fixture
def run_copy(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_run` to write to."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


@pytest.fixture
def read_only_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that may not be written to."""
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        folder.chmod(0o700)
        pytest.skip("this user may write everywhere")
    yield folder
    folder.chmod(0o700)

"""Every part does on a device what it does on the CPU; a pretended device, where there is no GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

from blemish.settings import config_folder

HERE = Path(__file__).parent
GROUPS = "model", "score", "residual", "corruption"
PARTS = [f"{group}={file.stem}" for group in GROUPS for file in sorted((config_folder() / group).glob("*.yaml"))]
FIRST = (  # one of each kind, and what trains by default
    *("model=repair_ae", "model=feature_ae", "model=place_nearest", "model=student", "model=siamese"),
    *("score=repair", "score=residual", "residual=l1_ssim", "residual=gradient", "corruption=structured"),
)


def run_apart(*words):
    """Python in a process of its own, which pretends to have a device; the test is skipped where it cannot."""
    command = [sys.executable, "-W", "ignore", *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE)
    if "cannot have a device made in Python" in ended.stderr:
        pytest.skip(ended.stderr.splitlines()[-1])
    return ended


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(FIRST, id="first"),
        pytest.param(sorted({*PARTS} - {*FIRST}), id="others", marks=pytest.mark.slow),
    ],
)
def test_what_the_cpu_does_a_device_does(parts):
    ended = run_apart("on_a_device.py", *parts)
    said = dict(line.split(": ", 1) for line in ended.stdout.splitlines())
    assert said.keys() == set(parts), ended.stderr[-2000:]
    wrong = [f"{part}: {what}" for part, what in said.items() if what != "fine" and not what.startswith("needs")]
    assert not wrong, "\n".join([*wrong, ended.stderr[-2000:]])


def test_the_pretended_device_refuses_what_a_gpu_refuses():
    """Or the test above could not fail."""
    code = (
        "import pretended_device, torch\n"
        "here = torch.ones(2); there = here.to(pretended_device.NAME)\n"
        "for mix in (lambda: here + there, lambda: torch.cat([there, here]), lambda: there.numpy(),"
        " lambda: here[torch.tensor([0]).to(pretended_device.NAME)],"
        " lambda: there.__setitem__(torch.tensor([0, 1]), here),"
        " lambda: torch.rand(2, device=pretended_device.NAME, generator=torch.Generator())):\n"
        "    try: mix()\n"
        "    except (RuntimeError, TypeError): print('refused')\n"
        "    else: print('taken')\n"
        "print((there * 3).cpu().tolist())"
    )
    ended = run_apart("-c", code)
    assert ended.stdout.split("\n")[:-1] == ["refused"] * 6 + ["[3.0, 3.0]"], ended.stderr

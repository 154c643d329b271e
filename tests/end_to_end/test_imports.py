"""What a command imports, which is what its start costs: modules are counted, as seconds depend on the machine."""

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "pytorch_lightning", "albumentations", "hydra", "cv2", "scipy", "numpy", "PIL"}
LIST = """
import json, sys
from blemish.cli import main
try:
    code = main(sys.argv[1:])
finally:
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@pytest.mark.parametrize(
    ("command", "allowed"),
    [
        (["--help"], set()),
        (["--version"], set()),
        (["check", "data.root={data}"], {"hydra", "cv2", "scipy", "numpy", "PIL"}),
    ],
    ids=["help", "version", "check"],
)
def test_a_command_imports_no_more_than_it_needs(command, allowed, tiny_data, in_tmp):
    words = [word.format(data=tiny_data / "train/good") for word in command]
    done = subprocess.run([sys.executable, "-c", LIST, *words], capture_output=True, text=True)
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert "blemish" in imported
    assert not (HEAVY & imported) - allowed

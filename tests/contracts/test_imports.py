"""The rules of the house over imports, read from the source."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import blemish

ROOT = Path(blemish.__file__).parent
REPOSITORY = Path(__file__).resolve().parents[2]
FILES = sorted(ROOT.rglob("*.py"))


def imported_by(file):
    """Every module and name that a file imports, wherever in the file, as dotted paths."""
    package = ("blemish", *file.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (above, node.module) if part)
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


IMPORTS = {file.relative_to(ROOT).as_posix(): imported_by(file) for file in FILES}


def importers_of(package):
    return {name for name, found in IMPORTS.items() if any(f"{path}.".startswith(f"{package}.") for path in found)}


def within(folder):
    return {name for name in IMPORTS if name.startswith(f"{folder}/")}


def test_the_source_is_read():
    assert {"detector.py", "cli.py", "data/augment.py", "models/contracts.py", "training/task.py"} <= IMPORTS.keys()
    assert "blemish.calibration.Calibration" in IMPORTS["detector.py"]
    assert "hydra" in IMPORTS["settings.py"]


def test_data_does_not_import_models():
    assert importers_of("blemish.models") & within("data") == set()


def test_models_do_not_import_data():
    assert importers_of("blemish.data") & within("models") == set()


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning", "hydra", "albumentations", "torch"])
def test_detector_imports_none_of(package):
    assert "detector.py" not in importers_of(package)


def test_only_settings_and_command_line_import_hydra():
    assert importers_of("hydra") == {"cli.py", "settings.py"}


def test_only_training_and_the_data_module_import_lightning():
    allowed = within("training") | {"data/datamodule.py"}
    importers = importers_of("pytorch_lightning") | importers_of("lightning")
    assert importers
    assert importers <= allowed


def test_only_augment_imports_albumentations():
    assert importers_of("albumentations") == {"data/augment.py"}


@pytest.mark.parametrize("package", ["pickle.load", "urllib", "requests", "http", "socket", "ftplib", "httpx"])
def test_nothing_imports_a_way_to_the_network_or_to_pickled_code(package):
    assert importers_of(package) == set()


def test_no_file_is_called_utils():
    vague = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
    assert [name for name in IMPORTS if Path(name).name in vague] == []


def test_packages_are_two_levels_deep_at_most():
    assert [name for name in IMPORTS if len(Path(name).parts) > 2] == []


def run_python(program):
    """The JSON that a program prints in a fresh interpreter."""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def loaded_after(statement):
    names = run_python(f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))")
    return {name.partition(".")[0] for name in names}


HEAVY = {"torch", "hydra", "omegaconf", "pytorch_lightning", "albumentations", "cv2", "scipy"}


@pytest.mark.parametrize("module", ["blemish", "blemish.cli"])
def test_the_command_starts_light(module):
    loaded = loaded_after(f"import {module}")
    assert "blemish" in loaded
    assert loaded & HEAVY == set()


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_and_version_load_nothing_heavy(word):
    assert loaded_after(run_of(word)) & (HEAVY | {"numpy", "PIL"}) == set()


def test_check_runs_without_torch(tiny_data):
    loaded = loaded_after(run_of("check", f"data.root={tiny_data / 'train/good'}"))
    assert {"hydra", "cv2"} <= loaded
    assert loaded & {"torch", "pytorch_lightning", "albumentations"} == set()


def run_of(*words):
    """A statement that runs the command, up to where it would exit."""
    return f"from contextlib import suppress\nfrom blemish.cli import main\nwith suppress(SystemExit): main({words!r})"


def test_public_names_come_on_first_use():
    from blemish import detector, loading

    assert blemish.Detector is detector.Detector
    assert blemish.Prediction is detector.Prediction
    assert blemish.load_detector is loading.load_detector
    assert all(hasattr(blemish, name) for name in blemish.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Detektor'"):
        _ = blemish.Detektor


def test_all_but_the_tile_scorer_runs_without_torch():
    modules = ["detector", "tiling", "calibration", "preprocess", "postprocess", "pictures", "outputs", "pipeline"]
    modules += [
        "ensemble",
        "loading",
        "engines.load",
        "export.parity",
        "data.images",
        "data.records",
        "data.splits",
        "data.check",
        "evaluation.metrics",
    ]
    loaded = loaded_after("import " + ", ".join(f"blemish.{module}" for module in modules))
    assert loaded & {"torch", "hydra", "pytorch_lightning", "albumentations"} == set()


def reached_from(module):
    """The files that importing `blemish.module` may come to, lazy imports included, less those that need a run."""
    found, waiting = set(), [module]
    while waiting:
        path = waiting.pop().replace(".", "/")
        for name in (f"{path}.py", f"{path}/__init__.py"):
            if name in IMPORTS and name not in found | {"checkpoint.py"}:
                found.add(name)
                waiting += [word.removeprefix("blemish.") for word in IMPORTS[name] if word.startswith("blemish.")]
                waiting += [path.rpartition("/")[0].replace("/", ".")] if "/" in path else []
    return found


def test_the_runtime_has_what_an_exported_file_needs_and_nothing_else():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and later have it")
    runtime = tomllib.loads((REPOSITORY / "packaging/runtime/pyproject.toml").read_text(encoding="utf-8"))
    whole = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    shipped = set()
    for source, target in runtime["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"].items():
        assert source == f"../../src/{target}"
        name = target.removeprefix("blemish/")
        shipped |= {name} if name.endswith(".py") else within(name)
    assert shipped == reached_from("loading") | {"__init__.py"}
    own, all_of_them = (set(one["project"]["dependencies"]) for one in (runtime, whole))
    assert own - all_of_them == {need for need in own if need.startswith("onnxruntime")}
    for key in ("version", "license", "requires-python"):
        assert runtime["project"][key] == whole["project"][key]


def test_exported_files_are_read_without_torch_hydra_and_their_like():
    blocked = sorted({"torch", "pytorch_lightning", "hydra", "omegaconf", "albumentations", "torchvision", "tqdm"})
    program = f"""
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
import blemish
from blemish.errors import ExportError
try:
    blemish.load_detector("none.onnx")
except ExportError as error:
    print(json.dumps(str(error)))
"""
    assert "No exported detector found at none.onnx" in run_python(program)


@pytest.mark.slow
def test_no_import_reaches_for_the_network():
    program = """
import importlib, json, pkgutil, sys
reached = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request", "ftplib.connect"):
        reached.append(f"{event} {arguments}")
sys.addaudithook(watch)
import blemish
names = [module.name for module in pkgutil.walk_packages(blemish.__path__, "blemish.")]
for name in names:
    importlib.import_module(name)
print(json.dumps({"names": names, "reached": reached}))
"""
    answer = run_python(program)
    assert "blemish.data.augment" in answer["names"]
    assert answer["reached"] == []

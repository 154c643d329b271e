"""Sweeps: which runs are made, how they go on after a kill, when poor ones stop, and the choice without labels.

Most tests drive the sweep with a training that takes no time; those of the command itself train tiny models.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blemish.errors import BlemishError, ConfigError
from blemish.files import held
from blemish.sweep import Choice, Ending, Interval, SweepSettings, sweep

pytestmark = pytest.mark.usefixtures("in_tmp")

GRID = (Choice("x", ("1", "3")), Choice("y", ("a", "b")))
LINE = (Interval("x", 0.0, 10.0, integer=False, log=False),)
SEARCH = {"sampler": "tpe", "trials": 5, "startup_trials": 2}


def pretend(words, folder, resume, report):
    """A training of three epochs whose figure is x; with KILL=N in the environment, run N kills this process once."""
    if resume:
        words = json.loads((folder / "words.json").read_text())
    settings = dict(word.split("=") for word in words)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "words.json").write_text(json.dumps(words))
    with (folder.parent / f"calls-{folder.name}").open("a") as file:
        file.write("resumed\n" if resume else "started\n")
    x = float(settings["x"])
    if x < 0:
        return Ending(2, "x is negative.")
    for epoch in (1, 2, 3):
        time.sleep(float(settings.get("wait", 0)))
        if report is not None and report(epoch, x):
            return Ending(0, f"stopped after epoch {epoch}", pruned=True)
        (folder / "checkpoints/last.ckpt").write_bytes(b"")
        (folder / "run.json").write_text('{"status": "training"}')
        if epoch == 2 and os.environ.get("KILL") == folder.name and not resume:
            os.kill(os.getpid(), signal.SIGKILL)
    (folder / "run.json").write_text('{"status": "done"}')
    (folder / "figure").write_text(str(x))
    return Ending(0)


def figure(folder, metric):
    assert metric == "synthetic/mean"
    file = folder / "figure"
    return float(file.read_text()) if file.is_file() else None


def run_sweep(folder, space, fixed=(), **settings):
    return sweep(Path(folder), SweepSettings(**settings), list(fixed), space, "synthetic/mean", pretend, figure)


def table(folder):
    return json.loads((Path(folder) / "sweep.json").read_text(encoding="utf-8"))["runs"]


def calls(folder, run):
    return (Path(folder) / f"calls-{run}").read_text().split()


def in_own_process(statement, **environment):
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_sweep import *\n{statement}"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


# --- grids ----------------------------------------------------------------------------------------------------


def test_grid_makes_every_combination_and_names_the_best(capsys):
    assert run_sweep("out", GRID, ["wait=0"], sampler="grid") == 0
    rows = table("out")
    assert [row["overrides"] for row in rows] == [["x=1", "y=a"], ["x=1", "y=b"], ["x=3", "y=a"], ["x=3", "y=b"]]
    assert [row["figure"] for row in rows] == [1, 1, 3, 3] and {row["status"] for row in rows} == {"done"}
    assert json.loads(Path("out/0/words.json").read_text()) == ["wait=0", "x=1", "y=a"]
    said = capsys.readouterr().out
    assert "best: run 2, synthetic/mean 3.0000: x=3 y=a" in said
    assert "blemish predict run=out/2 input=DIR out=OUT" in said


def test_one_failed_run_ends_that_run_only_and_is_tried_again(capsys):
    space = (Choice("x", ("-1", "2")),)
    assert run_sweep("out", space, sampler="grid") == 2
    assert [(row["status"], row["note"]) for row in table("out")] == [("failed", "x is negative."), ("done", "")]
    assert run_sweep("out", space, sampler="grid") == 2
    assert calls("out", 0) == ["started"] * 2 and calls("out", 1) == ["started"]


def test_killed_grid_goes_on_with_the_interrupted_run():
    statement = "run_sweep('out', GRID, sampler='grid')"
    killed = in_own_process(statement, KILL="1")
    assert killed.returncode == -signal.SIGKILL
    assert [row["status"] for row in table("out")] == ["done", "running"]
    finished = in_own_process(statement, KILL="1")
    assert finished.returncode == 0, finished.stderr
    assert "1 of its runs are done" in finished.stdout and "4 done" in finished.stdout
    assert [calls("out", run) for run in range(4)] == [["started"], ["started", "resumed"], ["started"], ["started"]]


def test_folder_of_something_else_is_left_alone():
    run_sweep("out", GRID, sampler="grid")
    with pytest.raises(ConfigError, match="holds a sweep with other space"):
        run_sweep("out", GRID[:1], sampler="grid")
    with pytest.raises(ConfigError, match="holds a sweep with other settings"):
        run_sweep("out", GRID, ["wait=1"], sampler="grid")
    Path("busy").mkdir()
    Path("busy/file").touch()
    with pytest.raises(ConfigError, match="exists and is not empty"):
        run_sweep("busy", GRID, sampler="grid")
    assert [path.name for path in Path("busy").iterdir()] == ["file"]


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be held")
def test_two_sweeps_do_not_work_in_one_folder():
    with (
        held(Path("out"), "taken by the test"),
        pytest.raises(BlemishError, match=r"Another .* works in out"),
    ):
        run_sweep("out", GRID, sampler="grid")


# --- searches -------------------------------------------------------------------------------------------------


def test_search_is_seeded_and_finds_the_better_end():
    optuna = pytest.importorskip("optuna")
    for name in ("one", "two"):
        assert run_sweep(name, LINE, sampler="tpe", trials=7, startup_trials=3) == 0
    assert table("one") == table("two")
    assert max(row["figure"] for row in table("one")) > 7
    assert optuna.load_study(study_name="sweep", storage="sqlite:///one/study.db").best_value > 7


@pytest.mark.slow
def test_a_killed_search_asks_what_an_uninterrupted_one_asks():
    pytest.importorskip("optuna")
    statement = "run_sweep('out', LINE, **SEARCH)"
    killed = in_own_process(statement, KILL="3")
    assert killed.returncode == -signal.SIGKILL
    assert [row["status"] for row in table("out")] == ["done"] * 3 + ["running"]
    finished = in_own_process(statement, KILL="3")
    assert finished.returncode == 0, finished.stderr
    assert "3 of its runs are done" in finished.stdout and "5 runs: 5 done" in finished.stdout
    assert calls("out", 3) == ["started", "resumed"] and calls("out", 0) == ["started"]
    run_sweep("whole", LINE, **SEARCH)
    assert table("out") == table("whole")
    with sqlite3.connect("out/study.db") as study:
        assert study.execute("select count(*) from trials where state = 'COMPLETE'").fetchone() == (5,)


def test_a_kill_between_the_table_and_the_study_loses_no_run():
    pytest.importorskip("optuna")
    run_sweep("whole", LINE, **SEARCH)
    run_sweep("out", LINE, **SEARCH | {"trials": 2})
    with sqlite3.connect("out/study.db") as study:  # as if the second run had been written to the table alone
        study.execute("delete from trial_values where trial_id = 2")
        study.execute("update trials set state = 'RUNNING', datetime_complete = null where trial_id = 2")
    run_sweep("out", LINE, **SEARCH)
    assert table("out") == table("whole") and calls("out", 1) == ["started"]


@pytest.mark.parametrize("written", [0, 1, 2])
@pytest.mark.parametrize("number", [1, 3], ids=["random", "modelled"])  # SEARCH starts with two random trials
def test_a_kill_between_two_values_of_a_trial_changes_nothing(number, written):
    pytest.importorskip("optuna")
    space = (*LINE, Interval("rate", 1e-4, 1.0, integer=False, log=True), Interval("steps", 1, 900, True, log=False))
    run_sweep("whole", space, **SEARCH)
    run_sweep("out", space, **SEARCH | {"trials": number + 1})
    with sqlite3.connect("out/study.db") as study:  # as if the last trial had been killed while it drew its values
        trial = number + 1
        study.execute("delete from trial_values where trial_id = ?", (trial,))
        study.execute("update trials set state = 'RUNNING', datetime_complete = null where trial_id = ?", (trial,))
        drawn = study.execute("select param_name from trial_params where trial_id = ? order by param_id", (trial,))
        names = [name for (name,) in drawn]
        assert len(names) == 3
        for name in names[written:]:
            study.execute("delete from trial_params where trial_id = ? and param_name = ?", (trial, name))
    Path("out/sweep.json").write_text(json.dumps(forget(Path("out/sweep.json"), str(number))))
    run_sweep("out", space, **SEARCH)
    assert table("out") == table("whole")


def forget(file, run):
    content = json.loads(file.read_text(encoding="utf-8"))
    return content | {"runs": [row for row in content["runs"] if row["run"] != run]}


def test_finished_search_goes_on_with_more_trials():
    pytest.importorskip("optuna")
    run_sweep("out", LINE, sampler="tpe", trials=2)
    run_sweep("out", LINE, sampler="tpe", trials=3)
    assert len(table("out")) == 3 and calls("out", 0) == ["started"]


def test_poor_runs_stop_early_once_others_have_finished(capsys):
    pytest.importorskip("optuna")
    assert run_sweep("out", LINE, **SEARCH | {"trials": 7}, prune=True, warmup_epochs=1) == 0
    rows = table("out")
    states = [row["status"] for row in rows]
    assert set(states) == {"done", "pruned"} and states[:2] == ["done", "done"]
    best = max(row["figure"] for row in rows if row["status"] == "done")
    for row in rows:
        if row["status"] == "pruned":
            assert row["note"] == "stopped after epoch 2" and row["figure"] is None
            assert float(row["overrides"][0].removeprefix("x=")) < best
    assert "stopped early: others did better" in capsys.readouterr().out


def test_equal_settings_are_not_trained_twice():
    pytest.importorskip("optuna")
    run_sweep("out", (Choice("x", ("1", "2")),), sampler="tpe", trials=4)
    rows = table("out")
    assert sorted(row["status"] for row in rows) == ["done"] * 2 + ["repeated"] * 2
    assert len(list(Path("out").glob("calls-*"))) == 2
    assert all("same as run" in row["note"] for row in rows if row["status"] == "repeated")


def test_integer_and_logarithmic_intervals_stay_inside():
    pytest.importorskip("optuna")
    space = (Interval("x", 2, 4, integer=True, log=False), Interval("y", 1e-4, 1e-2, integer=False, log=True))
    run_sweep("out", space, sampler="tpe", trials=5)
    for row in table("out"):
        x, y = (word.partition("=")[2] for word in row["overrides"])
        assert x in ("2", "3", "4") and 1e-4 <= float(y) <= 1e-2


# --- several at a time ----------------------------------------------------------------------------------------


def test_several_runs_at_a_time_have_a_process_and_a_log_each(capsys):
    space = (Choice("x", ("1", "-1", "3")),)
    assert run_sweep("out", space, sampler="grid", jobs=2) == 2
    assert [row["status"] for row in table("out")] == ["done", "failed", "done"]
    assert all(Path(f"out/{run}/log.txt").is_file() for run in range(3))
    err = capsys.readouterr().err
    assert "blemish: run 1: x is negative. (all it said: out/1/log.txt)" in err


def test_a_run_whose_process_dies_is_a_failed_one(monkeypatch):
    monkeypatch.setenv("KILL", "0")
    assert run_sweep("out", (Choice("x", ("1", "2")),), sampler="grid", jobs=2) == 70
    assert [(row["status"], row["note"]) for row in table("out")] == [
        ("failed", "its process ended with exit code -9"),
        ("done", ""),
    ]


@pytest.mark.slow
def test_poor_runs_stop_early_in_processes_of_their_own():
    pytest.importorskip("optuna")
    run_sweep("out", LINE, **SEARCH, prune=True, jobs=2)
    assert {row["status"] for row in table("out")} == {"done", "pruned"}


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("how", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_interrupted_sweep_leaves_no_process_behind(how):
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_sweep import *\n"
    code += "run_sweep('out', GRID, ['wait=600'], sampler='grid', jobs=2)"
    driver = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (Path("out/calls-0").exists() and Path("out/calls-1").exists()):
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.05)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(driver.pid)], capture_output=True, text=True)
    pids = [int(pid) for pid in children.stdout.split()]
    assert len(pids) >= 2
    driver.send_signal(how)
    said = driver.communicate(timeout=60)[1].decode()
    assert how == signal.SIGKILL or "the same command with out=out goes on" in said
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a run lives on"
        time.sleep(0.05)


# --- the command ----------------------------------------------------------------------------------------------


def test_training_measures_on_validation_images_alone(run_cli, tiny_data, tiny, monkeypatch, tmp_path):
    from blemish.evaluation import synthetic

    read = set()
    original = synthetic.read_pixels
    monkeypatch.setattr(synthetic, "read_pixels", lambda path: read.add(str(path)) or original(path))
    words = ["train", "data=mvtec", f"data.root={tiny_data}", "out=run", *tiny, "training.steps=2", "report.images=0"]
    result = run_cli(words)
    assert result.code == 0, result.err
    with (tmp_path / "run/splits.csv").open(newline="", encoding="utf-8") as file:
        held_out = {row["path"] for row in csv.DictReader(file) if row["split"] == "validation"}
    assert read == held_out
    content = json.loads((tmp_path / "run/synthetic.json").read_text(encoding="utf-8"))
    assert 0 <= content["image_auroc"] <= 1 and content["images"] == 6
    assert "synthetic defects on 6 validation images (no labels used): image AUROC" in result.out
    compared = run_cli(["compare", "."])
    assert "synthetic_mean" in compared.out and f"{content['mean']:.4f}" in compared.out


def test_run_that_is_told_to_stop_stops(tiny_data, tiny, tmp_path, capfd):
    from blemish.cli import train_one

    told = []
    words = ["data=mvtec", f"data.root={tiny_data}", *tiny]
    ending = train_one(words, tmp_path / "run", False, lambda epoch, figure: told.append((epoch, figure)) or epoch == 1)
    assert ending.pruned and ending.code == 0 and "epoch 1" in ending.sentence
    assert len(told) == 1 and 0 <= told[0][1] <= 1
    assert json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))["status"] == "pruned"
    assert not (tmp_path / "run/detector.pt").exists() and "blemish:" not in capfd.readouterr().err


@pytest.mark.slow
def test_search_by_command(run_cli, normal_folder, tiny, tmp_path):
    pytest.importorskip("optuna")
    words = ["train", "--multirun", "sweep=optuna", "sweep.trials=2", f"data.root={normal_folder}", "out=found"]
    vary = ["training.learning_rate=tag(log,interval(1e-4,1e-2))", "model.latent_dim=interval(2,6)"]
    result = run_cli([*words, *vary, *[word for word in tiny if "latent" not in word], "training.steps=2"])
    assert result.code == 0, result.err
    rows = table("found")
    assert [row["status"] for row in rows] == ["done", "done"]
    for row in rows:
        about = json.loads((tmp_path / f"found/{row['run']}/run.json").read_text(encoding="utf-8"))
        assert set(row["overrides"]) <= set(about["overrides"]) and "sweep.trials=2" not in about["overrides"]
        content = json.loads((tmp_path / f"found/{row['run']}/synthetic.json").read_text(encoding="utf-8"))
        assert row["figure"] == content["mean"]
    assert "best: run" in result.out


BAD = [
    ("--multirun sweep=optuna sweep.trials=0 model.width=4,8", "Expected sweep.trials >= 1, found 0"),
    ("--multirun sweep.jobs=0 model.width=4,8", "Expected sweep.jobs >= 1, found 0"),
    ("--multirun sweep=optun model.width=4,8", "There is no sweep 'optun': did you mean 'optuna'?"),
    ("--multirun sweep.trials=3 model.width=4,8", "no setting 'sweep.trials'"),
    ("--multirun sweep=optuna", "has nothing to vary"),
    ("--multirun model.width=interval(4,8)", "A grid cannot enumerate the interval of model.width"),
    ("--multirun sweep=optuna model.width=interval(8,4)", "from a smaller to a larger number"),
    ("--multirun sweep=optuna model.width=interval(4.5,8)", "model.width expects whole numbers"),
    ("--multirun sweep=optuna training.weight_decay=tag(log,interval(0,1))", "above 0"),
    ("--multirun sweep=grid,optuna model.width=4,8", "sweep takes one"),
    ("--multirun optimized_metric=image_auroc model.width=4,8", "labelled test images are not offered"),
    ("--multirun sweep=optuna synthetic.images=0 model.width=4,8", "set synthetic.images above 0"),
    ("--multirun resume=somewhere model.width=4,8", "a sweep goes on when its command is given again"),
    ("sweep=optuna", "add --multirun"),
    ("synthetic.images=-1", "Expected synthetic.images >= 0, found -1"),
    ("optimized_metric=metrics/image_auroc", "labelled test images are not offered"),
]


@pytest.mark.parametrize(("words", "sentence"), BAD)
def test_mistakes_are_one_sentence(run_cli, normal_folder, tiny, tmp_path, words, sentence):
    few = [word for word in tiny if not word.startswith("model.width")]
    result = run_cli(["train", *words.split(), f"data.root={normal_folder}", "out=never", *few])
    assert result.code == 2 and len(result.sentences) == 1 and sentence in result.sentences[0], result.err
    assert not (tmp_path / "never/0").exists()


def test_optuna_that_is_not_installed_is_named(run_cli, normal_folder, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    result = run_cli(["train", "--multirun", "sweep=optuna", "model.width=4,8", f"data.root={normal_folder}", "out=a"])
    assert result.code == 2 and "pip install 'blemish[sweep]'" in result.sentences[0]
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_real_search_is_killed_and_goes_on_with_several_jobs(spawn_cli, normal_folder, tiny, tmp_path):
    pytest.importorskip("optuna")
    words = ["train", "--multirun", "sweep=optuna", "sweep.trials=3", "sweep.jobs=2", f"data.root={normal_folder}"]
    words += ["training.learning_rate=interval(1e-4,1e-2)", "out=found", *tiny]
    launch = "import sys; from blemish.cli import main; main(sys.argv[1:])"
    driver = subprocess.Popen([sys.executable, "-c", launch, *map(str, words)])
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("found/*/checkpoints/last.ckpt")):
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    time.sleep(5)  # the children end themselves
    finished = spawn_cli(words)
    assert finished.returncode == 0, finished.stderr
    assert "going on with the sweep" in finished.stdout and "3 runs: 3 done" in finished.stdout

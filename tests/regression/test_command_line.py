"""Words on the command line that once led to a traceback or to another run than the one named."""

import shutil
import subprocess
import sys

import pytest
from tqdm import tqdm


def test_folder_named_like_a_number_is_a_path(run_copy, run_cli, tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.move(run_copy, tmp_path / "0")
    assert run_cli(["predict", "run=0", f"input={tiny_data / 'test' / 'blob'}", "out=1_000"]).code == 0
    assert (tmp_path / "1_000" / "predictions.csv").is_file()


def test_results_inside_the_input_are_no_inputs(run_copy, run_cli, tiny_data, tmp_path):
    source = shutil.copytree(tiny_data / "test" / "blob", tmp_path / "in")
    arguments = ["predict", f"run={run_copy}", f"input={source}", f"out={source / 'out'}"]
    assert "5 images" in run_cli(arguments).out
    assert "5 images" in run_cli([*arguments, "overwrite=true"]).out


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("trainer.precision=64-true", "trainer.precision"),
        ("+trainer.max_epochs=3", "trainer.max_epochs is set by blemish"),
        ("trainer.devices=2", "trainer=ddp"),
        ("seed=null", "seed expects a whole number"),
        ("split.calibration=abc", "split.calibration"),
    ],
)
def test_setting_that_cannot_work_is_refused_before_a_run_is_made(
    run_cli, tiny, normal_folder, tmp_path, word, sentence
):
    result = run_cli(["train", f"data.root={normal_folder}", f"out={tmp_path / 'run'}", *tiny, word])
    assert result.code == 2 and len(result.sentences) == 1 and sentence in result.sentences[0]
    assert not (tmp_path / "run").exists()


def test_only_training_sweeps(run_cli):
    result = run_cli(["check", "--multirun", "data.root=a,b"])
    assert result.code == 2 and "Only `blemish train` sweeps" in result.sentences[0]


def test_a_bar_that_was_left_open_does_not_move_the_sentence(run_cli):
    bars = [tqdm(total=3, leave=False), tqdm(total=3)]  # as after an exception whose traceback is still held
    result = run_cli(["predict", "run=missing", "input=missing"])
    assert result.err.splitlines()[-1].startswith("blemish: ")
    assert all(bar.disable for bar in bars)  # closed


def test_output_that_no_one_reads_is_no_mistake(normal_folder):
    command = [sys.executable, "-m", "blemish", "check", f"data.root={normal_folder}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # as `head` does
    said = process.stderr.read()
    assert process.wait() == 141 and "blemish:" not in said and "Traceback" not in said

"""`blemish monitor`: unchanged images pass, changed ones do not, and the journal goes on from call to call."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image

from blemish import load_detector

pytestmark = pytest.mark.usefixtures("in_tmp")


def journal(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def normals(tmp_path, texture, save):
    """Images like those that trained, in folders of two."""
    for number in range(24):
        save(tmp_path / "normals" / f"lot{number // 2:02}" / f"{number:02}.png", texture(5000 + number))
    return tmp_path / "normals"


@pytest.fixture
def changed(normals, tmp_path):
    """The same images under a lamp that burns out their middle."""
    for path in sorted(normals.rglob("*.png")):
        pixels = np.array(Image.open(path))
        pixels[10:30, 12:36] = 255
        (tmp_path / "changed").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "changed" / path.name)
    return tmp_path / "changed"


def test_unchanged_images_hold_and_changed_ones_do_not(run_copy, normals, changed, run_cli):
    held = run_cli(["monitor", f"run={run_copy}", f"input={normals}"])
    assert held.code == 0, held.err
    assert "No evidence that normal images have changed" in held.out
    lines = journal(run_copy / "monitor.jsonl")
    assert len(lines) == 1 + 24
    detector = load_detector(run_copy)
    for line in lines[1:]:
        assert line["score"] == pytest.approx(detector(line["path"]).image_score, rel=1e-5)
    drifted = run_cli(["monitor", f"run={run_copy}", f"input={changed}"])
    assert drifted.code == 3, drifted.out
    assert "The promise no longer holds" in drifted.out
    assert "expect more false alarms" in drifted.out
    assert len(journal(run_copy / "monitor.jsonl")) == 1 + 48


def test_a_second_call_knows_the_images_and_says_the_same(run_copy, normals, run_cli):
    first = run_cli(["monitor", f"run={run_copy}", f"input={normals}", "state=j.jsonl"])
    second = run_cli(["monitor", f"run={run_copy}", f"input={normals}", "state=j.jsonl"])
    assert first.out.splitlines()[1:] == second.out.splitlines()[1:]
    assert "24 different images, 24 of them new; 24 in the journal" in first.out
    assert "24 different images, 0 of them new; 24 in the journal" in second.out


def test_two_halves_give_the_journal_of_the_whole_in_the_order_of_names(run_copy, normals, run_cli, tmp_path):
    words = ["monitor", f"run={run_copy}", "order=name"]
    run_cli([*words, f"input={normals}", "state=whole.jsonl"])
    paths = sorted(str(path) for path in normals.rglob("*.png"))
    for half in (paths[:12], paths[12:]):
        run_cli([*words, f"input=[{','.join(half)}]", "state=halves.jsonl"])
    whole, halves = (journal(tmp_path / name) for name in ("whole.jsonl", "halves.jsonl"))
    assert [line["path"] for line in whole[1:]] == [line["path"] for line in halves[1:]] == paths
    for one, other in zip(whole[1:], halves[1:], strict=True):
        assert one["online_p"] == pytest.approx(other["online_p"], abs=0.05)


def test_images_of_a_folder_are_one_unit_with_the_largest_score(run_copy, normals, run_cli, tmp_path):
    done = run_cli(["monitor", f"run={run_copy}", f"input={normals}", "by_folder=true", "state=lots.jsonl"])
    assert done.code == 0, done.err
    lines = journal(tmp_path / "lots.jsonl")[1:]
    assert len(lines) == 12
    detector = load_detector(run_copy)
    for line in lines:
        scores = [detector(path).image_score for path in (normals / line["path"]).iterdir()]
        assert line["score"] == pytest.approx(max(scores), rel=1e-5)


def test_folder_that_has_changed_is_no_new_unit(run_copy, normals, texture, save, run_cli, tmp_path):
    words = ["monitor", f"run={run_copy}", f"input={normals}", "by_folder=true", "state=lots.jsonl"]
    run_cli(words)
    save(normals / "lot03" / "late.png", texture(7000))
    again = run_cli(words)
    assert again.code == 1
    assert any("lot03 was monitored before with other images" in sentence for sentence in again.sentences)
    assert len(journal(tmp_path / "lots.jsonl")) == 1 + 12
    other = run_cli([*words[:3], "by_folder=false", "state=lots.jsonl"])
    assert other.code == 2 and "lots.jsonl" in other.sentences[0]


def test_images_that_calibrated_are_refused(run_copy, run_cli):
    with (run_copy / "splits.csv").open(newline="", encoding="utf-8") as file:
        own = [row["path"] for row in csv.DictReader(file) if row["split"] == "calibration"]
    done = run_cli(["monitor", f"run={run_copy}", f"input=[{','.join(own)}]"])
    assert done.code == 2 and "took part in training or calibration" in done.sentences[0]
    assert not (run_copy / "monitor.jsonl").exists()


def test_unreadable_image_is_named_and_the_others_go_on(run_copy, normals, run_cli, tmp_path):
    broken = normals / "lot00" / "zz.png"
    broken.write_bytes(b"")
    done = run_cli(["monitor", f"run={run_copy}", f"input={normals}", "state=j.jsonl"])
    assert done.code == 1
    assert any(str(broken) in sentence for sentence in done.sentences)
    assert len(journal(tmp_path / "j.jsonl")) == 1 + 24

"""Results, inputs and recalibrations that once were mixed up, each without a word."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import pytest

from blemish.calibration import Promise
from blemish.errors import ConfigError
from blemish.mask_rules import MaskRule
from blemish.normalisation import SpatialNormalisation

pytestmark = pytest.mark.usefixtures("in_tmp")


def rows_of(out):
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def interrupt(out, keep):
    """Leave what a kill after `keep` images leaves."""
    lines = (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (out / "predictions.jsonl").unlink()
    (out / ".predictions.jsonl.part").write_text("".join(lines[:keep]), encoding="utf-8")


def refused(result, sentence):
    assert result.code == 2 and "Traceback" not in result.err, result.err
    assert len(result.sentences) == 1 and sentence in result.sentences[0], result.sentences


@pytest.fixture
def images(tmp_path, texture, save):
    for number in range(6):
        save(tmp_path / "in" / f"{number}.png", texture(9000 + number))
        save(tmp_path / "others" / f"{number}.png", texture(9100 + number))
    return tmp_path / "in"


@pytest.fixture
def predicted(images, tiny_run, run_cli, tmp_path):
    assert run_cli(["predict", f"run={tiny_run}", "input=in", "out=out"]).code == 0
    return tmp_path / "out"


def test_interrupted_prediction_refuses_other_images(predicted, tiny_run, run_cli):
    interrupt(predicted, 3)
    refused(
        run_cli(["predict", f"run={tiny_run}", "input=others", "out=out"]), "unfinished predictions of other images"
    )


def test_another_spelling_of_the_input_goes_on(predicted, tiny_run, images, run_cli):
    before = [row["path"] for row in rows_of(predicted)]
    interrupt(predicted, 3)
    done = run_cli(["predict", f"run={tiny_run}", f"input={images}", "out=out"])
    assert "6 images (3 of them before the interruption)" in done.out
    assert [row["path"] for row in rows_of(predicted)] == before


def test_results_are_no_inputs(images, tiny_run, run_cli, tmp_path):
    for out in ("in/one", "in/../in/two", "in/one"):
        done = run_cli(["predict", f"run={tiny_run}", "input=in", f"out={out}", "overwrite=true"])
        assert done.code == 0 and "6 images:" in done.out
    assert "6 different images" in run_cli(["monitor", f"run={tiny_run}", "input=in", "state=m.jsonl"]).out
    for out in ("in", "."):
        refused(run_cli(["predict", f"run={tiny_run}", "input=in", f"out={out}"]), "where the results would go")
    refused(run_cli(["predict", f"run={tiny_run}", "input=[in,others]", "out=others"]), "where the results would go")
    assert sorted(path.name for path in images.iterdir()) == [*(f"{number}.png" for number in range(6)), "one", "two"]


def test_overwriting_leaves_nothing_behind(predicted, tiny_run, run_cli):
    assert run_cli(["predict", f"run={tiny_run}", "input=in/0.png", "out=out", "overwrite=true"]).code == 0
    for folder in ("maps", "heatmaps", "masks"):
        assert [path.stem for path in (predicted / folder).iterdir()] == ["0"]


def test_predictions_do_not_go_into_a_run(run_copy, images, run_cli):
    before = (run_copy / "card.json").read_bytes()
    refused(run_cli(["predict", f"run={run_copy}", "input=in", f"out={run_copy}", "overwrite=true"]), "holds a run")
    assert (run_copy / "card.json").read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes are Linux's")
def test_file_names_need_no_encoding(images, tiny_run, run_cli, tmp_path):
    os.rename(os.fsencode(images / "0.png"), os.fsencode(images) + b"/a\xff.png")  # noqa: PTH104
    done = run_cli(["predict", f"run={tiny_run}", "input=in", "out=out"])
    assert done.code == 0, done.err
    assert b"a\xff.png" in (tmp_path / "out" / "predictions.csv").read_bytes()
    assert (tmp_path / "out" / "report.html").is_file()


def test_another_rule_does_not_fall_back_to_the_first_calibration_images(run_copy, texture, save, run_cli, tmp_path):
    for number in range(20):
        save(tmp_path / "new" / f"{number}.png", texture(8000 + number))
    assert run_cli(["calibrate", f"run={run_copy}", "data.root=new"]).code == 0
    card = (run_copy / "card.json").read_bytes()
    refused(run_cli(["calibrate", f"run={run_copy}", "calibration.mask_rule=region"]), "was calibrated on other images")
    assert (run_copy / "card.json").read_bytes() == card
    assert run_cli(["calibrate", f"run={run_copy}", "data.root=new", "calibration.mask_rule=region"]).code == 0
    assert json.loads((run_copy / "card.json").read_text(encoding="utf-8"))["units"] == 20
    refused(run_cli(["report", f"run={run_copy}"]), "run `blemish evaluate` again")


def test_the_report_does_not_tell_of_the_former_calibration(run_copy, run_cli):
    assert run_cli(["report", f"run={run_copy}"]).code == 0
    before = (run_copy / "report.html").read_bytes()
    assert run_cli(["calibrate", f"run={run_copy}", "calibration.alpha=0.2"]).code == 0
    followed = (run_copy / "report.html").read_bytes()
    assert run_cli(["report", f"run={run_copy}"]).code == 0
    assert (run_copy / "report.html").read_bytes() == followed != before
    done = run_cli(["calibrate", f"run={run_copy}", "calibration.mask_rule=region"])
    assert done.code == 0 and f"removed: {run_copy / 'report.html'}" in done.out and "evaluate` again" in done.out
    assert not (run_copy / "report.html").exists()


def test_settings_that_a_rule_ignores_are_refused(run_copy, run_cli):
    refused(run_cli(["calibrate", f"run={run_copy}", "calibration.tau=0.01"]), "for the mask rule area_fraction")
    area = ("calibration.mask_rule=region", "calibration.region_area=100000")
    refused(run_cli(["calibrate", f"run={run_copy}", *area]), "no mask could ever break the rule")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["calibration.mask_rule=parametric_noise"], "choose another mask rule"),
        (["split.validation=0.02"], "two or more validation images, found 1"),
    ],
)
def test_normalisation_that_cannot_work_is_refused_before_training(tiny_data, tiny, words, sentence, run_cli, tmp_path):
    train = ["train", f"data.root={tiny_data / 'train/good'}", "out=run", *tiny, "normalisation.kind=robust", *words]
    refused(run_cli(train), sentence)
    assert not (tmp_path / "run").exists()


def test_rate_that_no_batch_of_this_size_can_reach_is_said(tiny_run, images, run_cli):
    done = run_cli(["predict", f"run={tiny_run}", "input=in", "out=out", "fdr=0.01"])
    assert "none can be called anomalous among 6 images" in done.out


def test_share_of_pixels_is_the_decimal_that_was_written():
    score_map = np.arange(100, dtype=np.float32).reshape(10, 10)
    assert MaskRule("area_fraction", tau=0.29).score(score_map) == 70  # 29 pixels lie above


def test_alpha_too_small_for_any_number_of_images_is_refused():
    with pytest.raises(ConfigError, match="1e-09 or more"):
        Promise(1e-320)


def test_calm_pixel_does_not_dominate_where_most_never_varied():
    maps = [np.zeros((4, 4), np.float32) for _ in range(6)]
    for place, score_map in enumerate(maps):
        score_map[0, 0] = place * 1e-7
    normalise = SpatialNormalisation.fit(maps, "mean_std")
    score_map = np.zeros((4, 4), np.float32)
    score_map[0, 0], score_map[2, 2] = 1e-4, 0.9
    assert normalise(score_map).argmax() == 10

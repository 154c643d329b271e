"""What a review found: ways in which a promise could silently stop being one."""

import json
import math

import pytest
import torch

from blemish.calibration import Calibration, Promise
from blemish.data.records import Record
from blemish.errors import CalibrationError
from blemish.pipeline import normals_to_calibrate
from blemish.seen import Seen


def test_card_survives_another_rounding_of_its_interval():
    calibration = Calibration.fit(range(30), [str(i) for i in range(30)], Promise(0.1), "fingerprint")
    card = json.loads(json.dumps(calibration.to_dict()))
    card["rate_interval_95"][0] = math.nextafter(card["rate_interval_95"][0], 1)
    card["in_words"] = "worded otherwise"
    assert Calibration.from_dict(card) == calibration


def test_damaged_card_can_be_replaced(run_copy, run_cli, normal_folder):
    content = torch.load(run_copy / "detector.pt", weights_only=True)
    content["calibration"]["threshold"] *= 2
    torch.save(content, run_copy / "detector.pt")
    assert "contradicts" in run_cli(["predict", f"run={run_copy}", f"input={normal_folder}"]).sentences[0]
    for path in normal_folder.iterdir():  # one more byte makes it a file that training has not seen
        path.write_bytes(path.read_bytes() + b"\0")
    assert run_cli(["calibrate", f"run={run_copy}", f"data.root={normal_folder}"]).code == 0


@pytest.fixture
def images(tmp_path, save, texture):
    return [save(tmp_path / f"{number}.png", texture(number)) for number in range(4)]


def test_other_pictures_of_a_trained_group_do_not_calibrate(images):
    records = [Record(images[0], group="lot 1"), Record(images[1], group="lot 2")]
    with pytest.raises(CalibrationError, match=r"1 of 2 .* group, took part"):
        normals_to_calibrate(records, Seen(groups=frozenset({"lot 1"})), progress=False)


def test_relatives_of_the_test_part_do_not_calibrate(images):
    records = [
        Record(images[0], group="lot 1", split="test"),
        Record(images[1], group="lot 1"),
        Record(images[2]),
        Record(images[3], split="validation"),
    ]
    assert [item.record.path for item in normals_to_calibrate(records, Seen(), progress=False)] == [images[2]]


def test_resumed_prediction_refuses_another_threshold(run_copy, run_cli, tiny_data, tmp_path):
    arguments = ["predict", f"run={run_copy}", f"input={tiny_data / 'test'}", f"out={tmp_path / 'out'}"]
    assert run_cli(arguments).code == 0
    (tmp_path / "out/predictions.jsonl").rename(tmp_path / "out/.predictions.jsonl.part")
    assert run_cli(["calibrate", f"run={run_copy}", "calibration.alpha=0.3"]).code == 0
    assert run_cli(["calibrate", f"run={run_copy}", "calibration.alpha=0.1"]).code == 0
    made = json.loads((tmp_path / "out/predict.json").read_text())
    made["calibration"]["threshold"] *= 1.01
    (tmp_path / "out/predict.json").write_text(json.dumps(made))
    assert "another detector or calibration" in run_cli(arguments).sentences[0]


def test_compare_says_where_figures_are_of_an_earlier_threshold(run_copy, run_cli):
    assert "evaluate again" not in run_cli(["compare", run_copy.parent]).out
    assert run_cli(["calibrate", f"run={run_copy}", "calibration.alpha=0.5"]).code == 0
    assert "evaluate again" in run_cli(["compare", run_copy.parent]).out
    assert run_cli(["evaluate", f"run={run_copy}"]).code == 0
    assert "evaluate again" not in run_cli(["compare", run_copy.parent]).out

"""scripts/measure_difference.py: what counts as found, by hand; boxes that move with their image."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from blemish.errors import DataError

SCRIPTS = Path(__file__).parents[2] / "scripts"
SHAPE = (60, 80)


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("measure_difference")
    finally:
        sys.path.remove(str(SCRIPTS))


def boxes(*corners):
    return np.array(corners, float).reshape(-1, 4)


def test_a_pair_judged_by_hand(script):
    true = boxes((10, 10, 30, 30), (40, 10, 60, 30), (10, 40, 20, 50))
    found = boxes((16, 16, 24, 24), (24, 24, 28, 28), (42, 12, 60, 30), (70, 50, 74, 54))
    kinds = ["open", "short", "open"]
    counts = script.judged(found, true, kinds, 8, SHAPE)
    expected = {"boxes": 3, "regions": 4, "boxes_hit": 2, "regions_right": 3, "matched": 1, "matched_grown": 2}
    assert {name: counts[name] for name in expected} == expected
    assert (counts["open_boxes"], counts["open_hit"], counts["short_hit"], counts["spur_boxes"]) == (2, 1, 1, 0)
    own = script.figures([counts, counts])
    assert (own["centre_recall"], own["centre_precision"]) == (2 / 3, 3 / 4)
    assert own["tight_f1"] == pytest.approx(2 * (1 / 3) * (1 / 4) / (1 / 3 + 1 / 4))
    assert own["open_recall"] == 0.5 and np.isnan(own["spur_recall"])


@pytest.mark.parametrize(("found", "true"), [((), ()), ((), (1, 1, 9, 9)), ((1, 1, 9, 9), ())])
def test_nothing_found_or_nothing_there(script, found, true):
    counts = script.judged(boxes(*found), boxes(*true), ["open"] * bool(true), 8, SHAPE)
    assert counts["matched"] == counts["boxes_hit"] == counts["regions_right"] == 0
    assert script.figures([counts])["centre_f1"] == 0


def test_each_box_is_taken_once_and_the_best_first(script):
    true = boxes((0, 0, 10, 10), (0, 8, 10, 18))
    assert script.matches(boxes((0, 0, 10, 10), (1, 0, 10, 10)), true[:1]) == 1
    # The second region overlaps both: with the first box it would be better than with the second, which is left to it.
    assert script.matches(boxes((0, 0, 10, 10), (0, 4, 10, 14)), true) == 2


def test_grown_boxes_stay_in_the_image(script):
    np.testing.assert_array_equal(script.grown(boxes((2, 20, 70, 55)), 8, SHAPE), boxes((0, 12, 78, 60)))


def test_boxes_move_with_the_image(script):
    disturbance = script.Disturbance("all", shift=5, turn=2, scale=2)
    rng = np.random.default_rng(1)
    image = np.zeros((120, 140), np.float32)
    image[50:62, 90:110] = 1
    motion = script.draw(disturbance, image.shape, rng)
    seen = script.observe(image, motion, disturbance, rng)[..., 0] > 0.5
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    found, kinds = script.moved(boxes((90, 50, 110, 62)), ["open"], motion, image.shape)
    assert kinds == ["open"]
    np.testing.assert_allclose(found[0], [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], atol=1.6)
    still = script.draw(script.PLAIN, image.shape, rng)
    np.testing.assert_array_equal(script.observe(image, still, script.PLAIN, rng)[..., 0], image)


def test_boxes_that_leave_the_image_are_left_out(script):
    motion = script.Motion.translation(30, 0)  # the query's pixel 0 shows the image's pixel 30
    found, kinds = script.moved(boxes((10, 10, 30, 20), (25, 10, 45, 20)), ["open", "short"], motion, SHAPE)
    assert kinds == ["short"]
    np.testing.assert_array_equal(found, boxes((0, 10, 15, 20)))


def test_missing_boxes_and_missing_pairs_are_said(script, save, tmp_path):
    for folder in ("template", "test"):
        save(tmp_path / folder / "a.png", np.zeros((20, 20), np.uint8))
    with pytest.raises(DataError, match=r"There is no .*boxes/a\.txt"):
        script.read_boards(tmp_path, 0)
    with pytest.raises(DataError, match="lower --skip"):
        script.read_boards(tmp_path, 1)


def test_bounds_of_noise_close_in_on_the_promise(script):
    for pixels in (10_000, 1_000_000):
        fewest, most = script.noise_bounds(0.99, pixels, 0)
        assert fewest < 0.01 * pixels < most
        assert most - fewest < 12 * np.sqrt(0.01 * pixels)

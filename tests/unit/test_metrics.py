"""Evaluation: from predictions and truth to figures."""

import json

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import (
    auc,
    average_precision_score,
    f1_score,
    jaccard_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

from blemish.detector import Prediction
from blemish.evaluation.metrics import Confusion, Evaluation, clopper_pearson

THRESHOLD = 0.5


def predicted(score_map):
    score = float(score_map.max())
    return Prediction(score_map, score, 0.5, score > THRESHOLD, score_map > THRESHOLD, [], THRESHOLD)


def map_of(seed, top, size=(12, 10)):
    """Scores in 64ths, the largest of them `top`, so that binned figures are exact."""
    score_map = np.random.default_rng(seed).integers(8, 25, size).astype(np.float32) / 64
    score_map[2, 3] = top
    return score_map


def defect(seed, size=(12, 10)):
    truth = np.zeros(size, bool)
    truth[1 : 4 + seed % 3, 2:6] = True
    return truth


NORMALS = [map_of(0, 0.375), map_of(1, 0.75), map_of(2, 0.25)]
SCRATCHES = [map_of(3, 0.875), map_of(4, 0.4375)]
DENTS = [map_of(5, 0.625)]


def collected():
    """Three normal images, two scratches with masks, a dent without."""
    evaluation = Evaluation()
    for score_map in NORMALS:
        evaluation.add("good", predicted(score_map), None)
    for seed, score_map in enumerate(SCRATCHES):
        evaluation.add("scratch", predicted(score_map), defect(seed))
    for score_map in DENTS:
        evaluation.add("dent", predicted(score_map), None)
    return evaluation


def evaluated():
    return collected().result()


# --- counts of decisions ------------------------------------------------------------------------------------------


def test_confusion_figures_against_sklearn():
    rng = np.random.default_rng(0)
    truth, found = rng.random(300) < 0.3, rng.random(300) < 0.4
    confusion = Confusion(
        int((truth & found).sum()),
        int((~truth & found).sum()),
        int((truth & ~found).sum()),
        int((~truth & ~found).sum()),
    )
    assert confusion.precision() == pytest.approx(precision_score(truth, found))
    assert confusion.recall() == pytest.approx(recall_score(truth, found))
    assert confusion.f1() == pytest.approx(f1_score(truth, found))
    assert confusion.iou() == pytest.approx(jaccard_score(truth, found))


def test_confusions_add_up():
    assert Confusion(1, 2, 3, 4) + Confusion(10, 20, 30, 40) == Confusion(11, 22, 33, 44)


def test_figures_of_nothing_are_undefined():
    nothing = Confusion(passes=5)
    assert (nothing.precision(), nothing.recall(), nothing.f1(), nothing.iou()) == (None, None, None, None)
    assert Confusion(misses=2).precision() is None
    assert Confusion(misses=2).recall() == 0


# --- confidence intervals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("events", "trials"), [(0, 1), (0, 20), (1, 20), (7, 20), (20, 20), (3, 1000)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_clopper_pearson_against_beta_quantiles(events, trials, level):
    tail = (1 - level) / 2
    low = stats.beta.ppf(tail, events, trials - events + 1) if events else 0.0
    high = stats.beta.ppf(1 - tail, events + 1, trials - events) if events < trials else 1.0
    assert clopper_pearson(events, trials, level) == pytest.approx((low, high), abs=1e-9)


def test_clopper_pearson_is_wide_enough_for_every_rate():
    trials = 15
    intervals = [clopper_pearson(events, trials) for events in range(trials + 1)]
    for rate in np.linspace(0.01, 0.99, 50):
        covered = [low <= rate <= high for low, high in intervals]
        assert stats.binom.pmf(np.flatnonzero(covered), trials, rate).sum() >= 0.95 - 1e-9


# --- evaluation ---------------------------------------------------------------------------------------------------


def test_groups_are_overall_each_defect_and_the_normals():
    assert list(evaluated()) == ["overall", "kinds", "normals"]
    assert list(evaluated()["kinds"]) == ["dent", "scratch"]


def test_counts_of_images_and_masks():
    result = evaluated()
    assert [(figures["images"], figures["masks"]) for figures in (result["overall"], *result["kinds"].values())] == [
        (3, 2),
        (1, 0),
        (2, 2),
    ]
    assert result["overall"]["empty_masks"] == 0


@pytest.mark.parametrize(("name", "defects"), [("overall", SCRATCHES + DENTS), ("scratch", SCRATCHES), ("dent", DENTS)])
def test_image_figures_against_sklearn(name, defects):
    scores = [float(score_map.max()) for score_map in NORMALS + defects]
    labels = [False] * len(NORMALS) + [True] * len(defects)
    found = np.array(scores) > THRESHOLD
    figures = evaluated()[name] if name == "overall" else evaluated()["kinds"][name]
    assert figures["image_auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert figures["image_ap"] == pytest.approx(average_precision_score(labels, scores))
    best = max(f1_score(labels, np.array(scores) >= threshold) for threshold in scores)
    assert figures["image_best_f1_over_thresholds"] == pytest.approx(best)
    assert figures["calibrated"]["image_precision"] == pytest.approx(precision_score(labels, found))
    assert figures["calibrated"]["image_recall"] == pytest.approx(recall_score(labels, found))
    assert figures["calibrated"]["image_f1"] == pytest.approx(f1_score(labels, found))


@pytest.mark.parametrize("name", ["overall", "scratch"])
def test_pixel_figures_against_sklearn_on_images_with_truth(name):
    scores = np.concatenate([score_map.ravel() for score_map in NORMALS + SCRATCHES])
    normal_pixels = np.zeros(sum(score_map.size for score_map in NORMALS), bool)
    truth = np.concatenate([normal_pixels, *(defect(seed).ravel() for seed in range(len(SCRATCHES)))])
    found = scores > THRESHOLD
    figures = evaluated()[name] if name == "overall" else evaluated()["kinds"][name]
    assert figures["pixel_auroc"] == pytest.approx(roc_auc_score(truth, scores))
    assert figures["pixel_ap"] == pytest.approx(average_precision_score(truth, scores))
    assert figures["calibrated"]["pixel_precision"] == pytest.approx(precision_score(truth, found))
    assert figures["calibrated"]["pixel_recall"] == pytest.approx(recall_score(truth, found))
    assert figures["calibrated"]["pixel_dice"] == pytest.approx(f1_score(truth, found))
    assert figures["calibrated"]["pixel_iou"] == pytest.approx(jaccard_score(truth, found))
    assert 0 < figures["aupro_0.05"] < figures["aupro_0.3"] < 1


def test_pixel_figures_need_masks():
    figures = evaluated()["kinds"]["dent"]
    ranked = [figures[key] for key in ("pixel_auroc", "pixel_ap", "aupro_0.3", "aupro_0.05")]
    decided = [figures["calibrated"][f"pixel_{key}"] for key in ("precision", "recall", "dice", "iou")]
    assert ranked + decided == [None] * 8


def test_false_alarms_among_the_normals():
    normals = evaluated()["normals"]
    assert (normals["images"], normals["false_alarms"]) == (3, 1)
    assert normals["false_alarm_rate"] == pytest.approx(1 / 3)
    assert normals["false_alarm_rate_interval_95"] == list(clopper_pearson(1, 3))


def test_without_normals_rates_are_undefined():
    evaluation = Evaluation()
    evaluation.add("scratch", predicted(SCRATCHES[0]), defect(0))
    result = evaluation.result()
    assert result["normals"] == {
        "images": 0,
        "false_alarms": 0,
        "false_alarm_rate": None,
        "false_alarm_rate_interval_95": None,
    }
    assert result["overall"]["image_auroc"] is None
    assert result["overall"]["calibrated"]["image_recall"] == 1
    assert result["overall"]["pixel_auroc"] is not None


def test_without_defects_only_false_alarms_are_defined():
    evaluation = Evaluation()
    for score_map in NORMALS:
        evaluation.add("good", predicted(score_map), None)
    result = evaluation.result()
    assert result["kinds"] == {}
    figures = result["overall"]
    calibrated = figures.pop("calibrated")
    assert {figures.pop(key) for key in ("images", "masks", "empty_masks")} == {0}
    assert set(figures.values()) | set(calibrated.values()) == {None}
    assert result["normals"]["false_alarms"] == 1


def test_nothing_evaluated_is_undefined():
    result = Evaluation().result()
    assert result["normals"]["images"] == result["overall"]["images"] == 0
    assert result["overall"]["image_auroc"] is None


def test_empty_masks_are_counted():
    evaluation = Evaluation()
    evaluation.add("good", predicted(NORMALS[0]), None)
    evaluation.add("scratch", predicted(SCRATCHES[0]), np.zeros((12, 10), bool))
    figures = evaluation.result()["kinds"]["scratch"]
    assert (figures["masks"], figures["empty_masks"]) == (1, 1)
    assert figures["pixel_auroc"] is None
    assert figures["calibrated"]["pixel_dice"] is None


def test_order_of_images_does_not_matter():
    added = [("good", NORMALS[0], None), ("scratch", SCRATCHES[0], defect(0)), ("good", NORMALS[1], None)]
    results = []
    for order in (added, added[::-1]):
        evaluation = Evaluation()
        for kind, score_map, truth in order:
            evaluation.add(kind, predicted(score_map), truth)
        results.append(evaluation.result())
    assert results[0] == results[1]


def test_curves_belong_to_the_figures():
    curves, result = collected().curves(), evaluated()
    assert list(curves["kinds"]) == list(result["kinds"])
    for figures, drawn in (
        (result["overall"], curves["overall"]),
        (result["kinds"]["scratch"], curves["kinds"]["scratch"]),
    ):
        assert set(drawn) == {"image_roc", "pixel_roc", "pro"}
        for name, figure in (("image_roc", "image_auroc"), ("pixel_roc", "pixel_auroc")):
            area = auc(drawn[name]["false_positive_rate"], drawn[name]["true_positive_rate"])
            assert area == pytest.approx(figures[figure], abs=1e-12)
        assert set(drawn["pro"]) == {"false_positive_rate", "overlap"}
    dent = curves["kinds"]["dent"]  # has no mask
    assert dent["image_roc"] and dent["pixel_roc"] is None and dent["pro"] is None
    assert json.loads(json.dumps(curves, allow_nan=False)) == curves


def test_curves_of_nothing_are_none():
    assert Evaluation().curves() == {"overall": {"image_roc": None, "pixel_roc": None, "pro": None}, "kinds": {}}


def test_result_is_strict_json():
    result = evaluated()
    assert json.loads(json.dumps(result, allow_nan=False)) == result

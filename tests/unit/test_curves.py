"""Curves over all thresholds against scikit-learn and brute force."""

from itertools import pairwise

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from blemish.evaluation.curves import PixelCurves, RankCurve

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=60)
# Pixel scores are told apart down to this relative difference.
BIN = 2.0**-14
labelled_scores = st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=2, max_size=60).filter(
    lambda pairs: len({label for _, label in pairs}) == 2
)


def best_f1(scores, labels):
    best = 0.0
    for threshold in np.unique(scores):
        found = scores >= threshold
        best = max(best, 2 * np.sum(found & labels) / (np.sum(found) + np.sum(labels)))
    return best


def assert_agrees(curve, scores, labels, tolerance=1e-12):
    assert curve.auroc() == pytest.approx(roc_auc_score(labels, scores), abs=tolerance)
    assert curve.average_precision() == pytest.approx(average_precision_score(labels, scores), abs=tolerance)
    assert curve.best_f1() == pytest.approx(best_f1(scores, labels), abs=tolerance)


# --- images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rank_curve_against_sklearn(seed, scale):
    rng = np.random.default_rng(seed)
    labels = rng.random(200) < 0.3
    assert_agrees_on(scale * (rng.standard_normal(200) + labels), labels)


def assert_agrees_on(scores, labels):
    assert_agrees(RankCurve.from_scores(scores, labels), scores, labels)


@given(pairs=labelled_scores)
@REPEATABLE
def test_rank_curve_against_sklearn_with_ties(pairs):
    scores, labels = np.array([s for s, _ in pairs], float), np.array([label for _, label in pairs])
    assert_agrees_on(scores, labels)


def test_scores_far_above_one_keep_their_ranks():
    scores = np.array([1e6, 1e6 + 1, 1e6 + 2, 1e6 + 3])
    assert RankCurve.from_scores(scores, [False, False, True, True]).auroc() == 1


def test_best_f1_is_on_the_precision_recall_curve():
    rng = np.random.default_rng(0)
    scores, labels = rng.random(80), rng.random(80) < 0.5
    precision, recall, _ = precision_recall_curve(labels, scores)
    expected = (2 * precision * recall / np.maximum(precision + recall, 1e-12)).max()
    assert RankCurve.from_scores(scores, labels).best_f1() == pytest.approx(expected)


def test_all_tied_is_chance():
    curve = RankCurve.from_scores([3.0] * 10, [True] * 4 + [False] * 6)
    assert curve.auroc() == 0.5
    assert curve.average_precision() == pytest.approx(0.4)


def test_perfect_and_reversed_ranking():
    labels = [False, False, True, True]
    assert RankCurve.from_scores([1, 2, 3, 4], labels).auroc() == 1
    assert RankCurve.from_scores([4, 3, 2, 1], labels).auroc() == 0


@pytest.mark.parametrize("labels", [[], [True, True], [False, False]])
def test_undefined_without_both_kinds(labels):
    curve = RankCurve.from_scores(list(range(len(labels))), labels)
    assert not curve.is_defined
    assert (curve.auroc(), curve.average_precision(), curve.best_f1()) == (None, None, None)


# --- points for drawing -------------------------------------------------------------------------------------------


def area(x, y):
    return auc(x, y)


def assert_is_a_curve(x, y):
    assert (x[0], y[0]) == (0, 0) and x[-1] == pytest.approx(1) and y[-1] == pytest.approx(1)
    assert min(np.diff(x)) >= 0 and min(np.diff(y)) >= 0
    assert len(x) == len(y) <= 302


@given(pairs=labelled_scores)
@REPEATABLE
def test_roc_points_against_sklearn_where_none_is_left_out(pairs):
    scores, labels = np.array([s for s, _ in pairs], float), np.array([label for _, label in pairs])
    points = RankCurve.from_scores(scores, labels).roc()
    x, y = points["false_positive_rate"], points["true_positive_rate"]
    assert_is_a_curve(x, y)
    assert area(x, y) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    expected = {(round(a, 9), round(b, 9)) for a, b in zip(*roc_curve(labels, scores)[:2], strict=True)}
    assert expected <= {(round(a, 9), round(b, 9)) for a, b in zip(x, y, strict=True)}


@pytest.mark.parametrize("shift", [0.0, 0.5, 3.0, 8.0])
@pytest.mark.parametrize("share", [0.5, 0.002])
def test_thinned_roc_keeps_its_area(shift, share):
    rng = np.random.default_rng(0)
    labels = rng.random(20_000) < share
    curve = RankCurve.from_scores(rng.standard_normal(20_000) + shift * labels, labels)
    points = curve.roc()
    assert_is_a_curve(points["false_positive_rate"], points["true_positive_rate"])
    assert area(points["false_positive_rate"], points["true_positive_rate"]) == pytest.approx(curve.auroc(), abs=3e-3)


def test_curves_that_are_undefined_are_none():
    assert RankCurve.from_scores([1, 2], [True, True]).roc() is None
    assert PixelCurves().curve().roc() is None and PixelCurves().pro() is None


# --- pixels -------------------------------------------------------------------------------------------------------


def random_maps(count, seed=0, scale=1.0, size=(40, 33)):
    """Maps whose defects score somewhat higher, as (score map, truth) pairs; the last one has no defect."""
    rng = np.random.default_rng(seed)
    pairs = []
    for index in range(count):
        truth = ndimage.gaussian_filter(rng.random(size), 2) > 0.52
        truth &= index < count - 1
        noise = ndimage.gaussian_filter(rng.random(size), 1)
        pairs.append((np.float32(scale) * (noise + 0.2 * truth).astype(np.float32), truth))
    return pairs


def on_a_grid(pairs):
    """The same maps with scores of few binary digits, which no binning changes."""
    return [(np.round(score_map * 64).astype(np.float32) / 64, truth) for score_map, truth in pairs]


def collected(pairs):
    curves = PixelCurves()
    for score_map, truth in pairs:
        curves.add(score_map, truth)
    return curves


def flattened(pairs):
    return (np.concatenate([part.ravel() for part in parts]) for parts in zip(*pairs, strict=True))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_pixel_curve_against_sklearn(scale):
    pairs = random_maps(3, scale=scale)
    # Only pairs of pixels in one bin can tie wrongly, and no bin holds more than a few of these pixels.
    assert_agrees(collected(pairs).curve(), *flattened(pairs), tolerance=BIN)


def test_pixel_curve_is_exact_for_scores_of_few_digits():
    pairs = on_a_grid(random_maps(3))
    assert_agrees(collected(pairs).curve(), *flattened(pairs))


@pytest.mark.parametrize("score", [1e-11, 1e-3, 0.7, 1.0, 3e5])
def test_scores_further_apart_than_a_bin_are_told_apart(score):
    pair = np.array([[score, score * (1 + 1.01 * BIN)]], np.float32)
    assert collected([(pair, np.array([[False, True]]))]).curve().auroc() == 1


def test_zero_is_the_lowest_score():
    scores = np.array([[0.0, -0.0, 1e-11, 1.0]], np.float32)
    assert collected([(scores, np.array([[False, False, True, True]]))]).curve().auroc() == 1


def test_merging_equals_adding():
    pairs = random_maps(4, seed=3) + random_maps(3, seed=4, scale=50.0)
    merged = PixelCurves()
    for part in (pairs[:3], [], pairs[3:4], pairs[4:]):
        merged.merge(collected(part))
    together = collected(pairs)
    assert merged.curve().auroc() == together.curve().auroc()
    assert merged.curve().average_precision() == together.curve().average_precision()
    assert merged.aupro(0.3) == pytest.approx(together.aupro(0.3), abs=1e-12)


def test_order_of_images_does_not_matter():
    pairs = random_maps(2, scale=1e-4) + random_maps(2, seed=1) + random_maps(2, seed=2, scale=1e4)
    one, other = collected(pairs), collected(pairs[::-1])
    assert one.curve().auroc() == other.curve().auroc()
    assert one.aupro(0.05) == pytest.approx(other.aupro(0.05), abs=1e-12)


def brute_force_aupro(pairs, limit):
    """Every distinct score as a threshold; straight lines between the points."""
    regions, normal = [], []
    for score_map, truth in pairs:
        labels, count = ndimage.label(truth, structure=np.ones((3, 3)))
        regions += [score_map[labels == number] for number in range(1, count + 1)]
        normal.append(score_map[~truth])
    normal = np.concatenate(normal)
    points = [(0.0, 0.0)]
    for threshold in np.unique(np.concatenate([s.ravel() for s, _ in pairs]))[::-1]:
        overlap = np.mean([np.mean(region >= threshold) for region in regions])
        points.append((float(np.mean(normal >= threshold)), float(overlap)))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 >= limit or x1 == x0:
            continue
        end = min(x1, limit)
        y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
        area += (end - x0) * (y0 + y_end) / 2
    return area / limit


@pytest.mark.parametrize("limit", [0.01, 0.05, 0.3, 0.77, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_aupro_against_brute_force(seed, limit):
    pairs = on_a_grid(random_maps(3, seed))
    assert collected(pairs).aupro(limit) == pytest.approx(brute_force_aupro(pairs, limit), abs=1e-12)


@pytest.mark.parametrize("limit", [0.05, 0.3])
def test_aupro_of_continuous_scores_against_brute_force(limit):
    pairs = random_maps(2, seed=5, size=(24, 24))
    assert collected(pairs).aupro(limit) == pytest.approx(brute_force_aupro(pairs, limit), abs=BIN / limit)


@pytest.mark.parametrize("seed", [0, 1])
def test_pro_points_keep_their_area(seed):
    curves = collected(random_maps(3, seed))
    points = curves.pro()
    assert_is_a_curve(points["false_positive_rate"], points["overlap"])
    assert area(points["false_positive_rate"], points["overlap"]) == pytest.approx(curves.aupro(1.0), abs=3e-3)
    pixels = curves.curve().roc()
    assert_is_a_curve(pixels["false_positive_rate"], pixels["true_positive_rate"])


def test_aupro_weighs_regions_not_pixels():
    truth = np.zeros((10, 20), bool)
    truth[:, :9], truth[4, 19] = True, True
    score_map = truth.astype(np.float32)
    score_map[4, 19] = 0
    assert collected([(score_map, truth)]).aupro(0.3) == pytest.approx(0.5 + 0.5 * 0.3 / 2)


def test_regions_touch_at_corners():
    truth = np.eye(8, dtype=bool)
    score_map = np.where(truth, np.float32(1), np.float32(0))
    score_map[0, 0] = 0
    # One region of 8 pixels, 7 of them found before any false one.
    assert collected([(score_map, truth)]).aupro(0.1) == pytest.approx(7 / 8 + 1 / 8 * 0.1 / 2)


def test_aupro_of_a_perfect_map_is_one():
    truth = np.zeros((16, 16), bool)
    truth[3:7, 3:9] = True
    assert collected([(truth.astype(np.float32), truth)]).aupro(0.3) == pytest.approx(1)


def test_undefined_without_defects_or_without_normal_pixels():
    score_map = np.ones((4, 4), np.float32)
    for curves in (
        PixelCurves(),
        collected([(score_map, np.zeros((4, 4), bool))]),
        collected([(score_map, np.ones((4, 4), bool))]),
    ):
        assert curves.aupro(0.3) is None
        assert curves.curve().auroc() is None
        assert curves.curve().average_precision() is None


def test_counts_every_pixel_once():
    pairs = random_maps(3)
    curve = collected(pairs).curve()
    assert curve.positives.sum() == sum(truth.sum() for _, truth in pairs)
    assert curve.negatives.sum() == sum((~truth).sum() for _, truth in pairs)


def test_maps_are_left_as_they_were():
    score_map, truth = random_maps(2)[0]
    before = score_map.copy(), truth.copy()
    collected([(score_map, truth)])
    np.testing.assert_array_equal(score_map, before[0])
    np.testing.assert_array_equal(truth, before[1])


def test_a_view_counts_like_its_copy():
    (score_map, truth), _ = random_maps(2, size=(40, 40))
    enlarged = cv2.resize(score_map, (80, 80), interpolation=cv2.INTER_LINEAR)
    view = enlarged[::2, 1::2]
    one, other = collected([(view, truth)]), collected([(view.copy(), truth)])
    assert one.curve().auroc() == other.curve().auroc()

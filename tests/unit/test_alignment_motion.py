"""Motions: their algebra, warping, and which pixels are valid."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blemish.alignment import Motion, warp
from blemish.alignment.motion import KINDS
from blemish.errors import ConfigError

SHAPE = (60, 80)


def example(kind, seed=0):
    rng = np.random.default_rng(seed)
    matrix = np.eye(3)
    if kind != "identity":
        matrix[:2, 2] = rng.uniform(-5, 5, 2)
    if kind == "euclidean":
        angle = rng.uniform(-0.3, 0.3)
        matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    if kind in ("affine", "homography"):
        matrix[:2, :2] += rng.uniform(-0.1, 0.1, (2, 2))
    if kind == "homography":
        matrix[2, :2] = rng.uniform(-1e-3, 1e-3, 2)
    return Motion(kind, matrix)


@pytest.mark.parametrize("kind", KINDS)
def test_inverse_undoes_a_motion(kind):
    motion = example(kind)
    for both in (motion @ motion.inverse(), motion.inverse() @ motion):
        assert both.kind == kind
        assert both.displacement(Motion.identity(), SHAPE)[1] < 1e-9


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_composition_applies_the_right_one_first_and_has_the_freer_kind(first, second):
    one, two = example(first, 1), example(second, 2)
    points = np.random.default_rng(0).uniform(0, 50, (20, 2))
    np.testing.assert_allclose((two @ one).apply(points), two.apply(one.apply(points)), atol=1e-9)
    assert (two @ one).kind == max(first, second, key=KINDS.index)


def test_displacement_is_mean_and_largest_distance():
    mean, largest = Motion.identity().displacement(Motion.translation(3, -4), SHAPE)
    assert mean == pytest.approx(5) and largest == pytest.approx(5)
    scale = Motion("affine", np.diag([1.1, 1, 1]))
    mean, largest = scale.displacement(Motion.identity(), SHAPE)
    assert largest == pytest.approx(7.9) and mean == pytest.approx(7.9 / 2)


@pytest.mark.parametrize(
    ("kind", "matrix"),
    [
        ("rigid", np.eye(3)),
        ("affine", np.zeros((3, 3))),
        ("affine", np.eye(2)),
        ("affine", np.full((3, 3), np.nan)),
        ("affine", [[1, 0, 0], [0, 1, 0], [0.1, 0, 1]]),
        ("euclidean", np.diag([1.1, 1.1, 1])),
        ("euclidean", np.diag([-1, 1, 1])),
        ("translation", np.diag([1.01, 1, 1])),
        ("identity", [[1, 0, 1], [0, 1, 0], [0, 0, 1]]),
    ],
)
def test_a_matrix_must_keep_to_its_kind(kind, matrix):
    with pytest.raises(ConfigError):
        Motion(kind, np.asarray(matrix, float))


def test_simplified_keeps_what_the_simpler_kind_can_hold():
    for kind in KINDS[1:]:
        motion = example(kind, 3)
        freer = Motion("homography", motion.matrix)
        assert freer.simplified(kind, SHAPE).displacement(motion, SHAPE)[1] < 1e-6


def test_halved_motions_act_on_halved_images():
    motion = example("homography", 4)
    points = np.array([[10.0, 20.0], [40.0, 8.0]])
    halves = (points + 0.5) / 2 - 0.5
    np.testing.assert_allclose(motion.halved().apply(halves), (motion.apply(points) + 0.5) / 2 - 0.5, atol=1e-9)
    assert motion.halved(2).halved(-2).displacement(motion, SHAPE)[1] < 1e-9


def test_warp_by_whole_pixels_copies_them():
    reference = np.random.default_rng(0).random((40, 50, 3), np.float32)
    warped, valid = warp(reference, Motion.translation(7, -3), (40, 50))
    np.testing.assert_array_equal(warped[3:, :43], reference[:37, 7:])
    expected = np.zeros((40, 50), bool)
    expected[3:, :43] = True
    np.testing.assert_array_equal(valid, expected)


def test_warp_agrees_with_a_smooth_function():
    y, x = np.mgrid[0:70, 0:90]

    def scene(x, y):
        return (0.5 + 0.2 * np.sin(x / 7) + 0.2 * np.cos(y / 9)).astype(np.float32)

    for kind in KINDS:
        motion = example(kind, 5)
        warped, valid = warp(scene(x, y)[..., None], motion, SHAPE)
        rows, columns = np.nonzero(valid)
        places = motion.apply(np.column_stack([columns, rows]))
        # Cubic interpolation at coordinates rounded to 1/32 pixel; half a step times both slopes is 0.001, and
        # the scene bends.
        assert np.abs(warped[rows, columns, 0] - scene(*places.T)).max() < 6e-3


@given(seed=st.integers(0, 10**6), kind=st.sampled_from(KINDS), rows=st.integers(1, 30), columns=st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_valid_is_exactly_where_the_reference_is(seed, kind, rows, columns):
    motion = example(kind, seed)
    warped, valid = warp(np.full((25, 20), 0.5, np.float32), motion, (rows, columns))
    assert warped.shape == valid.shape == (rows, columns)
    y, x = np.mgrid[0:rows, 0:columns]
    places = motion.apply(np.column_stack([x.ravel(), y.ravel()]))
    depth = motion.matrix[2, 0] * x.ravel() + motion.matrix[2, 1] * y.ravel() + 1
    beyond = np.max([-places[:, 0], -places[:, 1], places[:, 0] - 19, places[:, 1] - 24], axis=0)
    beyond = np.where(depth > 0, beyond, np.inf)
    clear = np.abs(beyond) > 1e-5
    np.testing.assert_array_equal(valid.ravel()[clear], (beyond <= 0)[clear])
    # Borders repeat: nothing sinks to 0 outside.
    np.testing.assert_allclose(warped, 0.5, atol=1e-5)


def test_sizes_may_differ():
    reference = np.random.default_rng(0).random((30, 20, 1), np.float32)
    warped, valid = warp(reference, Motion.identity(), (25, 40))
    assert warped.shape == (25, 40, 1) and valid[:, :20].all() and not valid[:, 20:].any()
    np.testing.assert_array_equal(warped[:, :20], reference[:25])


def test_warp_stays_in_range():
    edge = np.zeros((40, 40), np.float32)
    edge[:, 20:] = 1
    warped, _ = warp(edge, Motion.translation(0.4, 0), (40, 40))
    overshot = cv2.warpAffine(edge, np.array([[1, 0, 0.4], [0, 1, 0]]), (40, 40), flags=cv2.INTER_CUBIC | 16)
    assert overshot.max() > 1  # or this test shows nothing
    assert warped.min() >= 0 and warped.max() <= 1

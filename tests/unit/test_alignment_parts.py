"""Refinement, illumination and the verdict, each by itself."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from blemish.alignment import Motion, compensate, judge, warp
from blemish.alignment.illumination import ILLUMINATIONS
from blemish.alignment.refine import coarse_to_fine, ecc, features, plausible, pyramid, remainder
from blemish.errors import ConfigError

SHAPE = (160, 200)
KINDS = ["translation", "euclidean", "affine", "homography"]


def scene(seed=0, shape=(260, 300)):
    """(H, W) float32 in [0, 1]: sharp-edged blobs on a fine texture."""
    rng = np.random.default_rng(seed)
    coarse, fine = (ndimage.gaussian_filter(rng.normal(size=shape), sigma) for sigma in (6, 1.5))
    image = ndimage.gaussian_filter((coarse > 0) * 1.0, 0.8) + fine
    return ((image - image.min()) / np.ptp(image)).astype(np.float32)


def about_the_middle(kind, size=1.0):
    """A motion of `kind` that moves an image of SHAPE by some pixels, inside a scene 50 pixels larger all round."""
    angle = 0.03 * size
    linear = {
        "translation": np.eye(2),
        "euclidean": np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]),
        "affine": np.eye(2) + size * np.array([[0.02, 0.015], [-0.02, -0.015]]),
        "homography": np.eye(2) + size * np.array([[0.02, 0.015], [-0.02, -0.015]]),
    }[kind]
    middle = np.array([SHAPE[1] / 2, SHAPE[0] / 2])
    matrix = np.eye(3)
    matrix[:2, :2] = linear
    matrix[:2, 2] = middle - linear @ middle + size * np.array([2.3, -3.6])
    if kind == "homography":
        matrix[2, :2] = size * np.array([1.5e-4, -1e-4])
    return Motion(kind, matrix)


def pair(motion, seed=0, noise=0.0):
    """The middle of a scene, and the same seen through a motion, without borders where nothing is known."""
    whole = scene(seed)
    inner = Motion.translation(50, 50)
    query, valid = warp(whole, inner @ motion, SHAPE)
    assert valid.all()
    rng = np.random.default_rng(seed)
    reference = np.ascontiguousarray(whole[50 : 50 + SHAPE[0], 50 : 50 + SHAPE[1]])
    return reference, (query + rng.normal(0, noise, SHAPE)).astype(np.float32)


# --- refinement ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_coarse_to_fine_recovers_each_kind(kind):
    motion = about_the_middle(kind)
    reference, query = pair(motion, noise=0.05)
    found = coarse_to_fine(pyramid(reference, 2), pyramid(query, 2), Motion.identity(), kind)
    assert found.kind == kind
    assert motion.displacement(Motion.identity(), SHAPE)[0] > 3
    assert found.displacement(motion, SHAPE)[0] < 0.1  # half of it from the query's coordinates, rounded to 1/32


def test_refinement_of_noise_and_of_nothing_returns_the_start():
    rng = np.random.default_rng(0)
    start = Motion.translation(1, 2)
    flat = np.full((40, 40), 0.5, np.float32)
    assert ecc(flat, flat, start, "affine") is start
    noise = rng.random((2, 40, 40)).astype(np.float32)
    found = ecc(*noise, start, "homography")
    assert found.displacement(start, (40, 40))[0] <= 4  # and never a traceback


@pytest.mark.parametrize("kind", ["euclidean", "homography"])
def test_features_find_a_large_turn(kind):
    motion = Motion(kind, about_the_middle("euclidean", 8).matrix)
    whole = scene(1)
    query, _ = warp(whole, motion, whole.shape)
    found = features(whole, query, kind)
    assert found is not None and found.kind == kind
    assert found.displacement(motion, whole.shape)[0] < 1


def test_features_of_unrelated_images_are_none():
    rng = np.random.default_rng(0)
    noise = rng.random((2, 150, 150)).astype(np.float32)
    assert features(*noise, "homography") is None
    assert features(scene(0), scene(1), "homography") is None
    assert features(np.zeros((50, 50), np.float32), np.zeros((50, 50), np.float32), "affine") is None


def test_remainder_sees_what_is_left():
    reference, query = pair(about_the_middle("affine", 0.1), noise=0.02)
    truth = about_the_middle("affine", 0.1)
    unseen, left = (remainder(reference, query, motion) for motion in (truth, Motion.identity()))
    assert unseen.pixels < 0.06
    mean, _ = truth.displacement(Motion.identity(), SHAPE)
    assert left.ratio > 100 * unseen.ratio
    assert 0.4 * mean < left.pixels < 1.2 * mean  # along the gradient only: 0.7 of it on average


def test_plausible_refuses_what_no_camera_does():
    assert plausible(about_the_middle("homography"), SHAPE, SHAPE)
    for matrix in (np.diag([-1.0, 1, 1]), np.diag([5.0, 5, 1]), [[1, 0, 180], [0, 1, 0], [0, 0, 1]]):
        assert not plausible(Motion("affine", np.asarray(matrix, float)), SHAPE, SHAPE)
    assert not plausible(Motion("homography", np.array([[1, 0, 0], [0, 1, 0], [-0.01, 0, 1]])), SHAPE, SHAPE)


def test_pyramid_averages_squares():
    image = scene()[:21, :31]
    half = pyramid(image, 1)[1]
    np.testing.assert_allclose(half, image[:20, :30].reshape(10, 2, 15, 2).mean(axis=(1, 3)), atol=1e-6)


# --- illumination -------------------------------------------------------------------------------------------------


def lit(image, how):
    """A change of illumination that `how` should undo."""
    rows, columns = image.shape[:2]
    x = np.linspace(0, 1, columns, dtype=np.float32)[None, :, None]
    y = np.linspace(0, 1, rows, dtype=np.float32)[:, None, None]
    return image * 0.6 + 0.15 if how == "global" else image * (0.9 - 0.5 * x) + 0.1 * y


@pytest.mark.parametrize(("how", "bound"), [("global", 1e-3), ("blocks", 0.02)])
@pytest.mark.parametrize("channels", [1, 3])
def test_known_changes_are_undone_and_defects_are_not(how, bound, channels):
    reference = np.stack([scene(seed) for seed in range(channels)], axis=-1)
    query = lit(reference, how)
    query[100:112, 140:152] = 0.0 if how == "global" else 1.0
    query = np.clip(query, 0, 1)
    valid = np.ones(query.shape[:2], bool)
    adjusted, same = compensate(reference, query, valid, how)
    assert same is query
    difference = np.abs(adjusted - query)
    inside = np.zeros(query.shape[:2], bool)
    inside[100:112, 140:152] = True
    assert difference[~inside].mean() < bound < 0.05 < np.abs(reference - query)[~inside].mean()
    expected = np.abs(lit(reference, how) - query)[inside]  # what the defect changed
    assert np.abs(difference[inside] - expected).mean() < 0.05


def test_blocks_leave_no_edges_where_blocks_meet():
    reference = np.full((256, 256, 1), 0.5, np.float32) + 0.1 * scene(0, (256, 256))[..., None]
    adjusted, _ = compensate(reference, lit(reference, "blocks"), np.ones((256, 256), bool), "blocks", 64)
    gain = (adjusted / reference)[..., 0]
    steps = np.abs(np.diff(gain, axis=1))
    # The gain falls by 0.5 over 255 steps, and its quotient follows the texture; blocks would jump by 0.12.
    assert steps.max() < 0.04


def test_invalid_pixels_have_no_say():
    reference = scene()[..., None]
    query = reference * 0.5 + 0.2
    valid = np.ones(query.shape[:2], bool)
    valid[:, :100] = False
    query[:, :100] = 1
    adjusted, _ = compensate(reference, query, valid, "global")
    np.testing.assert_allclose(adjusted[valid], query[valid], atol=1e-4)


def test_clahe_brings_both_closer():
    reference = scene()[..., None]
    query = lit(reference, "blocks")
    valid = np.ones(query.shape[:2], bool)
    adjusted, equalised = compensate(reference, query, valid, "clahe")
    assert np.abs(adjusted - equalised).mean() < 0.5 * np.abs(reference - query).mean()


@pytest.mark.parametrize("how", ILLUMINATIONS)
@pytest.mark.parametrize("shape", [(1, 30, 1), (30, 1, 3), (5, 5, 1), (70, 40, 3)])
def test_any_size_and_constant_images(how, shape):
    reference, query = np.full(shape, 0.4, np.float32), np.full(shape, 0.7, np.float32)
    for valid in (np.ones(shape[:2], bool), np.zeros(shape[:2], bool)):
        adjusted, other = compensate(reference, query, valid, how)
        assert adjusted.shape == other.shape == shape
        assert np.isfinite(adjusted).all() and adjusted.min() >= 0 and adjusted.max() <= 1
    if how in ("global", "blocks"):
        adjusted, _ = compensate(reference, query, np.ones(shape[:2], bool), how)
        np.testing.assert_allclose(adjusted, 0.7, atol=1e-3)


def test_unknown_ways_are_named():
    image, valid = np.zeros((20, 20, 1), np.float32), np.ones((20, 20), bool)
    with pytest.raises(ConfigError, match="did you mean 'blocks'"):
        compensate(image, image, valid, "block")
    with pytest.raises(ConfigError, match="at least 8"):
        compensate(image, image, valid, "blocks", 4)


# --- verdict ------------------------------------------------------------------------------------------------------


def shifted(image, pixels):
    return np.ascontiguousarray(np.roll(image, pixels, axis=1))


@given(seed=st.integers(0, 1000), pixels=st.integers(2, 12), noise=st.sampled_from([0.0, 0.05, 0.15]))
@settings(max_examples=25, deadline=None)
def test_a_shift_undone_is_an_improvement_and_a_shift_made_is_the_opposite(seed, pixels, noise):
    image = scene(seed, (160, 192))
    rng = np.random.default_rng(seed)
    query = (image + rng.normal(0, noise, image.shape)).astype(np.float32)
    other, valid = shifted(image, pixels), np.ones(image.shape, bool)
    good, bad = judge(query, image, other, valid), judge(query, other, image, valid)
    assert (good.overall, bad.overall) == ("improved", "worse")
    assert good.share > 0.5 > bad.share
    assert good.votes[0] > 0 and good.votes[1] == 0


@given(seed=st.integers(0, 1000), noise=st.sampled_from([0.0, 0.1, 0.3]))
@settings(max_examples=15, deadline=None)
def test_no_motion_is_undecided(seed, noise):
    image = scene(seed, (128, 128))
    query = (image + np.random.default_rng(seed).normal(0, noise, image.shape)).astype(np.float32)
    verdict = judge(query, image, image.copy(), np.ones(image.shape, bool))
    assert verdict.overall == "undecided" and not verdict.blocks.any()
    assert (verdict.better, verdict.worse, verdict.share) == (0, 0, 0.5)


def test_unrelated_warps_are_undecided():
    for seed in range(5):
        query, one, two = (scene(3 * seed + part, (192, 192)) for part in range(3))
        assert judge(query, one, two, np.ones(query.shape, bool)).overall == "undecided"


def test_blocks_say_where():
    image = scene(0, (128, 128))
    other = shifted(image, 4)
    warped, unwarped = image.copy(), other.copy()
    warped[:, 64:], unwarped[:, 64:] = other[:, 64:], image[:, 64:]  # better on the left, worse on the right
    verdict = judge(image, warped, unwarped, np.ones(image.shape, bool), block=32)
    assert verdict.blocks.shape == (4, 4)
    assert (verdict.blocks[:, :2] >= 0).all() and verdict.blocks[:, :2].any()
    assert (verdict.blocks[:, 2:] <= 0).all() and verdict.blocks[:, 2:].any()
    assert verdict.overall == "undecided"


def test_invalid_pixels_and_single_pixels_do_not_vote():
    image = np.full((96, 96), 0.5, np.float32)
    salted = image.copy()
    rng = np.random.default_rng(0)
    salted[rng.random(image.shape) < 0.03] = 1.0
    assert judge(image, image, salted, np.ones(image.shape, bool)).better < 0.005
    other = shifted(scene(0, (96, 96)), 5)
    verdict = judge(scene(0, (96, 96)), scene(0, (96, 96)), other, np.zeros(image.shape, bool))
    assert verdict.overall == "undecided" and verdict.better == 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (5, 100)])
def test_verdict_of_slivers(shape):
    image = np.zeros(shape, np.float32)
    assert judge(image, image, image, np.ones(shape, bool)).overall == "undecided"


def test_verdict_agrees_with_its_definition():
    """The count of changed pixels, written out."""
    query, warped = scene(0, (64, 96)), scene(0, (64, 96))
    unwarped = shifted(query, 3)
    verdict = judge(query, warped, unwarped, np.ones(query.shape, bool), block=96)  # one block: one tolerance
    a, b, c = (cv2.medianBlur(image, 3).astype(float) for image in (query, warped, unwarped))
    tolerance = 0.25 * (a.std() + b.std()) / 2 + 2 / 255
    change = abs(c - a) - abs(b - a)
    assert verdict.blocks.shape == (1, 1)
    assert verdict.better == pytest.approx((change > tolerance).mean(), abs=2e-3)
    assert verdict.worse == pytest.approx((change < -tolerance).mean(), abs=2e-3)

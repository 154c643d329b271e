"""Alignment on real circuit boards, where they are at hand, against motions that the test made."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from blemish.alignment import Alignment, Motion, warp
from blemish.data.images import read_image
from blemish.preprocess import Preprocess

DATA = Path(os.environ.get("BLEMISH_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")) / "deeppcb"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason="no data set deeppcb: set BLEMISH_DATA to the folder that holds it"),
]

COUNT = 12


def boards(part):
    paths = sorted((DATA / "template").glob("*.jpg"))[:: 100 // COUNT][:COUNT]
    assert len(paths) == COUNT
    return [Preprocess(channels=1)(read_image(DATA / part / path.name)) for path in paths]


def random_motion(rng, full):
    angle, scale = (np.deg2rad(rng.uniform(-2, 2)), 1 + rng.uniform(-0.02, 0.02)) if full else (0, 1)
    linear = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    middle = np.array([319.5, 319.5])
    matrix = np.eye(3)
    matrix[:2, :2] = linear
    matrix[:2, 2] = middle - linear @ middle + rng.uniform(-12, 12, 2)
    return Motion("affine" if full else "translation", matrix)


def observed(image, motion, noise, rng):
    query, _ = warp(image, motion, image.shape[:2])
    return np.clip(0.8 * query + 0.1 + rng.normal(0, noise / 255, query.shape), 0, 1).astype(np.float32)


@pytest.mark.parametrize(
    ("full", "noise", "bound"), [(False, 0, 0.1), (False, 20, 0.1), (True, 20, 0.5), (True, 40, 0.5)]
)
def test_motions_of_boards_are_found(full, noise, bound):
    rng = np.random.default_rng(0)
    errors, improved = [], 0
    for template in boards("template"):
        motion = random_motion(rng, full)
        found = Alignment()(template, observed(template, motion, noise, rng))
        errors.append(found.motion.displacement(motion, template.shape)[0])
        improved += found.verdict.overall == "improved"
    assert np.median(errors) < bound
    assert improved >= COUNT - 1  # a board that is all but empty may stay where it is


def test_defects_do_not_disturb():
    """The motion to a moved test image is that to the unmoved one after the move: pairs lie roughly on each other."""
    rng = np.random.default_rng(1)
    alignment = Alignment(motion="affine")
    errors = []
    for template, test in zip(boards("template"), boards("test"), strict=True):
        motion = random_motion(rng, full=True)
        own = alignment(template, test).motion
        found = alignment(template, observed(test, motion, 10, rng)).motion
        errors.append(found.displacement(own @ motion, template.shape)[0])
    assert np.median(errors) < 0.3


def test_alignment_makes_defects_stand_out():
    """Of the difference, more lies in the annotated boxes after alignment than before."""
    rng = np.random.default_rng(2)
    paths = sorted((DATA / "template").glob("*.jpg"))[:: 100 // COUNT][:COUNT]
    gains = []
    for path, template, test in zip(paths, boards("template"), boards("test"), strict=True):
        inside = np.zeros(test.shape[:2], np.float32)
        for line in (DATA / "boxes" / f"{path.stem}.txt").read_text("utf-8").splitlines():
            left, top, right, bottom = map(int, line.replace(",", " ").split()[:4])
            inside[top:bottom, left:right] = 1
        motion = random_motion(rng, full=False)
        query, _ = warp(test, motion, test.shape[:2])
        boxes, _ = warp(inside, motion, test.shape[:2])
        shares = []
        for alignment in (Alignment(motion="none"), Alignment()):
            found = alignment(template, query)
            difference = cv2.GaussianBlur(np.abs(found.reference - found.query)[..., 0] * found.valid, (0, 0), 2)
            shares.append(float(difference[boxes > 0.5].sum() / max(difference.sum(), 1e-9)))
        gains.append(shares[1] / max(shares[0], 1e-9))
    assert np.median(gains) > 2

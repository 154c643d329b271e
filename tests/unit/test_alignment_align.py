"""The whole of it: which motion is chosen, what is refused, and that it never makes things worse."""

import subprocess
import sys

import numpy as np
import pytest
from test_alignment_parts import SHAPE, about_the_middle, pair, scene

from blemish.alignment import Aligned, Alignment, Motion, align, warp
from blemish.alignment.align import nudge
from blemish.errors import ConfigError, ImageError

KINDS = ["translation", "euclidean", "affine", "homography"]


def run(alignment, reference, query):
    return alignment(reference[..., None], np.clip(query, 0, 1)[..., None])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_auto_takes_the_simplest_kind_that_suffices(kind, noise):
    motion = about_the_middle(kind)
    found = run(Alignment(), *pair(motion, seed=2, noise=noise))
    assert found.motion.kind == kind
    assert found.motion.displacement(motion, SHAPE)[0] < 0.15
    assert found.verdict.overall == "improved"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", ["correlation", "phase"])
def test_each_kind_by_name(kind, start):
    motion = about_the_middle(kind)
    found = run(Alignment(motion=kind, start=start), *pair(motion, seed=3, noise=0.05))
    assert found.motion.kind == kind
    assert found.motion.displacement(motion, SHAPE)[0] < 0.1


def test_features_start_where_no_shift_can():
    motion = Motion("euclidean", about_the_middle("euclidean", 12).matrix)  # a turn of 20 degrees
    whole = scene(4)
    query, _ = warp(whole, motion, whole.shape)
    for alignment in (Alignment(start="features"), Alignment(motion="euclidean", start="features")):
        found = run(alignment, whole, query)
        assert found.motion.displacement(motion, whole.shape)[0] < 0.2


def test_the_result_is_the_reference_on_the_grid_of_the_query():
    motion = about_the_middle("affine")
    reference, query = pair(motion, seed=5)
    found = run(Alignment(), reference, 0.7 * query + 0.1)
    assert isinstance(found, Aligned)
    assert found.reference.shape == found.query.shape == (*SHAPE, 1) and found.valid.shape == SHAPE
    np.testing.assert_array_equal(found.query[..., 0], np.clip(0.7 * query + 0.1, 0, 1))
    _, valid = warp(reference, found.motion, SHAPE)
    np.testing.assert_array_equal(found.valid, valid)
    difference = np.abs(found.reference - found.query)[..., 0]
    assert difference[found.valid].mean() < 0.01
    assert np.abs(reference - query).mean() > 0.1


def test_a_defect_stays_visible():
    reference, query = pair(about_the_middle("euclidean"), seed=6, noise=0.02)
    query[70:82, 90:102] = 1 - query[70:82, 90:102].round()
    found = run(Alignment(), reference, query)
    difference = np.abs(found.reference - found.query)[..., 0]
    assert difference[72:80, 92:100].mean() > 10 * np.median(difference[found.valid])


def test_colour_is_aligned_on_its_grey():
    motion = about_the_middle("affine")
    reference, query = (
        np.stack(parts, axis=-1) for parts in zip(*(pair(motion, seed) for seed in range(3)), strict=True)
    )
    found = Alignment()(reference, np.clip(query * [0.5, 0.7, 0.9], 0, 1).astype(np.float32))
    assert found.motion.displacement(motion, SHAPE)[0] < 0.1
    assert np.abs(found.reference - found.query)[found.valid].mean() < 0.02  # one gain for each channel


def test_sizes_may_differ_and_pixels_be_of_any_kind():
    whole = scene(7)
    query = whole[4:180, 6:240]
    found = Alignment(max_shift=0.2)((whole[..., None] * 255).astype(np.uint8), (query * 65535).astype(np.uint16))
    assert found.reference.shape == (176, 234, 1)
    assert found.motion.displacement(Motion.translation(6, 4), query.shape)[0] < 0.1
    assert found.valid.all()


@pytest.mark.parametrize("motion", ["auto", *KINDS])
@pytest.mark.parametrize("start", ["correlation", "features"])
def test_featureless_images_stay_where_they_are(motion, start):
    rng = np.random.default_rng(0)
    flat = np.full((90, 110), 0.5, np.float32)
    noise = rng.random((2, 90, 110)).astype(np.float32)
    for reference, query in ((flat, flat), (flat, noise[0]), (noise[0], flat), tuple(noise)):
        found = run(Alignment(motion=motion, start=start), reference, query)
        assert found.motion.kind == "identity" and found.valid.all()
        assert found.verdict.overall == "undecided"


@pytest.mark.parametrize("illumination", ["none", "global", "blocks", "clahe"])
def test_every_illumination(illumination):
    motion = about_the_middle("euclidean")
    reference, query = pair(motion, seed=8, noise=0.02)
    if illumination in ("blocks", "clahe"):
        query = query * np.linspace(0.5, 1, SHAPE[1], dtype=np.float32)
    found = run(Alignment(motion="euclidean", illumination=illumination), reference, query)
    assert found.motion.displacement(motion, SHAPE)[0] < 0.15
    assert found.verdict.overall == "improved"


def test_falls_back_to_the_identity_where_the_motion_made_it_worse(monkeypatch):
    reference, query = pair(Motion.identity(), seed=9, noise=0.02)
    monkeypatch.setattr(Alignment, "find", lambda *_: Motion.translation(5, 3))
    found = run(Alignment(), reference, query)
    assert found.verdict.overall == "worse"
    assert found.motion.kind == "identity" and found.valid.all()
    assert np.abs(found.reference - found.query).mean() < 0.03


def test_a_broken_refinement_does_no_harm(monkeypatch):
    def fail(*_):
        raise align.cv2.error("not converged")

    monkeypatch.setattr(align.cv2, "findTransformECC", fail)
    motion = about_the_middle("translation")
    found = run(Alignment(), *pair(motion, seed=1))
    assert found.motion.displacement(motion, SHAPE)[0] < 0.2  # the correlation's own accuracy


def test_the_verdict_can_refine_a_motion():
    motion = about_the_middle("affine")
    reference, query = pair(motion, seed=2, noise=0.02)
    start = Motion("affine", motion.matrix + np.array([[0, 0.004, 0.4], [-0.003, 0, -0.5], [0, 0, 0]]))
    before = start.displacement(motion, SHAPE)[0]
    assert nudge(reference, query, start).displacement(motion, SHAPE)[0] < 0.6 * before
    found = run(Alignment(motion="affine", refine_by_verdict=True), reference, query)
    assert found.motion.displacement(motion, SHAPE)[0] < 0.1


@pytest.mark.parametrize("shape", [(1, 100), (100, 1), (15, 40)])
def test_images_too_small_are_refused_in_one_sentence(shape):
    image = np.zeros((*shape, 1), np.float32)
    with pytest.raises(ImageError, match="at least 16 pixels a side"):
        Alignment()(image, image)
    found = Alignment(motion="none")(image, image)
    assert found.motion.kind == "identity" and found.reference.shape == image.shape


@pytest.mark.parametrize("shape", [(16, 16), (16, 300), (33, 47)])
def test_small_images_are_aligned_or_left(shape):
    image = scene(0, shape)
    found = run(Alignment(), image, image)
    assert found.motion.displacement(Motion.identity(), shape)[0] < 0.1


def test_grey_and_colour_do_not_mix():
    with pytest.raises(ImageError, match="same channels, found 1 and 3"):
        Alignment()(np.zeros((40, 40, 1), np.float32), np.zeros((40, 40, 3), np.float32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"motion": "afine"}, r"alignment.motion 'afine': did you mean 'affine'\?"),
        ({"start": "corelation"}, r"alignment.start 'corelation': did you mean 'correlation'\?"),
        ({"illumination": "globl"}, r"alignment.illumination 'globl': did you mean 'global'\?"),
        ({"max_shift": 0}, "max_shift above 0 and at most 0.5, found 0"),
        ({"max_shift": 0.6}, "max_shift above 0 and at most 0.5, found 0.6"),
        ({"block": 4}, "block of at least 8 pixels, found 4"),
    ],
)
def test_mistakes_in_settings_are_one_sentence(settings, message):
    with pytest.raises(ConfigError, match=message):
        Alignment(**settings)


def test_imports_neither_torch_nor_hydra():
    code = "import sys, blemish.alignment; sys.exit(bool({'torch', 'hydra', 'pytorch_lightning'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

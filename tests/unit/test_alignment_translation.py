"""Shifts: against an exhaustive search, against known fractions of a pixel, in noise, and where there is nothing."""

import cv2
import numpy as np
import pytest
from scipy import ndimage

from blemish.alignment.refine import features
from blemish.alignment.translation import CONFIDENT, cross_correlation, laplacian_of_gaussian, phase_correlation

METHODS = [cross_correlation, phase_correlation]


def scene(seed, size=260):
    """(size, size), blobs and edges of many sizes, in [0, 1], smooth enough for a shift by Fourier."""
    rng = np.random.default_rng(seed)
    coarse = ndimage.gaussian_filter(rng.normal(size=(size, size)), 6, mode="wrap")
    fine = ndimage.gaussian_filter(rng.normal(size=(size, size)), 1.5, mode="wrap")
    image = ndimage.gaussian_filter((coarse > 0) * 1.0, 1.0, mode="wrap") + fine
    return (image - image.min()) / np.ptp(image)


def pair(seed, x, y, noise=0.0, side=160):
    """Windows of a scene, the query showing at (0, 0) what the reference shows at (x, y)."""
    image = scene(seed)
    moved = np.fft.ifft2(ndimage.fourier_shift(np.fft.fft2(image), (-y, -x))).real
    rng = np.random.default_rng(seed + 1000)
    reference, query = (each[50 : 50 + side, 50 : 50 + side] for each in (image, moved))
    return reference.astype(np.float32), (query + rng.normal(0, noise, query.shape)).astype(np.float32)


def exhaustive(reference, query, most):
    """The best whole shift by the definition of normalised correlation over the overlap, and that correlation."""
    first, second = (laplacian_of_gaussian(image, 1.5).astype(float) for image in (reference, query))
    best = (-2.0, 0, 0)
    for dy in range(-most, most + 1):
        for dx in range(-most, most + 1):
            rows = slice(max(0, -dy), min(second.shape[0], first.shape[0] - dy))
            columns = slice(max(0, -dx), min(second.shape[1], first.shape[1] - dx))
            a = second[rows, columns]
            b = first[rows.start + dy : rows.stop + dy, columns.start + dx : columns.stop + dx]
            value = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
            best = max(best, (value, dx, dy))
    return best


@pytest.mark.parametrize(
    ("seed", "x", "y", "sizes"), [(0, 5, -8, None), (1, -9, 2, (70, 90)), (2, 0, 0, (96, 64)), (3, 7, 9, None)]
)
def test_cross_correlation_equals_the_exhaustive_search(seed, x, y, sizes):
    reference, query = pair(seed, x, y, noise=0.1, side=80)
    if sizes:
        reference, query = reference[: sizes[0]], query[:, : sizes[1]]
    value, dx, dy = exhaustive(reference, query, 10)
    found = cross_correlation(reference, query, max_shift=10 / max(query.shape))
    assert (dx, dy) == (x, y)
    assert found.peak == pytest.approx(value, abs=1e-4)
    assert (round(found.x), round(found.y)) == (dx, dy)


@pytest.mark.parametrize(
    ("method", "noise", "bound"),
    [
        (cross_correlation, 0, 0.05),
        (cross_correlation, 0.1, 0.06),
        (cross_correlation, 0.3, 0.2),
        (phase_correlation, 0, 0.05),
        (phase_correlation, 0.1, 0.2),
        (phase_correlation, 0.3, 0.5),
    ],
)
def test_known_fractions_of_a_pixel(method, noise, bound):
    # Bounds about twice what was measured: the overlap's border, and then noise, are what remains.
    for seed, (x, y) in enumerate([(3.3, -7.75), (-0.5, 0.25), (11.9, 4.5)]):
        found = method(*pair(seed, x, y, noise))
        assert np.hypot(found.x - x, found.y - y) < bound
        assert found.confidence > CONFIDENT


def test_correlation_finds_the_shift_where_features_fail():
    # Noise four times as strong as the scene's own contrast.
    reference, query = pair(7, 6.25, -4.5, noise=0.9, side=200)
    assert query.std() > 4 * reference.std()
    assert features(reference, np.clip(query, 0, 1), "translation") is None
    for method in METHODS:
        found = method(reference, query)
        assert np.hypot(found.x - 6.25, found.y + 4.5) < 0.5
        assert found.confidence > CONFIDENT


@pytest.mark.parametrize("method", METHODS)
def test_brightness_and_contrast_do_not_matter(method):
    reference, query = pair(4, 2.5, 1.25)
    plain, changed = method(reference, query), method(reference, 0.4 * query + 0.3)
    assert np.hypot(plain.x - changed.x, plain.y - changed.y) < 0.02


@pytest.mark.parametrize("method", METHODS)
def test_unrelated_noise_is_not_confident(method):
    rng = np.random.default_rng(0)
    for sizes in ((64, 64), (160, 160), (90, 200)):
        for _ in range(10):
            assert method(*rng.random((2, *sizes)).astype(np.float32)).confidence < CONFIDENT


@pytest.mark.parametrize("method", METHODS)
def test_constant_images_stay_where_they_are(method):
    flat, textured = np.full((60, 60), 0.3, np.float32), pair(0, 0, 0, side=60)[0]
    for reference, query in ((flat, flat), (flat, textured), (textured, flat)):
        found = method(reference, query)
        assert (found.x, found.y, found.confidence) == (0, 0, 0)


@pytest.mark.parametrize("method", METHODS)
def test_no_shift_beyond_the_largest_allowed(method):
    reference, query = pair(5, 30, 0)
    found = method(reference, query, max_shift=0.1)
    assert max(abs(found.x), abs(found.y)) <= 17  # 16 whole pixels, and the climb from there
    assert method(reference, query, max_shift=0.25).x == pytest.approx(30, abs=0.1)


def test_agrees_with_scikit_image():
    registration = pytest.importorskip("skimage.registration")
    reference, query = pair(6, 4.3, -2.6)
    window = np.outer(*(np.hanning(side) for side in query.shape))
    shift, _, _ = registration.phase_cross_correlation(
        reference * window, query * window, upsample_factor=50, normalization=None
    )
    found = cross_correlation(reference, query)
    assert np.hypot(found.x - shift[1], found.y - shift[0]) < 0.25  # theirs leans to whole overlap, ours to none


def test_laplacian_of_gaussian_is_zero_on_a_ramp():
    ramp = np.tile(np.linspace(0, 1, 80, dtype=np.float32), (80, 1))
    assert laplacian_of_gaussian(ramp, 1.5) is None
    assert laplacian_of_gaussian(cv2.GaussianBlur(np.eye(80, dtype=np.float32), (0, 0), 1), 1.5) is not None

"""The shift between two grey images, to a fraction of a pixel: cross-correlation and phase correlation."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from scipy import fft

from blemish.alignment.motion import Motion
from blemish.data.images import FloatArray

CONFIDENT = 6.0
"""Peaks of images that have nothing in common stay below 5 with all but certainty, over up to a million shifts."""

Spectrum = npt.NDArray[np.complex64]


@dataclass(frozen=True)
class Shift:
    """The query's pixel (0, 0) shows the reference's pixel (x, y).

    peak: the correlation there; for cross-correlation in [-1, 1].
    confidence: the peak in standard deviations of the correlation of unrelated images with these spectra; 0 where
        an image has no features.
    """

    x: float
    y: float
    peak: float
    confidence: float

    @property
    def motion(self) -> Motion:
        return Motion.translation(self.x, self.y)


_NOWHERE = Shift(0.0, 0.0, 0.0, 0.0)


def cross_correlation(reference: FloatArray, query: FloatArray, max_shift: float = 0.25, sigma: float = 1.5) -> Shift:
    """The shift at which the Laplacian-of-Gaussian images correlate best, normalised over their overlap.

    All whole shifts are compared (by Fourier transforms, zero-padded so that nothing wraps around); the best is then
    refined on the correlation's trigonometric interpolation.

    Args:
        reference, query: (H, W) grey; sizes may differ.
        max_shift: the largest shift along each axis, as a fraction of the query's side.
        sigma: of the Gaussian, in pixels.
    """
    first, second = laplacian_of_gaussian(reference, sigma), laplacian_of_gaussian(query, sigma)
    if first is None or second is None:
        return _NOWHERE
    most = _most(query.shape, max_shift)
    spectrum, size = _cross_spectrum(first, second, most)
    surface = fft.irfft2(spectrum, size)
    rows, columns = (np.arange(-bound, bound + 1) for bound in most)
    energy = _overlap_energy(first, second, rows, columns)
    sums = surface[np.ix_(rows, columns)]
    normalised = sums / np.sqrt(np.maximum(energy, 1e-2 * energy.max()))
    row, column = np.unravel_index(int(normalised.argmax()), normalised.shape)
    peak = float(normalised[row, column])
    # The variance per pixel of overlap of a correlation by chance; each lag counts as many pixels as overlap there.
    spread = float(np.sqrt((surface.astype(np.float64) ** 2).sum() / (first.size * second.size)))
    dy, dx = int(rows[row]), int(columns[column])
    pixels = _overlap_side(reference.shape[0], query.shape[0], dy) * _overlap_side(
        reference.shape[1], query.shape[1], dx
    )
    confidence = float(sums[row, column]) / (spread * pixels**0.5)
    y, x = _climb(spectrum, size, dy, dx)
    return Shift(x, y, peak, confidence)


def phase_correlation(reference: FloatArray, query: FloatArray, max_shift: float = 0.25, sigma: float = 1.5) -> Shift:
    """The shift from the phases of the Fourier transforms alone: a sharper peak, more sensitive to noise.

    Source: Kuglin and Hines, The phase correlation image alignment method, 1975. Taken on the Laplacian of Gaussian
    under a Hann window; frequencies that hold next to nothing in it have next to no say. Arguments as for
    `cross_correlation`.
    """
    first, second = laplacian_of_gaussian(reference, sigma), laplacian_of_gaussian(query, sigma)
    if first is None or second is None:
        return _NOWHERE
    most = _most(query.shape, max_shift)
    first_window, second_window = _window(first.shape), _window(second.shape)
    spectrum, size = _cross_spectrum(first * first_window, second * second_window, most)
    amplitude = np.abs(spectrum)
    spectrum = np.asarray(spectrum / (amplitude + 0.1 * amplitude.mean()), np.complex64)
    surface = fft.irfft2(spectrum, size)
    rows, columns = (np.arange(-bound, bound + 1) for bound in most)
    sums = surface[np.ix_(rows, columns)]
    row, column = np.unravel_index(int(sums.argmax()), sums.shape)
    # Chance correlates more at small shifts, where the middles of the windows meet.
    share = float((first_window**2).mean() * (second_window**2).mean()) * first.size * second.size
    together = _common(first_window, second_window)
    variance = float((surface.astype(np.float64) ** 2).sum()) * together / share
    spread = float(np.sqrt(variance))
    y, x = _climb(spectrum, size, int(rows[row]), int(columns[column]))
    return Shift(x, y, float(sums[row, column]), float(sums[row, column]) / spread)


def laplacian_of_gaussian(image: FloatArray, sigma: float) -> FloatArray | None:
    """(H, W) -> (H, W), blind to brightness; None where it is next to zero everywhere: nothing to align.

    0 within 4 sigma of the border, where the mirrored image would make edges that stand still.
    """
    smooth = cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
    edges = np.asarray(cv2.Laplacian(smooth, cv2.CV_32F, borderType=cv2.BORDER_REFLECT), np.float32)
    margin = min(int(np.ceil(4 * sigma)) + 1, min(image.shape) // 4)
    if margin:
        edges[:margin] = edges[-margin:] = 0
        edges[:, :margin] = edges[:, -margin:] = 0
    return edges if float(np.abs(edges).max()) > 1e-5 else None  # float32 rounding of values up to 1


def _most(shape: tuple[int, ...], max_shift: float) -> tuple[int, int]:
    """The largest whole shift in rows and in columns; some overlap always remains."""
    rows, columns = (min(int(np.ceil(max_shift * side)), side - 1) for side in shape[:2])
    return rows, columns


def _window(shape: tuple[int, ...]) -> FloatArray:
    """(H, W), Hann's, nowhere quite 0."""
    rows, columns = (np.hanning(side + 2)[1:-1].astype(np.float32) for side in shape)
    return np.asarray(rows[:, None] * columns, np.float32)


def _common(first: FloatArray, second: FloatArray) -> float:
    """The sum of both windows' squares, multiplied, where they overlap without a shift."""
    rows, columns = (min(sides) for sides in zip(first.shape, second.shape, strict=True))
    return float((first[:rows, :columns] ** 2 * second[:rows, :columns] ** 2).sum())


def _cross_spectrum(
    reference: FloatArray, query: FloatArray, most: tuple[int, int]
) -> tuple[Spectrum, tuple[int, int]]:
    """The transform of c(d) = sum over p of query(p) reference(p + d), and the padded size."""
    rows, columns = (
        fft.next_fast_len(max(reference.shape[axis], query.shape[axis]) + most[axis], real=True) for axis in (0, 1)
    )
    size = (int(rows), int(columns))
    return fft.rfft2(reference, size) * np.conj(fft.rfft2(query, size)), size


def _overlap_side(reference: int, query: int, shift: int) -> int:
    return max(0, min(query, reference - shift) - max(0, -shift))


def _overlap_energy(
    reference: FloatArray, query: FloatArray, rows: npt.NDArray[np.int_], columns: npt.NDArray[np.int_]
) -> npt.NDArray[np.float64]:
    """For every shift, the product of both images' sums of squares over their overlap."""
    product = np.ones((len(rows), len(columns)))
    for image, other, sign in ((reference, query, 1), (query, reference, -1)):
        sums = cv2.integral(image * image, sdepth=cv2.CV_64F)
        ends = []
        for side, other_side, shifts in zip(image.shape, other.shape, (sign * rows, sign * columns), strict=True):
            low = np.clip(shifts, 0, side)
            ends.append((low, np.maximum(low, np.clip(other_side + shifts, 0, side))))
        (top, bottom), (left, right) = ends
        product *= (
            sums[np.ix_(bottom, right)]
            - sums[np.ix_(top, right)]
            - sums[np.ix_(bottom, left)]
            + sums[np.ix_(top, left)]
        )
    return np.maximum(product, 0)


def _climb(spectrum: Spectrum, size: tuple[int, int], row: int, column: int) -> tuple[float, float]:
    """(row, column) of the nearest maximum of the trigonometric interpolation, by Newton's method."""
    wave_rows = 2 * np.pi * fft.fftfreq(size[0])
    wave_columns = 2 * np.pi * fft.rfftfreq(size[1])
    weight = np.where((wave_columns > 0) & (wave_columns < np.pi), 2.0, 1.0)  # the half that rfft leaves out
    y, x = float(row), float(column)
    for _ in range(6):
        along_y = np.exp(1j * wave_rows * y) * np.stack([wave_rows**0, 1j * wave_rows, -(wave_rows**2)])
        along_x = weight * np.exp(1j * wave_columns * x)
        along_x = along_x * np.stack([wave_columns**0, 1j * wave_columns, -(wave_columns**2)])
        # [i, j]: the i-th derivative by y and the j-th by x
        found = (along_y.astype(np.complex64) @ spectrum @ along_x.T.astype(np.complex64)).real.astype(np.float64)
        slope = np.array([found[1, 0], found[0, 1]])
        curve = np.array([[found[2, 0], found[1, 1]], [found[1, 1], found[0, 2]]])
        if curve[0, 0] >= 0 or np.linalg.det(curve) <= 0:
            break  # no summit here
        step = -np.linalg.solve(curve, slope)
        y, x = y + float(np.clip(step[0], -0.5, 0.5)), x + float(np.clip(step[1], -0.5, 0.5))
        if abs(y - row) > 1 or abs(x - column) > 1:
            break
        if np.abs(step).max() < 1e-3:
            return y, x
    return (y, x) if abs(y - row) <= 1 and abs(x - column) <= 1 else (float(row), float(column))

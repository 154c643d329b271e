"""A threshold that assumes white Gaussian noise: what `parametric_noise` rests on instead of a conformal promise.

If two pictures of a scene differ by white Gaussian noise only, the absolute difference of a pixel is half-normal.
Its standard deviation follows from the median absolute deviation about zero, which a few defective pixels do not move
(Hampel, The influence curve and its role in robust estimation, JASA 1974). In colour, a score is the mean of three
such values, whose law is known, too, if the channels' noise is independent and equally strong. NumPy and SciPy only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy import integrate, optimize, stats

from blemish.data.images import FloatArray
from blemish.errors import CalibrationError, ConfigError

# Values within this fraction of each other are one value, which floating point computed in two ways; and a median that
# more than this share of the pixels has is that of rounded values.
_SAME, _MANY = 1e-3, 0.01
_BINS = np.linspace(0.0, 8.0, 513)
# Beyond these the assumption is called doubtful: rules of thumb on the size of an effect, as with millions of pixels
# a test would refuse every real image.
_LARGEST_KS, _LARGEST_CORRELATION, _LARGEST_SPREAD = 0.05, 0.1, 1.5


@cache
def noise_level(probability: float, channels: int = 1) -> float:
    """What the mean over `channels` of |e|, e independent and standard normal, exceeds with `probability` in (0, 1).

    Raises:
        ConfigError: neither 1 nor 3 channels.
    """
    if channels == 1:
        return float(stats.norm.isf(probability / 2))
    if channels != 3:
        raise ConfigError(
            f"A threshold from noise needs images of 1 or 3 channels, found {channels}: choose another threshold."
        )
    # A mean is no larger than the largest of its three values, so the union bound brackets it.
    highest = stats.norm.isf(probability / 6)
    return float(optimize.brentq(lambda level: _sum_of_three_exceeds(3 * level) - probability, 0, highest, xtol=1e-10))


def _sum_of_three_exceeds(total: float) -> float:
    """P(|e1| + |e2| + |e3| > total): {|e1| + |e2| <= u} is a square on its corner, and a turned normal is a normal."""

    def part(third: float) -> float:
        beyond = math.erfc((total - third) / 2)
        return math.sqrt(2 / math.pi) * math.exp(-third * third / 2) * beyond * (2 - beyond)

    return math.erfc(total / math.sqrt(2)) + float(integrate.quad(part, 0, total, epsabs=0, epsrel=1e-9)[0])


def robust_sigma(values: FloatArray, channels: int = 1) -> float:
    """The noise's standard deviation in one channel, from scores >= 0 of any shape; 0 where more than half are 0.

    A score is the mean of |e| over `channels`. Images of whole grey levels leave few different scores, and their
    median is up to half a step off: the pixels that tie with it are spread evenly over that step.
    """
    median = float(np.median(values))
    below = values < median * (1 - _SAME)
    ties = int(np.count_nonzero(values <= median * (1 + _SAME))) - (lower := int(np.count_nonzero(below)))
    if lower and ties > max(1, _MANY * values.size):
        step = median - float(values[below].max())
        median += step * ((values.size / 2 - lower) / ties - 0.5)
    return median / noise_level(0.5, channels)


@dataclass(frozen=True)
class Noise:
    """White Gaussian noise as estimated from score maps of normal images, and how well it describes them.

    sigma: median over images of their robust standard deviation, in units of the score. pixels: of the largest image.
    ks: Kolmogorov-Smirnov distance of the pixels, each divided by its image's sigma, to the half-normal law.
    correlation: of horizontal and vertical neighbours; white noise has none. spread: largest sigma / smallest sigma.
    """

    sigma: float
    pixels: int
    ks: float
    correlation: float
    spread: float

    def threshold(self, alpha: float) -> float:
        """Exceeded by any of `pixels` independent pixels with probability `alpha` (Sidak, JASA 1967).

        A float32, like the pixels: to these NumPy compares in float32, to an image's score Python in float64.
        """
        per_pixel = -math.expm1(math.log1p(-alpha) / self.pixels)
        return float(np.float32(self.sigma * noise_level(per_pixel)))

    def warnings(self) -> list[str]:
        """One sentence for each way in which the score maps contradict the assumption; empty if none."""
        found = []
        if self.ks > _LARGEST_KS:
            found.append(
                f"the score maps are not the absolute value of Gaussian noise (distance {self.ks:.2f}, expected at "
                f"most {_LARGEST_KS}): use residual=l1 with smoothing.sigma=0, or a mask rule that assumes nothing"
            )
        if self.correlation > _LARGEST_CORRELATION:
            found.append(
                f"neighbouring pixels are correlated ({self.correlation:.2f}, expected at most "
                f"{_LARGEST_CORRELATION}): the noise is not white"
            )
        if self.spread > _LARGEST_SPREAD:
            found.append(
                f"the noise differs between images (by a factor of {self.spread:.1f}, expected at most "
                f"{_LARGEST_SPREAD}): one threshold does not fit all"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Noise:
        return cls(**content)


class NoiseEstimator:
    """Collects score maps one by one; memory does not grow with them, but for a number each."""

    def __init__(self) -> None:
        self._sigmas: list[float] = []
        self._correlations: list[float] = []
        self._counts = np.zeros(len(_BINS) - 1)
        self._pixels = 0

    def add(self, score_map: FloatArray) -> None:
        """(H, W) >= 0, the absolute difference of observed and expected.

        Raises:
            CalibrationError: most of the map is exactly 0, so that there is no noise to estimate.
        """
        sigma = robust_sigma(score_map)
        if sigma <= 0:
            raise CalibrationError(
                "At least half of a score map is exactly 0, so that its noise cannot be estimated: choose another "
                f"calibration.mask_rule than parametric_noise (median {float(np.median(score_map)):g})."
            )
        self._sigmas.append(sigma)
        self._counts += np.histogram(np.minimum(score_map / sigma, _BINS[-1]), _BINS)[0]
        self._correlations.append(_neighbour_correlation(score_map))
        self._pixels = max(self._pixels, score_map.size)

    def result(self) -> Noise:
        if not self._sigmas:
            raise CalibrationError("There is no score map to estimate noise from: expected at least one normal image.")
        observed = np.cumsum(self._counts) / self._counts.sum()
        distance = np.abs(observed - stats.halfnorm.cdf(_BINS[1:])).max()
        return Noise(
            sigma=float(np.median(self._sigmas)),
            pixels=self._pixels,
            ks=float(distance),
            correlation=float(np.median(self._correlations)),
            spread=max(self._sigmas) / min(self._sigmas),
        )


def _neighbour_correlation(score_map: FloatArray) -> float:
    centred = score_map.astype(np.float64) - score_map.mean()
    variance = float((centred**2).mean())
    pairs = [centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]]
    products = [float(pair.mean()) for pair in pairs if pair.size]
    return max(products, default=0.0) / variance if variance > 0 else 0.0

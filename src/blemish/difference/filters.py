"""What both images go through before they are compared: a chain of filters, each known by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from blemish.alignment.illumination import equalise
from blemish.data.images import FloatArray
from blemish.errors import ConfigError, ImageError, nearest_names

_LEAST_SPREAD = 0.02  # of an image in [0, 1]: noise on an even surface is not blown up further

WIDEST = 256  # pixels that any filter may reach: what it costs grows with them


@dataclass(frozen=True)
class Filters:
    """A chain of filters of images (H, W, C) in [0, 1]; the result is in [0, 1], too.

    Args:
        chain: in this order, any of: identity; normalise, to a mean of 0.5 and a standard deviation of 0.2, over all
            channels; low_pass, Gaussian; high_pass, what low_pass leaves out, about 0.5; wavelet, the detail bands
            alone, about 0.5; clahe, contrast-limited adaptive histogram equalisation. What lies beyond [0, 1] is cut.
        sigma: of low_pass and high_pass, in pixels; at most 256, as the time it takes grows with it.
        wavelet: its name in PyWavelets.
        levels: how many detail bands, from the finest on; fewer where the image is too small for so many.

    Sources: Mallat, A theory for multiresolution signal decomposition, IEEE PAMI 1989 (wavelet); Zuiderveld, Contrast
    limited adaptive histogram equalization, Graphics Gems IV 1994 (clahe).

    Raises:
        ConfigError: unknown names, or a number out of range.
    """

    chain: Sequence[str] = ()
    sigma: float = 4.0
    wavelet: str = "db2"
    levels: int = 3

    def __post_init__(self) -> None:
        check_chain("preprocessing.chain", self.chain, FILTERS)
        if not (0 < self.sigma <= WIDEST and self.levels >= 1):
            raise ConfigError(
                f"Expected preprocessing.sigma above 0 and at most {WIDEST} and preprocessing.levels >= 1, found "
                f"{self.sigma} and {self.levels}."
            )
        if "wavelet" in self.chain:
            import pywt

            if self.wavelet not in (known := pywt.wavelist(kind="discrete")):
                raise ConfigError(
                    f"Unknown preprocessing.wavelet '{self.wavelet}': {nearest_names(self.wavelet, known)}"
                )

    def __call__(self, image: FloatArray) -> FloatArray:
        """(H, W, C) -> (H, W, C), contiguous.

        Raises:
            ImageError: the image is too small for the wavelet.
        """
        image = np.ascontiguousarray(image)
        for name in self.chain:
            image = FILTERS[name](self, image)
        return image


def check_chain(setting: str, chain: Sequence[str], known: Iterable[str]) -> None:
    """Raises ConfigError unless `chain`, the value of a setting, is a list of known names."""
    if isinstance(chain, str):
        raise ConfigError(f"Expected {setting} to be a list of filters, found '{chain}': write [{chain}].")
    for name in chain:
        if name not in known:
            raise ConfigError(f"Unknown filter '{name}' in {setting}: {nearest_names(str(name), known)}")


def _normalise(settings: Filters, image: FloatArray) -> FloatArray:
    spread = max(float(image.std(dtype=np.float64)), _LEAST_SPREAD)
    return _about_grey((image - np.float32(image.mean(dtype=np.float64))) * np.float32(0.2 / spread))


def _low_pass(settings: Filters, image: FloatArray) -> FloatArray:
    smooth = cv2.GaussianBlur(image, (0, 0), settings.sigma, borderType=cv2.BORDER_REFLECT)
    return np.asarray(smooth, np.float32).reshape(image.shape).clip(0, 1)


def _high_pass(settings: Filters, image: FloatArray) -> FloatArray:
    return _about_grey(image - _low_pass(settings, image))


def _wavelet(settings: Filters, image: FloatArray) -> FloatArray:
    import pywt

    rows, columns = image.shape[:2]
    length = pywt.Wavelet(settings.wavelet).dec_len
    # Deeper than the image allows, there is border only.
    deepest = pywt.dwt_max_level(min(rows, columns), length)
    if deepest < 1:
        raise ImageError(
            f"The wavelet '{settings.wavelet}' needs images of at least {2 * (length - 1)} pixels a side, found "
            f"{rows} x {columns}: choose a shorter preprocessing.wavelet."
        )
    parts = pywt.wavedec2(image, settings.wavelet, level=min(settings.levels, deepest), axes=(0, 1))
    parts[0] = np.zeros_like(parts[0])
    # An odd side comes back one longer.
    return _about_grey(pywt.waverec2(parts, settings.wavelet, axes=(0, 1))[:rows, :columns])


def _about_grey(image: FloatArray) -> FloatArray:
    return np.ascontiguousarray((image + np.float32(0.5)).clip(0, 1), np.float32)


FILTERS: dict[str, Callable[[Filters, FloatArray], FloatArray]] = {
    "identity": lambda settings, image: image,
    "normalise": _normalise,
    "low_pass": _low_pass,
    "high_pass": _high_pass,
    "wavelet": _wavelet,
    "clahe": lambda settings, image: equalise(image),
}

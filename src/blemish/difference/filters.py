"""What both images go through before they are compared: a chain of filters, each known by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from blemish.alignment.illumination import equalise
from blemish.data.images import FloatArray
from blemish.errors import ConfigError, nearest_names


@dataclass(frozen=True)
class Filters:
    """A chain of filters of images (H, W, C) in [0, 1]; the result is in [0, 1], too.

    Args:
        chain: in this order, any of: identity; normalise, to a mean of 0.5 and a standard deviation of 0.2;
            low_pass, Gaussian; high_pass, what low_pass leaves out, about 0.5; wavelet, the detail bands alone, about
            0.5; clahe, contrast-limited adaptive histogram equalisation.
        sigma: of low_pass and high_pass, in pixels.
        wavelet: its name in PyWavelets. levels: how many detail bands, from the finest on.

    Raises:
        ConfigError: unknown names, or a number out of range.
    """

    chain: Sequence[str] = ()
    sigma: float = 4.0
    wavelet: str = "db2"
    levels: int = 3

    def __post_init__(self) -> None:
        for name in self.chain:
            if name not in FILTERS:
                raise ConfigError(f"Unknown filter '{name}' in preprocessing.chain: {nearest_names(name, FILTERS)}")
        if self.sigma <= 0 or self.levels < 1:
            raise ConfigError(
                f"Expected preprocessing.sigma > 0 and preprocessing.levels >= 1, found {self.sigma} and {self.levels}."
            )
        if "wavelet" in self.chain:
            import pywt

            if self.wavelet not in (known := pywt.wavelist(kind="discrete")):
                raise ConfigError(
                    f"Unknown preprocessing.wavelet '{self.wavelet}': {nearest_names(self.wavelet, known)}"
                )

    def __call__(self, image: FloatArray) -> FloatArray:
        """(H, W, C) -> (H, W, C)."""
        for name in self.chain:
            image = FILTERS[name](self, image)
        return image


def _normalise(settings: Filters, image: FloatArray) -> FloatArray:
    spread = max(float(image.std()), 1 / 255)
    return _about_grey((image - image.mean()) * np.float32(0.2 / spread))


def _low_pass(settings: Filters, image: FloatArray) -> FloatArray:
    smooth = cv2.GaussianBlur(image, (0, 0), settings.sigma, borderType=cv2.BORDER_REFLECT)
    return np.asarray(smooth, np.float32).reshape(image.shape)


def _high_pass(settings: Filters, image: FloatArray) -> FloatArray:
    return _about_grey(image - _low_pass(settings, image))


def _wavelet(settings: Filters, image: FloatArray) -> FloatArray:
    import pywt

    # Deeper than the image allows, there is border only.
    deepest = pywt.dwt_max_level(min(image.shape[:2]), pywt.Wavelet(settings.wavelet).dec_len)
    parts = pywt.wavedec2(
        image, settings.wavelet, mode="symmetric", level=max(1, min(settings.levels, deepest)), axes=(0, 1)
    )
    parts[0] = np.zeros_like(parts[0])
    details = pywt.waverec2(parts, settings.wavelet, mode="symmetric", axes=(0, 1))
    return _about_grey(np.asarray(details[: image.shape[0], : image.shape[1]], np.float32))


def _about_grey(image: FloatArray) -> FloatArray:
    return np.asarray((image + np.float32(0.5)).clip(0, 1), np.float32)


FILTERS: dict[str, Callable[[Filters, FloatArray], FloatArray]] = {
    "identity": lambda settings, image: image,
    "normalise": _normalise,
    "low_pass": _low_pass,
    "high_pass": _high_pass,
    "wavelet": _wavelet,
    "clahe": lambda settings, image: equalise(image),
}

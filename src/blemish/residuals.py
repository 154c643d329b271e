"""Per-pixel distances between observed and expected; the training loss is the mean of the same object.

Every residual maps two (B, C, H, W) tensors with values around [0, 1] to (B, 1, H, W), >= 0 and 0 where they
are equal; those that compare each place on its own take features (B, D, h, w), too. Channels are averaged. Computed in
float32, also under autocast: differences of near-equal numbers do not survive 8 bits of mantissa.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.blur import blurred, gaussian_window
from blemish.errors import ConfigError


class Residual(nn.Module, ABC):
    """Base: subclasses implement `distance`.

    pixels_only: it looks at edges, windows or photographs, and makes no sense of a backbone's features.
    """

    pixels_only = False

    def forward(self, observed: Tensor, expected: Tensor) -> Tensor:
        """(B, C, H, W) x 2 -> (B, 1, H, W)."""
        with torch.autocast(observed.device.type, enabled=False):
            return self.distance(observed.float(), expected.float())

    @abstractmethod
    def distance(self, observed: Tensor, expected: Tensor) -> Tensor:
        """As `forward`, in float32."""


class L1(Residual):
    """Absolute difference."""

    def distance(self, observed: Tensor, expected: Tensor) -> Tensor:
        return (observed - expected).abs().mean(dim=1, keepdim=True)


class L2(Residual):
    """Squared difference."""

    def distance(self, observed: Tensor, expected: Tensor) -> Tensor:
        return (observed - expected).square().mean(dim=1, keepdim=True)


class Windowed(Residual):
    """Base of residuals that look through a Gaussian window of 11 pixels, sigma 1.5; borders reflect.

    Raises:
        ConfigError: (in `forward`) a side is shorter than 6 pixels.
    """

    pixels_only = True
    window: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", gaussian_window(1.5, 5), persistent=False)

    def blur(self, x: Tensor) -> Tensor:
        """The window's weighted mean about each pixel, of the same shape."""
        if min(x.shape[-2:]) < 6:
            raise ConfigError(
                f"{type(self).__name__} needs at least 6 pixels a side, found {x.shape[-2]} x {x.shape[-1]}: "
                "use larger tiles or fewer scales."
            )
        return blurred(x, self.window.to(x))


class PSNR(Windowed):
    """How far the local peak signal-to-noise ratio lies below `cap` decibels, as a share of it.

    The mean squared error is that of SSIM's Gaussian window, the peak is 1. In [0, 1] for images in [0, 1]; 0 where
    the error is at most 10^(-cap / 10), and the gradient is 0 there, too.

    Raises:
        ConfigError: cap not above 0, or (in `forward`) a side is shorter than 6 pixels.
    """

    def __init__(self, cap: float = 60.0) -> None:
        super().__init__()
        if not cap > 0:
            raise ConfigError(f"Expected residual.cap > 0, in decibels, found {cap}.")
        self.cap = cap

    def distance(self, observed: Tensor, expected: Tensor) -> Tensor:
        error = self.blur((observed - expected).square().mean(dim=1, keepdim=True))
        # In units of the cap's error, so that the logarithm is exactly 0 up to there.
        return (error * 10 ** (self.cap / 10)).clamp(min=1).log10() * (10 / self.cap)


class SSIM(Windowed):
    """Structural dissimilarity (1 - SSIM) / 2, in [0, 1].

    Source: Wang et al., Image quality assessment, IEEE TIP 2004: Gaussian window of 11 pixels, sigma 1.5,
    C1 = 0.01^2, C2 = 0.03^2. Borders reflect, so the map has the images' size.

    Raises:
        ConfigError: a side is shorter than 6 pixels.
    """

    def __init__(self, c1: float = 0.01**2, c2: float = 0.03**2) -> None:
        super().__init__()
        self.c1, self.c2 = c1, c2

    def distance(self, observed: Tensor, expected: Tensor) -> Tensor:
        luminance, structure = self.parts(observed, expected)
        similarity = (luminance * structure).mean(dim=1, keepdim=True)
        return ((1 - similarity) / 2).clamp(min=0)

    def parts(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The luminance and the contrast-structure terms of SSIM, each (B, C, H, W)."""
        channels = x.shape[1]
        moments = self.blur(torch.cat([x, y, x * x, y * y, x * y], dim=1))
        mean_x, mean_y, xx, yy, xy = torch.split(moments, channels, dim=1)
        luminance = (2 * mean_x * mean_y + self.c1) / (mean_x.square() + mean_y.square() + self.c1)
        variances = (xx - mean_x.square()) + (yy - mean_y.square())
        return luminance, (2 * (xy - mean_x * mean_y) + self.c2) / (variances + self.c2)


class MultiScaleSSIM(Residual):
    """1 - MS-SSIM per pixel, in [0, 1]: contrast and structure of every scale, luminance of the coarsest.

    Source: Wang et al., Multiscale structural similarity, Asilomar 2003, and its five weights (fewer scales use
    the first ones, rescaled to sum to 1). Maps of coarse scales are enlarged bilinearly.

    Raises:
        ConfigError: scales not in 1 to 5, or (in `forward`) a side is shorter than 6 * 2^(scales - 1) pixels.
    """

    pixels_only = True
    _WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)

    def __init__(self, scales: int = 4) -> None:
        super().__init__()
        if not 1 <= scales <= len(self._WEIGHTS):
            raise ConfigError(f"Expected residual.scales between 1 and {len(self._WEIGHTS)}, found {scales}.")
        total = sum(self._WEIGHTS[:scales])
        self.weights = [weight / total for weight in self._WEIGHTS[:scales]]
        self.ssim = SSIM()

    def distance(self, observed: Tensor, expected: Tensor) -> Tensor:
        size = observed.shape[-2:]
        similarity = observed.new_ones(())
        for scale, weight in enumerate(self.weights):
            luminance, structure = self.ssim.parts(observed, expected)
            last = scale == len(self.weights) - 1
            term = (luminance * structure if last else structure).clamp(min=1e-6).pow(weight)
            # Enlarging the difference from 1 keeps equal images at exactly 0.
            similarity = similarity * (1 - F.interpolate(1 - term, size, mode="bilinear", align_corners=False))
            if not last:
                observed, expected = F.avg_pool2d(observed, 2), F.avg_pool2d(expected, 2)
        return (1 - similarity.mean(dim=1, keepdim=True)).clamp(min=0)


class GradientMagnitude(Residual):
    """1 - gradient magnitude similarity, averaged over channels and scales, in [0, 1].

    Source: Xue et al., Gradient magnitude similarity deviation, IEEE TIP 2014 (Prewitt filters, c = 170 / 255^2);
    several scales as in Zavrtanik et al., RIAD, Pattern Recognition 2021. Unlike there, channels are compared one by
    one: in their mean, a change of hue at the same brightness is none.

    Raises:
        ConfigError: scales below 1, or (in `forward`) a side is shorter than 2^scales pixels.
    """

    pixels_only = True

    def __init__(self, scales: int = 3, c: float = 170 / 255**2) -> None:
        super().__init__()
        if scales < 1:
            raise ConfigError(f"Expected residual.scales >= 1, found {scales}.")
        self.scales, self.c = scales, c

    def distance(self, observed: Tensor, expected: Tensor) -> Tensor:
        size = observed.shape[-2:]
        if min(size) < 2**self.scales:
            raise ConfigError(
                f"A gradient residual of {self.scales} scales needs {2**self.scales} pixels a side, found "
                f"{size[0]} x {size[1]}: use larger tiles or fewer scales."
            )
        x, y = observed.flatten(0, 1)[:, None], expected.flatten(0, 1)[:, None]
        total = torch.zeros_like(x)
        for scale in range(self.scales):
            difference = 1 - self.similarity(x, y)
            if scale:
                difference = F.interpolate(difference, size, mode="bilinear", align_corners=False)
            total = total + difference
            if scale < self.scales - 1:
                x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        return (total / self.scales).clamp(min=0).reshape(observed.shape).mean(dim=1, keepdim=True)

    def similarity(self, x: Tensor, y: Tensor) -> Tensor:
        """Gradient magnitude similarity of two (N, 1, H, W) images at one scale."""
        a, b = self._magnitude(x), self._magnitude(y)
        return (2 * a * b + self.c) / (a.square() + b.square() + self.c)

    def _magnitude(self, x: Tensor) -> Tensor:
        # By sums of slices: a convolution of one channel takes ten times as long on a CPU.
        x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        rows = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
        columns = x[..., :-2] + x[..., 1:-1] + x[..., 2:]
        across, down = rows[..., :-2] - rows[..., 2:], columns[..., :-2, :] - columns[..., 2:, :]
        # The small number keeps the square root's slope finite on flat areas.
        return ((across.square() + down.square()) / 9 + 1e-12).sqrt()


class WeightedSum(Residual):
    """Sum of residuals, each times its weight.

    Raises:
        ConfigError: no term, a negative weight, or not one weight per term.
    """

    def __init__(self, terms: Sequence[Residual], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        weights = [1.0] * len(terms) if weights is None else list(weights)
        if not terms or len(weights) != len(terms) or min(weights) < 0:
            raise ConfigError(
                f"Expected one weight >= 0 per residual, found {len(terms)} residuals and weights {weights}."
            )
        self.terms = nn.ModuleList(terms)
        self.weights = weights
        self.pixels_only = any(term.pixels_only for term in terms)

    def distance(self, observed: Tensor, expected: Tensor) -> Tensor:
        parts = [weight * term(observed, expected) for weight, term in zip(self.weights, self.terms, strict=True)]
        return torch.stack(parts).sum(dim=0)

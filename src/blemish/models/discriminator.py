"""The opponents of adversarial models: networks whose slope is bounded, so that they cannot win too clearly."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.models.contracts import Judgement


class _Activation(nn.LeakyReLU):
    """A leaky ReLU of slope 0.2 that keeps the mean square (He et al., arXiv 1502.01852).

    Without the gain, what layers of spectral norm 1 see would shrink from each to the next, and the last one could
    tell nothing apart.
    """

    def __init__(self) -> None:
        super().__init__(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.negative_slope) * math.sqrt(2 / (1 + self.negative_slope**2))


class SpectralConv2d(nn.Conv2d):
    """A convolution whose weights, as a matrix (outputs, inputs * k * k), have the spectral norm 1.

    Source: Miyato et al., Spectral normalization for generative adversarial networks, arXiv 1802.05957: one step of
    power iteration each time it is used in training. Written out, as torch's own mixes types under autocast.
    """

    direction: Tensor  # (outputs,), the first left singular vector, approached

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding)
        self.register_buffer("direction", F.normalize(torch.randn(outputs), dim=0))
        for _ in range(15):  # near enough from the first step on
            self._iterate()

    def spectral_norm(self) -> Tensor:
        """Of the weights as they are stored: a scalar > 0 that gradients pass through, in float32."""
        with torch.autocast(self.weight.device.type, enabled=False):
            if self.training:
                self._iterate()
            matrix = self.weight.float().flatten(1)
            left = self.direction.clone()  # the next iteration must not change what the gradient needs
            right = F.normalize(matrix.detach().T @ left, dim=0)
            norm: Tensor = left @ matrix @ right
            return norm

    @torch.no_grad()
    def _iterate(self) -> None:
        matrix = self.weight.float().flatten(1)
        right = F.normalize(matrix.T @ self.direction, dim=0)
        self.direction.copy_(F.normalize(matrix @ right, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, h, w)."""
        return F.conv2d(x, self.weight / self.spectral_norm(), self.bias, self.stride, self.padding)


class Discriminator(nn.Module):
    """Judges patches (Isola et al., arXiv 1611.07004), each on its own, without batch statistics."""

    def __init__(self, trunk: nn.Sequential, features: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = SpectralConv2d(features, 1, 1)

    def forward(self, x: Tensor) -> Judgement:
        """What it judges -> logits (B, 1, h, w) and features (B, F, h, w), in float32; (B, D) counts as one place."""
        features = self.trunk(x if x.ndim == 4 else x[:, :, None, None])
        return Judgement(self.head(features).float(), features.float())


def of_tiles(channels: int, widths: list[int]) -> Discriminator:
    """Judges tiles: (B, C, H, W) -> a grid of (H / 2^depth, W / 2^depth), one level for each of `widths`."""
    layers: list[nn.Module] = []
    for features in widths:
        layers += [SpectralConv2d(channels, features, 4, stride=2, padding=1), _Activation()]
        channels = features
    return Discriminator(nn.Sequential(*layers), channels)


def of_codes(dimensions: int, hidden: int = 128) -> Discriminator:
    """Judges codes (B, D, h, w), each place on its own, or (B, D)."""
    first, second = SpectralConv2d(dimensions, hidden, 1), SpectralConv2d(hidden, hidden, 1)
    return Discriminator(nn.Sequential(first, _Activation(), second, _Activation()), hidden)


def parameters_beside(model: nn.Module, discriminator: nn.Module) -> list[nn.Parameter]:
    """All parameters of the model but the discriminator's."""
    own = set(discriminator.parameters())
    return [parameter for parameter in model.parameters() if parameter not in own]

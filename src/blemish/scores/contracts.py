"""What a score is, what it may ask of a model, and what scores share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.errors import ConfigError
from blemish.models.contracts import Latent, Output

NO_GRADIENTS = "it follows gradients while it scores, which no exported graph does"
NO_RANDOM_NUMBERS = "it draws from PyTorch's random numbers while it scores, which other engines do not have"
"""Why some scores are `Unexportable`."""


class Score(Protocol):
    """Turns a model in evaluation mode and tiles into score tiles; owns the gradient mode."""

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1], or standardised -> (B, 1, H, W), >= 0, higher is worse, each tile on its own."""


@runtime_checkable
class FittableScore(Protocol):
    """A score that learns of normal tiles after training, and keeps it in buffers, which the checkpoint carries."""

    def fit(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """Batches of normal tiles (B, C, H, W) in [0, 1], or standardised, none of which calibrates."""


@runtime_checkable
class LearningScore(Protocol):
    """A score, or a part of one, that first learns of the tiles that trained the model, and keeps it in buffers."""

    def learn(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """Batches of training tiles as for `FittableScore`; may be gone through several times."""


def learning_parts(score: Score) -> list[LearningScore]:
    """The score itself, and what it is made of, as far as they learn of training tiles."""
    parts = score.modules() if isinstance(score, nn.Module) else [score]
    return [part for part in parts if isinstance(part, LearningScore)]


class ExplainedScore(nn.Module, ABC):
    """Base of the scores that tell what they expected: subclasses implement `explain`."""

    def forward(self, model: nn.Module, x: Tensor) -> Tensor:
        """As `Score`."""
        return self.explain(model, x)[0]

    @abstractmethod
    def explain(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """The score, and what a defect-free tile would have shown: (B, D, h, w)."""


def explain(score: Score, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """A score, and what it expected: (B, D, h, w), with D = 0 for a score that does not tell."""
    if not hasattr(score, "explain"):
        return score(model, x), x[:, :0]
    explained: tuple[Tensor, Tensor] = score.explain(model, x)
    return explained


@contextmanager
def gradients() -> Iterator[None]:
    """Gradients are recorded here, whatever the caller's mode; a tensor from outside must be cloned first."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def gradient(score: nn.Module, value: Tensor, x: Tensor) -> Tensor:
    """d value / dx, of a scalar that was computed from x; no parameter collects any.

    Raises:
        ConfigError: no gradient passes through the model.
    """
    slope: Tensor | None = None
    if value.requires_grad:
        (slope,) = torch.autograd.grad(value, x, allow_unused=True)
    if slope is None:
        raise ConfigError(
            f"{type(score).__name__} follows gradients from the model's output back to its input, and found none: use "
            "a score that needs no gradient, such as score=residual."
        )
    return slope


def latents_of(output: Output, score: nn.Module) -> tuple[Latent, ...]:
    """The levels of a model's latent code. Raises ConfigError if it has none."""
    if not output.latents:
        raise ConfigError(
            f"{type(score).__name__} expects a model with a latent distribution, such as model=vae, found one "
            "without: choose another model, or another score."
        )
    return output.latents


def expected_tile(output: Output, x: Tensor, score: nn.Module) -> Tensor:
    """What the model expected, in pixels like x. Raises ConfigError if it is something else."""
    if output.expected.shape != x.shape:
        raise ConfigError(
            f"{type(score).__name__} expects a model that gives back a tile of shape {tuple(x.shape[1:])}, found "
            f"{tuple(output.expected.shape[1:])}: choose a model in pixel space, or another score."
        )
    return output.expected


def residual_tile(residual: nn.Module, output: Output, x: Tensor) -> Tensor:
    """The residual of what a model said of the tiles x, (B, 1, H, W); a coarser grid is enlarged bilinearly.

    Raises:
        ConfigError: the model does not say what it expects; or it compares features, and the residual pixels.
    """
    if output.evidence is not None:
        raise ConfigError(
            f"{type(residual).__name__} compares what is observed with what is expected, and the model judges without "
            "expecting anything: set score=evidence, or choose another model."
        )
    if output.observed.shape[-2:] != x.shape[-2:] and getattr(residual, "pixels_only", False):
        raise ConfigError(
            f"{type(residual).__name__} compares pixels, and the model features of shape "
            f"{tuple(output.observed.shape[1:])}: set score=residual residual=l2, or choose a model in pixel space."
        )
    return enlarged(residual(output.observed, output.expected), x)


def enlarged(values: Tensor, like: Tensor) -> Tensor:
    """(B, 1, h, w) -> (B, 1, H, W), those of `like`, bilinearly."""
    size = like.shape[-2:]
    return values if values.shape[-2:] == size else F.interpolate(values, size, mode="bilinear", align_corners=False)


def compared(residual: Tensor, output: Output) -> Tensor:
    """A residual (B, 1, H, W) in units of what normal tiles show, 0 where there is nothing to compare with."""
    if output.spread is not None:
        residual = residual / enlarged(output.spread, residual)
    # A pixel between places of a coarser grid counts only if all of them do.
    return residual if output.valid is None else residual * (enlarged(output.valid.float(), residual) == 1)


def bounded(y: Tensor, x: Tensor) -> Tensor:
    """y kept to [0, 1], or to the range of the tiles x where that is wider: standardised tiles leave [0, 1]."""
    return torch.minimum(torch.maximum(y, x.amin((1, 2, 3), True).clamp(max=0)), x.amax((1, 2, 3), True).clamp(min=1))


def check_counts(**numbers: int) -> None:
    """Raise ConfigError if one of a score's numbers is no count."""
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise ConfigError(f"Expected score.{name} to be a positive whole number, found {number}.")


def check_positive(**numbers: float) -> None:
    """Raise ConfigError if one of a score's numbers is not above 0."""
    for name, number in numbers.items():
        if not number > 0:
            raise ConfigError(f"Expected score.{name} > 0, found {number}.")


def check_not_negative(**numbers: float) -> None:
    """Raise ConfigError if one of a score's numbers is below 0."""
    for name, number in numbers.items():
        if not number >= 0:
            raise ConfigError(f"Expected score.{name} >= 0, found {number}.")

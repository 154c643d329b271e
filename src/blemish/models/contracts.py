"""What every model returns, in training and in use alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from blemish.seen import Seen


@runtime_checkable
class PartOfAnotherRun(Protocol):
    """A module that another run trained: its images can no more calibrate than the model's own.

    run: that run, for messages.
    """

    run: str
    seen: Seen


class Gaussian(NamedTuple):
    """A diagonal normal distribution over a latent code; both tensors of shape (B, D) or (B, D, h, w)."""

    mean: Tensor
    log_variance: Tensor

    def sample(self) -> Tensor:
        """A draw that gradients pass through (Kingma and Welling, arXiv 1312.6114, the reparametrisation trick)."""
        return self.mean + torch.exp(0.5 * self.log_variance) * torch.randn_like(self.mean)

    def kl(self, prior: Gaussian | None = None) -> Tensor:
        """KL divergence to the prior (None: the standard normal), per latent dimension, in nats; shape of `mean`."""
        if prior is None:
            return 0.5 * (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance)
        spread = self.log_variance - prior.log_variance
        distance = (self.mean - prior.mean).square() * torch.exp(-prior.log_variance)
        return 0.5 * (distance + spread.exp() - 1 - spread)


class Latent(NamedTuple):
    """One level of a latent code: what the encoder says of it, and what was expected of it before looking.

    prior: None for the standard normal; a hierarchical model has one that depends on the level above.
    """

    posterior: Gaussian
    prior: Gaussian | None = None

    def kl(self) -> Tensor:
        """KL divergence from prior to posterior, per latent dimension, in nats: (B, D) or (B, D, h, w)."""
        return self.posterior.kl(self.prior)


class Pair(NamedTuple):
    """What a model compares beside pixels, such as two codes or two looks of a discriminator: both (B, D, h, w)."""

    observed: Tensor
    expected: Tensor


class Output(NamedTuple):
    """Observed against expected.

    observed, expected: (B, D, h, w); for models in pixel space D = C and h, w are the tile's. While it trains, an
        `Observing` model, which is compared with what is observed of clean tiles, may give zeros as observed.
    latents: the levels of the code's distribution, for models that have one.
    penalty: a scalar >= 0 that the model wants minimised beside the residual, for models that have one.
    repaired: (B, 1, H, W) logits of the model's own belief that it repaired a pixel, for models that have one.
    valid: (B, 1, h, w) bool, False where there is nothing to compare with; None if there is something everywhere.
    spread: (B, 1, h, w) > 0, how much normal tiles differ from what is expected at each place, for models that know.
    evidence: (B, 1, h, w) >= 0, how unusual each place is, for models that judge without saying what they expect; these
        give what was observed as expected, and no residual can score them (see `EvidenceScore`).
    choice: (B,) int64, which of the model's `classes` (see `classes_of`) each tile is most like, for models that tell.
    features: of what was observed and of what was expected, on a grid of their own, for models that compare both.
    activations: of the network's layers, (B, K, h, w) each, in any order, for models that show them.
    """

    observed: Tensor
    expected: Tensor
    latents: tuple[Latent, ...] = ()
    penalty: Tensor | None = None
    repaired: Tensor | None = None
    valid: Tensor | None = None
    spread: Tensor | None = None
    evidence: Tensor | None = None
    choice: Tensor | None = None
    features: Pair | None = None
    activations: tuple[Tensor, ...] = ()


class FeatureSource(Protocol):
    """What models in feature space look through, the setting `backbone`: a torch module that never changes.

    features: D, the number of features at each place.
    """

    features: int

    def __call__(self, x: Tensor) -> Tensor:
        """(B, 1 or 3, H, W), values around [0, 1] -> (B, D, h, w); the grid's places divide the tile evenly."""


@runtime_checkable
class Encoding(Protocol):
    """A model whose bottleneck others may look at."""

    def encode(self, x: Tensor) -> Tensor:
        """(B, C, H, W), as `forward` takes them -> what the bottleneck says: (B, D, h, w), or (B, D) of the tile."""


@runtime_checkable
class Observing(Protocol):
    """A model that is trained to expect something else than pixels."""

    def observe(self, x: Tensor) -> Tensor:
        """Tiles (B, C, H, W) -> what `Output.expected` would ideally be for defect-free ones: (B, D, h, w)."""


@runtime_checkable
class Preparing(Protocol):
    """A model that looks at normal tiles once before the trainer trains it, and keeps what it learned in its state."""

    def prepare(self, batches: Iterable[Tensor]) -> None:
        """Tiles (B, C, H, W), as the model will see them; may be gone through several times."""

    def release(self) -> None:
        """Training is over: what was kept for it alone, such as a temporary file, is needed no more."""


@runtime_checkable
class Fittable(Protocol):
    """A model that learns of normal tiles by itself, without the trainer, and keeps what it has learned in its state.

    whole_image: it compares whole images, so a tile must be one.
    """

    whole_image: bool

    def fit(self, batches: Iterable[Tensor], labels: Sequence[str | None] = ()) -> None:
        """Tiles (B, C, H, W) in [0, 1], as the model will see them; may be gone through several times.

        `labels`: the class of part of each tile, where the data name it.
        """


@runtime_checkable
class Needing(Protocol):
    """A `Fittable` whose `fit` needs packages that its use does not need."""

    def check_installed(self) -> None:
        """Raises ConfigError if one is missing, before anything is written."""


@runtime_checkable
class Unexportable(Protocol):
    """A part of a model or of a score that no graph for another engine can hold.

    unexportable: why, to stand after "because".
    """

    unexportable: str


Corrupt = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""Clean tiles (B, C, H, W) in [0, 1] -> the corrupted ones, the clean ones, and a mask (B, 1, H, W), 1 where corrupted.

Draws from torch's global generator; this is what a `Corruption` of `blemish.data` is to a model.
"""


@runtime_checkable
class Contrasting(Protocol):
    """A `Fittable` that learns from corrupted tiles, too, and is told how to make them before its `fit`."""

    def contrast_with(self, corrupt: Corrupt) -> None:
        """Not kept in its state: what has been learned needs no more corruption."""


class Judgement(NamedTuple):
    """What a discriminator makes of a batch.

    logits: (B, 1, h, w), above 0 where it takes what it sees for real. features: (B, F, h, w), what it goes by.
    """

    logits: Tensor
    features: Tensor


class Round(NamedTuple):
    """What a model made of a batch in training against a discriminator.

    learners: the parameters that learn now, beside the discriminator's.
    output: for the objective; None where nothing is rebuilt yet.
    real, fake: for the discriminator to tell apart, of one shape; None where it has finished learning.
    """

    learners: Sequence[nn.Parameter]
    output: Output | None = None
    real: Tensor | None = None
    fake: Tensor | None = None


@runtime_checkable
class Adversarial(Protocol):
    """A model that learns against a discriminator; all else about it is as for any other.

    discriminator: from what it judges to a `Judgement`; no other part of the model shares its parameters.
    discriminator_rate: its learning rate, in units of the other parameters'.
    stages: shares of the training, one after the other; their sum is 1. Validation counts in the last one.
    """

    discriminator: nn.Module
    discriminator_rate: float
    stages: tuple[float, ...]

    def play(self, given: Tensor, target: Tensor, stage: int) -> Round:
        """Corrupted tiles and clean ones, both (B, C, H, W), and the number of the stage, from 0."""

    def persuasion(self, real: Judgement, fake: Judgement) -> Tensor:
        """What all but the discriminator minimise beside the objective: a scalar, weighted."""


def remembering(parts: Iterable[object]) -> str | None:
    """The name of a part of a model or of a score that keeps what single training tiles showed, and so finds nothing in
    them: it says `remembers_tiles`. None if there is none."""
    for part in parts:
        for module in part.modules() if isinstance(part, nn.Module) else ():
            if getattr(module, "remembers_tiles", False):
                return type(module).__name__
    return None


def observed_by(model: nn.Module, x: Tensor) -> Tensor:
    """What a model is trained to expect of defect-free tiles: pixels, unless it is `Observing`."""
    return model.observe(x) if isinstance(model, Observing) else x


def parts_of_other_runs(model: nn.Module) -> list[PartOfAnotherRun]:
    """What in a model was trained by other runs."""
    return [part for part in model.modules() if isinstance(part, PartOfAnotherRun)]


def classes_of(model: nn.Module) -> tuple[str, ...]:
    """The names of the classes of parts that a model tells apart by `Output.choice`; none, for most.

    Such a model compares whole images, so that an image is of one class.
    """
    return tuple(getattr(model, "classes", ()))

"""Training against a discriminator: two optimisers, one pass through the model for both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor

from blemish.errors import ConfigError
from blemish.models.contracts import Adversarial, Judgement
from blemish.models.discriminator import parameters_beside
from blemish.training.objectives import Loss
from blemish.training.task import ReconstructionTask

_BETAS = (
    0.5,
    0.999,
)  # of AdamW: a long momentum makes the players circle each other (Radford et al., arXiv 1511.06434)
_WARM_UP = 0.3  # of a stage
_CLIPPING = ("gradient_clip_val", "gradient_clip_algorithm")


class AdversarialTask(ReconstructionTask):
    """Both players learn from the same pass: the discriminator to tell real from fake, the model to persuade it.

    Sources: the hinge loss of Lim and Ye, arXiv 1705.02894, as in Miyato et al., arXiv 1802.05957; two learning rates,
    Heusel et al., arXiv 1706.08500. Gradients are taken at the same point for both, then both step. Each of the model's
    stages has one cycle of the learning rate. `global_step` counts batches, as for other models. In validation, the
    reconstruction alone decides which weights are best: the game's losses do not fall when the model gets better.

    Args: those of `ReconstructionTask`, then
        clipping: largest norm (or value) of each player's gradient, and "norm" or "value"; None never clips.
    """

    def __init__(self, *arguments: Any, clipping: tuple[float, str] | None = None, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.automatic_optimization = False
        assert isinstance(self.model, Adversarial)
        self.player: Adversarial = self.model
        self.clipping = clipping

    def stage(self, step: int) -> tuple[int, float]:
        """The number of the stage that a step (from 0) belongs to, and how much of the stage is over before it."""
        share, begin = step / self.steps, 0.0
        for number, length in enumerate(self.player.stages[:-1]):
            if share < begin + length - 1e-9:
                return number, (share - begin) / length
            begin += length
        return len(self.player.stages) - 1, max(0.0, share - begin) / (1 - begin)

    @property
    def settled(self) -> bool:  # type: ignore[override]  # of a model, once and for all
        """The stages before the last rebuild nothing yet."""
        return self.stage(self.global_step - 1)[0] == len(self.player.stages) - 1

    def configure_optimizers(self) -> Any:
        own, discriminator = parameters_beside(self.model, self.player.discriminator), self.player.discriminator
        return [
            torch.optim.AdamW(parameters, self.learning_rate, _BETAS, weight_decay=self.weight_decay)
            for parameters in (own, discriminator.parameters())
        ]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        number, over = self.stage(self.global_step)
        generator, discriminator = self._at_rate(self.learning_rate * one_cycle(over))
        given, target, mask = self._corrupted(batch)
        made = self.player.play(given, target, number)
        total = target.new_zeros(())
        if made.output is not None:
            loss: Loss = self.objective(made.output, target, mask, self.global_step)
            total = loss.total
            self._log_parts(loss)
        if made.real is not None and made.fake is not None:
            real, fake = self._judged(made.real, made.fake)
            against = hinge(real.logits, fake.logits)
            # Only the discriminator's share of this gradient is taken, so nothing need be detached or judged twice.
            self.manual_backward(against, inputs=list(self.player.discriminator.parameters()), retain_graph=True)
            persuasion = self.player.persuasion(real, fake)
            total = total + persuasion
            told = {"generator": persuasion, "discriminator": against}
            logits = {"real": real.logits.mean(), "fake": fake.logits.mean()}
            self.log_dict({f"train/{name}": value for name, value in (told | logits).items()})
        self.manual_backward(total, inputs=list(made.learners))
        self._step(generator, discriminator)
        self.log("train/loss", total.detach(), prog_bar=True)
        return total.detach()

    def held_out(self, loss: Loss) -> Tensor:
        return loss.reconstruction

    def _at_rate(self, rate: float) -> tuple[LightningOptimizer, LightningOptimizer]:
        """Both optimisers, the model's first. The rate follows from the step alone: nothing of it is to be resumed."""
        generator, discriminator = cast(list[LightningOptimizer], self.optimizers())
        for optimizer, factor in ((generator, 1.0), (discriminator, self.player.discriminator_rate)):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        return generator, discriminator

    def _judged(self, real: Tensor, fake: Tensor) -> tuple[Judgement, Judgement]:
        both = self.player.discriminator(torch.cat([real.to(fake.dtype), fake]))
        logits, features = (part.chunk(2) for part in both)
        return Judgement(logits[0], features[0]), Judgement(logits[1], features[1])

    def _step(self, generator: LightningOptimizer, discriminator: LightningOptimizer) -> None:
        """Parameters without a gradient are passed over: they are frozen."""
        if self.clipping is not None:
            for optimizer in (generator, discriminator):
                self.clip_gradients(optimizer.optimizer, *self.clipping)
        discriminator.optimizer.step()  # past Lightning, which would count this step, too
        generator.step()
        for optimizer in (generator, discriminator):
            optimizer.zero_grad()


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss: a scalar >= 0, 0 where real logits are above 1 and fake ones below -1."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def one_cycle(over: float) -> float:
    """The learning rate in units of its peak, by the part that is over: from 0.04 up to 1 and, by cosines, to 0."""
    if over < _WARM_UP:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * over / _WARM_UP)) / 2
    return (1 + math.cos(math.pi * (over - _WARM_UP) / (1 - _WARM_UP))) / 2


def without_clipping(trainer: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[float, str] | None]:
    """A trainer's arguments without those that Lightning refuses where a task steps by itself, and what they say."""
    value, algorithm = (trainer.get(name) for name in _CLIPPING)
    rest = {name: argument for name, argument in trainer.items() if name not in _CLIPPING}
    return rest, (float(value), str(algorithm or "norm")) if value else None


def check_adversarial(accumulate: int, precision: str, devices: int) -> None:
    """Raise ConfigError if a model that learns against a discriminator cannot be trained with these settings.

    `accumulate`: batches per step. `precision`, `devices`: what "auto" means on this machine.
    """
    if precision == "16-mixed":
        raise ConfigError(
            "Adversarial models expect trainer.precision=bf16-mixed or 32-true, found 16-mixed, whose scaled gradients "
            "two players do not share: set one of these."
        )
    if accumulate != 1:
        raise ConfigError(
            f"Adversarial models expect training.accumulate=1, found {accumulate}: set a larger training.batch_size "
            "instead."
        )
    if devices > 1:
        raise ConfigError(f"Adversarial models train on one device, found {devices}: set trainer.devices=1.")

"""The Lightning module: how a step, a validation and an optimiser look, for every model that learns by gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from blemish.data.corruption import Corruption
from blemish.data.datasets import to_input
from blemish.models.contracts import observed_by
from blemish.standardise import Light, standardised
from blemish.training.objectives import Loss, ReconstructionObjective


class ReconstructionTask(pl.LightningModule):
    """Corrupt a tile, let the model say what it expects, compare with the clean tile.

    The learning rate follows one cycle (Smith and Topin, arXiv 1708.07120) over `steps` optimiser steps. `compiled`
    lets torch.compile make one program of the model's forward and backward pass.

    Randomness is seeded per epoch from (seed, epoch, rank), not carried along: a training resumed at an epoch's
    start is the one that was never interrupted, on a CPU bit for bit.
    """

    settled = True  # validation counts: for the best weights, for early stopping, for a sweep

    def __init__(
        self,
        model: nn.Module,
        objective: ReconstructionObjective,
        corruption: Corruption,
        learning_rate: float,
        weight_decay: float,
        steps: int,
        seed: int,
        channels_last: bool = True,
        standardise: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.to(memory_format=self._format)
        # Of the method, not the module: names in checkpoints stay, and the model itself is as it was.
        self._forward = torch.compile(model.forward) if compiled else self.model.__call__
        self.objective = objective
        self.corruption = corruption
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.steps, self.seed, self.standardise = steps, seed, standardise

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(_mix(self.seed, self.current_epoch, self.global_rank))

    def on_validation_epoch_start(self) -> None:
        torch.manual_seed(_mix(self.seed, -1, self.global_rank))  # the same noise at every validation

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        return to_input(batch).contiguous(memory_format=self._format)  # they travel as uint8, a quarter of the bytes

    def _corrupted(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the model is given, what it should expect (both (B, C, H, W)), and the mask."""
        with torch.autocast(x.device.type, enabled=False):  # whose coordinates 8 bits of mantissa would ruin
            given, target, mask = self.corruption(x)
        if self.standardise:  # by what the model is given, as when scoring
            light = Light.of(given)
            given, target = light.remove(given), light.remove(target)
        return given.contiguous(memory_format=self._format), target, mask

    def loss_of(self, x: Tensor) -> Loss:
        """Of clean tiles (B, C, H, W) in [0, 1], corrupted anew."""
        given, target, mask = self._corrupted(x)
        loss: Loss = self.objective(self._forward(given), observed_by(self.model, target), mask, self.global_step)
        return loss

    def held_out(self, loss: Loss) -> Tensor:
        """The part of a validation loss by which the best weights are chosen."""
        return loss.total

    def shown(self, x: Tensor) -> Tensor:
        """Clean tiles as the model sees them."""
        return standardised(x) if self.standardise else x

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss_of(batch)
        self.log("train/loss", loss.total, prog_bar=True)
        self._log_parts(loss)
        return loss.total

    def _log_parts(self, loss: Loss) -> None:
        for name in ("reconstruction", "kl", "mask", "penalty"):
            self.log(f"train/{name}", getattr(loss, name))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.held_out(self.loss_of(batch)), prog_bar=True, sync_dist=True)
        # What the score map will be made of, on clean input.
        output = self._forward(self.shown(batch))
        clean = self.objective.residual(output.observed, output.expected)
        self.log("val/score", clean.amax(dim=(1, 2, 3)).mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.model.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _mix(seed: int, epoch: int, rank: int) -> int:
    """One 63-bit seed from three numbers."""
    return int(np.random.SeedSequence([seed, epoch + 1, rank]).generate_state(1, np.uint64)[0] >> 1)

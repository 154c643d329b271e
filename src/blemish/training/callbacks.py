"""What TensorBoard shows beside the scalars."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.utils import make_grid

from blemish.scores import Score
from blemish.training.task import ReconstructionTask


class Panel(pl.Callback):
    """Every few epochs, a picture of validation tiles in three rows: input, expected, score map.

    The score map's scale is fixed by the first panel of a process (white is twice its largest value), so that
    pictures of different epochs can be compared.
    """

    def __init__(self, score: Score, every: int, tiles: int = 8) -> None:
        self._score, self._every, self._tiles = score, every, tiles
        self._white: float | None = None

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: Tensor,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        due = (trainer.current_epoch + 1) % self._every == 0 or trainer.current_epoch == 0
        logger = trainer.logger
        if batch_idx or not due or not isinstance(logger, TensorBoardLogger) or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, ReconstructionTask)
        observed = batch[: self._tiles]
        expected = pl_module.model(observed).expected
        score_map = self._score(pl_module.model, observed)
        if self._white is None:
            self._white = max(2 * float(score_map.max()), 1e-6)
        rows = [observed, expected, (score_map / self._white).expand_as(observed)]
        picture = make_grid(torch.cat(rows).float().clamp(0, 1), nrow=len(observed))
        logger.experiment.add_image("panel/input_expected_score", picture, trainer.global_step)

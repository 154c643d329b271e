"""What is shown and told of a training while it runs."""

from __future__ import annotations

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchvision.utils import make_grid

from blemish.data.datasets import ValidationTiles, as_batch, to_input
from blemish.data.synthetic import add_defect, deal_kinds
from blemish.evaluation.curves import PixelCurves, RankCurve
from blemish.scores.contracts import FittableScore, Score
from blemish.sweep import Report
from blemish.training.task import ReconstructionTask


class _OnceSettled(pl.Callback):
    """Mixed into a callback that goes by the validation loss: it waits until that counts (`task.settled`)."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, ReconstructionTask)
        if pl_module.settled:
            super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, ReconstructionTask)
        if pl_module.settled:
            super().on_train_epoch_end(trainer, pl_module)


class BestCheckpoint(_OnceSettled, ModelCheckpoint):
    """Keeps the weights of the best validation loss."""


class Patience(_OnceSettled, EarlyStopping):
    """Stops a training that no longer gets better."""


class Panel(pl.Callback):
    """Every few epochs, a picture of validation tiles in rows: input, expected if that is pixels, score map.

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
        observed = pl_module.shown(batch[: self._tiles])
        expected = pl_module.model(observed).expected
        score_map = self._score(pl_module.model, observed)
        if self._white is None:
            self._white = max(2 * float(score_map.max()), 1e-6)
        rows = [observed, *([expected] if expected.shape == observed.shape else [])]
        rows.append((score_map / self._white).expand_as(observed))
        picture = make_grid(torch.cat(rows).float().clamp(0, 1), nrow=len(observed))
        logger.experiment.add_image("panel/input_expected_score", picture, trainer.global_step)


class Pruned(Exception):
    """The training was stopped because others did better at the same epoch; no mistake of anyone."""

    def __init__(self, epoch: int, figure: float) -> None:
        super().__init__(f"stopped after epoch {epoch} with {figure:.4f}")
        self.epoch, self.figure = epoch, figure


class SyntheticWatch(pl.Callback):
    """After every epoch, tells fixed validation tiles from copies with synthetic defects, by the run's own score.

    A cheap stand-in for `evaluation.synthetic`: a tile's score is its map's maximum, without blending and smoothing.
    The losses of two runs can differ in kind; these figures can be compared.

    Args:
        metric: one of `evaluation.synthetic.METRICS`.
        most: clean tiles, and defective ones, at most.

    Raises:
        Pruned: out of Lightning's loop, when `report` says so.
    """

    def __init__(
        self, score: Score, tiles: ValidationTiles, metric: str, report: Report | None, batch: int = 32, most: int = 32
    ) -> None:
        self._score, self._metric, self.report, self._batch = score, metric, report, batch
        chosen = np.unique(np.linspace(0, len(tiles) - 1, most).round().astype(int)).tolist()
        clean = list(tiles.__getitems__(chosen).permute(0, 2, 3, 1).contiguous().numpy())
        defective, masks = [], [np.zeros(clean[0].shape[:2], dtype=bool)] * len(clean)
        for number, (index, kind) in enumerate(deal_kinds(len(clean), most)):
            other = clean[(index + 1) % len(clean)]
            defect = add_defect(clean[index], other, kind, np.random.default_rng([0, number]))
            defective.append(defect.image)
            masks.append(defect.mask)
        self._tiles, self._masks, self._clean = as_batch([*clean, *defective]), masks, len(clean)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, ReconstructionTask)
        if self.report is None or trainer.sanity_checking or not pl_module.settled:
            return
        epoch, figure = trainer.current_epoch + 1, self._figure(pl_module)
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.experiment.add_scalar("val/synthetic", figure, trainer.global_step)
        if self.report(epoch, figure):
            raise Pruned(epoch, figure)

    @torch.no_grad()
    def _figure(self, task: ReconstructionTask) -> float:
        """0 where the scores are not numbers: the training has diverged."""
        model, device = task.model, task.device
        if isinstance(self._score, nn.Module):
            self._score.to(device)
        batches = [
            task.shown(to_input(self._tiles[first : first + self._batch].to(device)))
            for first in range(0, len(self._tiles), self._batch)
        ]
        if isinstance(self._score, FittableScore):  # fitted once more, on all validation tiles, after the training
            self._score.fit(model, [task.shown(to_input(self._tiles[: self._clean].to(device)))])
        maps = torch.cat([self._score(model, x)[:, 0].float().cpu() for x in batches]).numpy()
        if not np.isfinite(maps).all():
            return 0.0
        pixels = PixelCurves()
        for score_map, mask in zip(maps, self._masks, strict=True):
            pixels.add(np.ascontiguousarray(score_map), mask)
        is_defective = np.arange(len(maps)) >= self._clean
        image = RankCurve.from_scores(maps.max(axis=(1, 2)), is_defective).auroc()
        pixel = pixels.curve().auroc()
        assert image is not None and pixel is not None
        chosen = {"synthetic/image_auroc": image, "synthetic/pixel_auroc": pixel}
        return chosen.get(self._metric, (image + pixel) / 2)

"""Running Lightning: from splits to trained weights, resumable at every epoch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn

from blemish.data.augment import Augmentation
from blemish.data.corruption import Corruption
from blemish.data.datamodule import TileDataModule
from blemish.data.datasets import ImageCache, TrainingTiles, ValidationTiles
from blemish.data.splits import Splits
from blemish.errors import CheckpointError, ConfigError
from blemish.preprocess import Preprocess
from blemish.scores import Score
from blemish.tiling import Tiling
from blemish.training.callbacks import Panel
from blemish.training.objectives import ReconstructionObjective
from blemish.training.task import ReconstructionTask

BEST, LAST = "best", "last"


@dataclass(frozen=True)
class TrainingSettings:
    """How to train. An epoch is `steps_per_epoch` optimiser steps, whatever the number of images: it is the
    interval between validations and checkpoints, and what a kill can lose.

    Args:
        steps: optimiser steps in all. batch_size: tiles per step and process.
        learning_rate: the peak of the one-cycle schedule. weight_decay: AdamW's.
        patience: epochs without a better validation loss before training stops; null never stops early.
        workers: processes that prepare tiles (0: none). channels_last: memory format of the model.
        cache_gb: memory for decoded images. panel_every: epochs between pictures in TensorBoard.

    Raises:
        ConfigError: a number is out of range.
    """

    steps: int
    batch_size: int
    steps_per_epoch: int
    learning_rate: float
    weight_decay: float
    patience: int | None
    workers: int
    channels_last: bool
    cache_gb: float
    panel_every: int

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "steps_per_epoch", "learning_rate", "panel_every"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"Expected training.{name} to be positive, found {getattr(self, name)}.")
        if self.steps % self.steps_per_epoch:
            raise ConfigError(
                f"Expected training.steps to be a multiple of training.steps_per_epoch, found {self.steps} and "
                f"{self.steps_per_epoch}."
            )
        for name in ("weight_decay", "workers", "cache_gb"):
            if getattr(self, name) < 0:
                raise ConfigError(f"Expected training.{name} >= 0, found {getattr(self, name)}.")
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"Expected training.patience >= 1 or null, found {self.patience}.")


def fit(
    run: Path,
    splits: Splits,
    model: nn.Module,
    objective: ReconstructionObjective,
    score: Score,
    corruption: Corruption,
    augment: Augmentation | None,
    preprocess: Preprocess,
    tiling: Tiling,
    settings: TrainingSettings,
    trainer: Mapping[str, Any],
    seed: int,
    progress: bool = True,
) -> nn.Module:
    """Train `model` in the folder `run`; the weights of the best validation loss are loaded into it.

    If `run` holds a last checkpoint, training continues from it, to the same weights as if it had never stopped.

    Args:
        trainer: arguments for `pytorch_lightning.Trainer` (accelerator, devices, strategy, precision, ...).

    Raises:
        DataError: an image cannot be read. CheckpointError: the last checkpoint is damaged or diverged.
    """
    _quieten()
    limit = settings.cache_gb * 2**30
    images = ImageCache([r.record.path for r in splits.of("train")], preprocess, limit, "train", progress)
    held_out = ImageCache([r.record.path for r in splits.of("validation")], preprocess, limit / 8, "validate", progress)
    data = TileDataModule(
        TrainingTiles(images, tiling.size, seed, augment),
        ValidationTiles(held_out, tiling),
        settings.batch_size,
        settings.steps_per_epoch,
        settings.workers,
    )
    task = ReconstructionTask(
        model,
        objective,
        corruption,
        settings.learning_rate,
        settings.weight_decay,
        settings.steps,
        seed,
        settings.channels_last,
    )
    best = ModelCheckpoint(
        run / "checkpoints",
        filename=BEST,
        monitor="val/loss",
        save_last=True,
        enable_version_counter=False,
    )
    callbacks: list[pl.Callback] = [best, LearningRateMonitor("step"), Panel(score, settings.panel_every)]
    if progress:
        callbacks.append(TQDMProgressBar(refresh_rate=max(1, settings.steps_per_epoch // 50)))
    if settings.patience is not None:
        callbacks.append(EarlyStopping("val/loss", patience=settings.patience, check_finite=True))
    lightning = pl.Trainer(
        **trainer,
        default_root_dir=run,
        logger=TensorBoardLogger(run, name="tensorboard", version=""),
        callbacks=callbacks,
        max_epochs=settings.steps // settings.steps_per_epoch,
        num_sanity_val_steps=0,
        log_every_n_steps=min(10, settings.steps_per_epoch),
        use_distributed_sampler=False,  # the position sampler divides the stream itself
        enable_model_summary=False,
        enable_progress_bar=progress,
    )
    last = run / "checkpoints" / f"{LAST}.ckpt"
    try:
        lightning.fit(task, data, ckpt_path=last if last.is_file() else None, weights_only=True)
    except SystemExit as stopped:  # Lightning's answer to Ctrl-C
        raise KeyboardInterrupt from stopped
    if not best.best_model_path:
        raise CheckpointError(
            f"Training in {run} diverged: the validation loss was never finite; lower training.learning_rate."
        )
    state = torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict(
        {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    )
    return model


def _quieten() -> None:
    """Keep Lightning's advice off the terminal where it does not fit: cached tiles need no workers, and so on."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*GPU available but not used.*",
        ".*Checkpoint directory.*exists.*",
        ".*have overridden `on_after_batch_transfer`.*",
        ".*LeafSpec.*is deprecated.*",
    ):
        warnings.filterwarnings("ignore", text)

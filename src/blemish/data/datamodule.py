"""The training and validation tiles as Lightning wants them."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from blemish.data.datasets import PositionSampler, TrainingTiles, ValidationTiles


def _as_is(batch: Any) -> Any:
    return batch  # the data sets build whole batches


class TileDataModule(pl.LightningDataModule):
    """Serves `batches` training batches an epoch, and all validation tiles.

    Args:
        batch_size: tiles in each, per process.
        workers: processes that cut and augment tiles; 0 does it in the training process, which on few cores is
            the fastest, because cached tiles cost little.
    """

    def __init__(
        self, train: TrainingTiles, validation: ValidationTiles, batch_size: int, batches: int, workers: int = 0
    ) -> None:
        super().__init__()
        self._train, self._validation = train, validation
        self._batch_size, self._batches, self._workers = batch_size, batches, workers

    def train_dataloader(self) -> DataLoader[Tensor]:
        rank, processes = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return DataLoader(
            self._train,
            batch_size=self._batch_size,
            sampler=PositionSampler(self._batches, self._batch_size, rank, processes),
            num_workers=self._workers,
            persistent_workers=self._workers > 0,
            pin_memory=_on_gpu(self.trainer),
            collate_fn=_as_is,
            generator=torch.Generator(),  # else the loader draws from the generator that training has seeded
        )

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(
            self._validation,
            batch_size=self._batch_size,
            pin_memory=_on_gpu(self.trainer),
            collate_fn=_as_is,
            generator=torch.Generator(),
        )


def _on_gpu(trainer: pl.Trainer | None) -> bool:
    return trainer is not None and trainer.strategy.root_device.type == "cuda"

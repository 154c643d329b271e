"""Training throughput through `blemish train` against a bare PyTorch loop, in one run.

    python scripts/benchmark_training.py [steps]

Both train the default model with the default settings (batch, residual, corruption, optimiser, schedule) on the
same number of tiles of random images; the bare loop has its tiles in memory as one tensor. The two alternate,
epoch by epoch, in one process, so that a machine that slows down slows both. blemish's time is that of an epoch
of training steps: loader, Lightning, logging and progress bar included; validation is not.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pytorch_lightning.loggers import TensorBoardLogger

from blemish.build import build
from blemish.checkpoint import build_model
from blemish.cli import config_folder
from blemish.data.datamodule import TileDataModule
from blemish.data.datasets import TrainingTiles, ValidationTiles
from blemish.tiling import Tiling
from blemish.training.task import ReconstructionTask

IMAGES, SIDE, STEPS = 512, 160, 40


class Interleaved(pl.Callback):
    """Times each training epoch, then gives the bare loop its turn."""

    def __init__(self, bare: BareLoop) -> None:
        self.bare = bare
        self.blemish_seconds: list[float] = []
        self.bare_seconds: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.blemish_seconds.append(time.perf_counter() - self._start)
        start = time.perf_counter()
        self.bare.epoch()
        self.bare_seconds.append(time.perf_counter() - start)


class BareLoop:
    """What one would write by hand: a tensor of tiles, a model, a loss, an optimiser."""

    def __init__(self, settings: dict[str, Any], tiles: torch.Tensor, epochs: int) -> None:
        training = settings["training"]
        self.tiles, self.batch = tiles, training["batch_size"]
        self.model = build_model(settings).to(memory_format=torch.channels_last).train()
        self.residual = build(settings["residual"])
        self.corruption = build(settings["corruption"])
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), training["learning_rate"], weight_decay=training["weight_decay"]
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, training["learning_rate"], total_steps=STEPS * epochs
        )

    def epoch(self) -> None:
        for _ in range(STEPS):
            chosen = torch.randint(len(self.tiles), (self.batch,))
            x = self.tiles[chosen].contiguous(memory_format=torch.channels_last)
            loss = self.residual(x, self.model(self.corruption(x)).expected).mean()
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()


def main() -> None:
    epochs = max(3, int(sys.argv[1]) // STEPS) if len(sys.argv) > 1 else 6
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("train", ["data.root=.", "image.channels=1"])
    settings: Any = OmegaConf.to_container(config, resolve=True)
    tiling, training = Tiling(**settings["tiling"]), settings["training"]
    images = list(np.random.default_rng(0).integers(0, 256, (IMAGES, SIDE, SIDE, 1), dtype=np.uint8))
    tiles = torch.from_numpy(np.stack(images)[:, : tiling.size, : tiling.size]).permute(0, 3, 1, 2).float() / 255

    task = ReconstructionTask(
        build_model(settings),
        build(settings["objective"]),
        build(settings["corruption"]),
        training["learning_rate"],
        training["weight_decay"],
        STEPS * epochs,
        seed=0,
        channels_last=training["channels_last"],
    )
    data = TileDataModule(
        TrainingTiles(images, tiling.size, 0),  # type: ignore[arg-type]  # a list serves as the cache
        ValidationTiles(images[:8], tiling),  # type: ignore[arg-type]
        training["batch_size"],
        STEPS,
        training["workers"],
    )
    timer = Interleaved(BareLoop(settings, tiles, epochs))
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            **settings["trainer"],
            max_epochs=epochs,
            limit_val_batches=0,
            logger=TensorBoardLogger(Path(folder), name="tensorboard", version=""),
            callbacks=[timer],
            enable_checkpointing=False,
            enable_model_summary=False,
            log_every_n_steps=10,
        )
        trainer.fit(task, data)
    tiles_per_epoch = STEPS * training["batch_size"]
    # The first epoch warms up both.
    pairs = list(zip(timer.blemish_seconds, timer.bare_seconds, strict=True))[1:]
    ratios = [bare / ours for ours, bare in pairs]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {training['batch_size']} tiles a step")
    print(f"blemish:   {tiles_per_epoch / statistics.median(ours for ours, _ in pairs):.1f} tiles/s")
    print(f"bare loop: {tiles_per_epoch / statistics.median(bare for _, bare in pairs):.1f} tiles/s")
    print(f"ratio:     {statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()

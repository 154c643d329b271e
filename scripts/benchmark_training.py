"""Training throughput through `blemish train` against a bare PyTorch loop, without corruption, compiled, and the peak.

    python scripts/benchmark_training.py [steps]

All train the default model with the default settings (batch, precision, objective, optimiser, schedule) on the
same number of tiles of random images; the bare loops have their tiles in memory as one tensor, one of them leaves
the corruption out, and one compiles the model. They alternate, epoch by epoch, in one process, so that a machine that
slows down slows all. blemish's time is that of an epoch of training steps: loader, Lightning, logging and progress bar
included; validation is not. The first epoch warms up all, and shows what compiling costs where nothing is cached. The
share of the peak is that of a step's multiplications and additions, as PyTorch counts them, in units of what a large
matrix product reaches in the same precision.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Before torch: what an earlier run compiled would hide the cost.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.flop_counter import FlopCounterMode

from blemish.build import build
from blemish.checkpoint import build_model
from blemish.data.corruption import Corruption, NoCorruption
from blemish.data.datamodule import TileDataModule
from blemish.data.datasets import TrainingTiles, ValidationTiles
from blemish.settings import settings_of
from blemish.standardise import Light
from blemish.tiling import Tiling
from blemish.training.fit import pick_precision
from blemish.training.task import ReconstructionTask

IMAGES, SIDE, STEPS = 128, 192, 40


class Interleaved(pl.Callback):
    """Times each training epoch, then gives the bare loops their turn."""

    def __init__(self, loops: Mapping[str, BareLoop]) -> None:
        self.loops = loops
        self.seconds: dict[str, list[float]] = {name: [] for name in ("blemish", *loops)}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds["blemish"].append(time.perf_counter() - self._start)
        for name, loop in self.loops.items():
            start = time.perf_counter()
            loop.epoch()
            self.seconds[name].append(time.perf_counter() - start)


class BareLoop:
    """What one would write by hand: a tensor of tiles, a model, a loss, an optimiser."""

    def __init__(
        self,
        settings: dict[str, Any],
        corruption: Corruption,
        tiles: torch.Tensor,
        epochs: int,
        compiled: bool = False,
    ) -> None:
        training = settings["training"]
        self.tiles, self.batch = tiles, training["batch_size"]
        self.model = build_model(settings).to(memory_format=torch.channels_last).train()
        self.forward = torch.compile(self.model.forward) if compiled else self.model.__call__
        self.objective, self.corruption = build(settings["objective"]), corruption
        self.low = pick_precision(settings["trainer"]) == "bf16-mixed"
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), training["learning_rate"], weight_decay=training["weight_decay"]
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, training["learning_rate"], total_steps=STEPS * epochs
        )

    def epoch(self) -> None:
        for _ in range(STEPS):
            self.step()

    def step(self) -> None:
        chosen = torch.randint(len(self.tiles), (self.batch,))
        x = self.tiles[chosen].contiguous(memory_format=torch.channels_last)
        given, target, mask = self.corruption(x)
        light = Light.of(given)
        given, target = light.remove(given).contiguous(memory_format=torch.channels_last), light.remove(target)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.low):
            loss = self.objective(self.forward(given), target, mask, 0).total
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()


def gflop_per_step(loop: BareLoop) -> float:
    """Of the forward and the backward pass."""
    counter = FlopCounterMode(display=False)
    with counter:
        loop.step()
    return counter.get_total_flops() / 1e9


def peak_gflop_per_second(low: bool, side: int = 2048, seconds: float = 1.0) -> float:
    """Of a large matrix product in bfloat16 or float32."""
    matrix = torch.rand(side, side, dtype=torch.bfloat16 if low else torch.float32)
    torch.mm(matrix, matrix)
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        torch.mm(matrix, matrix)
        calls += 1
    return 2 * side**3 * calls / 1e9 / (time.perf_counter() - start)


def main() -> None:
    epochs = max(3, int(sys.argv[1]) // STEPS) if len(sys.argv) > 1 else 6
    fixed = ["data.root=.", "image.channels=1", f"tiling.size={SIDE}", "trainer.accelerator=cpu"]
    settings = settings_of("train", fixed)
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
        standardise=tiling.standardise,
    )
    data = TileDataModule(
        TrainingTiles(images, tiling.size, 0),  # type: ignore[arg-type]  # a list serves as the cache
        ValidationTiles(images[:8], tiling),  # type: ignore[arg-type]
        training["batch_size"],
        STEPS,
        training["workers"],
    )
    loops = {
        "bare loop": BareLoop(settings, build(settings["corruption"]), tiles, epochs + 1),
        "without corruption": BareLoop(settings, NoCorruption(), tiles, epochs),
        "compiled": BareLoop(settings, build(settings["corruption"]), tiles, epochs, compiled=True),
    }
    timer = Interleaved(loops)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            **(settings["trainer"] | {"precision": pick_precision(settings["trainer"])}),
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
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {training['batch_size']} tiles a step")
    seconds = {name: values[1:] for name, values in timer.seconds.items()}  # the first epoch warms up all
    for name, values in seconds.items():
        print(f"{name}: {tiles_per_epoch / statistics.median(values):.1f} tiles/s")
    for of, to in (("blemish", "bare loop"), ("bare loop", "without corruption"), ("compiled", "bare loop")):
        ratios = [other / own for own, other in zip(seconds[of], seconds[to], strict=True)]
        print(f"{of} / {to}: {statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})")
    slow, fast = (statistics.median(seconds[name]) for name in ("bare loop", "compiled"))
    cost = timer.seconds["compiled"][0] - fast
    pays = f"pays after {cost / (slow - fast) * STEPS:.0f} steps" if fast < slow else "never pays"
    print(f"compiling takes {cost:.0f} s and {pays}")
    bare = loops["bare loop"]
    work, peak = gflop_per_step(bare), peak_gflop_per_second(bare.low)
    rate = work * STEPS / slow
    print(f"bare loop: {work:.1f} GFLOP a step, {rate:.0f} GFLOP/s, {rate / peak:.0%} of {peak:.0f} GFLOP/s")


if __name__ == "__main__":
    main()

"""A batch size for this machine: as many tiles at once as make steps cheaper, and as memory holds."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blemish.data.datasets import TrainingTiles
from blemish.errors import ConfigError
from blemish.training.task import ReconstructionTask

AUTO = "auto"
_FIRST, _LARGEST = 8, 256
_WORTH = 1.15  # times the tiles per second that twice the batch must bring
_ROOM = 0.85  # of a GPU's memory; the rest is for validation, pictures and what the allocator cannot use
_LEAST_SECONDS, _LEAST_STEPS = 0.5, 2
_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Choice:
    """A batch size, and the tiles per second of each that was tried."""

    size: int
    speeds: dict[int, float]

    def __str__(self) -> str:
        tried = ", ".join(f"{size}: {speed:.3g}" for size, speed in sorted(self.speeds.items()))
        return f"training.batch_size={self.size}, chosen by trial (tiles per second by batch size: {tried})"


def choose(seconds: Callable[[int], float | None]) -> Choice:
    """From 8 tiles on, double while that brings at least 15 % more tiles per second; halve if 8 do not fit.

    Args:
        seconds: that a step with so many tiles takes; None if they do not fit into memory.

    Raises:
        ConfigError: not even one tile fits.
    """
    speeds: dict[int, float] = {}
    size = _FIRST
    while (taken := seconds(size)) is None:
        if size == 1:
            raise ConfigError(
                "training.batch_size=auto found no room for a single tile on the device: set a smaller tiling.size or "
                "a smaller model, or trainer.accelerator=cpu."
            )
        size //= 2
    speeds[size] = size / taken
    while _FIRST <= size < _LARGEST and (taken := seconds(2 * size)) is not None:
        speeds[2 * size] = 2 * size / taken
        if speeds[2 * size] < _WORTH * speeds[size]:
            break
        size *= 2
    return Choice(size, speeds)


class Trial:
    """Optimiser steps on copies of a task's model, with real tiles; the task and the random numbers stay as they are.

    Args:
        device: where to train. precision: as `pytorch_lightning.Trainer` names it.
    """

    def __init__(self, task: ReconstructionTask, tiles: TrainingTiles, device: str, precision: str) -> None:
        self._task, self._tiles, self._device, self._precision = task, tiles, torch.device(device), precision

    def seconds(self, size: int) -> float | None:
        """Of a step with so many tiles, after one that is not timed; None if they do not fit."""
        with torch.random.fork_rng():
            try:
                return self._seconds(size)
            except torch.OutOfMemoryError:
                return None
            finally:
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()

    def _seconds(self, size: int) -> float | None:
        on_gpu = self._device.type == "cuda"
        task = copy.deepcopy(self._task).to(self._device)
        optimizer = task.configure_optimizers()["optimizer"]
        batch = self._tiles.__getitems__(list(range(size))).to(self._device)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        self._step(task, optimizer, batch)
        began, steps = self._now(), 0
        while steps < _LEAST_STEPS or self._now() - began < _LEAST_SECONDS:
            self._step(task, optimizer, batch)
            steps += 1
        taken = (self._now() - began) / steps
        if on_gpu:
            total = torch.cuda.get_device_properties(self._device).total_memory
            if torch.cuda.max_memory_reserved(self._device) > _ROOM * total:
                return None
        return taken

    def _step(self, task: ReconstructionTask, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
        optimizer.zero_grad()
        with self._autocast():
            loss = task.loss_of(task.on_after_batch_transfer(batch, 0)).total
        torch.autograd.backward(loss)
        optimizer.step()

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = _DTYPES.get(self._precision)
        return torch.autocast(self._device.type, dtype) if dtype else nullcontext()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def with_batch_size(settings: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The settings of `blemish train` with another batch size, so that the record holds what was chosen."""
    return dict(settings) | {"training": dict(settings["training"]) | {"batch_size": size}}

"""Running Lightning: from splits to trained weights, resumable at every epoch."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn

from blemish.data.corruption import Corruption
from blemish.data.datamodule import TileDataModule
from blemish.data.datasets import TrainingTiles, ValidationTiles
from blemish.errors import CheckpointError, ConfigError
from blemish.files import explain_write_errors
from blemish.models.contracts import Adversarial, Fittable
from blemish.scores.contracts import Score
from blemish.training.adversarial import AdversarialTask, check_adversarial, without_clipping
from blemish.training.callbacks import BestCheckpoint, Panel, Patience, SyntheticWatch
from blemish.training.objectives import ReconstructionObjective
from blemish.training.task import ReconstructionTask

CHECKPOINTS = "checkpoints"
_PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
_OWN_ARGUMENTS = {
    "accumulate_grad_batches",
    "callbacks",
    "default_root_dir",
    "enable_checkpointing",
    "enable_model_summary",
    "enable_progress_bar",
    "log_every_n_steps",
    "logger",
    "max_epochs",
    "max_steps",
    "num_sanity_val_steps",
    "use_distributed_sampler",
}


@dataclass(frozen=True)
class TrainingSettings:
    """How to train. An epoch is `steps_per_epoch` optimiser steps, whatever the number of images: it is the
    interval between validations and checkpoints, and what a kill can lose.

    Args:
        steps: optimiser steps in all. batch_size: tiles at once, per process. accumulate: batches per step.
        learning_rate: the peak of the one-cycle schedule. weight_decay: AdamW's.
        patience: epochs without a better validation loss before training stops; null never stops early.
        workers: processes that prepare tiles (0: none). channels_last: memory format of the model.
        cache_gb: memory for decoded images. disk_gb: temporary disk space for those beyond that.
        max_tiles: what models and scores that learn by themselves learn from, evenly spread; null takes all tiles.
        panel_every: epochs between pictures in TensorBoard.
        compile: whether torch.compile prepares the model, see `check_compile`.

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
    disk_gb: float = 16.0
    accumulate: int = 1
    compile: bool = False
    max_tiles: int | None = 1000

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "steps_per_epoch", "learning_rate", "panel_every"):
            if getattr(self, name) is None or getattr(self, name) <= 0:
                raise ConfigError(f"Expected training.{name} to be positive, found {getattr(self, name)}.")
        if self.steps % self.steps_per_epoch:
            raise ConfigError(
                f"Expected training.steps to be a multiple of training.steps_per_epoch, found {self.steps} and "
                f"{self.steps_per_epoch}."
            )
        for name in ("weight_decay", "workers", "cache_gb", "disk_gb"):
            if getattr(self, name) is None or getattr(self, name) < 0:
                raise ConfigError(f"Expected training.{name} >= 0, found {getattr(self, name)}.")
        for name in ("patience", "max_tiles"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"Expected training.{name} >= 1 or null, found {getattr(self, name)}.")


def fit(
    run: Path,
    tiles: TrainingTiles,
    validation: ValidationTiles,
    model: nn.Module,
    objective: ReconstructionObjective,
    score: Score,
    corruption: Corruption,
    settings: TrainingSettings,
    trainer: Mapping[str, Any],
    seed: int,
    standardise: bool = False,
    progress: bool = True,
    watch: SyntheticWatch | None = None,
) -> nn.Module:
    """Train `model` in the folder `run`; the weights of the best validation loss are loaded into it.

    If `run` holds a last checkpoint, training continues from it, to the same weights as if it had never
    stopped (on a CPU bit for bit; some CUDA kernels sum in no fixed order).

    Args:
        score: for the pictures in TensorBoard.
        trainer: arguments for `pytorch_lightning.Trainer` (accelerator, devices, strategy, precision, ...).
        standardise: show the model tiles of one brightness and contrast.
        watch: reports to a sweep after every epoch; not where several processes train, which it does not reach.

    Raises:
        BlemishError: the disk is full.
        Pruned: the sweep stops this training.
        KeyboardInterrupt: Ctrl-C.
    """
    _quieten()
    batches = settings.steps_per_epoch * settings.accumulate
    data = TileDataModule(tiles, validation, settings.batch_size, batches, settings.workers)
    arguments = dict(trainer) | {"precision": pick_precision(trainer)}
    clipping = None
    if isinstance(model, Adversarial):
        arguments, clipping = without_clipping(arguments)
    task = make_task(model, objective, corruption, settings, seed, standardise, clipping)
    folder = run / CHECKPOINTS
    best = BestCheckpoint(folder, filename="best", monitor="val/loss", enable_version_counter=False)
    # Not save_last, which since Lightning 2.6 saves only when the best is saved: a resumed training would go back.
    latest = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    callbacks: list[pl.Callback] = [best, latest, LearningRateMonitor("step"), Panel(score, settings.panel_every)]
    if progress:
        callbacks.append(TQDMProgressBar(refresh_rate=max(1, settings.steps_per_epoch // 50)))
    if watch is not None:
        callbacks.append(watch)
    if settings.patience is not None:
        callbacks.append(Patience("val/loss", patience=settings.patience, check_finite=True))
    lightning = pl.Trainer(
        **arguments,
        default_root_dir=run,
        logger=TensorBoardLogger(run, name="tensorboard", version=""),
        callbacks=callbacks,
        max_epochs=settings.steps // settings.steps_per_epoch,
        accumulate_grad_batches=settings.accumulate,
        num_sanity_val_steps=0,
        log_every_n_steps=min(10, settings.steps_per_epoch),
        use_distributed_sampler=False,  # the position sampler divides the stream itself
        enable_model_summary=False,
        enable_progress_bar=progress,
    )
    if watch is not None and lightning.world_size > 1:
        watch.report = None
    last = folder / "last.ckpt"
    if last.is_file():
        _load(last)  # says so if it is damaged
    try:
        with explain_write_errors(run):
            lightning.fit(task, data, ckpt_path=last if last.is_file() else None, weights_only=True)
    except SystemExit as stopped:  # Lightning's answer to Ctrl-C
        raise KeyboardInterrupt from stopped
    return load_best(run, model)


def make_task(
    model: nn.Module,
    objective: ReconstructionObjective,
    corruption: Corruption,
    settings: TrainingSettings,
    seed: int,
    standardise: bool,
    clipping: tuple[float, str] | None = None,
) -> ReconstructionTask:
    """The Lightning module that trains a model; see `fit`. `clipping` is for models that learn against another."""
    parts = (
        model.train(),  # Lightning keeps the mode that it finds
        objective,
        corruption,
        settings.learning_rate,
        settings.weight_decay,
        settings.steps,
        seed,
        settings.channels_last,
        standardise,
        settings.compile,
    )
    if isinstance(model, Adversarial):
        return AdversarialTask(*parts, clipping=clipping)
    return ReconstructionTask(*parts)


def _load(path: Path) -> dict[str, Any]:
    """The weights in one of Lightning's checkpoints."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"Cannot load {path}: it is missing or damaged; start a new run.") from error
    return state


def check_trainer(trainer: Mapping[str, Any], model: nn.Module, accumulate: int = 1) -> str:
    """The device that will train, the first of several; "cpu" for any that is no CUDA device.

    Args:
        accumulate: batches per step.

    Raises:
        ConfigError: Lightning cannot work with these arguments on this machine, or not for this model.
    """
    _quieten()
    taken = sorted(_OWN_ARGUMENTS & trainer.keys())
    if taken:
        raise ConfigError(f"trainer.{taken[0]} is set by blemish itself: leave it out.")
    if str(trainer.get("precision", "32-true")) not in _PRECISIONS:
        raise ConfigError(
            f"Expected trainer.precision to be one of {', '.join(_PRECISIONS)}, found '{trainer['precision']}'."
        )
    try:
        arguments = dict(trainer) | {"precision": pick_precision(trainer)}
        lightning = pl.Trainer(**arguments, logger=False, enable_checkpointing=False)
        if type(lightning.strategy.launcher).__name__ == "_SubprocessScriptLauncher":
            raise ConfigError("Several devices need trainer=ddp: other strategies would start the whole command anew.")
        if isinstance(model, Adversarial):
            check_adversarial(accumulate, arguments["precision"], lightning.world_size)
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise ConfigError(f"The settings of trainer do not fit: {error}") from error
    device = lightning.strategy.root_device
    return str(device) if device.type == "cuda" else "cpu"


def check_one_loss(model: nn.Module, setting: str, otherwise: str) -> None:
    """Raise ConfigError if a setting is for other models: this one learns by itself, or against a discriminator.

    `otherwise`: what to do then.
    """
    if isinstance(model, (Adversarial, Fittable)):
        raise ConfigError(
            f"{setting} is for models that the trainer trains by one loss, and {type(model).__name__} learns "
            f"otherwise: {otherwise}."
        )


def check_compile(model: nn.Module, device: str = "cpu") -> None:
    """Raise ConfigError if torch.compile cannot prepare this model, or nothing on this device."""
    check_one_loss(model, "training.compile=true", "leave it out")
    try:
        torch.compile(torch.neg)(torch.zeros(2, device=device))
    except Exception as error:  # of a compiler that is missing, in any of its ways
        raise ConfigError(
            "training.compile=true needs a C++ compiler (and on a GPU Triton) that torch.compile can use, found none "
            f"that works ({type(error).__name__}): install one, such as g++, or leave it out."
        ) from error


def pick_precision(trainer: Mapping[str, Any]) -> str:
    """ "auto" becomes bf16-mixed on hardware that multiplies bfloat16 matrices natively, else 32-true.

    On two cores with such units (AMX, or AVX-512 with BF16), training steps took half the time.
    """
    precision = str(trainer.get("precision", "32-true"))
    if precision != "auto":
        return precision
    if trainer.get("accelerator") != "cpu" and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
        fast = any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
    return "bf16-mixed" if fast else "32-true"


def load_best(run: Path, model: nn.Module) -> nn.Module:
    """Load the weights of the best validation loss into `model`.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
    """
    state = _load(run / CHECKPOINTS / "best.ckpt")
    weights = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    model.load_state_dict(weights)
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
        ".*in eval mode at the start of training.*",  # the frozen network of a feature space
    ):
        warnings.filterwarnings("ignore", text)

"""Saving and loading detectors: {config, state_dict, version, ...}, read with weights_only=True, never a pickle.

An ensemble's checkpoint holds those of its members, so that it needs none of their folders.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor, nn

from blemish import __version__
from blemish.build import TRUSTED, build, build_section
from blemish.calibration import Calibration
from blemish.data.records import SPLITS
from blemish.data.splits import Splits
from blemish.detector import Detector, TileDetector
from blemish.ensemble import Ensemble
from blemish.errors import CheckpointError, ConfigError
from blemish.files import CARD_FILE, DETECTOR_FILE, write_bytes, write_json
from blemish.frozen import content_of
from blemish.normalisation import SpatialNormalisation
from blemish.postprocess import Cleaning, Smoothing
from blemish.preprocess import Preprocess
from blemish.scores.contracts import Score
from blemish.scores.engine import TorchScorer
from blemish.tiling import Tiling

FORMAT = 5
PARTS = ("model", "score", "image", "tiling", "smoothing", "normalisation", "cleaning")
"""The sections of a run's config that make a detector; a checkpoint carries just these."""
_ENSEMBLE_PARTS = ("join", "cleaning")


def build_model(config: Mapping[str, Any], trusted: Sequence[str] | None = None) -> nn.Module:
    """Build the model of a config and try it on one tile, so that a misfit shows before any work is done.

    Raises:
        ConfigError: unknown target or arguments, or a tile size that the model cannot take.
    """
    model = build(config["model"], trusted, "model")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model._target_ must name a torch.nn.Module, found {type(model).__name__}.")
    tile = torch.zeros(1, config["image"]["channels"], config["tiling"]["size"], config["tiling"]["size"])
    training = model.training
    build(config["score"], trusted, "score")(model.eval(), tile)
    return model.train(training)


def assemble(
    config: Mapping[str, Any],
    model: nn.Module,
    normalisation: SpatialNormalisation | None = None,
    about: Mapping[str, Any] | None = None,
    device: str = "cpu",
    trusted: Sequence[str] | None = None,
    score: Score | None = None,
) -> TileDetector:
    """Put a detector together from the `PARTS` of a config and a trained model.

    `score` is one that has learned of normal tiles; None builds a new one.
    """
    parts = {name: config[name] for name in PARTS}
    score = build(parts["score"], trusted, "score") if score is None else score
    tiling: Tiling = build_section(Tiling, parts, "tiling", trusted)
    return TileDetector(
        scorer=TorchScorer(model, score, device, tiling.standardise),
        preprocess=build_section(Preprocess, parts, "image", trusted),
        tiling=tiling,
        smoothing=build_section(Smoothing, parts, "smoothing", trusted),
        cleaning=build_section(Cleaning, parts, "cleaning", trusted),
        normalisation=normalisation,
        fingerprint=fingerprint(parts, model.state_dict(), score_state(score), normalisation),
        about=about or {},
    )


def score_state(score: Score) -> dict[str, Tensor]:
    """What a score has learned of normal tiles; nothing, for most."""
    return dict(score.state_dict()) if isinstance(score, nn.Module) else {}


def fingerprint(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    score: Mapping[str, Tensor],
    normalisation: SpatialNormalisation | None = None,
) -> str:
    """SHA-256 over all that shapes a score: weights, model, score, preprocessing, tiling, smoothing, normalisation."""
    shaping = {name: config[name] for name in PARTS if name != "cleaning"}
    shaping["tiling"] = {key: value for key, value in shaping["tiling"].items() if key != "batch"}
    digest = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode())
    for name, tensor in (*sorted(state.items()), *sorted(score.items())):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(content_of(tensor))
    if normalisation:
        digest.update(normalisation.location.tobytes() + normalisation.scale.tobytes())
    return digest.hexdigest()


def save_detector(
    run: Path,
    config: Mapping[str, Any],
    detector: TileDetector,
    calibration: Calibration | None,
    about: Mapping[str, Any],
) -> None:
    """Write `detector.pt` and, beside it for people to read, the calibration card `card.json`.

    `config` is what `detector` was assembled from.
    """
    assert isinstance(detector.scorer, TorchScorer)
    normalisation = detector.normalisation
    content = {
        "format": FORMAT,
        "version": about["version"],
        "config": {name: config[name] for name in PARTS},
        "state_dict": _on_cpu(detector.scorer.model.state_dict()),
        "score_state": _on_cpu(score_state(detector.scorer.score)),
        "normalisation": (
            {name: torch.from_numpy(getattr(normalisation, name)) for name in ("location", "scale")}
            if normalisation
            else None
        ),
        "calibration": calibration.to_dict() if calibration else None,
        "about": dict(about),
    }
    _write(run, content)


def about_run(seed: int, splits: Splits, overrides: Sequence[str]) -> dict[str, Any]:
    """How a run that begins now is made, as run.json and `detector.pt` keep it."""
    return {
        "software": "blemish",
        "version": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a subclass of str, which a checkpoint may not hold
        "seed": seed,
        "overrides": list(overrides),
        "data_fingerprint": splits.fingerprint(),
        "images": {name: len(splits.of(name)) for name in SPLITS},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def save_ensemble(
    run: Path, ensemble: Ensemble, members: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> None:
    """Write a calibrated ensemble as `save_detector` does; `members` are the contents of its members' checkpoints."""
    content = {
        "format": FORMAT,
        "version": about["version"],
        "config": {"join": ensemble.join, "cleaning": asdict(ensemble.cleaning)},
        "members": [{**member, "calibration": None} for member in members],
        "units": list(ensemble.units),
        "calibration": ensemble.card.to_dict(),
        "about": dict(about),
    }
    _write(run, content)


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def replace_calibration(run: Path, calibration: Calibration) -> None:
    """Give a saved detector another calibration; all else stays as it is."""
    _write(run, read_checkpoint(run) | {"calibration": calibration.to_dict()})


def write_tensors(file: Path, content: Mapping[str, Any]) -> None:
    """Plain data and tensors, as `torch.load` reads them with weights_only=True."""
    buffer = io.BytesIO()  # so that a full disk is the operating system's error, not the serialiser's
    torch.save(content, buffer)
    write_bytes(file, buffer.getvalue())


def _write(run: Path, content: Mapping[str, Any]) -> None:
    write_tensors(run / DETECTOR_FILE, content)
    if content["calibration"]:
        write_json(run / CARD_FILE, content["calibration"])


def read_checkpoint(run: str | Path) -> dict[str, Any]:
    """The content of a run's `detector.pt`, as plain data and tensors.

    Raises:
        CheckpointError: it is missing, damaged, or of a newer format.
    """
    path = Path(run)
    path = path / DETECTOR_FILE if path.is_dir() else path
    if not path.is_file():
        unfinished = (path.parent / "checkpoints" / "last.ckpt").is_file()
        raise CheckpointError(
            f"Training in {path.parent} has not finished: continue it with `blemish train resume={path.parent}`."
            if unfinished
            else f"No detector found at {path}: run= takes the folder that `blemish train` made."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"Cannot load {path}: it is damaged or not a blemish detector; train again.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{path} has format {found}, this version of blemish reads {FORMAT}: use another version, or train again."
        )
    if missing := _missing(content):
        raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}: it is damaged; train again.")
    return content


def _missing(content: Mapping[str, Any]) -> set[str]:
    members = content.get("members", ())
    own = {"units"} if members else {"state_dict", "score_state", "normalisation"}
    parts = _ENSEMBLE_PARTS if members else PARTS
    missing = (own | {"config", "calibration", "about"}) - content.keys()
    missing |= {f"config.{name}" for name in parts if name not in content.get("config", parts)}
    return missing.union(*({f"members.{name}" for name in _missing(member)} for member in members))


def load_detector(
    run: str | Path, device: str = "auto", trusted: Sequence[str] = (), *, with_card: bool = True
) -> Detector:
    """Load the detector of a run, calibrated if the run is.

    Args:
        run: the folder that `blemish train` made, or its `detector.pt`.
        device: cpu, cuda, ... or auto (the GPU if there is one).
        with_card: False leaves the calibration out, whatever its state, so that a new one can be made.
        trusted: packages besides blemish's own models and torch.nn that the checkpoint may take classes from.

    Raises:
        CheckpointError, ConfigError: the checkpoint cannot be used. CalibrationError: its card is not its own.
    """
    content = read_checkpoint(run)
    detector = restore(content, str(run), device, trusted)
    card = content["calibration"] if with_card else None
    return detector.calibrated(Calibration.from_dict(card)) if card else detector


def restore(
    content: Mapping[str, Any], run: str, device: str = "auto", trusted: Sequence[str] = (), own: str | None = None
) -> Detector:
    """The detector that a checkpoint's content makes, without its calibration.

    Args:
        content: what `read_checkpoint` gave. run: whose it is, for messages. device, trusted: as `load_detector`.
        own: of a member of an ensemble, the run that it was. What a backbone needs, and is no longer where it was, is
            looked for beside either.

    Raises:
        CheckpointError, ConfigError: the checkpoint cannot be used.
    """
    if "members" in content:
        owns = [about["run"] for about in content["about"]["members"]]
        pairs = zip(content["members"], owns, strict=True)
        members = [restore(member, run, device, trusted, own) for member, own in pairs]
        cleaning = build_section(Cleaning, content["config"], "cleaning")
        return Ensemble.of(members, content["units"], content["config"]["join"], cleaning, content["about"])
    allowed = (*TRUSTED, *trusted)
    model = build(with_what_it_needs(content["config"]["model"], run, own), allowed, "model")
    score = build(content["config"]["score"], allowed, "score")
    for part, state, name in ((model, content["state_dict"], "model"), (score, content["score_state"], "score")):
        try:
            if isinstance(part, nn.Module):
                part.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(
                f"The weights in {run} do not fit its {name}: {str(error).splitlines()[0]}"
            ) from error
    statistics = content["normalisation"]
    normalisation = SpatialNormalisation(**{k: v.numpy() for k, v in statistics.items()}) if statistics else None
    return assemble(content["config"], model, normalisation, content["about"], pick_device(device), allowed, score)


def with_what_it_needs(model: Mapping[str, Any], run: str, own: str | None = None) -> Mapping[str, Any]:
    """A model's section, with its backbone's weights or run where they are now: beside the detector, if not where they
    were when it was trained.

    Raises:
        CheckpointError: they are at neither place.
    """
    if not isinstance(model.get("backbone"), Mapping):
        return model
    backbone = dict(model["backbone"])
    folders = [Path(name) if Path(name).is_dir() else Path(name).parent for name in (own, run) if name]
    for name in ("weights", "run"):
        value = str(backbone.get(name) or "")
        # What `blemish train` found as a file or folder, it wrote down as an absolute path, maybe on another system.
        written = any(kind(value).is_absolute() for kind in (PurePosixPath, PureWindowsPath))
        if not written or os.path.exists(value):  # noqa: PTH110 (False, too, where it may not be looked at)
            continue
        own_name = PureWindowsPath(value).name  # either slash
        found = [folder / own_name for folder in folders if (folder / own_name).exists()]
        if not found:
            raise CheckpointError(
                f"{run} needs {value} (its backbone.{name}), which is not there: bring it back, or put it beside "
                f"{DETECTOR_FILE} under the name {own_name}."
            )
        backbone[name] = str(found[0])
    return {**model, "backbone": backbone}


def pick_device(name: str) -> str:
    """ "auto" becomes the GPU if there is one; other names are tried. Raises ConfigError if one cannot be used."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"The device '{name}' cannot be used here: {str(error).splitlines()[0]}") from error
    return name

"""A training from settings to a finished run folder: prepare, train, calibrate, evaluate; or resume one."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from blemish import pipeline
from blemish.build import build, build_section, locate
from blemish.calibration import read_settings
from blemish.checkpoint import PARTS, about_run, assemble, build_model, save_detector, with_what_it_needs, write_tensors
from blemish.data.augment import Augmentation
from blemish.data.corruption import Corruption
from blemish.data.datasets import ImageCache, TrainingTiles, ValidationTiles
from blemish.data.images import check_not_mixed, probe
from blemish.data.records import SPLITS, Record, Split
from blemish.data.splits import SPLITS_FILE, Splits, split_records, write_splits
from blemish.errors import ConfigError, DataError, ImageError
from blemish.evaluation.synthetic import check_images, check_metric
from blemish.files import CONFIG_FILE, RUN_FILE, held, write_json, write_text
from blemish.models.backbones import Backbone
from blemish.models.contracts import (
    Contrasting,
    Fittable,
    Needing,
    Preparing,
    classes_of,
    parts_of_other_runs,
    remembering,
)
from blemish.normalisation import NormalisationSettings
from blemish.pipeline import Finished
from blemish.preprocess import Preprocess
from blemish.scores.contracts import FittableScore, Score, learning_parts
from blemish.seen import Seen
from blemish.standardise import standardised
from blemish.sweep import Report
from blemish.tiling import Tiling
from blemish.training.batch_size import AUTO, Choice, Trial, choose, with_batch_size
from blemish.training.callbacks import Pruned, SyntheticWatch
from blemish.training.fit import (
    TrainingSettings,
    check_compile,
    check_one_loss,
    check_trainer,
    fit,
    load_best,
    make_task,
    pick_precision,
)
from blemish.training.objectives import ReconstructionObjective

_LARGEST_TILE, _TILE_STEP = 192, 32  # pixels; models halve a tile up to five times
_COSTS = ("training_seconds", "training_core_seconds")
_APART = "give both runs the same data, seed, split and calibration, so that both set the same images aside"


def start(
    run: Path,
    settings: dict[str, Any],
    records: Sequence[Record],
    overrides: Sequence[str],
    report: Report | None = None,
) -> Finished:
    """Train in the new folder `run`. It is made only when settings and images have proved sound.

    Args:
        settings: the resolved settings of `blemish train`.
        overrides: as given on the command line, for the record.
        report: told a figure after every epoch, may end the training (see `callbacks.SyntheticWatch`).

    Raises:
        ConfigError, DataError, CalibrationError: before anything is written, where possible.
        Pruned: `report` said so.
    """
    splits = _split(records, settings)
    parts = _Parts.build(settings, splits)
    for sentence in parts.unused(overrides):
        print(sentence, flush=True)
    if settings["training"]["batch_size"] == AUTO:
        chosen = parts.try_batch_sizes(settings)
        print(chosen, flush=True)
        settings, parts = with_batch_size(settings, chosen.size), parts.with_batch_size(chosen.size)
    with _alone_in(run):
        if (run / CONFIG_FILE).exists():
            raise ConfigError(f"Another `blemish train` has begun in {run} meanwhile: choose another out=.")
        settings = _with_kept_weights(run, settings, parts.model)
        write_text(run / CONFIG_FILE, yaml.safe_dump(settings, sort_keys=False))
        write_splits(run / SPLITS_FILE, splits)
        about = about_run(settings["seed"], splits, overrides) | {"status": "training"}
        write_json(run / RUN_FILE, about)
        return _go_on(run, settings, splits, parts, about, report)


def _alone_in(run: Path) -> AbstractContextManager[None]:
    return held(run, f"Another `blemish train` works in {run}: wait for it, or choose another out=.")


def resume(run: Path, read: Any, report: Report | None = None) -> Finished:
    """Continue the training in `run` from its last checkpoint, to the weights it would have had.

    Args:
        read: from the settings' `data` section to records.

    Raises:
        ConfigError: there is nothing to resume, or the images have changed.
    """
    if not (run / CONFIG_FILE).is_file() or not (run / RUN_FILE).is_file():
        raise ConfigError(f"Nothing to resume in {run}: expected the folder of an interrupted `blemish train`.")
    with _alone_in(run):
        return _resume(run, read, report)


def _resume(run: Path, read: Any, report: Report | None) -> Finished:
    about = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))
    if about["status"] == "done":
        raise ConfigError(f"The training in {run} is finished: nothing to resume.")
    settings = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))
    sections = (*PARTS, "training", "trainer", "calibration", "synthetic", "optimized_metric", "report")
    missing = [name for name in sections if name not in settings]
    if missing:
        raise ConfigError(
            f"{run / CONFIG_FILE} lacks the section {missing[0]}: it was begun by another version of blemish, or "
            "edited; start a new run."
        )
    settings["model"] = with_what_it_needs(settings["model"], str(run))
    splits = _split(read(settings["data"]), settings)
    changed = [name for name, value in splits.fingerprint().items() if value != about["data_fingerprint"][name]]
    if changed:
        raise ConfigError(f"The images changed since {run} was started (part: {', '.join(changed)}): start a new run.")
    return _go_on(run, settings, splits, _Parts.build(settings, splits), about, report)


def _with_kept_weights(run: Path, settings: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A backbone's weights that were downloaded are kept in `run`, so that whoever loads it asks no network."""
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, Backbone) or not backbone.downloaded:
        return settings
    file = run.absolute() / f"backbone-{backbone.fingerprint & 0xFFFFFFFF:08x}.pt"  # ensembles may have several
    write_tensors(file, backbone.weights())
    kept = {**settings["model"]["backbone"], "weights": str(file)}
    return {**settings, "backbone": kept, "model": {**settings["model"], "backbone": kept}}


@dataclass(frozen=True)
class _Again:
    """Batches that are made anew each time they are gone through, so that they need not be held."""

    batches: Callable[[], Iterator[Tensor]]

    def __iter__(self) -> Iterator[Tensor]:
        return self.batches()


@dataclass(frozen=True)
class _Parts:
    """All that is built from settings and images before a run folder is made; `labels` are of the training images,
    `device` is the one that trains, and then calibrates and evaluates."""

    model: nn.Module
    objective: ReconstructionObjective
    score: Score
    corruption: Corruption
    training: TrainingSettings
    normalisation: NormalisationSettings
    tiling: Tiling
    tiles: TrainingTiles
    labels: list[str | None]
    validation: ValidationTiles
    device: str

    @classmethod
    def build(cls, settings: Mapping[str, Any], splits: Splits) -> _Parts:
        by_trial = settings["training"]["batch_size"] == AUTO
        numbered = with_batch_size(settings, 1) if by_trial else settings
        training: TrainingSettings = build_section(TrainingSettings, numbered, "training")
        normalisation: NormalisationSettings = build_section(NormalisationSettings, settings, "normalisation")
        # Before the model is tried on a tile.
        preprocess: Preprocess = build_section(Preprocess, settings, "image")
        tiling: Tiling = build_section(Tiling, settings, "tiling")
        if normalisation.kind != "none":
            _check_normalisation(splits, normalisation, preprocess, settings["calibration"]["mask_rule"])
        torch.manual_seed(settings["seed"])
        model = build_model(settings)
        device = check_trainer(settings["trainer"], model, training.accumulate)
        if isinstance(model, Needing):
            model.check_installed()
        if training.compile:
            check_compile(model, device)
        if by_trial:
            check_one_loss(model, "training.batch_size=auto", "set a number")
        objective, score, corruption = (build(settings[key], where=key) for key in ("objective", "score", "corruption"))
        tile = torch.zeros(1, preprocess.channels, tiling.size, tiling.size)
        if not isinstance(model, Fittable):
            _check_loss(objective, corruption, tile)
            if training.batch_size == 1 and not by_trial:
                _check_one_tile(model, tile)
        if getattr(model, "whole_image", False):
            _check_unmoved(model, score)
        assemble(settings, model)  # what prediction would refuse is refused now
        if normalisation.kind != "none" and normalisation.source == "train":
            _check_forgetful(model, score, tile)
        promise, _ = read_settings(settings["calibration"])
        calibrating = splits.of("calibration")
        pipeline.check_classes_told(promise, classes_of(model), len(calibrating))
        for part in parts_of_other_runs(model):
            part.seen.check_apart(calibrating, part.run, _APART)
            part.seen.check_apart(splits.of("test"), part.run, _APART, "test")
        augment = build(settings["augment"], where="augment") if settings["augment"].get("transforms", True) else None
        limit, disk = training.cache_gb * 2**30, training.disk_gb * 2**30

        def cached(split: Split, share: float) -> ImageCache:
            paths = [item.record.path for item in splits.of(split)]
            return ImageCache(paths, preprocess, share * limit, split, share * disk)

        images, held_out = cached("train", 0.9), cached("validation", 0.1)
        cached("calibration", 0)  # only to find unreadable ones now, and not after the training
        tiles = TrainingTiles(images, tiling.size, settings["seed"], augment)
        validation = ValidationTiles(held_out, tiling)
        if getattr(model, "whole_image", False) and preprocess.size != tiling.size:
            raise ConfigError(
                f"{type(model).__name__} compares whole images, so they must be of one size, found "
                f"image.size={preprocess.size or 'null'} and tiling.size={tiling.size}: set both to a number of "
                "pixels, such as image.size=256 tiling.size=256."
            )
        labels = [item.record.label for item in splits.of("train")]
        return cls(
            model, objective, score, corruption, training, normalisation, tiling, tiles, labels, validation, device
        )

    def unused(self, overrides: Sequence[str]) -> list[str]:
        """Sentences about settings that were given and do nothing, or nothing good."""
        sentences = []
        if isinstance(self.model, Fittable):
            for_others = (
                "training.",
                "objective",
                "augment",
                *(() if isinstance(self.model, Contrasting) else ("corruption",)),
            )
            kept = tuple(
                f"training.{name}="
                for name in ("batch_size", "cache_gb", "disk_gb", "max_tiles", "channels_last", "workers")
            )
            given = [
                word for word in overrides if word.lstrip("+~").startswith(for_others) and not word.startswith(kept)
            ]
            if given:
                sentences.append(
                    f"ignored: {', '.join(given)}, for {type(self.model).__name__} learns by itself (its own settings "
                    "are those of model)"
                )
        elif not getattr(self.corruption, "tells_where", True) and getattr(self.model, "mask", None) is not None:
            sentences.append(
                f"note: {type(self.corruption).__name__} changes every pixel or none, so that the mask head learns "
                "nothing: model.mask_head=false leaves it out"
            )
        return sentences

    def try_batch_sizes(self, settings: Mapping[str, Any]) -> Choice:
        """The batch size that suits the device which will train."""
        trainer, seed = settings["trainer"], settings["seed"]
        eager = replace(self.training, compile=False)  # every size would be compiled anew
        task = make_task(
            copy.deepcopy(self.model), self.objective, self.corruption, eager, seed, self.tiling.standardise
        )
        return choose(Trial(task, self.tiles, self.device, pick_precision(trainer)).seconds)

    def with_batch_size(self, size: int) -> _Parts:
        return replace(self, training=replace(self.training, batch_size=size))

    def learn(self) -> nn.Module:
        """What takes the place of the trainer for a model that learns by itself."""
        assert isinstance(self.model, Fittable)
        if isinstance(self.model, Contrasting):
            self.model.contrast_with(self.corruption)
        normal = self._normal()
        model = self.model.to(self.device)
        model.fit(_Again(lambda: self.shown(normal, self.device)), [self.labels[image] for image in normal.sources])
        return model

    def prepare(self) -> None:
        """What comes before the trainer, for a model that asks for it."""
        if isinstance(self.model, Preparing):
            normal = self._normal()
            self.model.to(self.device).prepare(_Again(lambda: self.shown(normal, self.device)))
            self.model.to("cpu")  # from where the trainer takes it, to other processes, too

    def teach_score(self, model: nn.Module) -> None:
        """What comes after training, for a score that has a part which learns of training tiles, augmented as there."""
        parts = learning_parts(self.score)
        if not parts:
            return
        normal = self._normal(self.tiles.augment)
        for part in parts:
            part.learn(model, _Again(lambda: self.shown(normal, self.device)))

    def _normal(self, augment: Augmentation | None = None) -> ValidationTiles:
        """Training tiles in fixed places."""
        most = self.training.max_tiles
        tiles = ValidationTiles(self.tiles.images, self.tiling, most or sys.maxsize, augment, self.tiles.seed)
        if len(tiles) < tiles.total:
            print(
                f"learning from {len(tiles)} of {tiles.total} training tiles, evenly spread: training.max_tiles={most}",
                flush=True,
            )
        return tiles

    def shown(self, tiles: ValidationTiles, device: str) -> Iterator[Tensor]:
        """Batches of normal tiles (B, C, t, t) as model and score see them."""
        batches = tiles.batches(self.training.batch_size, device)
        return map(standardised, batches) if self.tiling.standardise else batches


def _split(records: Sequence[Record], settings: Mapping[str, Any]) -> Splits:
    """Split, and refuse before training what calibration would refuse after it."""
    if settings["seed"] < 0:
        raise ConfigError(f"Expected seed >= 0, found {settings['seed']}.")
    pipeline.check_gallery(settings["report"]["images"])
    check_images(settings["synthetic"]["images"])
    check_metric(settings["optimized_metric"])
    promise, rule = read_settings(settings["calibration"])
    splits = split_records(records, settings["seed"], **settings["split"], needed=promise.needed)
    pipeline.check_enough(splits.of("calibration"), promise, rule)
    if splits.dropped:
        print(f"left out: {splits.dropped} training images whose content or group is also in the test part")
    return splits


def _check_unmoved(model: nn.Module, score: Score) -> None:
    """Raise ConfigError if a score asks a model that knows places about tiles whose places have moved."""
    moving = [part for part in score.modules() if getattr(part, "moves", False)] if isinstance(score, nn.Module) else []
    if moving:
        raise ConfigError(
            f"{type(model).__name__} learns each place of an image by itself, and {type(moving[0]).__name__} moves "
            "them: choose another score, such as score=residual."
        )


def _check_loss(objective: ReconstructionObjective, corruption: Corruption, tile: Tensor) -> None:
    """Raise ConfigError if no pixel would count; `tile`: any (1, C, t, t)."""
    if objective.corrupted_weight == 0:
        with torch.random.fork_rng():
            mask = corruption(tile).mask
        if (mask == 1).all():
            raise ConfigError(
                "objective.corrupted_weight=0 expects a corruption that leaves pixels clean, and "
                f"{type(corruption).__name__} changes them all, so that nothing would be learned: set a larger weight, "
                "or corruption=structured."
            )


def _check_one_tile(model: nn.Module, tile: Tensor) -> None:
    """Raise ConfigError if a batch of one tile is too little for the model's batch normalisation."""
    try:
        with torch.no_grad():
            copy.deepcopy(model).train()(tile)
    except ValueError as error:  # PyTorch's own, where a layer has one place
        raise ConfigError(
            f"training.batch_size=1 with tiling.size={tile.shape[-1]} leaves {type(model).__name__} one place to "
            "normalise over: set a larger training.batch_size, or larger tiles."
        ) from error


def _check_forgetful(model: nn.Module, score: Score, tile: Tensor) -> None:
    """Raise ConfigError if score maps of training images say nothing of other normal ones; `tile`: any (1, C, t, t)."""
    with torch.no_grad():
        learns = bool(model.eval()(tile).activations)  # else the score has nothing to remember
    if name := remembering((model, score) if learns else (model,)):
        raise ConfigError(
            f"normalisation.source=train expects a detector that does not know single training images, and {name} "
            "remembers them, so that their score maps are almost 0: set normalisation.source=validation."
        )


def _check_normalisation(
    splits: Splits, normalisation: NormalisationSettings, preprocess: Preprocess, mask_rule: str
) -> None:
    """Raise ConfigError or DataError, before training, if score maps cannot be compared pixel by pixel."""
    if mask_rule == "parametric_noise":
        raise ConfigError(
            "calibration.mask_rule=parametric_noise expects the noise itself, and normalised maps are none: set "
            "normalisation.kind=none, or choose another mask rule."
        )
    source = normalisation.source
    if len(splits.of(source)) < 2:
        advice = "set a larger split.validation" if source == "validation" else "add images"
        raise ConfigError(
            f"Spatial normalisation needs two or more {source} images, found {len(splits.of(source))}: {advice}."
        )
    if preprocess.size is not None:
        return
    first: tuple[Path, int, int] | None = None
    for item in splits.records:
        if item.record.split != "test":
            info = probe(item.record.path)
            first = first or (item.record.path, info.width, info.height)
            if preprocess.scored_size(info.height, info.width) != preprocess.scored_size(first[2], first[1]):
                raise DataError(
                    f"Spatial normalisation expects aligned images of equal size, found {first[0]} with {first[1]} x "
                    f"{first[2]} and {item.record.path} with {info.width} x {info.height} pixels: set "
                    "normalisation.kind=none, or image.size to bring them to one."
                )


@contextmanager
def _costs_added(about: dict[str, Any]) -> Iterator[None]:
    """What happens here counts as training; an interrupted one took its time, too."""
    began = time.monotonic(), time.process_time()
    try:
        yield
    finally:
        taken = time.monotonic() - began[0], time.process_time() - began[1]
        for name, seconds in zip(_COSTS, taken, strict=True):
            about[name] = round(about.get(name, 0.0) + seconds, 3)


def _go_on(
    run: Path,
    settings: Mapping[str, Any],
    splits: Splits,
    parts: _Parts,
    about: dict[str, Any],
    report: Report | None = None,
) -> Finished:
    """From a prepared folder to a finished one. A training that is done is not done again; but what a model learns by
    itself is kept with the finished detector only, so that it learns anew."""
    print(f"run folder: {run}", flush=True)
    by_itself = isinstance(parts.model, Fittable)
    if by_itself and about["status"] == "trained":
        about = {key: value for key, value in about.items() if key not in _COSTS}
    if about["status"] == "trained" and not by_itself:
        model = load_best(run, parts.model)
    else:
        watch = None
        if not by_itself and report is not None and settings["synthetic"]["images"]:
            watch = SyntheticWatch(parts.score, parts.validation, settings["optimized_metric"], report)
        try:
            with _costs_added(about):
                if by_itself:
                    model = parts.learn()
                else:
                    parts.prepare()
                    model = fit(
                        run,
                        parts.tiles,
                        parts.validation,
                        parts.model,
                        parts.objective,
                        parts.score,
                        parts.corruption,
                        parts.training,
                        settings["trainer"],
                        settings["seed"],
                        parts.tiling.standardise,
                        watch=watch,
                    )
            # Early stopping would let a resumed training go one epoch further.
            about["status"] = "trained"
        except Pruned:
            about["status"] = "pruned"
            raise
        finally:
            if isinstance(parts.model, Preparing):
                parts.model.release()
            write_json(run / RUN_FILE, about)
    own = Seen.of([item for name in SPLITS[:2] for item in splits.of(name)])
    trained = own.union(part.seen for part in parts_of_other_runs(model)).to_dict()
    device = parts.device
    model = model.eval().to(device)
    with _costs_added(about):
        parts.teach_score(model)
    if isinstance(parts.score, FittableScore):
        parts.score.fit(model, parts.shown(parts.validation, device))
    detector = assemble(settings, model, about=about, device=device, score=parts.score)
    if parts.normalisation.kind != "none":
        source = [item.record.path for item in splits.of(parts.normalisation.source)]
        normalisation = pipeline.fit_normalisation(detector, source, parts.normalisation)
        detector = assemble(settings, model, normalisation, about=about, device=device, score=parts.score)
    promise, mask_rule = read_settings(settings["calibration"])
    if promise.by_class:  # too few images of a class are found only by scoring them: the training is not to be lost
        save_detector(run, settings, detector, None, about | trained)
    calibration = pipeline.calibrate(detector, splits.of("calibration"), promise, mask_rule)
    about["status"] = "done"
    save_detector(run, settings, detector, calibration, about | trained)
    images, gallery = settings["synthetic"]["images"], settings["report"]["images"]
    finished = pipeline.measure(run, detector.calibrated(calibration), splits, images, gallery)
    write_json(run / RUN_FILE, about)
    return finished


def name_classes(settings: Any, records: Iterable[Record]) -> None:
    """Put the names of the classes that the data name into `model.classes`, where that is "named".

    Args:
        settings: the settings of `blemish train`.

    Raises:
        DataError: a defect-free image outside the test part has no class.
    """
    if "classes" not in settings.model or settings.model.classes != "named":
        return
    normal = [record for record in records if record.is_normal and record.split != "test"]
    nameless = [record.path for record in normal if record.label is None]
    if nameless:
        raise DataError(
            f"model.classes=named expects a class for every defect-free image, found none for {len(nameless)} of "
            f"{len(normal)} (first: {nameless[0]}): fill in the column class of data=manifest, or set "
            "data.classes=folders with data=folder."
        )
    settings.model.classes = sorted({str(record.label) for record in normal})


def fit_to_images(settings: Any, paths: Iterable[Path]) -> None:
    """Fill in what is null and depends on the images: `image.channels`, `tiling.size`, for some models `image.size`.

    Tiles are as large as half of the images (after preprocessing) allow in steps of 32 pixels, at most 192 or what
    `image.short_side` or `image.size` says; smaller images are mirrored at their borders, so that a few of them do not
    cut up all others. For a model that compares whole images, each is made a square of that size. Unreadable images are
    left for the decoder to report.

    Args:
        settings: the settings of `blemish train`.
        paths: of the defect-free images.

    Raises:
        DataError: the images mix grey and colour. ConfigError: the settings of `image` do not fit.
    """
    first: dict[int, Path] = {}
    sides: list[tuple[int, int]] = []
    for path in paths:
        try:
            info = probe(path)
        except ImageError:
            continue
        first.setdefault(info.channels, path)
        sides.append((info.height, info.width))
    if settings.image.channels is None:
        check_not_mixed(first)
        settings.image.channels = next(iter(first), 1)
    if settings.tiling.size is None:
        preprocess: Preprocess = build_section(Preprocess, settings, "image")
        most = preprocess.size or preprocess.short_side or _LARGEST_TILE
        shorter = sorted(min(preprocess.scored_size(*side)) for side in sides) or [most]
        usual = shorter[(len(shorter) - 1) // 2]
        settings.tiling.size = max(_TILE_STEP, min(usual, most) // _TILE_STEP * _TILE_STEP)
        if getattr(locate(settings.model._target_, None, "model"), "whole_image", False):
            settings.tiling.size = settings.image.size or settings.tiling.size
            settings.image.size, settings.image.short_side = settings.tiling.size, None

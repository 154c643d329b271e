"""From finished runs to the run folder of their ensemble: units, promise, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from blemish import pipeline
from blemish.build import build_section
from blemish.calibration import read_settings
from blemish.checkpoint import about_run, read_checkpoint, restore, save_ensemble
from blemish.data.records import Record
from blemish.data.splits import SPLITS_FILE, Splits, part_digests, read_splits, split_records, write_splits
from blemish.ensemble import Ensemble, check_join, check_members, learn_units
from blemish.errors import DataError
from blemish.evaluation.synthetic import check_images
from blemish.files import CONFIG_FILE, RUN_FILE, write_json, write_text
from blemish.pipeline import Finished
from blemish.postprocess import Cleaning
from blemish.seen import Seen

_APART = "train the runs with the same data, seed and split, or give other normal images by data.root=DIR"


def combine(
    out: Path,
    runs: Sequence[Path],
    settings: Mapping[str, Any],
    records: Sequence[Record],
    other_data: bool,
    overrides: Sequence[str],
) -> Finished:
    """Make one detector of finished runs, in the new folder `out`, which is made when all but the figures is done.

    Args:
        settings: the resolved settings of `blemish ensemble`.
        records: of its data. other_data: they may be others than those of the first run, whose parts are kept, wherever
            its images lie now.
        overrides: as given on the command line, for the record.

    Raises:
        CheckpointError, ConfigError: a run cannot be used, or they cannot be combined.
        CalibrationError: a run has seen calibration images, or there are too few. DataError: see `read_splits`.
    """
    join, seed = settings["join"], settings["seed"]
    check_join(join)
    pipeline.check_gallery(settings["report"]["images"])
    check_images(settings["synthetic"]["images"])
    cleaning: Cleaning = build_section(Cleaning, settings, "cleaning")
    promise, mask_rule = read_settings(settings["calibration"])
    contents = [read_checkpoint(run) for run in runs]
    members = [
        restore(content, str(run), settings["device"], settings["trusted"])
        for content, run in zip(contents, runs, strict=True)
    ]
    check_members(members)
    try:
        splits, other_data = read_splits(runs[0] / SPLITS_FILE, records), False
    except DataError:
        if not other_data:
            raise
        splits = split_records(records, seed, **settings["split"], needed=promise.needed)
    splits = _without_fitted(splits, runs, contents, other_data)
    held_out, calibrating = splits.of("validation"), splits.of("calibration")
    pipeline.check_enough(calibrating, promise, mask_rule)
    pipeline.check_classes_told(promise, (), len(calibrating))
    for run, content in zip(runs, contents, strict=True):
        seen = Seen.read(content["about"])
        seen.check_apart(calibrating, run, _APART)
        seen.check_apart(splits.of("test"), run, _APART, "test")
    units = learn_units(members, [item.record.path for item in held_out])
    about = about_run(seed, splits, overrides) | {
        "members": [
            {"run": str(run.absolute()), "fingerprint": member.fingerprint, "unit": unit}
            for run, member, unit in zip(runs, members, units, strict=True)
        ],
        "status": "done",
    }
    ensemble = Ensemble.of(members, units, join, cleaning, about)
    ensemble = replace(ensemble, calibration=pipeline.calibrate(ensemble, calibrating, promise, mask_rule))
    write_text(out / CONFIG_FILE, yaml.safe_dump(dict(settings), sort_keys=False))
    write_splits(out / SPLITS_FILE, splits)
    seen = Seen.of(held_out).union(Seen.read(content["about"]) for content in contents)
    save_ensemble(out, ensemble, contents, about | seen.to_dict())
    write_json(out / RUN_FILE, about)
    try:
        return pipeline.measure(out, ensemble, splits, settings["synthetic"]["images"], settings["report"]["images"])
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"; it is calibrated: `blemish evaluate run={out}` measures it") from None


def _without_fitted(
    splits: Splits, runs: Sequence[Path], contents: Sequence[Mapping[str, Any]], other_data: bool
) -> Splits:
    """The parts, less the validation images that a run was fitted to: maps of these are lower than of new images.

    Those that stopped a run's training early, or chose its weights, may stay. Of other data, nothing trains.
    """
    fitted: set[str] = set()
    for run, content in zip(runs, contents, strict=True):
        stopped = part_digests(run / SPLITS_FILE, "validation") if (run / SPLITS_FILE).is_file() else set()
        fitted |= set(content["about"]["trained_on"]) - stopped
    kept = [
        item
        for item in splits.records
        if not (item.record.split == "validation" and item.digest in fitted)
        and not (item.record.split == "train" and other_data)
    ]
    return replace(splits, records=kept)

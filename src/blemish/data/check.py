"""Looking a data set over: what is in it, what is wrong with it, and what it can promise. Imports no torch."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from blemish.calibration import RULES, Promise, round_up
from blemish.data.images import ImageInfo, check_not_mixed, probe, read_mask, read_pixels
from blemish.data.records import SPLITS, Record, Records
from blemish.data.splits import digest_files, split_records
from blemish.errors import BlemishError, DataError, ImageError


@dataclass(frozen=True)
class CheckReport:
    """`facts` and `problems`, each a line to print."""

    facts: list[str]
    problems: list[str]


def check(
    records: Records,
    promise: Promise,
    seed: int,
    validation: float,
    calibration: float | None,
    progress: bool = True,
) -> CheckReport:
    """Decode every image and mask once, hash every file, and try the split that training would make."""
    images = records.images
    problems = list(records.problems)
    facts = [f"images: {len(images)} ({_count(record.kind for record in images)})"]
    masks = sum(record.mask is not None for record in images)
    without = [r for r in images if not r.is_normal and r.mask is None]
    if masks or without:
        facts.append(f"masks: {masks}; defective images without a mask: {len(without)}")

    infos: list[ImageInfo] = []
    readable: list[Record] = []
    with ThreadPoolExecutor(2) as pool:
        looked = tqdm(pool.map(_look, images), "reading", len(images), unit="image", disable=not progress, leave=False)
        for record, found in zip(images, looked, strict=True):
            if isinstance(found, ImageError):
                problems.append(str(found))
            else:
                infos.append(found)
                readable.append(record)
    facts.append(f"sizes (width x height): {_count(f'{info.width} x {info.height}' for info in infos)}")
    facts.append(f"modes: {_count(info.mode for info in infos)}")
    first: dict[int, Path] = {}
    for record, info in zip(readable, infos, strict=True):
        if record.is_normal and record.split != "test":
            first.setdefault(info.channels, record.path)
    try:
        check_not_mixed(first)
    except DataError as error:
        problems.append(str(error))
    facts.append(f"bits per channel: {_count(str(info.bits) for info in infos)}")

    part = {record.path: "test" if record.split == "test" else "train" for record in images}
    double = _duplicates(readable, progress)
    facts.append(f"files with the same content: {len(double)} sets")
    problems += [
        f"The same content lies in {' and '.join(sorted(map(str, paths)))}, in different parts."
        for paths in double
        if len({part[path] for path in paths}) > 1
    ]
    try:
        splits = split_records(readable, seed, validation, calibration, promise.needed, progress)
    except BlemishError as error:
        return CheckReport(facts, [*problems, str(error)])
    facts.append("split: " + ", ".join(f"{len(splits.of(name))} {name}" for name in SPLITS))
    units = len({item.unit for item in splits.of("calibration")})
    for rule in RULES:
        smallest = Promise(promise.alpha, rule, promise.delta).smallest_alpha(units)
        facts.append(f"{units} calibration images can promise alpha >= {round_up(smallest)} ({rule})")
    if units < promise.needed:
        problems.append(promise.shortage(units))
    return CheckReport(facts, problems)


def _look(record: Record) -> ImageInfo | ImageError:
    try:
        pixels = read_pixels(record.path)
        if record.mask is not None:
            read_mask(record.mask, (pixels.shape[0], pixels.shape[1]))
        return probe(record.path)
    except ImageError as error:
        return error


def _duplicates(records: list[Record], progress: bool) -> list[list[Path]]:
    by_digest: dict[str, list[Path]] = {}
    paths = [record.path for record in records]
    for path, digest in zip(paths, digest_files(paths, progress), strict=True):
        by_digest.setdefault(digest, []).append(path)
    return [same for same in by_digest.values() if len(same) > 1]


def _count(values: object, most: int = 6) -> str:
    counts = Counter(values)  # type: ignore[call-overload]
    parts = [f"{count} {value}" for value, count in counts.most_common(most)]
    return ", ".join(parts) + (f", and {len(counts) - most} other" if len(counts) > most else "")

"""Dividing defect-free images into train, validation and calibration: seeded, disjoint, by group and content."""

from __future__ import annotations

import csv
import hashlib
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from blemish.data.records import SPLITS, Record, Split, of_split
from blemish.errors import ConfigError, DataError
from blemish.files import write_csv


@dataclass(frozen=True)
class SplitRecord:
    """A record with its split settled, the SHA-256 of its file, and its `unit`.

    Images of one unit share a group or have the same content; a unit is what is exchangeable, and what
    calibration counts.
    """

    record: Record
    digest: str
    unit: str


@dataclass(frozen=True)
class Splits:
    """`dropped` counts defect-free images left out because the test part holds the same file or group."""

    records: list[SplitRecord]
    dropped: int = 0

    def of(self, split: Split) -> list[SplitRecord]:
        return [item for item in self.records if item.record.split == split]

    def fingerprint(self) -> dict[str, str]:
        """Per split, the SHA-256 of its sorted file hashes: equal exactly when the data are."""
        return {
            split: hashlib.sha256("".join(sorted(item.digest for item in self.of(split))).encode()).hexdigest()
            for split in SPLITS
        }


SPLITS_FILE = "splits.csv"
_COLUMNS = ("path", "split", "kind", "unit", "sha256")
_SPLIT: dict[str, Split] = {split: split for split in SPLITS}


def write_splits(path: Path, splits: Splits) -> None:
    """A CSV row for each image: where it is, what it is for, and its content's SHA-256."""
    rows = (
        {
            "path": str(item.record.path),
            "split": item.record.split,
            "kind": item.record.kind,
            "unit": item.unit,
            "sha256": item.digest,
        }
        for item in splits.records
    )
    write_csv(path, _COLUMNS, rows)


def read_splits(path: Path, records: Sequence[Record], progress: bool = True) -> Splits:
    """The parts that `write_splits` wrote, of records that hold the same files, wherever; others are left out.

    Raises:
        DataError: the file is missing, or an image is gone or has changed since.
    """
    rows = {row["sha256"]: row for row in _read_rows(path)}
    digests = digest_files([record.path for record in records], progress)
    if lost := rows.keys() - set(digests):
        first = min(rows[digest]["path"] for digest in lost)
        what = "changed" if first in {str(record.path) for record in records} else "gone"
        raise DataError(f"{first} has {what} since {path} was written: give the images by data.root=DIR.")
    return Splits(
        [
            SplitRecord(replace(record, split=_SPLIT[row["split"]]), digest, row["unit"])
            for record, digest in zip(records, digests, strict=True)
            if (row := rows.get(digest))
        ]
    )


def read_part(path: Path, split: Split, progress: bool = True) -> list[SplitRecord]:
    """The images of one part, from what `write_splits` wrote.

    Raises:
        DataError: the file is missing, or an image is gone or has changed since.
    """
    rows = [row for row in _read_rows(path) if row["split"] == split]
    _check_same(path, rows, progress)
    return [
        SplitRecord(Record(Path(row["path"]), row["kind"], split=split), row["sha256"], row["unit"]) for row in rows
    ]


def part_digests(path: Path, split: Split) -> set[str]:
    """The SHA-256 of the images of one part, from what `write_splits` wrote. Raises DataError if it is missing."""
    return {row["sha256"] for row in _read_rows(path) if row["split"] == split}


def _read_rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}; give the images by data.root=DIR.") from error


def _check_same(path: Path, rows: Sequence[Mapping[str, str]], progress: bool) -> None:
    digests = digest_files([Path(row["path"]) for row in rows], progress)
    for row, digest in zip(rows, digests, strict=True):
        if row["sha256"] != digest:
            raise DataError(f"{row['path']} has changed since {path} was written: give the images by data.root=DIR.")


def digest_files(paths: Sequence[Path], progress: bool = True) -> list[str]:
    """SHA-256 of each file, in order. Raises DataError if one cannot be read."""

    def digest(path: Path) -> str:
        sha = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while block := file.read(2**20):
                    sha.update(block)
        except OSError as error:
            raise DataError(f"Cannot read {path}: {error.strerror}; check its permissions, or remove it.") from error
        return sha.hexdigest()

    with ThreadPoolExecutor(4) as pool:
        return list(
            tqdm(pool.map(digest, paths), "hashing", len(paths), unit="image", disable=not progress, leave=False)
        )


def find_units(records: Sequence[Record], digests: Sequence[str]) -> list[str]:
    """Name each record's unit: the connected components of "same group" and "same content" (union-find)."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for record, digest in zip(records, digests, strict=True):
        if record.group is not None:
            first, second = sorted((root("content " + digest), root("group " + record.group)))
            parent[second] = first
    return [root("content " + digest) for digest in digests]


def split_records(
    records: Sequence[Record],
    seed: int,
    validation: float = 0.1,
    calibration: float | None = None,
    needed: int = 0,
    progress: bool = True,
) -> Splits:
    """Settle the split of every record; units (see `SplitRecord`) are never divided.

    Args:
        records: their own `split` wins, except that defect-free images marked "train" may still be given to
            validation or calibration where the data set names no images for these.
        seed: of the shuffle.
        validation: share of the defect-free units for early stopping and model selection.
        calibration: share of the units for calibration. None takes a fifth, or as many as the promise needs,
            but never more than half.
        needed: the number of calibration units that the promise needs.

    Raises:
        ConfigError: a share is out of range. DataError: no image is left to train on, or a unit is named in
            two splits.
    """
    shares = [validation] if calibration is None else [validation, calibration]
    if not all(isinstance(share, (int, float)) and share > 0 for share in shares) or sum(shares) >= 1:
        raise ConfigError(
            f"Expected split.validation and split.calibration in (0, 1) and together below 1, found {validation} "
            f"and {calibration}."
        )
    digests = digest_files([record.path for record in records], progress)
    units = find_units(records, digests)
    in_test = {unit for record, unit in zip(records, units, strict=True) if record.split == "test"}
    dropped = 0
    free: set[str] = set()  # units that blemish may place
    fixed: dict[str, Split] = dict.fromkeys(in_test, "test")
    named = {split: bool(of_split(records, split)) for split in SPLITS}
    for record, unit in zip(records, units, strict=True):
        if record.split == "test":
            continue
        if unit in in_test:
            dropped += 1
        elif record.split in (None, "train"):
            free.add(unit)
        else:
            fixed.setdefault(unit, record.split)
    for record, unit in zip(records, units, strict=True):
        if record.split is not None and fixed.get(unit, record.split) not in (record.split, "test"):
            raise DataError(
                f"{record.path} shares its group or content with an image of another split: give both one split."
            )
    order = sorted(free - fixed.keys())
    random.Random(seed).shuffle(order)
    total = len(order)
    for_calibration = (
        0
        if named["calibration"]
        else (round(total * calibration) if calibration is not None else min(max(-(-total // 5), needed), total // 2))
    )
    for_validation = 0 if named["validation"] else max(1, round(total * validation))
    if total - for_calibration - for_validation < 1:
        raise DataError(
            f"Too few images: {total} distinct defect-free images or groups do not leave one for each of training, "
            "validation and calibration; add images, or lower split.validation or split.calibration."
        )
    for position, unit in enumerate(order):
        fixed[unit] = (
            "calibration"
            if position < for_calibration
            else "validation"
            if position < for_calibration + for_validation
            else "train"
        )
    settled = [
        SplitRecord(replace(record, split=fixed[unit]), digest, unit)
        for record, digest, unit in zip(records, digests, units, strict=True)
        if record.split == "test" or unit not in in_test
    ]
    return Splits(settled, dropped)

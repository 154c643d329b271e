"""From a data set's layout to records: one reader per layout, all returning the same `Records`."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from blemish.data.images import IMAGE_SUFFIXES, images_below, is_image, list_images
from blemish.errors import ConfigError, DataError

Split = Literal["train", "validation", "calibration", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "calibration", "test")
NORMAL = "good"
_NORMAL_NAMES = ("good", "normal")  # whatever their case


@dataclass(frozen=True)
class Record:
    """One image: `kind` is "good" or the name of its defect; `split` None leaves the choice to the splitter.

    `group` names what images have in common (part, lot, roll): a group never lies in two splits. `label` names the
    class of part, where the data tell it.
    """

    path: Path
    kind: str = NORMAL
    mask: Path | None = None
    split: Split | None = None
    group: str | None = None
    label: str | None = None

    @property
    def is_normal(self) -> bool:
        return self.kind == NORMAL


@dataclass(frozen=True)
class Records:
    """The images of a data set, and what is wrong with its layout (each problem one sentence)."""

    images: list[Record]
    problems: list[str] = field(default_factory=list)

    def sound(self) -> list[Record]:
        """The images, if the layout has no problem.

        Raises:
            DataError: it has; the sentence gives the first problem and their number.
        """
        if self.problems:
            more = f" ({len(self.problems) - 1} more such problems)" if len(self.problems) > 1 else ""
            raise DataError(f"{self.problems[0]}{more} `blemish check` lists them all.")
        return self.images


def read_folder(root: str | Path, classes: str | None = None) -> Records:
    """Every image below `root`, in any nesting, is defect-free.

    `classes`: "folders" makes the name of the folder directly below `root` the class of part; None names no class.

    Raises:
        ConfigError: `classes` is something else. DataError: the folder is missing, or has the MVTec AD layout.
    """
    root = Path(root)
    if classes not in (None, "folders"):
        raise ConfigError(f"Expected data.classes to be folders or null, found '{classes}'.")
    if (root / "train" / NORMAL).is_dir() and (root / "test").is_dir():
        raise DataError(f"{root} has the MVTec AD layout, its test part holds defects: use data=mvtec.")
    paths = list_images(root)
    if classes is None:
        return Records([Record(path) for path in paths])
    return Records(
        [Record(path, label=path.relative_to(root).parts[0]) for path in paths if path.parent != root],
        [
            f"{path} lies in no folder below {root}, which would name its class: move it."
            for path in paths
            if path.parent == root
        ],
    )


def read_mvtec(root: str | Path) -> Records:
    """`train/good`, `test/<kind>` and `ground_truth/<kind>/<stem>_mask.png` (or `<stem>.png`), as in MVTec AD.

    Where images lie in folders of a kind's folder, so do their masks.

    Source: Bergmann et al., MVTec AD, CVPR 2019. A data set without masks, or without a test part, is fine.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"Folder {root} does not exist: check data.root.")
    if not (root / "train" / NORMAL).is_dir():
        raise DataError(f"{root} has no folder train/{NORMAL}, which the MVTec AD layout needs: use data=folder?")
    images = [Record(path, split="train") for path in list_images(root / "train" / NORMAL)]
    problems = [
        f"Folder {folder} lies in the train part beside train/{NORMAL}: only defect-free images train; move it."
        for folder in _folders_in(root / "train")
        if folder.name != NORMAL
    ]
    problems += [
        f"Image {path} lies in no folder of its kind: move it into one, such as {path.parent / NORMAL}."
        for path in sorted((root / "test").glob("*"))
        if path.is_file() and is_image(path)
    ]
    masks, in_doubt = _masks_by_image(root / "ground_truth")
    problems += in_doubt
    taken: dict[tuple[str, str], Path] = {}
    for folder in _folders_in(root / "test"):
        if folder.name != NORMAL and folder.name.lower() in _NORMAL_NAMES:
            problems.append(f"Folder {folder} counts as a kind of defect: call it {NORMAL} if it is free of them.")
        for path in list_images(folder):
            name = folder.name, path.relative_to(folder).with_suffix("").as_posix()
            if name not in masks:
                name = folder.name, path.stem  # masks may lie flat where images do not
            mask = masks.get(name)
            if mask is not None and folder.name == NORMAL:
                problems.append(f"Mask {mask} belongs to a defect-free image: remove it or move the image.")
            elif mask is not None and name in taken:
                problems.append(f"Images {taken[name]} and {path} have one mask, {mask}: rename one of them.")
            taken[name] = path
            images.append(Record(path, kind=folder.name, mask=mask, split="test"))
    problems += [
        f"Mask {mask} has no image in {root / 'test' / name[0]}: restore it or remove the mask."
        for name, mask in sorted(masks.items())
        if name not in taken
    ]
    return Records(images, problems)


def _folders_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*")) if path.is_dir() and not path.name.startswith(".")]


def _masks_by_image(root: Path) -> tuple[dict[tuple[str, str], Path], list[str]]:
    """Masks by kind and the path of their image below the folder of its kind, without its ending; and problems."""
    found: dict[tuple[str, str], Path] = {}
    problems = []
    for path in images_below(root):
        kind, *rest = path.relative_to(root).with_suffix("").parts
        image = kind, "/".join(rest).removesuffix("_mask")
        if not rest:
            problems.append(f"Mask {path} lies in no folder of a kind of defect: move it, or remove it.")
        elif image in found:
            problems.append(f"Masks {found[image]} and {path} are of one image: remove one of them.")
        else:
            found[image] = path
    return found, problems


def read_manifest(root: str | Path, manifest: str = "manifest.csv") -> Records:
    """A CSV file with the columns path, label, and optionally mask, split, group, class; paths are relative to it.

    `root` is the CSV file, or the folder that holds one called `manifest`. `label` is "good" (or "normal") or
    the name of the defect. `split` is train, validation, calibration or test; left empty, defect-free images
    are split by blemish and defective ones go to the test part. `class` is the class of part.

    Raises:
        DataError: the file is missing or malformed, a defective image is not in the test part, a path is missing.
    """
    file = Path(root)
    file = file / manifest if file.is_dir() else file
    if not file.is_file():
        raise DataError(
            f"Manifest {file} does not exist: expected a CSV file with columns path,label,mask,split,group,class."
        )
    images: list[Record] = []
    problems: list[str] = []
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"Manifest {file} is not in UTF-8: save it as CSV UTF-8.") from error
    reader = csv.DictReader(text.splitlines())
    columns = set(reader.fieldnames or ())
    if not {"path", "label"} <= columns or columns - {"path", "label", "mask", "split", "group", "class"}:
        raise DataError(
            f"Manifest {file} has the columns {', '.join(reader.fieldnames or ['(none)'])}; expected path and label, "
            "and optionally mask, split, group, class."
        )
    lines: dict[Path, int] = {}
    for number, row in enumerate(reader, start=2):
        if None in row:
            problems.append(f"Line {number} of {file} has more fields than columns: quote fields that hold a comma.")
            continue
        record, problem = _manifest_row(file, number, {key: (row[key] or "").strip() for key in columns})
        if record and record.path in lines:
            problem = f"Line {number} of {file} names {record.path} twice (see line {lines[record.path]}): remove one."
        elif record:
            lines[record.path] = number
            images.append(record)
        problems += [problem] if problem else []
    if not images and not problems:
        raise DataError(f"Manifest {file} lists no image.")
    return Records(images, problems)


def _manifest_row(file: Path, number: int, row: dict[str, str]) -> tuple[Record | None, str | None]:
    where = f"Line {number} of {file}"
    label, split = row["label"], row.get("split", "")
    if not row["path"] or not label:
        return None, f"{where} lacks a path or a label: fill it in."
    kind = NORMAL if label.lower() in _NORMAL_NAMES else label
    if split not in ("", *SPLITS):
        return None, f"{where} has the split '{split}': expected one of {', '.join(SPLITS)}, or nothing."
    if kind != NORMAL and split not in ("", "test"):
        return (
            None,
            f"{where} puts a defective image ('{label}') into the {split} part: only the test part may hold one.",
        )
    path = file.parent / row["path"]
    mask = file.parent / row["mask"] if row.get("mask") else None
    if not path.is_file():
        return None, f"{where} names the image {path}, which does not exist: restore it or remove the line."
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        return None, f"{where} names {path}: expected a file ending in {', '.join(sorted(IMAGE_SUFFIXES))}."
    if mask is not None and not mask.is_file():
        return None, f"{where} names the mask {mask}, which does not exist: restore it or empty the field."
    if mask is not None and kind == NORMAL:
        return None, f"{where} gives a mask to a defect-free image: empty the field, or name the defect."
    part: Split | None = "test" if kind != NORMAL else _as_split(split)
    return Record(path, kind, mask, part, row.get("group") or None, row.get("class") or None), None


def _as_split(text: str) -> Split | None:
    return next((split for split in SPLITS if split == text), None)


def of_split(records: Iterable[Record], split: Split) -> list[Record]:
    return [record for record in records if record.split == split]

"""Which reference, and which mask of true differences, belongs to which query."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from blemish.data.images import list_images
from blemish.errors import DataError
from blemish.outputs import unique_stems

_MASK_SUFFIXES = ("_mask", "_gt")


@dataclass(frozen=True)
class Pair:
    """A query, its reference, the mask of its true differences if there is one, and its name without suffix."""

    query: Path
    reference: Path
    name: Path
    mask: Path | None = None


def find_pairs(reference: Path, query: Path, mask: Path | None = None) -> list[Pair]:
    """Pairs of two files, of one reference with a folder of queries, or of two folders by name.

    In folders, files belong together whose paths below the folder are equal but for the suffix; those of masks may
    end in _mask or _gt. References and masks may be left over, queries may not.

    Raises:
        DataError: a path is missing or no image, a query has no reference, or two files have one name.
    """
    for path, what in ((reference, "reference"), (query, "query"), (mask, "mask")):
        if path is not None and not path.exists():
            raise DataError(f"The {what} {path} does not exist: give an image, or a folder of images.")
    if query.is_file():
        if not reference.is_file():
            raise DataError(f"The query is a file, the reference {reference} a folder: give two files or two folders.")
        if mask is not None and not mask.is_file():
            raise DataError(f"The query is a file, the mask {mask} a folder: give the mask's file.")
        return [Pair(query, reference, Path(query.stem), mask)]
    if mask is not None and mask.is_file():
        raise DataError(f"The query is a folder, the mask {mask} a file: give a folder of masks.")
    queries = list_images(query)
    names = unique_stems([path.relative_to(query) for path in queries])
    references = dict.fromkeys(names, reference) if reference.is_file() else _by_name(reference)
    masks = _by_name(mask) if mask is not None else {}
    pairs = []
    for path, name in zip(queries, names, strict=True):
        found = references.get(name) or references.get(name.with_suffix(""))
        if found is None:
            lonely = [other for other in names if other not in references and other.with_suffix("") not in references]
            raise DataError(
                f"{len(lonely)} of {len(names)} queries have no reference, the first is {path}: expected an image "
                f"{reference / name.with_suffix('.*')}."
            )
        candidates = (name, *(name.with_name(name.name + suffix) for suffix in _MASK_SUFFIXES))
        pairs.append(Pair(path, found, name, next((masks[one] for one in candidates if one in masks), None)))
    return pairs


def _by_name(folder: Path) -> dict[Path, Path]:
    found: dict[Path, Path] = {}
    for path in list_images(folder):
        name = path.relative_to(folder).with_suffix("")
        if name in found:
            raise DataError(f"{found[name]} and {path} have one name: a query could not tell which it belongs to.")
        found[name] = path
    return found

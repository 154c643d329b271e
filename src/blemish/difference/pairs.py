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
        DataError: a path is missing or no image, a query has no reference, no mask has a query, or two files have one
            name.
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
    keys = [path.relative_to(query).with_suffix("") for path in queries]
    references = dict.fromkeys(keys, reference) if reference.is_file() else _by_name(reference)
    masks = _by_name(mask) if mask is not None else {}
    pairs = []
    for path, name, key in zip(queries, names, keys, strict=True):
        if key not in references:
            lonely = sum(other not in references for other in keys)
            raise DataError(
                f"{lonely} of {len(keys)} queries have no reference, the first is {path}: expected an image "
                f"{reference / key}.*."
            )
        candidates = (key, *(key.with_name(key.name + suffix) for suffix in _MASK_SUFFIXES))
        pairs.append(Pair(path, references[key], name, next((masks[one] for one in candidates if one in masks), None)))
    if masks and all(pair.mask is None for pair in pairs):
        raise DataError(
            f"None of the {len(masks)} masks in {mask} belongs to a query: expected one called like {pairs[0].query}, "
            "at the same place below its folder."
        )
    return pairs


def _by_name(folder: Path) -> dict[Path, Path]:
    found: dict[Path, Path] = {}
    for path in list_images(folder):
        name = path.relative_to(folder).with_suffix("")
        if name in found:
            raise DataError(f"{found[name]} and {path} have one name: a query could not tell which it belongs to.")
        found[name] = path
    return found

"""Thumbnails for the report: observed, expected, heat map, mask and truth of chosen images, in one zip file."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from blemish.data.images import FloatArray, Pixels, probe, read_mask, read_pixels
from blemish.detector import Detector, Prediction
from blemish.errors import ImageError
from blemish.files import atomic
from blemish.pictures import Picture, as_rgb, colour
from blemish.postprocess import Mask
from blemish.scoring import ScoredFile, score_files

SIDE = 160  # of a thumbnail, in pixels
_LARGE = 2**22  # pixels, from which scoring again, or holding what was expected, costs more than a thumbnail is worth


@dataclass(frozen=True)
class Shown:
    """An image of the gallery, the mask of its true defects and its score map as TIFF, where there is one.

    `label`: the class of part that goes with the score map.
    """

    path: Path
    truth: Path | None = None
    score_map: Path | None = None
    label: str | None = None

    @property
    def is_large(self) -> bool:
        """Whether its stored map serves, instead of scoring the image again."""
        return self.score_map is not None and _is_large(self.path)


class Drawn(NamedTuple):
    """The thumbnails of an image of size (H, W), encoded, by their names."""

    size: tuple[int, int]
    pictures: Mapping[str, bytes]


def draws_at_once(paths: Sequence[Path], gallery: int) -> bool:
    """Whether to draw images while they are scored, instead of scoring again those that turn out to be worth it."""
    return len(paths) <= gallery and not any(map(_is_large, paths))


def draw(pixels: Pixels, prediction: Prediction, expected: FloatArray | None) -> Drawn:
    """The thumbnails of an image: observed, heat map, mask, and what was expected (h, w, C), if that is known."""
    height, width = prediction.score_map.shape
    pictures = {"observed": _webp(_shrink(as_rgb(pixels)))}
    if expected is not None:
        picture = as_rgb((expected.clip(0, 1) * 255).round().astype(np.uint8))
        pictures["expected"] = _webp(_shrink(picture, (height, width)))
    pictures["heat"] = _webp(colour(_shrink_to_largest(prediction.score_map), prediction.threshold))
    pictures["mask"] = _png(_shrink_to_largest(prediction.mask.astype(np.uint8)) > 0)
    return Drawn((height, width), pictures)


def write_gallery(
    out: Path,
    detector: Detector,
    images: Sequence[Shown],
    progress: bool = True,
    drawn: Mapping[Path, Drawn] | None = None,
) -> None:
    """Write the thumbnails of images; `index.json` in the zip names them, in the order given.

    Those that are not `drawn` yet are scored once more. An image that has become unreadable is left out.
    """
    index = []
    drawn = drawn or {}
    others = [shown for shown in images if shown.path not in drawn]
    bar = tqdm(_scored(detector, others), "picturing", len(others), unit="image", disable=not progress, leave=False)
    scored = iter(bar)
    with atomic(out) as path, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for number, shown in enumerate(images):
            made = drawn.get(shown.path) or _drawn(detector, next(scored))
            if made is None:
                continue
            size, pictures = made.size, dict(made.pictures)
            if shown.truth is not None:
                pictures["truth"] = _png(_shrink_to_largest(read_mask(shown.truth, size).astype(np.uint8)) > 0)
            names = {}
            for name, content in pictures.items():
                suffix = "png" if name in ("mask", "truth") else "webp"
                names[name] = f"{number}/{name}.{suffix}"
                archive.writestr(names[name], content)
            index.append({"path": str(shown.path), "width": size[1], "height": size[0], "pictures": names})
        archive.writestr("index.json", json.dumps({"threshold": detector.card.thresholds, "images": index}))


def _scored(detector: Detector, images: Sequence[Shown]) -> Iterator[ScoredFile]:
    """The images in order; large ones with their stored map, and so without what was expected."""
    for large, some in groupby(images, lambda shown: shown.is_large):
        if large:
            yield from map(_read, some)
        else:
            yield from score_files(detector, [shown.path for shown in some], explain=True)


def _read(shown: Shown) -> ScoredFile:
    assert shown.score_map is not None
    try:
        pixels = read_pixels(shown.path)
    except ImageError as error:
        return ScoredFile(shown.path, None, None, None, 0.0, str(error))
    with Image.open(shown.score_map) as tiff:
        return ScoredFile(shown.path, pixels, np.asarray(tiff, np.float32), None, 0.0, label=shown.label)


def _drawn(detector: Detector, scored: ScoredFile) -> Drawn | None:
    if scored.pixels is None or scored.score_map is None:
        return None
    return draw(scored.pixels, detector.decide(scored.score_map, scored.label), scored.expected)


def _is_large(path: Path) -> bool:
    try:
        info = probe(path)
    except ImageError:
        return False
    return info.width * info.height > _LARGE


def _fitting(size: Sequence[int]) -> tuple[int, int]:
    """(width, height) of the thumbnail of an image of size (H, W); small images keep their size."""
    factor = min(1.0, SIDE / max(size))
    return max(1, round(size[1] * factor)), max(1, round(size[0] * factor))


def _shrink(picture: Picture, size: Sequence[int] | None = None) -> Picture:
    """To the thumbnail of an image of `size` (H, W), which is the picture's own if None."""
    fitting = _fitting(size or picture.shape[:2])
    return np.asarray(cv2.resize(picture, fitting, interpolation=cv2.INTER_AREA), np.uint8)


def _shrink_to_largest(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """(H, W) -> the largest value under each pixel of the thumbnail, so that a defect of one pixel stays visible."""
    width, height = _fitting(values.shape)
    rows, columns = (
        np.arange(new) * old // new for new, old in zip((height, width), values.shape, strict=True)
    )  # where each thumbnail pixel begins
    return np.maximum.reduceat(np.maximum.reduceat(values, rows, axis=0), columns, axis=1)


def _webp(picture: Picture) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", quality=80, method=2)
    return buffer.getvalue()


def _png(mask: Mask) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()

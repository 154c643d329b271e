"""Scoring files in order: decoding runs ahead in threads, neighbours of equal size share batches."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blemish.data.images import FloatArray, Pixels, probe, read_pixels
from blemish.detector import Detector
from blemish.errors import DataError, ImageError
from blemish.streaming import map_ahead

PIXELS_AHEAD = 2**24  # decoded or waiting to be written at any time, beyond the images in hand


@dataclass(frozen=True)
class ScoredFile:
    """A file with its pixels and raw score map, or the reason why there are none.

    `expected`, `label`: as in `ScoredImage`. `seconds`: to decode, tile and score, shared evenly by the images of a
    batch.
    """

    path: Path
    pixels: Pixels | None
    score_map: FloatArray | None
    expected: FloatArray | None
    seconds: float
    error: str = ""
    label: str | None = None


def usable(normal: ScoredFile) -> FloatArray:
    """The score map of a normal image that nothing can go on without. Raises DataError if there is none."""
    if normal.score_map is None:
        raise DataError(f"A normal image cannot be used. {normal.error}")
    return normal.score_map


def score_files(detector: Detector, paths: Sequence[Path], explain: bool = False) -> Iterator[ScoredFile]:
    """Score files in order: decoding runs ahead in threads; an unreadable file yields its error."""

    def decode(path: Path) -> Pixels | ImageError:
        try:
            pixels = read_pixels(path)
        except ImageError as error:
            return error
        try:
            detector.check_size(pixels)
        except ImageError as error:
            return ImageError(f"{path}: {error}")
        return pixels

    def area(path: Path) -> float:
        try:
            info = probe(path)
        except ImageError:
            return 0
        return info.width * info.height

    pending: deque[tuple[Path, Pixels | ImageError]] = deque()

    def readable() -> Iterator[Pixels]:
        for path, pixels in zip(paths, map_ahead(decode, paths, area, PIXELS_AHEAD), strict=True):
            pending.append((path, pixels))
            if not isinstance(pixels, ImageError):
                yield pixels

    def errors() -> Iterator[ScoredFile]:
        while pending and isinstance(pending[0][1], ImageError):
            path, error = pending.popleft()
            yield ScoredFile(path, None, None, None, 0.0, str(error))

    start = time.perf_counter()
    for batch in detector.score_batches(readable(), explain):
        seconds = (time.perf_counter() - start) / len(batch)
        for scored in batch:
            yield from errors()
            path, pixels = pending.popleft()
            assert not isinstance(pixels, ImageError)
            yield ScoredFile(path, pixels, scored.score_map, scored.expected, seconds, label=scored.label)
        start = time.perf_counter()
    yield from errors()

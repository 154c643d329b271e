"""A figure without labels: how well held-out normal images are told from copies of them with synthetic defects.

It serves to choose between runs on the same images, and says nothing of how many real defects will be found.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from blemish.data.images import Pixels, probe, read_pixels
from blemish.data.records import NORMAL
from blemish.data.synthetic import SMALLEST_SIDE, Mask, add_defect, deal_kinds
from blemish.detector import Detector
from blemish.errors import ConfigError
from blemish.evaluation.metrics import Evaluation
from blemish.files import write_json

SYNTHETIC_FILE = "synthetic.json"
METRICS = ("synthetic/mean", "synthetic/image_auroc", "synthetic/pixel_auroc")
"""What runs can be chosen by: the AUROC of images, of pixels, or the mean of both. Higher is better."""
_PIXELS, _FEWEST = 2**27, 10  # clean pixels to score at most, but so many images anyway


def check_images(images: Any) -> None:
    """Raise ConfigError if so many images cannot be drawn."""
    if images < 0:
        raise ConfigError(f"Expected synthetic.images >= 0, found {images}.")


def check_metric(name: Any) -> str:
    """Raise ConfigError unless `name` is one of METRICS."""
    if name not in METRICS:
        raise ConfigError(
            f"Expected optimized_metric to be one of {', '.join(METRICS)}, found '{name}': figures of labelled test "
            "images are not offered, because a run chosen by them can no longer be measured by them."
        )
    return str(name)


def read_metric(folder: Path, name: str) -> float | None:
    """The figure `name` (one of METRICS) of a run; None if it has none."""
    file = folder / SYNTHETIC_FILE
    if not file.is_file():
        return None
    figure: float | None = json.loads(file.read_text(encoding="utf-8"))[name.removeprefix("synthetic/")]
    return figure


def synthetic_defects_figure(
    detector: Detector, paths: Sequence[Path], images: int, seed: int = 0, progress: bool = True
) -> dict[str, Any] | None:
    """AUROC of images and pixels, clean against defective, on normal images that neither trained nor calibrate.

    At most `images` clean images, and at most as many defective copies; where there are fewer images, each is copied
    with several kinds. Large images are fewer. A defect depends on the image's pixels and `seed` alone, so that every
    run with the same images is asked the same.

    Returns:
        {"images", "defective", "image_auroc", "pixel_auroc", "mean", "kinds": {kind: {...}}}; None if no image is
        large enough for a defect.

    Raises:
        NotCalibrated: without a mask rule there is no image score. ImageError: a file cannot be read.
    """
    chosen = _choose(paths, images)
    if not chosen:
        return None
    evaluation = Evaluation()
    told: list[tuple[str, Mask | None]] = []
    pairs = deal_kinds(len(chosen), images)

    def pictures() -> Iterator[Pixels]:
        for turn, (index, kind) in enumerate(pairs):
            clean, other = read_pixels(chosen[index]), read_pixels(chosen[(index + 1) % len(chosen)])
            if turn < len(chosen):
                told.append((NORMAL, None))
                yield clean
            rng = np.random.default_rng([seed, zlib.crc32(clean.tobytes()), zlib.crc32(kind.encode())])
            defect = add_defect(clean, other, kind, rng)
            told.append((defect.kind, defect.mask))
            yield defect.image

    images_scored = chain.from_iterable(detector.score_batches(pictures()))
    total = len(pairs) + min(len(pairs), len(chosen))
    bar = tqdm(images_scored, "measuring", total, unit="image", disable=not progress, leave=False)
    for number, scored in enumerate(bar):
        kind, mask = told[number]
        evaluation.add(kind, detector.decide(scored.score_map, scored.label), mask)
        told[number] = (kind, None)  # masks are not kept
    result = evaluation.result()
    return {
        "images": len(chosen),
        "defective": len(pairs),
        "seed": seed,
        **_figures(result["overall"]),
        "kinds": {
            kind: {"defective": figures["images"], **_figures(figures)} for kind, figures in result["kinds"].items()
        },
    }


def _figures(result: dict[str, Any]) -> dict[str, float]:
    image, pixel = result["image_auroc"], result["pixel_auroc"]
    return {"image_auroc": image, "pixel_auroc": pixel, "mean": (image + pixel) / 2}


def _choose(paths: Sequence[Path], images: int) -> list[Path]:
    """At most `images` of them, evenly spread over their names, none too small, not too many pixels in all."""
    large, pixels = [], []
    for path in sorted(paths):
        info = probe(path)
        if min(info.width, info.height) >= SMALLEST_SIDE:
            large.append(path)
            pixels.append(info.width * info.height)
    if not large or not images:
        return []
    most = min(images, len(large), max(_FEWEST, int(_PIXELS / np.mean(pixels))))
    return [large[place] for place in np.linspace(0, len(large) - 1, most).round().astype(int)]


def write_figure(folder: Path, figure: dict[str, Any], made: dict[str, Any]) -> None:
    write_json(folder / SYNTHETIC_FILE, {"made": made, **figure})


def in_words(figure: dict[str, Any]) -> str:
    kinds = ", ".join(f"{kind} {figures['image_auroc']:.2f}" for kind, figures in sorted(figure["kinds"].items()))
    return (
        f"synthetic defects on {figure['images']} validation images (no labels used): image AUROC "
        f"{figure['image_auroc']:.4f}, pixel AUROC {figure['pixel_auroc']:.4f} (images by kind: {kinds})"
    )

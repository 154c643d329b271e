"""Shows the same pairs through every strategy and metric of `blemish diff`, on one page that needs nothing else.

    python scripts/difference_gallery.py REFERENCE QUERY OUT.html [--pairs 6] [KEY=VALUE ...]

REFERENCE and QUERY are as for `blemish diff`; of more pairs than --pairs, some are taken, spread evenly. KEY=VALUE are
settings of `blemish diff`, the same for every way. A way whose weights are not installed is left out, and the page says
so. Open it in a browser; a click on a picture enlarges it.
"""

from __future__ import annotations

import argparse
import base64
import io
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from tqdm import tqdm

from blemish.data.images import read_pixels
from blemish.difference.build import build_comparison
from blemish.difference.compare import Comparison, Difference
from blemish.difference.pairs import Pair, find_pairs
from blemish.errors import BlemishError, ConfigError
from blemish.files import write_text
from blemish.pictures import Picture, as_rgb, hatched, heat_map
from blemish.settings import settings_of

SIDE = 400  # of a picture on the page, in pixels


@dataclass(frozen=True)
class Way:
    """One column of the page: a strategy, a metric, and what it shows."""

    name: str
    shows: str
    settings: tuple[str, ...]


METRICS = {
    "l1": ("L1", "by how much each pixel's value differs"),
    "l2": ("L2", "the same squared: strong differences stand out, weak ones fade"),
    "psnr": ("PSNR", "how many decibels of likeness are lost around each pixel"),
    "ssim": ("SSIM", "where brightness, contrast or structure differ within some 11 pixels"),
    "ms_ssim": ("MS-SSIM", "the same on four scales, from fine to coarse"),
    "gradient": ("Edges", "where edges are missing, new, or of another strength, on three scales"),
    "perceptual": ("LPIPS", "where features of a trained network differ: what looks different"),
}
WAYS = [
    *(Way(name, shows, (f"residual={key}", "strategy=difference")) for key, (name, shows) in METRICS.items()),
    *(
        Way(
            f"Gradient of {METRICS[key][0]}",
            f"which pixels of the query {METRICS[key][0]} would change most with",
            (f"residual={key}", "strategy=gradient"),
        )
        for key in ("l2", "psnr", "ssim", "ms_ssim", "perceptual")
    ),
    Way(
        "Grad-CAM",
        "what makes a trained network's features of the query unlike those of the reference",
        ("strategy=grad_cam",),
    ),
]


def build_ways(ways: Sequence[Way], words: Sequence[str]) -> tuple[dict[Way, Comparison], dict[str, str]]:
    """What compares, and why the others cannot.

    Raises:
        ConfigError: a setting is unknown, or no way can be built.
    """
    built, missing = {}, {}
    for way in ways:
        settings = settings_of("diff", ["reference=-", "query=-", *way.settings, *words])
        try:
            built[way] = build_comparison(settings)
        except ConfigError as error:
            missing[way.name] = str(error)
    if not built:
        raise ConfigError(next(iter(missing.values())))
    return built, missing


def show(ways: Mapping[Way, Comparison], pairs: Sequence[Pair], progress: bool = True) -> list[dict[str, Any]]:
    """A row for each pair: its name, reference and query, and a cell for each way."""
    rows = []
    for pair in tqdm(pairs, "comparing", unit="pair", disable=not progress):
        reference, query = read_pixels(pair.reference), read_pixels(pair.query)
        found = {way: comparison(reference, query) for way, comparison in ways.items()}
        aligned = next(iter(ways.values())).align(reference, query)
        rows.append(
            {
                "name": pair.name.as_posix(),
                "reference": encoded(shrunk(hatched(as_rgb(aligned.reference), aligned.valid))),
                "query": encoded(shrunk(as_rgb(aligned.query))),
                "cells": [cell(one, aligned.query) for one in found.values()],
            }
        )
    return rows


def cell(found: Difference, query: np.ndarray[Any, Any]) -> dict[str, Any]:
    regions = f"{len(found.regions)} region{'' if len(found.regions) == 1 else 's'}"
    return {
        "picture": encoded(overlay(found, query)),
        "said": f"{regions}, {100 * found.share:.2g} %" if found.is_different else "same",
        "seconds": sum(found.seconds.values()),
    }


def overlay(found: Difference, query: np.ndarray[Any, Any]) -> Picture:
    """Heat map and outline over the query, drawn after shrinking, so that neither fades."""
    height, width = fitting(found.mask.shape)
    rows, columns = np.arange(height) * found.mask.shape[0] // height, np.arange(width) * found.mask.shape[1] // width
    score_map, mask = (
        np.maximum.reduceat(np.maximum.reduceat(values, rows, axis=0), columns, axis=1)
        for values in (found.score_map, found.mask.astype(np.uint8))
    )
    picture = heat_map(score_map, found.threshold, shrunk(as_rgb(query)), mask > 0)
    return hatched(picture, found.valid[np.ix_(rows, columns)])


def fitting(shape: Sequence[int]) -> tuple[int, int]:
    """(height, width) on the page; small pictures keep their size."""
    factor = min(1.0, SIDE / max(shape[:2]))
    return max(1, round(shape[0] * factor)), max(1, round(shape[1] * factor))


def shrunk(picture: Picture) -> Picture:
    return np.asarray(cv2.resize(picture, fitting(picture.shape)[::-1], interpolation=cv2.INTER_AREA), np.uint8)


def encoded(picture: Picture) -> str:
    """As a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", quality=80, method=2)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def page(
    ways: Mapping[Way, Comparison], rows: Sequence[Mapping[str, Any]], missing: Mapping[str, str], words: Sequence[str]
) -> str:
    """The HTML page."""
    columns = [
        {
            "name": way.name,
            "shows": way.shows,
            "settings": " ".join(way.settings),
            "threshold": comparison.threshold.kind,
            "seconds": statistics.median(row["cells"][place]["seconds"] for row in rows),
        }
        for place, (way, comparison) in enumerate(ways.items())
    ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    template = environment.get_template("difference_gallery.html")
    text = template.render(columns=columns, rows=rows, missing=missing, settings=" ".join(words))
    return text.encode("utf-8", "replace").decode("utf-8")  # file names may not be valid Unicode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path, help="an image, or a folder of images")
    parser.add_argument("query", type=Path, help="an image, or a folder of images paired by name")
    parser.add_argument("out", type=Path, help="the page to write")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of blemish diff")
    parser.add_argument("--pairs", type=int, default=6)
    arguments = parser.parse_args()
    try:
        pairs = find_pairs(arguments.reference, arguments.query)
        places = np.linspace(0, len(pairs) - 1, min(arguments.pairs, len(pairs))).round().astype(int)
        ways, missing = build_ways(WAYS, arguments.settings)
        rows = show(ways, [pairs[place] for place in places])
        write_text(arguments.out, page(ways, rows, missing, arguments.settings))
    except BlemishError as error:
        sys.exit(str(error))
    print(arguments.out)


if __name__ == "__main__":
    main()

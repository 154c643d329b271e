"""Draw images whose defects are of colour alone, or of texture alone, to see which models find which.

    python scripts/colour_defects.py OUT

makes the data sets OUT/colour and OUT/grey, in MVTec layout with masks: striped leaves of 96 x 96 pixels, which vary in
hue, saturation and value. Kinds of defects, each in a region of 32 x 32 pixels: `hue`, shifted by a quarter of the
circle and nothing else; `turned`, where the stripes run the other way and all colours are what they were; `scratch`, a
bright line some three pixels wide. OUT/grey holds the same images without colours, and no `hue`. Nothing of it is
real; it says what a model can see, not how well it does on parts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

Hsv = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]

SIDE, REGION = 96, 32
TRAIN, NORMAL, OF_KIND = 300, 100, 50


def leaf(rng: np.random.Generator) -> Hsv:
    """(96, 96, 3), hue, saturation and value in [0, 1]: smooth variation, and stripes of value."""
    hue, saturation, value = (cv2.GaussianBlur(rng.standard_normal((SIDE, SIDE)), (0, 0), 4) * 8 for _ in range(3))
    stripes = np.sin(np.arange(SIDE) / 3 + rng.uniform(0, 2 * np.pi))[None]
    return np.stack([0.33 + 0.02 * hue, 0.6 + 0.04 * saturation, 0.5 + 0.04 * value + 0.08 * stripes], axis=-1)


def shift_hue(leaf: Hsv, region: tuple[slice, slice], rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    leaf[(*region, 0)] += 0.25
    return np.ones((REGION, REGION), bool)


def turn(leaf: Hsv, region: tuple[slice, slice], rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    leaf[region] = np.rot90(leaf[region])
    return np.ones((REGION, REGION), bool)


def scratch(leaf: Hsv, region: tuple[slice, slice], rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    line = np.zeros((REGION, REGION), np.uint8)
    first, last = rng.integers(0, REGION, 2).tolist()
    cv2.line(line, (0, first), (REGION - 1, last), 1, 2)
    leaf[(*region, 2)] += 0.25 * line
    return line.astype(bool)


KINDS: dict[str, Callable[[Hsv, tuple[slice, slice], np.random.Generator], npt.NDArray[np.bool_]]] = {
    "hue": shift_hue,
    "turned": turn,
    "scratch": scratch,
}


def as_pixels(leaf: Hsv) -> Pixels:
    """(96, 96, 3) BGR."""
    scaled = np.stack([leaf[..., 0] % 1 * 360, *np.moveaxis(leaf[..., 1:].clip(0, 1), -1, 0)], axis=-1)
    return (cv2.cvtColor(scaled.astype(np.float32), cv2.COLOR_HSV2BGR) * 255).round().astype(np.uint8)


def write(out: Path, name: str, pixels: Pixels, grey: bool = True, mask: npt.NDArray[np.bool_] | None = None) -> None:
    """Into both data sets, or the coloured one alone; `name` is its place there, as train/good/000."""
    shades = cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)
    for root, content in ((out / "colour", pixels), (out / "grey", shades))[: 1 + grey]:
        path = root / f"{name}.png"
        save(path, content)
        if mask is not None:
            save(root / "ground_truth" / path.parent.name / f"{path.stem}_mask.png", mask.astype(np.uint8) * 255)


def save(path: Path, pixels: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), pixels):
        sys.exit(f"Cannot write {path}: is the disk full?")


def draw(out: Path, seed: int = 0) -> None:
    """Both data sets below `out`."""
    rng = np.random.default_rng(seed)
    for part, count in (("train/good", TRAIN), ("test/good", NORMAL)):
        for number in range(count):
            write(out, f"{part}/{number:03}", as_pixels(leaf(rng)))
    for kind, change in KINDS.items():
        for number in range(OF_KIND):
            drawn, mask = leaf(rng), np.zeros((SIDE, SIDE), bool)
            top, left = rng.integers(0, SIDE - REGION, 2).tolist()
            region = (slice(top, top + REGION), slice(left, left + REGION))
            mask[region] = change(drawn, region, rng)
            write(out, f"test/{kind}/{number:03}", as_pixels(drawn), grey=kind != "hue", mask=mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, metavar="OUT")
    out = parser.parse_args().out
    if out.exists():
        sys.exit(f"{out} exists: name a new folder.")
    draw(out)
    print(f"written: {out / 'colour'} and {out / 'grey'}")


if __name__ == "__main__":
    main()

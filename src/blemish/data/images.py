"""Reading images and masks: one rule from any file to (H, W, C) pixels, and from pixels to [0, 1].

The rule, by bit depth: 1 bit -> {0, 1}; 8 bit -> v / 255; 16 bit -> v / 65535; floating point must already
lie in [0, 1]. Palettes are expanded, alpha is dropped, CMYK becomes RGB, and the EXIF orientation is applied.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from blemish.errors import DataError, ImageError

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".pgm", ".ppm", ".pnm"}
)
_UNREAD_SUFFIXES = frozenset(
    {".avif", ".heic", ".heif", ".jp2", ".j2k", ".tga", ".pcx", ".psd", ".exr", ".hdr", ".dcm", ".dng", ".cr2", ".nef"}
)
"""Images of kinds that are not read: listed all the same, so that none is left out without a word."""
LARGEST = 2**28
"""Pixels, such as 16384 x 16384; see `allow_large_images`."""

Pixels = npt.NDArray[Any]
"""(H, W, C) with C 1 or 3, of dtype uint8, uint16, or float32 in [0, 1]."""
FloatArray = npt.NDArray[np.float32]

_ORIENTATION = 0x0112  # the EXIF and TIFF tag
_RUN = "detector.pt"  # marks the folder of a run
_RESULTS = {  # folders of pictures beside the file that marks results
    "predict.json": ("maps", "heatmaps", "masks"),
    "diff.json": ("maps", "masks", "overlays", "side_by_side"),
}
_GREY_MODES = ("1", "L", "LA", "La", "F", "I")
_SCALE = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0}


@dataclass(frozen=True)
class ImageInfo:
    """What a file's header says: `mode` is Pillow's, `bits` per channel."""

    width: int
    height: int
    mode: str
    bits: int

    @property
    def channels(self) -> int:
        """1 if `read_pixels` gives grey, 3 if it gives colour."""
        return 1 if self.mode in _GREY_MODES or self.mode.startswith("I;16") else 3


def is_image(path: Path) -> bool:
    """Whether a file is listed as an image, by its ending; `check_kind` says whether it is of a kind that is read."""
    return path.suffix.lower() in IMAGE_SUFFIXES | _UNREAD_SUFFIXES and not path.name.startswith(".")


def check_kind(path: Path) -> None:
    """Raise ImageError if the ending of `path` is that of an image of a kind that is not read."""
    if path.suffix.lower() in _UNREAD_SUFFIXES:
        raise ImageError(f"Cannot read {path}: {path.suffix} images are not read; save it as PNG, or remove it.")


def list_images(root: Path) -> list[Path]:
    """All image files below `root`, as `images_below` finds them.

    Raises:
        DataError: `root` is missing, is not a folder, or holds no image.
    """
    if not root.exists():
        raise DataError(f"Folder {root} does not exist: check the path.")
    if not root.is_dir():
        raise DataError(f"Expected a folder of images, found a file: {root}.")
    found = images_below(root)
    if not found:
        raise DataError(f"No image found below {root}: expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}.")
    return found


def images_below(root: Path) -> list[Path]:
    """All image files below `root`, sorted; hidden ones, folders of runs, and pictures that blemish made are left out.

    Linked folders count; one that is already being read, by whatever name, is not read again.
    """
    found = []
    read = {root.resolve()}
    for folder, folders, names in os.walk(root, followlinks=True):
        ours = {made for mark in _RESULTS.keys() & set(names) for made in _RESULTS[mark]}
        inside = {
            name: (Path(folder) / name).resolve()
            for name in sorted(folders)
            if not name.startswith(".") and name not in ours and not (Path(folder) / name / _RUN).is_file()
        }
        folders[:] = [name for name, place in inside.items() if place not in read]
        read.update(inside.values())
        found += [path for name in names if is_image(path := Path(folder) / name)]
    return sorted(found)


def allow_large_images() -> None:
    """Let Pillow open images of up to twice `LARGEST` pixels, in this process, as the command does.

    Not at import: a library leaves the guard against decompression bombs to whoever uses Pillow beside it.
    """
    Image.MAX_IMAGE_PIXELS = max(LARGEST, Image.MAX_IMAGE_PIXELS or LARGEST)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open `path` with Pillow; whatever goes wrong in decoding it becomes one ImageError."""
    check_kind(path)
    try:
        if path.stat().st_size == 0:
            raise ImageError(f"Cannot read {path}: the file is empty (0 bytes); replace or remove it.")
        # A file object, not a path: Pillow maps a path into memory, and then scrambles TIFFs that lie on their side.
        with path.open("rb") as file, Image.open(file) as image:
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                raise ImageError(
                    f"Cannot read {path}: expected one image, found {image.n_frames} pages; save each as its own file."
                )
            if image.format == "PPM" and image.mode == "RGB" and image.tile and image.tile[0][0] != "raw":
                raise ImageError(f"Cannot read {path}: a PPM of more than 8 bits per channel; save it as PNG.")
            yield image
    except FileNotFoundError as error:
        raise ImageError(f"Cannot read {path}: the file does not exist.") from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"Cannot read {path}: {error}; cut it into parts, or in Python raise PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, struct.error) as error:
        reason = str(error) if not isinstance(error, UnidentifiedImageError) else "it is not an image"
        raise ImageError(f"Cannot read {path}: {reason or 'damaged file'}; replace or remove it.") from error


def _is_deep_colour(image: Image.Image) -> bool:
    """True for 16-bit colour, which Pillow would silently reduce to 8 bits."""
    return not image.mode.startswith("I") and any(";16" in str(tile[3]) for tile in image.tile)  # type: ignore[attr-defined]


def _mode(image: Image.Image) -> str:
    """Pillow's mode, but LA for 16-bit grey with alpha, which Pillow would open as RGBA."""
    return "LA" if any("LA;16" in str(tile[3]) for tile in image.tile) else image.mode  # type: ignore[attr-defined]


def probe(path: Path) -> ImageInfo:
    """Read only the header of `path`.

    Raises:
        ImageError: the file is missing, empty, or not an image.
    """
    with _opened(path) as image:
        bits = {"1": 1, "I": 32, "F": 32}.get(image.mode, 8)
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM") or _is_deep_colour(image):
            bits = 16
        mode = _mode(image)
        # Pillow has turned the size of a TIFF already, and would decode a whole PNG to look for its orientation.
        look = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
        turned = look and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        width, height = (image.height, image.width) if turned else image.size
        return ImageInfo(width, height, mode, bits)


def check_not_mixed(first: Mapping[int, Path]) -> None:
    """Raise DataError if there are grey and coloured images; `first` has one by its number of channels."""
    if len(first) == 2:
        raise DataError(
            f"The images mix grey ({first[1]}) and colour ({first[3]}): set image.channels=1 to make all grey, or 3."
        )


def read_pixels(path: str | Path) -> Pixels:
    """Decode a file to (H, W, C) at its own bit depth: uint8, uint16 or float32, C = 1 (grey) or 3 (RGB).

    Raises:
        ImageError: the file is missing, empty, damaged, has several pages, or values outside its range.
    """
    path = Path(path)
    with _opened(path) as image:
        if _is_deep_colour(image):
            grey = _mode(image) == "LA"
            image.load()  # finds truncation, which OpenCV would hide; OpenCV turns a TIFF, and Pillow then says so
            pixels = _read_deep_colour(path, image.getexif().get(_ORIENTATION, 1))
            return np.ascontiguousarray(pixels[..., :1]) if grey else pixels
        image.load()  # turns a TIFF, and only then says that nothing is left to turn
        image = ImageOps.exif_transpose(image)
        mode = image.mode
        if mode.startswith("I;16"):
            pixels = np.asarray(image).astype(np.uint16)
        elif mode == "I":
            pixels = np.asarray(image)
            if pixels.min() < 0 or pixels.max() > 65535:
                raise ImageError(
                    f"Cannot read {path}: 32-bit integers in [{pixels.min()}, {pixels.max()}], expected at most "
                    "16 bits; save it as 16-bit PNG or TIFF."
                )
            pixels = pixels.astype(np.uint16)
        elif mode == "F":
            pixels = np.asarray(image, dtype=np.float32)
            if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
                raise ImageError(
                    f"Cannot read {path}: floating-point values in [{pixels.min():g}, {pixels.max():g}], expected "
                    "finite values in [0, 1]; rescale them or save as 16-bit integers."
                )
        elif mode in ("1", "L", "LA", "La"):
            pixels = np.asarray(image.convert("L"))
        else:
            pixels = np.asarray(image.convert("RGB"))
    return np.ascontiguousarray(pixels if pixels.ndim == 3 else pixels[..., None])


def _read_deep_colour(path: Path, orientation: int) -> Pixels:
    flags = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.fromfile(path, np.uint8), flags)
    if pixels is None:
        raise ImageError(f"Cannot read {path}: 16-bit colour of a kind that is not supported; save it as 16-bit PNG.")
    pixels = pixels[..., ::-1]
    if orientation in (2, 4, 5, 7):
        pixels = pixels[:, ::-1]
    quarter_turns = {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(orientation, 0)
    return np.ascontiguousarray(np.rot90(pixels, quarter_turns))


def to_unit(pixels: Pixels) -> FloatArray:
    """Map pixels of any supported dtype to float32 in [0, 1], by the rule at the top of this file."""
    scale = _SCALE.get(pixels.dtype)
    if scale is None:
        return np.asarray(pixels, dtype=np.float32)
    unit: FloatArray = np.divide(pixels, np.float32(scale), dtype=np.float32)
    return unit


def read_image(path: str | Path) -> FloatArray:
    """Decode a file to (H, W, C) float32 in [0, 1], C = 1 or 3. Raises ImageError like `read_pixels`."""
    return to_unit(read_pixels(path))


def read_mask(path: str | Path, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Read a ground-truth mask as (H, W) bool: any value above 0 is a defect.

    Raises:
        ImageError: the mask cannot be read, or its size is not that of its image.
    """
    mask: npt.NDArray[np.bool_] = np.any(read_pixels(path) > 0, axis=2)
    if mask.shape != shape:
        raise ImageError(
            f"Mask {path} is {mask.shape[1]} x {mask.shape[0]} pixels, its image {shape[1]} x {shape[0]}: "
            "they must have the same size."
        )
    return mask


def check_pixels(pixels: Pixels) -> Pixels:
    """Validate an array handed in from Python; a (H, W) array gains its channel axis.

    Raises:
        ImageError: wrong shape, channel count, dtype, or values outside [0, 1].
    """
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or 0 in pixels.shape:
        raise ImageError(f"Expected an image of shape (H, W), (H, W, 1) or (H, W, 3), found {pixels.shape}.")
    if pixels.dtype in _SCALE:
        return pixels
    if not np.issubdtype(pixels.dtype, np.floating):
        raise ImageError(f"Expected uint8, uint16 or floating-point pixels, found {pixels.dtype}.")
    if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
        raise ImageError(
            f"Expected floating-point pixels in [0, 1], found [{pixels.min():g}, {pixels.max():g}]; "
            "pass uint8 or uint16, or rescale."
        )
    return pixels.astype(np.float32, copy=False)


def expand_inputs(inputs: str | Path | Iterable[str | Path]) -> list[tuple[Path, Path]]:
    """Turn a folder, a file or a list of them into (path, name relative to its folder) pairs.

    Raises:
        DataError: a path does not exist, a folder holds no image, or a file is not of a known kind.
    """
    items = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
    pairs: list[tuple[Path, Path]] = []
    for item in map(Path, items):
        if item.is_dir():
            pairs += [(path, path.relative_to(item)) for path in list_images(item)]
        elif not item.exists():
            raise DataError(f"Input {item} does not exist: give an image file or a folder of images.")
        elif not is_image(item):
            raise DataError(f"Input {item} is no image: expected a file ending in {', '.join(sorted(IMAGE_SUFFIXES))}.")
        else:
            pairs.append((item, Path(item.name)))
    if not pairs:
        raise DataError("No input was given: give an image file or a folder of images.")
    return pairs

"""Reading every kind of image file, and refusing the others in one sentence."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from blemish.data.images import (
    LARGEST,
    check_pixels,
    expand_inputs,
    list_images,
    probe,
    read_image,
    read_mask,
    read_pixels,
)
from blemish.errors import DataError, ImageError

UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored[::-1].swapaxes(0, 1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: stored[:, ::-1].swapaxes(0, 1),
}


def noise(shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def write_png16(path, pixels, colour_type):
    """A 16-bit PNG of any colour type, chunk by chunk."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def with_png_orientation(content, orientation):
    exif = b"MM\x00\x2a\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01" + struct.pack(
        ">HHI", orientation, 0, 0
    )
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    return content[:33] + chunk + content[33:]


def assert_probe_agrees(path):
    info, pixels = probe(path), read_pixels(path)
    assert (info.height, info.width, info.channels) == pixels.shape
    return info


@pytest.mark.parametrize("suffix", ["png", "tif", "tiff", "bmp", "pgm"])
def test_grey_8_bit_is_exact(tmp_path, suffix):
    pixels = noise((7, 9))
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path)
    np.testing.assert_array_equal(read_pixels(path), pixels[..., None], strict=True)
    assert assert_probe_agrees(path).bits == 8


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "webp", "ppm"])
def test_colour_8_bit_is_exact(tmp_path, suffix):
    pixels = noise((7, 9, 3))
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path, **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(read_pixels(path), pixels, strict=True)
    assert assert_probe_agrees(path).bits == 8


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_tiff_is_exact(tmp_path, compression):
    pixels = noise((7, 9, 3))
    Image.fromarray(pixels).save(tmp_path / "a.tif", compression=compression)
    np.testing.assert_array_equal(read_pixels(tmp_path / "a.tif"), pixels, strict=True)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_close_to_its_source(tmp_path, texture, channels):
    pixels = np.repeat(texture(0)[..., None], channels, axis=2)
    Image.fromarray(pixels.squeeze()).save(tmp_path / "a.jpg", quality=95)
    read = read_pixels(tmp_path / "a.jpg")
    assert read.shape == pixels.shape and read.dtype == np.uint8
    assert np.abs(read.astype(int) - pixels).max() <= 8
    assert_probe_agrees(tmp_path / "a.jpg")


def test_read_image_maps_each_depth_to_the_unit_interval(tmp_path):
    eight, sixteen = noise((5, 6)), noise((5, 6), np.uint16)
    Image.fromarray(eight).save(tmp_path / "8.png")
    cv2.imwrite(str(tmp_path / "16.png"), sixteen)
    np.testing.assert_array_equal(read_image(tmp_path / "8.png")[..., 0], eight / np.float32(255), strict=True)
    np.testing.assert_array_equal(read_image(tmp_path / "16.png")[..., 0], sixteen / np.float32(65535), strict=True)


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_one_bit_becomes_black_and_white(tmp_path, suffix):
    bits = noise((7, 11)) > 127
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(bits).save(path)
    np.testing.assert_array_equal(read_image(path)[..., 0], bits.astype(np.float32), strict=True)
    assert_probe_agrees(path)


def test_alpha_is_dropped_and_hides_nothing(tmp_path):
    pixels = noise((7, 9, 4))
    pixels[:3, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    Image.fromarray(pixels[..., [0, 3]], mode=None).save(tmp_path / "la.png")
    np.testing.assert_array_equal(read_pixels(tmp_path / "rgba.png"), pixels[..., :3], strict=True)
    np.testing.assert_array_equal(read_pixels(tmp_path / "la.png"), pixels[..., :1], strict=True)


@pytest.mark.parametrize("transparent", [False, True])
def test_palette_is_expanded(tmp_path, transparent):
    colours, index = noise((16, 3)), noise((7, 9)) % 16
    image = Image.fromarray(index, "L")
    image.putpalette(colours.tobytes())
    image.save(tmp_path / "a.png", **({"transparency": 3} if transparent else {}))
    np.testing.assert_array_equal(read_pixels(tmp_path / "a.png"), colours[index], strict=True)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_16_bit_is_exact(tmp_path, suffix):
    pixels = noise((7, 9), np.uint16)
    path = tmp_path / f"a.{suffix}"
    cv2.imwrite(str(path), pixels)
    np.testing.assert_array_equal(read_pixels(path), pixels[..., None], strict=True)
    assert assert_probe_agrees(path).bits == 16


def test_big_endian_grey_tiff_is_exact(tmp_path):
    pixels = noise((7, 9), np.uint16)
    Image.frombytes("I;16B", (9, 7), pixels.astype(">u2").tobytes()).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_pixels(tmp_path / "a.tif"), pixels[..., None], strict=True)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_colour_16_bit_is_exact(tmp_path, suffix):
    pixels = noise((7, 9, 3), np.uint16)
    path = tmp_path / f"a.{suffix}"
    cv2.imwrite(str(path), pixels[..., ::-1])
    np.testing.assert_array_equal(read_pixels(path), pixels, strict=True)
    assert assert_probe_agrees(path).bits == 16


def test_colour_16_bit_with_alpha_is_exact(tmp_path):
    pixels = noise((7, 9, 4), np.uint16)
    pixels[:3, :, 3] = 0
    write_png16(tmp_path / "a.png", pixels, colour_type=6)
    np.testing.assert_array_equal(read_pixels(tmp_path / "a.png"), pixels[..., :3], strict=True)


def test_grey_16_bit_with_alpha_stays_grey_and_exact(tmp_path):
    pixels = noise((7, 9, 2), np.uint16)
    write_png16(tmp_path / "a.png", pixels, colour_type=4)
    np.testing.assert_array_equal(read_pixels(tmp_path / "a.png"), pixels[..., :1], strict=True)
    assert assert_probe_agrees(tmp_path / "a.png").bits == 16


def test_float_tiff_in_the_unit_interval_is_exact(tmp_path):
    pixels = np.random.default_rng(0).random((7, 9), dtype=np.float32)
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_pixels(tmp_path / "a.tif"), pixels[..., None], strict=True)
    assert_probe_agrees(tmp_path / "a.tif")


@pytest.mark.parametrize("value", [-0.01, 1.01, np.nan, np.inf])
def test_float_out_of_range_is_refused(tmp_path, value):
    pixels = np.full((7, 9), 0.5, np.float32)
    pixels[3, 4] = value
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="floating-point") as caught:
        read_pixels(tmp_path / "a.tif")
    assert str(tmp_path / "a.tif") in str(caught.value)


@pytest.mark.parametrize("value", [-1, 70000])
def test_32_bit_integers_beyond_16_bits_are_refused(tmp_path, value):
    Image.fromarray(np.array([[0, value]], np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="16 bits"):
        read_pixels(tmp_path / "a.tif")


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    read = read_pixels(tmp_path / "a.jpg")
    assert read.shape == (16, 16, 3)
    assert np.abs(read.astype(int) - [200, 40, 90]).max() <= 6


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_exif_orientation_is_applied(tmp_path, suffix, orientation):
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :16], stored[8:, :16], stored[:8, 16:] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(stored).save(path, exif=exif, **({"quality": 100, "subsampling": 0} if suffix == "jpg" else {}))
    read = read_pixels(path)
    assert read.shape == UPRIGHT[orientation](stored).shape
    assert np.abs(read.astype(int) - UPRIGHT[orientation](stored)).max() <= (12 if suffix == "jpg" else 0)
    assert_probe_agrees(path)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("channels", [1, 3])
def test_exif_orientation_of_16_bit_png_is_applied(tmp_path, orientation, channels):
    stored = noise((6, 9, channels), np.uint16)
    content = cv2.imencode(".png", stored[..., ::-1])[1].tobytes()
    (tmp_path / "a.png").write_bytes(with_png_orientation(content, orientation))
    np.testing.assert_array_equal(read_pixels(tmp_path / "a.png"), UPRIGHT[orientation](stored), strict=True)
    assert_probe_agrees(tmp_path / "a.png")


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("channels", [1, 3])
def test_exif_orientation_of_16_bit_tiff_is_applied(tmp_path, orientation, channels):
    tifffile = pytest.importorskip("tifffile")
    stored = noise((6, 9, channels), np.uint16)
    colours = "rgb" if channels == 3 else "minisblack"
    tags = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(tmp_path / "a.tif", stored.squeeze(), photometric=colours, extratags=tags)
    np.testing.assert_array_equal(read_pixels(tmp_path / "a.tif"), UPRIGHT[orientation](stored), strict=True)
    assert_probe_agrees(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", ["tif", "webp"])
def test_several_pages_are_refused(tmp_path, suffix):
    pages = [Image.fromarray(noise((8, 8, 3), seed=seed)) for seed in range(2)]
    path = tmp_path / f"a.{suffix}"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    for reader in (read_pixels, probe):
        with pytest.raises(ImageError, match="2 pages") as caught:
            reader(path)
        assert str(path) in str(caught.value)


def write_truncated(path, content):
    path.write_bytes(content[: len(content) * 2 // 3])


def encoded(suffix, dtype=np.uint8):
    return cv2.imencode(suffix, noise((64, 64, 3), dtype))[1].tobytes()


BROKEN = {
    "empty.png": lambda path: path.write_bytes(b""),
    "text.png": lambda path: path.write_text("no image at all"),
    "missing.png": lambda path: None,
    "folder.png": lambda path: path.mkdir(),
    "truncated.png": lambda path: write_truncated(path, encoded(".png")),
    "truncated16.png": lambda path: write_truncated(path, encoded(".png", np.uint16)),
    "truncated.jpg": lambda path: write_truncated(path, encoded(".jpg")),
    "truncated.tif": lambda path: write_truncated(path, encoded(".tiff")),
    "truncated16.tif": lambda path: write_truncated(path, encoded(".tiff", np.uint16)),
    "truncated.bmp": lambda path: write_truncated(path, encoded(".bmp")),
    "truncated.webp": lambda path: write_truncated(path, encoded(".webp")),
    "header.png": lambda path: path.write_bytes(encoded(".png")[:20]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_one_sentence_with_its_path(tmp_path, name):
    path = tmp_path / name
    BROKEN[name](path)
    with pytest.raises(ImageError) as caught:
        read_pixels(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["empty.png", "text.png", "missing.png", "header.png"])
def test_probe_refuses_what_has_no_header(tmp_path, name):
    BROKEN[name](tmp_path / name)
    with pytest.raises(ImageError) as caught:
        probe(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_probe_reads_no_more_than_the_header(tmp_path):
    BROKEN["truncated.png"](tmp_path / "a.png")
    assert (probe(tmp_path / "a.png").width, probe(tmp_path / "a.png").height) == (64, 64)


def test_flipped_bit_in_a_png_is_found(tmp_path):
    content = bytearray(encoded(".png"))
    content[len(content) // 2] ^= 16
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ImageError):
        read_pixels(tmp_path / "a.png")


def test_the_command_opens_larger_images_than_pillow_alone(run_cli, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    run_cli(["check", f"data.root={tmp_path}"])
    assert Image.MAX_IMAGE_PIXELS == LARGEST >= 16384**2


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.fromarray(noise((64, 64))).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="MAX_IMAGE_PIXELS"):
        read_pixels(tmp_path / "a.png")


def test_mask_is_any_value_above_zero(tmp_path):
    values = np.array([[0, 1], [128, 255]], np.uint8)
    Image.fromarray(values).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", (2, 2)), values > 0, strict=True)


def test_coloured_mask_counts_every_channel(tmp_path):
    values = np.zeros((2, 3, 3), np.uint8)
    values[0, 1] = (0, 0, 1)
    Image.fromarray(values).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", (2, 3)), values.any(axis=2), strict=True)


def test_mask_of_another_size_is_refused(tmp_path):
    Image.fromarray(noise((5, 6))).save(tmp_path / "m.png")
    with pytest.raises(ImageError, match="6 x 5 pixels, its image 5 x 6") as caught:
        read_mask(tmp_path / "m.png", (6, 5))
    assert str(tmp_path / "m.png") in str(caught.value)


@pytest.mark.parametrize(
    ("pixels", "fragment"),
    [
        (np.zeros(3, np.uint8), r"found \(3,\)"),
        (np.zeros((2, 2, 2), np.uint8), r"found \(2, 2, 2\)"),
        (np.zeros((2, 2, 4), np.uint8), r"found \(2, 2, 4\)"),
        (np.zeros((1, 2, 2, 1), np.uint8), r"found \(1, 2, 2, 1\)"),
        (np.zeros((0, 2, 1), np.uint8), r"found \(0, 2, 1\)"),
        (np.zeros((2, 2), np.int64), "found int64"),
        (np.zeros((2, 2), bool), "found bool"),
        (np.full((2, 2), 1.5), r"found \[1.5, 1.5\]"),
        (np.full((2, 2), -0.5), r"found \[-0.5, -0.5\]"),
        (np.full((2, 2), np.nan), "found "),
    ],
)
def test_wrong_arrays_are_refused(pixels, fragment):
    with pytest.raises(ImageError, match=fragment):
        check_pixels(pixels)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_fitting_arrays_pass_unchanged(dtype):
    pixels = np.eye(4, 5, dtype=dtype)
    np.testing.assert_array_equal(check_pixels(pixels), pixels[..., None], strict=True)
    np.testing.assert_array_equal(check_pixels(np.dstack([pixels] * 3)), np.dstack([pixels] * 3), strict=True)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_become_float32(dtype):
    assert check_pixels(np.eye(4, dtype=dtype)).dtype == np.float32


def test_list_images_is_sorted_nested_and_skips_hidden(tmp_path, save, texture):
    wanted = [save(tmp_path / name, texture(0)) for name in ("a.png", "b/c/d.PNG", "b/e.jpg", "z.tiff")]
    for name in (".hidden.png", ".cache/a.png", "b/.DS/a.png"):
        save(tmp_path / name, texture(0))
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "b" / "Thumbs.db").write_bytes(b"x")
    assert list_images(tmp_path) == sorted(wanted)


def test_list_images_says_what_is_wrong(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.png").write_bytes(b"x")
    for name, fragment in {"missing": "does not exist", "empty": "No image found", "file.png": "found a file"}.items():
        with pytest.raises(DataError, match=fragment) as caught:
            list_images(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_pictures_that_blemish_made_are_no_images_where_it_left_its_mark(tmp_path, save, texture):
    places = ["a.png", "maps/b.png", "sub/c.png", "sub/overlays/d.png", "sub/heatmaps/e.png", "run/f.png"]
    a, b, c, d, e, f = (save(tmp_path / place, texture(0)) for place in places)
    assert list_images(tmp_path) == sorted([a, b, c, d, e, f])
    for mark in ("predict.json", "sub/diff.json", "run/detector.pt"):
        (tmp_path / mark).touch()
    assert list_images(tmp_path) == sorted([a, c, e])


@pytest.mark.parametrize("suffix", ["heic", "DCM"])
def test_images_of_kinds_that_are_not_read_are_listed_and_refused(tmp_path, save, texture, suffix):
    image = save(tmp_path / "a.png", texture(0)).rename(tmp_path / f"a.{suffix}")
    assert list_images(tmp_path) == [image]
    for read in (read_pixels, probe):
        with pytest.raises(ImageError, match=rf"a\.{suffix}: \.{suffix} images are not read; save it as PNG"):
            read(image)


def test_16_bit_pgm_is_scaled_by_its_largest_value(tmp_path):
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5\n2 1\n4095\n" + np.array([0, 4095], ">u2").tobytes())
    assert (probe(path).bits, probe(path).channels) == (16, 1)
    assert np.array_equal(read_image(path).ravel(), [0, 1])


def test_16_bit_ppm_is_refused(tmp_path):
    (tmp_path / "a.ppm").write_bytes(b"P6\n1 1\n65535\n" + bytes(6))
    with pytest.raises(ImageError, match="more than 8 bits per channel"):
        read_pixels(tmp_path / "a.ppm")


def test_inputs_are_files_folders_or_both(tmp_path, save, texture):
    a, b = save(tmp_path / "in/x/a.png", texture(0)), save(tmp_path / "b.png", texture(0))
    assert expand_inputs(str(b)) == [(b, Path("b.png"))]
    assert expand_inputs(tmp_path / "in") == [(a, Path("x/a.png"))]
    assert expand_inputs([tmp_path / "in", b]) == [(a, Path("x/a.png")), (b, Path("b.png"))]


def test_unusable_inputs_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for item, fragment in {"notes.txt": "is no image", "gone.png": "does not exist", "empty": "No image found"}.items():
        with pytest.raises(DataError, match=fragment):
            expand_inputs(tmp_path / item)
    with pytest.raises(DataError, match="No input was given"):
        expand_inputs([])

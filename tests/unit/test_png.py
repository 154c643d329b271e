"""PNG files as other libraries read them."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from blemish import png

SHAPES = [(1, 1), (1, 1, 3), (7, 5), (7, 5, 3), (64, 1, 3), (1, 64), (130, 131, 3), (300, 2, 3)]


def picture_of(shape):
    """Smooth in one half, noise in the other, so that the filter meets both."""
    noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    ramp = np.add.outer(np.arange(shape[0]), np.arange(shape[1])).astype(np.uint8)
    smooth = ramp if len(shape) == 2 else ramp[..., None].repeat(3, axis=2)
    return np.where(noise > 127, noise, smooth)


@pytest.mark.parametrize("at_once", [1, 400, 2**22])
@pytest.mark.parametrize("shape", SHAPES)
def test_pillow_and_opencv_read_back_what_was_written(shape, at_once, monkeypatch):
    monkeypatch.setattr(png, "_BYTES", at_once)  # rows compressed a few at a time must make one picture
    picture = picture_of(shape)
    content = b"".join(png.encode(picture, "blemish"))
    with Image.open(io.BytesIO(content)) as image:
        image.verify()  # the checksums of the chunks
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == ("RGB" if len(shape) == 3 else "L")
        assert image.info["Software"] == "blemish"
        np.testing.assert_array_equal(np.asarray(image), picture)
    read = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(read if read.ndim == 2 else read[..., ::-1], picture)


def test_a_view_that_is_not_contiguous_is_written_as_it_looks():
    picture = picture_of((40, 30, 3))[::2, ::-1]
    content = b"".join(png.encode(picture, "blemish"))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), picture)

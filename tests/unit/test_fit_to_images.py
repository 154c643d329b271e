"""What training takes from the images: channels, the size of tiles; and the precision it takes from the hardware."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from blemish.errors import ConfigError, DataError
from blemish.preprocess import Preprocess
from blemish.training.fit import pick_precision
from blemish.training.run import fit_to_images

COLOUR = (40, 40, 3)


def settings(channels=None, tile=None, model="blemish.models.autoencoder.ConvAutoencoder", **image):
    image = {"channels": channels, "size": None, "short_side": None, "max_side": None, "square": None} | image
    return OmegaConf.create({"model": {"_target_": model}, "image": image, "tiling": {"size": tile, "overlap": 0.25}})


@pytest.fixture
def fitted(tmp_path, save):
    """Fit settings to images of these shapes: (channels, tile size)."""

    def fit(shapes, **changes):
        paths = [save(tmp_path / f"{n}.png", np.zeros(shape, np.uint8)) for n, shape in enumerate(shapes)]
        config = settings(**changes)
        fit_to_images(config, paths)
        return config.image.channels, config.tiling.size

    return fit


@pytest.mark.parametrize(
    ("image", "tile"), [({}, 96), ({"size": 100}, 100), ({"short_side": 64}, 64), ({"short_side": 192}, 96)]
)
def test_a_model_that_compares_whole_images_gets_squares(tmp_path, save, image, tile):
    path = save(tmp_path / "a.png", np.zeros((100, 140), np.uint8))
    config = settings(model="blemish.models.reference.TemplateBank", **image)
    fit_to_images(config, [path])
    assert (config.image.size, config.image.short_side, config.tiling.size) == (tile, None, tile)


@pytest.mark.parametrize(
    ("shapes", "image", "tile"),
    [
        ([(96, 128)], {}, 96),
        ([(127, 128)], {}, 96),
        ([(128, 127)], {}, 96),
        ([(500, 600)], {}, 192),  # the largest
        ([(192, 192)], {}, 192),
        ([(191, 300)], {}, 160),
        ([(20, 300)], {}, 32),  # the smallest; the image is padded
        ([(31, 31)], {}, 32),
        ([(500, 600), (70, 300), (130, 300)], {}, 128),  # half of the images allow it
        ([(70, 300), (130, 300)], {}, 64),
        ([(500, 600)], {"short_side": 128}, 128),
        ([(500, 600)], {"short_side": 100}, 96),
        ([(90, 600)], {"short_side": 128}, 64),  # none is enlarged
        ([(500, 600)], {"short_side": 256}, 256),
        ([(500, 600)], {"short_side": 20}, 32),
        ([(40, 600)], {"size": 128}, 128),  # every image is a square
        ([(500, 600)], {"size": 256}, 256),
        ([(500, 600)], {"size": 100}, 96),
        ([(500, 600)], {"size": 10}, 32),
        ([(200, 400)], {"max_side": 200}, 96),
        ([(500, 600), (300, 310), (110, 600)], {"short_side": 192, "square": 2.0}, 192),
        ([(600, 600)], {"max_side": 400}, 192),
    ],
)
def test_tiles_are_as_large_as_the_images_allow(fitted, shapes, image, tile):
    found = fitted(shapes, **image)[1]
    assert found == tile
    fitting = [max(32, min(Preprocess(1, **image).scored_size(*shape))) >= found for shape in shapes]
    assert found % 32 == 0 and found >= 32 and sum(fitting) >= len(shapes) / 2


def test_a_given_tile_size_stays(fitted):
    assert fitted([(500, 600)], tile=80) == (1, 80)


@pytest.mark.parametrize(("shape", "channels"), [((40, 40), 1), (COLOUR, 3)])
def test_channels_are_those_of_the_images(fitted, shape, channels):
    assert fitted([shape, shape]) == (channels, 32)


def test_mixed_channels_are_one_sentence_that_names_one_of_each(fitted, tmp_path):
    sentence = rf"^The images mix grey \({tmp_path}/1\.png\) and colour \({tmp_path}/0\.png\): set .*=1 .* or 3\.$"
    with pytest.raises(DataError, match=sentence):
        fitted([COLOUR, (40, 40), (40, 40)])


@pytest.mark.parametrize("channels", [1, 3])
def test_given_channels_stay_and_may_mix(fitted, channels):
    assert fitted([COLOUR, (40, 40)], channels=channels) == (channels, 32)


def test_unreadable_images_are_left_for_the_decoder(tmp_path, save):
    good, empty = save(tmp_path / "good.png", np.zeros((70, 90), np.uint8)), tmp_path / "empty.png"
    empty.touch()
    for paths, tile in (([empty, good], 64), ([empty], 192), ([], 192)):
        config = settings()
        fit_to_images(config, iter(paths))
        assert (config.image.channels, config.tiling.size) == (1, tile)


def test_two_ways_to_size_images_are_refused(fitted):
    with pytest.raises(ConfigError, match=r"image\.short_side=64 and image\.size=96"):
        fitted([(100, 100)], short_side=64, size=96)


# Precision


def has(monkeypatch, **capabilities):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("fast", [True, False])
def test_a_given_precision_is_taken(monkeypatch, precision, fast):
    has(monkeypatch, amx_bf16=fast)
    assert pick_precision({"accelerator": "cpu", "precision": precision}) == precision


def test_without_a_word_it_is_full_precision(monkeypatch):
    has(monkeypatch, amx_bf16=True)
    assert pick_precision({"accelerator": "cpu"}) == "32-true"


@pytest.mark.parametrize("accelerator", ["cpu", "auto"])
@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ({"amx_bf16": True}, "bf16-mixed"),
        ({"amx_bf16": False, "avx512_bf16": True}, "bf16-mixed"),
        ({"amx_bf16": False, "avx512_vnni": True}, "32-true"),
        ({"architecture": "aarch64"}, "32-true"),
    ],
)
def test_auto_on_a_cpu_follows_its_matrix_units(monkeypatch, accelerator, capabilities, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    has(monkeypatch, **capabilities)
    assert pick_precision({"accelerator": accelerator, "precision": "auto"}) == precision


def test_auto_is_full_precision_where_torch_cannot_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert pick_precision({"accelerator": "cpu", "precision": "auto"}) == "32-true"


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_auto_follows_the_gpu_where_one_is_used_and_the_cpu_where_not(monkeypatch, native, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    has(monkeypatch, amx_bf16=not native)
    assert pick_precision({"accelerator": "auto", "precision": "auto"}) == precision
    other = {"bf16-mixed": "32-true", "32-true": "bf16-mixed"}[precision]
    assert pick_precision({"accelerator": "cpu", "precision": "auto"}) == other

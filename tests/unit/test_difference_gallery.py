"""scripts/difference_gallery.py on two tiny pairs: one page, that needs nothing else, with every way that there is."""

import base64
import importlib
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blemish.difference.pairs import find_pairs
from blemish.errors import ConfigError

SCRIPTS = Path(__file__).parents[2] / "scripts"
SHAPE = (70, 90)


@pytest.fixture(scope="module")
def gallery():
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("difference_gallery")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, texture, save):
    root = tmp_path_factory.mktemp("pairs")
    for number, name in enumerate(("<a>", "b")):
        pixels = texture(number, SHAPE)
        save(root / f"references/{name}.png", pixels)
        if name == "<a>":
            pixels = pixels.copy()
            pixels[20:34, 30:50] = 250
        save(root / f"queries/{name}.png", pixels)
    return find_pairs(root / "references", root / "queries")


class Page(HTMLParser):
    """What a page is made of: its tags, and the addresses that it loads."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]


def picture(source):
    kind, _, content = source.partition(",")
    assert kind == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))


def of_names(gallery, *names):
    return [way for way in gallery.WAYS if way.name in names]


def test_a_page_of_two_pairs_and_three_ways(gallery, pairs):
    ways, missing = gallery.build_ways(of_names(gallery, "L1", "SSIM", "Gradient of L2"), ["cleaning.min_area=4"])
    assert missing == {}
    rows = gallery.show(ways, pairs, progress=False)
    text = gallery.page(ways, rows, missing, ["cleaning.min_area=4"])
    page = Page(text)
    assert page.tags.count("img") == 2 * (2 + 3) and "script" not in page.tags
    assert [source for source in page.sources if not source.startswith("data:")] == []
    assert not re.search(r"url\(|@import", text)
    for source in page.sources[1:]:
        assert picture(source).shape == (*SHAPE, 3)
    assert page.tags.count("th") == 1 + 3 + 2 and page.tags.count("tr") == 3
    for words in ("L1", "SSIM", "Gradient of L2", "threshold: noise", "threshold: otsu", "residual=ssim", "min_area=4"):
        assert words in text
    assert "&lt;a&gt;" in text and "<a>" not in text
    assert [cell["said"] for cell in rows[1]["cells"]] == ["same"] * 3
    assert rows[0]["cells"][0]["said"].startswith("1 region, ")


def test_the_outline_of_a_thin_mask_survives_shrinking(gallery, monkeypatch):
    (comparison,) = gallery.build_ways(of_names(gallery, "L1"), ["cleaning.min_area=1", "preprocessing.chain=[]"])[
        0
    ].values()
    monkeypatch.setattr(gallery, "SIDE", 40)
    reference = np.full((400, 300, 1), 0.5, np.float32)
    query = reference.copy()
    query[201, 101] = 1
    shown = gallery.overlay(comparison(reference, query), query)
    assert shown.shape == (40, 30, 3)
    assert (shown[20, 10] == (0, 255, 255)).all()


def test_a_way_that_cannot_be_built_is_left_out_with_a_sentence(gallery, pairs, monkeypatch):
    def refused(settings):
        if "LPIPS" in settings["residual"]["_target_"]:
            raise ConfigError("There are no weights: install <them>.")
        return built(settings)

    built = gallery.build_comparison
    monkeypatch.setattr(gallery, "build_comparison", refused)
    ways, missing = gallery.build_ways(of_names(gallery, "L2", "LPIPS"), [])
    assert [way.name for way in ways] == ["L2"]
    text = gallery.page(ways, gallery.show(ways, pairs[:1], progress=False), missing, [])
    assert (
        "LPIPS is left out.</strong> There are no weights: install &lt;them&gt;." in text
        and "1 pair, 1 way to compare" in text
    )
    with pytest.raises(ConfigError, match="There are no weights"):
        gallery.build_ways(of_names(gallery, "LPIPS"), [])


def test_an_unknown_setting_is_refused(gallery):
    with pytest.raises(ConfigError, match="no setting 'tolerence': did you mean 'tolerance'"):
        gallery.build_ways(gallery.WAYS, ["tolerence=3"])


def test_every_residual_and_strategy_has_a_way(gallery):
    words = {word for way in gallery.WAYS for word in way.settings}
    configs = SCRIPTS.parent / "configs"
    for group in ("residual", "strategy"):
        options = {file.stem for file in (configs / group).glob("*.yaml")} - {"l1_ssim", "l1_ssim_gradient"}
        options -= {"siamese"}  # needs a trained run
        assert {f"{group}={option}" for option in options} <= words
    assert len({way.name for way in gallery.WAYS}) == len(gallery.WAYS) == 13

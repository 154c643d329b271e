"""The report in a real browser, opened as a file. BLEMISH_SCREENSHOTS=DIR keeps pictures of it."""

import base64
import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blemish.calibration import Calibration, Promise
from blemish.files import write_csv
from blemish.report.page import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.chrome.options import Options  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
CALIBRATION = [0.1 + 0.01 * i for i in range(63)]  # the largest is 0.72; alpha = 0.05 takes rank 61: 0.70
GOOD = [0.2 + 0.0125 * i for i in range(40)] + [0.705, 0.8]
DEFECTS = {"scratch": [0.6, 0.71, 0.9, 1.5], "dent": [0.65, 0.75, 1.0, 2.0]}
ROUND = {"threshold": 0.70, "missed": 2, "false alarms": 2, "flagged": 8}


def encoded(pixels, suffix):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, suffix)
    return buffer.getvalue()


def make_folder(folder, truth=True):
    """50 images: the 30 of the highest scores in the gallery, a linked original for one of the others."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    card = Calibration.fit(CALIBRATION, [str(i) for i in range(63)], Promise(0.05), "sha256:abc", made={"seed": 0})
    (folder / "card.json").write_text(json.dumps(card.to_dict()))
    entries = [("good", score) for score in GOOD] + [(kind, score) for kind in DEFECTS for score in DEFECTS[kind]]
    rows = [
        {
            "path": str(folder / f"{kind}_{number:02d}.png") if truth else f"/new/{number:02d}.png",
            "image_score": score,
            "p_value": card.p_value(score),
            "decision": "anomalous" if score > card.threshold else "normal",
            "error": "",
        }
        | ({"kind": kind} if truth else {})
        for number, (kind, score) in enumerate(entries)
    ]
    (folder / "good_00.png").write_bytes(encoded(rng.integers(0, 255, (24, 32), np.uint8), "PNG"))
    if truth:
        write_csv(folder / "evaluation.csv", ("path", "kind", "image_score", "p_value", "decision", "error"), rows)
    else:
        (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with zipfile.ZipFile(folder / "gallery.zip", "w") as archive:
        images = []
        for number, row in enumerate(sorted(rows, key=lambda row: -row["image_score"])[:30]):
            pictures = {}
            for name in ("observed", "expected", "heat", "mask", "truth"):
                suffix = "png" if name in ("mask", "truth") else "webp"
                pictures[name] = f"{number}/{name}.{suffix}"
                pixels = rng.integers(0, 255, (24, 32, 3), np.uint8)
                archive.writestr(pictures[name], encoded(pixels[..., 0] > 200 if suffix == "png" else pixels, suffix))
            images.append({"path": row["path"], "width": 32, "height": 24, "pictures": pictures})
        archive.writestr("index.json", json.dumps({"threshold": card.threshold, "images": images}))
    line = np.linspace(0, 1, 20)
    roc = {"false_positive_rate": line.tolist(), "true_positive_rate": (line**0.2).tolist()}
    pro = {"false_positive_rate": (0.3 * line).tolist(), "overlap": (line**0.3).tolist()}
    curves = {"image_roc": roc, "pixel_roc": roc, "pro": pro}
    if truth:
        (folder / "curves.json").write_text(json.dumps({"overall": curves, "kinds": {"dent": curves}}))
    return write_report(folder)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    return {"evaluation": make_folder(root / "a b#ü"), "predictions": make_folder(root / "predictions", truth=False)}


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    browser, service = shutil.which("chromium"), shutil.which("chromedriver")
    if not (browser and service):
        pytest.skip("needs chromium and chromedriver on the PATH")
    options = Options()
    options.binary_location = browser
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(service))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


class Page:
    """A freshly opened report; every look fails the test if the console holds an error."""

    def __init__(self, driver, path, width=1280, scheme="light", media=""):
        self.driver = driver
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        driver.get(path.as_uri())

    def __getitem__(self, name):
        return self.driver.find_element(By.ID, name)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def script(self, program, *arguments):
        return self.driver.execute_script(f"return {program}", *arguments)

    def until(self, condition):
        return WebDriverWait(self.driver, 20).until(lambda _: condition())

    def set(self, name, value):
        self.script("void Object.assign(arguments[0], {value: arguments[1]})", self[name], value)
        self.script("arguments[0].dispatchEvent(new Event('input', {bubbles: true}))", self[name])

    def choose(self, name, words):
        Select(self[name]).select_by_visible_text(words)

    def press(self, *keys):
        self.driver.switch_to.active_element.send_keys(*keys)

    def focused(self):
        return self.script("document.activeElement.id || document.activeElement.className")

    def alphas(self):
        return [step["alpha"] for step in self.script("steps")]

    def counts(self):
        """{"missed": 2, ...} as shown beside the slider."""
        words = [item.text.split(maxsplit=1) for item in self.all("#counts li")]
        return {word.split(" of ")[0]: int(number) for number, word in words}

    def badges(self):
        return [badge.text[2:] for badge in self.all("#gallery .badge")]

    def names(self):
        return self.script("[...document.querySelectorAll('#gallery h3')].map((e) => e.firstChild.textContent)")

    def scores(self):
        texts = self.script("[...document.querySelectorAll('#gallery .numbers')].map((e) => e.textContent)")
        return [float(text.split()[1]) for text in texts]

    def errors(self):
        return [entry for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture
def page(driver, pages):
    page = Page(driver, pages["evaluation"])
    yield page
    assert page.errors() == []


@pytest.mark.slow
def test_the_console_hears_of_an_error(driver, pages):
    page = Page(driver, pages["evaluation"])
    page.script("void console.error('seen')")
    assert len(page.errors()) == 1


@pytest.mark.parametrize("name", ["evaluation", "predictions"])
def test_it_opens_without_errors_and_loads_nothing_from_elsewhere(driver, pages, name):
    page = Page(driver, pages[name])
    page.script("void [...document.images].forEach((e) => { e.loading = 'eager'; })")
    page.until(lambda: page.script("[...document.images].every((e) => e.complete)"))
    assert page.script("[...document.images].every((e) => e.naturalWidth > 0)")
    assert page.script("document.images.length") == 24 * 6  # five views, and heat over the observed one
    assert page.script("document.querySelectorAll('#histogram .scatterlayer .trace').length") >= 3
    loaded = page.script("performance.getEntriesByType('resource').map((e) => e.name)")
    assert [address for address in loaded if not address.startswith(("data:", "file:"))] == []
    assert page.errors() == []


def test_it_starts_at_the_cards_own_alpha(page):
    assert page["alpha-now"].text == "alpha = 0.05"
    assert "the card's own" in page["threshold-now"].text
    assert page.counts() == {key: ROUND[key] for key in ("missed", "false alarms", "flagged")}
    assert page.script("document.getElementById('histogram').data.at(-1).x[0]") == pytest.approx(ROUND["threshold"])
    assert not page["reset"].is_enabled()


def test_the_slider_moves_every_decision(page):
    page.choose("sort", "score, highest first")
    place = page.alphas().index(0.5)
    page.set("alpha", place)
    threshold = CALIBRATION[31]  # rank 64 * 0.5 of 63
    good = sum(score > threshold for score in GOOD)
    missed = sum(score <= threshold for scores in DEFECTS.values() for score in scores)
    assert page.counts() == {"missed": missed, "false alarms": good, "flagged": good + 8 - missed}
    assert page.script("document.getElementById('histogram').data.at(-1).x[0]") == pytest.approx(threshold)
    assert f"{good / 42:.1%} of 42 good images" in page["normals"].text
    flagged = sum(badge in ("False alarm", "Correctly flagged") for badge in page.badges())
    assert flagged == sum(score > threshold for score in page.scores()) > ROUND["flagged"]
    assert f"{good - 2 + 2} decisions differ" in page["outcome"].get_property("textContent")
    page["reset"].click()
    assert page.counts()["flagged"] == ROUND["flagged"]
    assert page["alpha-now"].text == "alpha = 0.05"


@pytest.mark.slow
def test_it_says_where_the_promise_stops(page):
    page.set("alpha", page.alphas().index(0.01))
    assert "No promise at alpha = 0.01: 99 needed, 63 available" in page["promise"].text
    assert "no promise" in page["threshold-now"].text
    assert page["alpha"].get_attribute("aria-valuetext") == "alpha 0.01, no promise"
    assert page.script("document.getElementById('histogram').data.at(-1).x[0]") == max(CALIBRATION)
    assert "no promise" in page.script("document.getElementById('histogram').data.at(-1).name")
    assert page.counts() == {"missed": 3, "false alarm": 1, "flagged": 6}
    page.set("alpha", page.alphas().index(0.02))
    assert page["promise"].text.startswith("Of 1000 good parts expect about")


@pytest.mark.slow
def test_sorting(page):
    every = sorted([*GOOD, *DEFECTS["scratch"], *DEFECTS["dent"]])
    for words, expected in (("score, highest first", every[::-1]), ("score, lowest first", every)):
        page.choose("sort", words)
        assert page.scores() == pytest.approx(expected[:24], rel=1e-3)
    for words, step in (("p-value, lowest first", 1), ("p-value, highest first", -1)):
        page.choose("sort", words)
        p_values = page.script("shown.map((row) => row.p)")
        assert p_values == sorted(p_values)[::step]
        assert len(set(p_values)) > 1
    page.choose("sort", "name, A to Z")
    assert page.names()[:2] == ["dent_46.png", "dent_47.png"]
    page.choose("sort", "name, Z to A")
    assert page.names()[:4] == ["scratch_45.png", "scratch_44.png", "scratch_43.png", "scratch_42.png"]


@pytest.mark.slow
def test_filters(page):
    page.choose("kind", "dent")
    assert len(page.badges()) == 4
    page.choose("verdict", "missed defects")
    assert page.badges() == ["Missed defect"]
    assert page["found"].text == "1 image"
    page.choose("kind", "all kinds")
    assert page.badges() == ["Missed defect"] * 2
    page.set("alpha", page.alphas().index(0.01))  # the choice follows the slider
    assert page.badges() == ["Missed defect"] * 3
    page.choose("verdict", "all decisions")
    page["text"].send_keys("SCRATCH_4")
    assert sorted(page.names()) == [f"scratch_{number}.png" for number in range(42, 46)]
    page["text"].send_keys("no such file")
    assert page["found"].text == "No image matches these filters."
    assert page.names() == []


@pytest.mark.slow
def test_pages(page):
    page.choose("sort", "name, A to Z")
    seen = page.names()
    assert (len(seen), page["page"].text, page["previous"].is_enabled()) == (24, "Page 1 of 3", False)
    for number in (2, 3):
        page["next"].click()
        assert page["page"].text == f"Page {number} of 3"
        seen += page.names()
    assert not page["next"].is_enabled()
    assert len(page.names()) == 2
    assert len(set(seen)) == 50
    page.choose("kind", "dent")
    assert page["page"].text == "Page 1 of 1"


@pytest.mark.slow
def test_images_without_thumbnails_are_linked(page):
    page["text"].send_keys("good_00")
    picture = page.all("#gallery .main img")[0]
    assert picture.get_attribute("loading") == "lazy"
    page.until(lambda: picture.get_property("complete"))
    assert picture.get_property("naturalWidth") == 32
    assert page.all("#gallery .links a")[0].get_property("href").endswith("/a%20b%23%C3%BC/good_00.png")
    page["text"].clear()
    page["text"].send_keys("good_01")
    assert page.all("#gallery .main img") == []
    assert "no picture" in page.all("#gallery .main")[0].text


@pytest.mark.slow
def test_every_picture_has_words(page):
    words = page.script("[...document.querySelectorAll('#gallery img:not(.overlay)')].map((e) => e.alt)")
    assert len(words) == 24 * 4 + 24  # observed and four views
    assert all(word.split(" of ")[0] in {"observed", "expected", "heat map", "mask", "truth"} for word in words)


@pytest.mark.slow
def test_the_opacity_of_the_heat(page):
    opacity = "getComputedStyle(document.querySelector('.overlay')).opacity"
    assert page.script(opacity) == "0.6"
    page["opacity"].send_keys(Keys.END)
    assert page.script(opacity) == "1"
    page["opacity"].send_keys(Keys.HOME)
    assert page.script(opacity) == "0"
    assert page["opacity-now"].text == "0 %"


@pytest.mark.slow
def test_the_keyboard_reaches_everything(page):
    reached = []
    for _ in range(20):
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(page.focused())
        outline = page.script("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", reached
    wanted = ["skip", "theme quiet", "alpha", "curve-kind", "sort", "kind", "verdict", "text", "opacity", "main"]
    wanted[1] = "theme"
    assert [name for name in reached if name in wanted][: len(wanted)] == wanted
    page["alpha"].send_keys(Keys.ARROW_RIGHT)
    assert page["alpha-now"].text != "alpha = 0.05"
    assert page["outcome"].get_attribute("aria-live") == "polite"


@pytest.mark.slow
def test_the_skip_link_leads_to_the_pictures(page):
    page.press(Keys.TAB)
    page.press(Keys.ENTER)
    page.until(lambda: page.focused() == "gallery-title")


@pytest.mark.slow
def test_enter_enlarges_and_escape_closes(page):
    first = page.all("#gallery .main")[0]
    first.send_keys(Keys.ENTER)
    page.until(lambda: page["large"].is_displayed())
    assert page.names()[0] in page["large-title"].text
    assert page.script("document.querySelectorAll('#large-pictures img').length") == 2  # observed, and heat over it
    page.press(Keys.ESCAPE)
    page.until(lambda: not page["large"].is_displayed())
    assert page.focused() == "main"
    page.all("#gallery .views button")[1].click()
    assert page["large-title"].text.startswith("heat map: ")


@pytest.mark.slow
def test_the_theme_changes_page_and_plots(page):
    look = "[getComputedStyle(document.body).backgroundColor, document.getElementById('histogram').layout.font.color]"
    light = page.script(look)
    page["theme"].click()
    dark = page.script(look)
    assert all(a != b for a, b in zip(light, dark, strict=True))
    assert page["theme"].text == "Light theme"
    page["theme"].click()
    assert page.script(look) == light


@pytest.mark.slow
def test_a_dark_system_starts_dark_and_prints_light(driver, pages):
    page = Page(driver, pages["evaluation"], scheme="dark")
    theme = "document.documentElement.dataset.theme"
    assert page.script(theme) == "dark"
    page.script("void dispatchEvent(new Event('beforeprint'))")
    assert page.script(theme) == "light"
    page.script("void dispatchEvent(new Event('afterprint'))")
    assert page.script(theme) == "dark"


@pytest.mark.slow
def test_paper_has_no_controls(driver, pages):
    page = Page(driver, pages["evaluation"], media="print")
    assert [e.tag_name for e in page.all("input, select, #theme, .pager button, .decide") if e.is_displayed()] == []
    assert page.all(".lead")[0].is_displayed()
    assert page.all("#gallery img")[0].is_displayed()


@pytest.mark.slow
def test_the_roc_curve_follows_the_kind(page):
    point = "document.getElementById('roc').data.at(-1).y[0]"
    page.set("alpha", page.alphas().index(0.01))
    assert page.script(point) == 5 / 8
    page.choose("curve-kind", "dent")
    assert page.script(point) == 3 / 4


@pytest.mark.slow
def test_predictions_have_no_kinds(driver, pages):
    page = Page(driver, pages["predictions"])
    assert page.counts() == {"flagged": ROUND["flagged"]}
    assert page.all("#kind") == []
    page.choose("verdict", "flagged")
    assert page.badges() == ["Flagged"] * ROUND["flagged"]
    assert page.errors() == []


SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "scheme"),
    [(1280, "light"), (400, "dark"), pytest.param(1280, "dark", marks=SLOW), pytest.param(400, "light", marks=SLOW)],
)
def test_it_fits_the_window(driver, pages, tmp_path, width, scheme):
    page = Page(driver, pages["evaluation"], width, scheme)
    page.script("void document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    assert page.script("innerWidth") == width
    page.until(lambda: page.script("document.documentElement.scrollWidth") <= width)
    wide = "[...document.querySelectorAll('main *:not(.scroll *, .hidden, .hidden *)')]"
    beyond = f"{wide}.filter((e) => e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML)"
    assert page.script(beyond) == []
    folder = Path(os.environ.get("BLEMISH_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    height = min(4000, page.script("document.documentElement.scrollHeight"))
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    picture = folder / f"report_{width}_{scheme}.png"
    picture.write_bytes(base64.b64decode(shot["data"]))
    assert Image.open(picture).size == (width, height)

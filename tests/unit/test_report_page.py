import base64
import csv
import json
import re
import subprocess
import sys
import zipfile
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy import stats

from blemish.calibration import Calibration, Promise
from blemish.errors import DataError
from blemish.mask_rules import MaskRule
from blemish.noise import Noise
from blemish.report.page import write_report

HOSTILE = '/data/<b>&"quoted"\'</script><script>alert(1)</script><!-- ü漢.png'


def a_card(folder, n=450, alpha=0.01, rule="marginal", seed=0, **more):
    scores = np.sort(np.exp(np.random.default_rng(seed).normal(-1.5, 0.35, n))).tolist()
    card = Calibration.fit(scores, [str(i) for i in range(n)], Promise(alpha, rule), "sha256:abc", **more)
    (folder / "card.json").write_text(json.dumps(card.to_dict()))
    return card


def a_table(folder, card, entries):
    """evaluation.csv from (path, kind, score); a score of None is an unreadable image."""
    with (folder / "evaluation.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "kind", "image_score", "p_value", "decision", "error"])
        for path, kind, score in entries:
            if score is None:
                writer.writerow([path, kind, "", "", "", f"{path} is no image."])
            else:
                decision = "anomalous" if score > card.threshold else "normal"
                writer.writerow([path, kind, score, card.p_value(score), decision, ""])


def a_gallery(folder, paths, threshold=0.5, size=300):
    with zipfile.ZipFile(folder / "gallery.zip", "w") as archive:
        images = []
        for number, path in enumerate(paths):
            pictures = {"observed": f"{number}/observed.webp", "mask": f"{number}/mask.png"}
            for name, file in pictures.items():
                archive.writestr(file, f"{name} {path} ".encode().ljust(size, b"x"))
            images.append({"path": path, "width": 32, "height": 24, "pictures": pictures})
        archive.writestr("index.json", json.dumps({"threshold": threshold, "images": images}))


@pytest.fixture
def folder(tmp_path):
    """20 good and 10 defective images, two kinds, one unreadable."""
    card = a_card(tmp_path)
    entries = [(f"/data/good/{i}.png", "good", 0.1 + 0.01 * i) for i in range(20)]
    entries += [(f"/data/{kind}/{i}.png", kind, 0.2 + 0.3 * i) for kind in ("scratch", "dent") for i in range(5)]
    a_table(tmp_path, card, [*entries, ("/data/good/broken.png", "good", None)])
    return tmp_path


class Page(HTMLParser):
    """Elements with their attributes, visible text, and the JSON blocks."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.blocks, self.text, self._inside, self._id = [], {}, "", [], None
        self.size = path.stat().st_size
        self.feed(path.read_text(encoding="utf-8"))
        self.facts, self.pictures = self.blocks["facts"], self.blocks["pictures"]
        self.rows = self.blocks["rows"]

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        self._id = attributes.get("id") if tag == "script" and attributes.get("type") == "application/json" else None
        if tag in ("script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._inside.pop()

    def handle_data(self, data):
        if self._id:
            self.blocks[self._id] = json.loads(data)
            self._id = None
        elif not self._inside:
            self.text += data.replace("\N{NO-BREAK SPACE}", " ")


def report(folder):
    return Page(write_report(folder))


def test_the_path_comes_back_and_nothing_else_is_written(folder):
    before = set(folder.iterdir())
    assert write_report(folder) == folder / "report.html"
    assert set(folder.iterdir()) - before == {folder / "report.html"}


def test_nothing_is_loaded_from_elsewhere(folder):
    page = report(folder)
    addresses = [
        (tag, name, value)
        for tag, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action", "poster") and not value.startswith(("#", "data:"))
    ]
    assert addresses == []
    assert {tag for tag, _ in page.elements} & {"iframe", "object", "embed", "base"} == set()
    own = (folder / "report.html").read_text(encoding="utf-8").replace(plotly_source(), "")
    assert "plotly.js v" not in own
    assert re.findall(r"https?://|@import|url\((?!#)", own) == []


def plotly_source():
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def test_the_promise_in_plain_words_follows_the_beta_law(folder):
    n, k = 450, 447  # ceil(451 * 0.99)
    most = int(np.ceil(1000 * stats.beta.ppf(0.95, n + 1 - k, k)))
    sentence = f"Of 1000 good parts expect about {1000 * 4 / 451:.1f} false alarms; with 95 % confidence no more than"
    page = report(folder)
    assert f"{sentence} {most}." in page.text
    assert f"rank {k} of {n}" in page.text


def test_the_summary_counts_and_bounds_the_decisions(folder):
    page = report(folder)
    low, high = stats.binomtest(0, 20).proportion_ci(0.95, "exact")
    assert "0 of 20" in page.text
    assert f"95 % interval {low:.1%} to {high:.1%}" in page.text
    assert "4 of 10" in page.text  # 0.2 and 0.5 of each kind lie below the threshold of about 0.53
    assert "/data/good/broken.png is no image." in page.text


def test_the_slider_has_the_cards_alpha_and_each_threshold_is_the_conformal_one(tmp_path):
    card = a_card(tmp_path, alpha=0.0123)
    a_table(tmp_path, card, [("a.png", "good", 0.2)])
    facts = report(tmp_path).facts
    own = facts["steps"][facts["own"]]
    assert own["alpha"] == 0.0123
    assert own["thresholds"] == own["lines"] == [card.threshold]
    alphas = [step["alpha"] for step in facts["steps"]]
    assert alphas == sorted(set(alphas))
    assert 50 <= len(alphas) <= 70
    assert {0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2} <= set(alphas)
    assert (alphas[0], alphas[-1]) == (0.0005, 0.5)
    scores = np.sort(card.scores)
    for step in facts["steps"]:
        rank = int(np.ceil(np.round(451 * (1 - step["alpha"]), 9)))
        assert step["promised"] is (rank <= 450)
        assert step["thresholds"] == [scores[min(rank, 450) - 1]]


def test_where_the_promise_stops_the_step_says_how_many_are_needed(tmp_path):
    card = a_card(tmp_path, n=63, alpha=0.05)
    a_table(tmp_path, card, [("a.png", "good", 0.2)])
    step = next(step for step in report(tmp_path).facts["steps"] if step["alpha"] == 0.01)
    assert step["promised"] is False
    assert "No promise" in step["words"]
    assert "99 needed, 63 available" in step["words"]
    assert step["thresholds"] == [max(card.scores)]


def test_false_alarms_are_counted_at_every_step(folder):
    facts = report(folder).facts
    for step in facts["steps"]:
        alarms = sum(0.1 + 0.01 * i > step["thresholds"][0] for i in range(20))
        assert step["normals"].startswith(f"{alarms / 20:.1%} of 20 good images")
    assert {step["normals"].partition(" ")[0] for step in facts["steps"]} > {"0.0%"}


def test_a_pac_card_says_its_confidence(tmp_path):
    card = a_card(tmp_path, alpha=0.02, rule="pac")
    a_table(tmp_path, card, [("a.png", "good", 0.2)])
    page = report(tmp_path)
    assert "pac: the rate of this very threshold is at most alpha with 95 % confidence" in page.text
    most = int(re.search(r"no more than (\d+)", page.text)[1])
    assert most <= 20


def test_a_threshold_that_rests_on_an_assumption_is_no_promise(tmp_path):
    noise = Noise(sigma=0.1, pixels=10_000, ks=0.2, correlation=0.0, spread=1.0)
    card = a_card(tmp_path, mask_rule=MaskRule("parametric_noise"), noise=noise)
    a_table(tmp_path, card, [("a.png", "good", 0.2)])
    page = report(tmp_path)
    assert "An assumption, not a promise" in page.text
    assert "no false-alarm rate is promised" in page.text
    assert "not the absolute value of Gaussian noise" in page.text
    assert "expect about" not in page.text
    assert [step["promised"] for step in page.facts["steps"]] == [False] * len(page.facts["steps"])
    assert len({step["thresholds"][0] for step in page.facts["steps"]}) == len(page.facts["steps"])


def test_text_from_files_ends_neither_scripts_nor_elements(tmp_path):
    card = a_card(tmp_path, made={"note": HOSTILE})
    a_table(tmp_path, card, [(HOSTILE, HOSTILE, 0.9), (HOSTILE + "2", "good", None)])
    a_gallery(tmp_path, [HOSTILE], card.threshold)
    honest = tmp_path / "honest"
    honest.mkdir()
    a_table(honest, a_card(honest, made={"note": "n"}), [("a.png", "dent", 0.9), ("b.png", "good", None)])
    page, plain = report(tmp_path), report(honest)
    assert page.rows[0][0] == HOSTILE
    assert page.facts["kinds"] == [HOSTILE]
    assert list(page.pictures) == ["0"]
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    assert HOSTILE in page.text


def test_a_file_name_that_is_no_unicode_does_not_stop_the_report(tmp_path):
    a_card(tmp_path)
    row = {"path": "bad\udcff.png", "image_score": None, "p_value": None, "decision": None, "error": "no image"}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(row) + "\n")
    assert "no image" in report(tmp_path).text


def test_pictures_are_embedded_in_the_order_of_the_gallery(folder):
    a_gallery(folder, ["/data/dent/3.png", "/data/good/7.png"])
    page = report(folder)
    assert [row[0] for row in page.rows[:2]] == ["/data/dent/3.png", "/data/good/7.png"]
    assert set(page.pictures) == {"0", "1"}
    kind, _, content = page.pictures["0"]["observed"].partition(";base64,")
    assert kind == "data:image/webp"
    assert base64.b64decode(content).startswith(b"observed /data/dent/3.png")
    assert page.pictures["1"]["mask"].startswith("data:image/png;base64,")


def test_pictures_beyond_the_budget_are_left_out_from_the_end(folder):
    paths = [f"/data/good/{i}.png" for i in range(20)]
    a_gallery(folder, paths, size=1_000_000)  # 2.67 MB of base64 an image
    page = report(folder)
    assert list(page.pictures) == [str(i) for i in range(8)]  # 8 * 2.67 <= 22 < 9 * 2.67
    assert [row[0] for row in page.rows[:20]] == paths
    assert page.size < 30_000_000


@pytest.mark.slow
def test_ten_thousand_images_stay_below_thirty_megabytes(tmp_path):
    card = a_card(tmp_path)
    scores = np.random.default_rng(1).exponential(0.2, 10_000)
    paths = [f"/somewhere/on/a/large/disk/with/long/names/part_{i:06d}.png" for i in range(10_000)]
    a_table(tmp_path, card, [(path, "good", score) for path, score in zip(paths, scores, strict=True)])
    a_gallery(tmp_path, paths, size=1500)
    page = report(tmp_path)
    assert len(page.rows) == 10_000
    assert 4_000 < len(page.pictures) < 10_000
    assert page.size < 30_000_000


def test_predictions_have_no_truth_and_link_their_files(tmp_path):
    card = a_card(tmp_path)
    for name in ("heatmaps", "masks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a 1#.png").write_bytes(b"")
    (tmp_path / "a 1#.png").write_bytes(b"")
    rows = [
        {"path": str(tmp_path / "a 1#.png"), "image_score": 0.9, "p_value": card.p_value(0.9), "q_value": 0.03,
         "decision": "anomalous", "error": "", "heatmap": "heatmaps/a 1#.png", "mask": "masks/gone.png"},
        {"path": "b.png", "image_score": 0.1, "p_value": card.p_value(0.1), "q_value": 0.9, "decision": "normal",
         "error": ""},
    ]  # fmt: skip
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report(tmp_path)
    assert page.facts["kinds"] == []
    first, second = page.rows
    assert first[1:5] == [None, 0.9, card.p_value(0.9), 0.03]
    assert first[5:9] == ["a%201%23.png", "heatmaps/a%201%23.png", "", True]
    assert second[5:9] == ["", "", "", True]
    assert [group["name"] for group in page.facts["histogram"]["groups"]] == ["calibration, good", "predicted"]
    assert "Missed" not in page.text
    assert "50.0% of the images are anomalous" in page.text


def test_the_evaluation_wins_over_predictions(folder):
    (folder / "predictions.jsonl").write_text("not even JSON")
    assert "images from evaluation.csv" in report(folder).text


@pytest.mark.parametrize("spread, logarithmic", [(1.05, False), (100.0, True)])
def test_the_histogram_holds_every_score(tmp_path, spread, logarithmic):
    scores = np.linspace(1.0, spread, 99).tolist()
    card = Calibration.fit(scores, [str(i) for i in range(99)], Promise(0.05), "f")
    (tmp_path / "card.json").write_text(json.dumps(card.to_dict()))
    a_table(tmp_path, card, [("a", "good", 1.0), ("b", "dent", spread), ("c", "dent", 1.0)])
    histogram = report(tmp_path).facts["histogram"]
    assert histogram["logarithmic"] is logarithmic
    assert {group["name"]: sum(group["counts"]) for group in histogram["groups"]} == {
        "calibration, good": 99,
        "test, good": 1,
        "test, defective": 2,
    }
    assert all(sum(group["shares"]) == pytest.approx(100) for group in histogram["groups"])


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_scores_that_are_all_equal_have_a_histogram(tmp_path, value):
    card = Calibration.fit([value] * 99, [str(i) for i in range(99)], Promise(0.05), "f")
    (tmp_path / "card.json").write_text(json.dumps(card.to_dict()))
    a_table(tmp_path, card, [("a", "good", value)])
    assert [sum(group["counts"]) for group in report(tmp_path).facts["histogram"]["groups"]] == [99, 1]


def test_metrics_and_curves_are_shown_where_they_exist(folder):
    figures = {"images": 10, "image_auroc": 0.98765, "aupro_0.3": None, "calibrated": {"image_f1": 0.8}}
    kinds = {"dent": figures | {"image_auroc": 0.5}}
    (folder / "metrics.json").write_text(
        json.dumps({"made": {"seed": 7}, "overall": figures, "kinds": kinds, "normals": {}, "unreadable": []})
    )
    line = {"false_positive_rate": [0, 1], "true_positive_rate": [0, 1]}
    none = {"image_roc": None, "pixel_roc": None, "pro": None}
    (folder / "curves.json").write_text(
        json.dumps({"overall": none | {"image_roc": line}, "kinds": {"dent": none | {"image_roc": line}}})
    )
    page = report(folder)
    assert "0.988" in page.text
    assert "0.500" in page.text
    assert "seed7" in page.text.replace("\n", "")
    assert list(page.facts["curves"]) == ["all defects", "dent"]
    assert "AUPRO@0.3" not in re.split("Figures by kind", page.text)[0]


def test_decisions_of_another_card_are_called_stale(folder):
    assert "recalibrated since" not in report(folder).text
    a_card(folder, alpha=0.2)
    assert "of 30 decisions in the table are not those of this card" in report(folder).text


def test_pictures_of_another_threshold_are_called_stale(folder):
    a_gallery(folder, ["/data/dent/3.png"], threshold=0.123)
    page = report(folder)
    assert "pictures were drawn at another threshold" in page.text
    assert "0.246" in page.text  # the colour bar's end


def test_training_without_a_test_part_gets_the_card_and_its_scores(tmp_path):
    card = a_card(tmp_path)
    page = report(tmp_path)
    assert "no other images yet" in page.text
    assert [group["name"] for group in page.facts["histogram"]["groups"]] == ["calibration, good"]
    assert f"{card.threshold:.4g}" in page.text


DAMAGES = [
    ("card.json", None, r"Expected a calibration card at .*card\.json, found none"),
    ("card.json", "{", r"Expected a calibration card at .*card\.json, found a damaged one"),
    ("card.json", "[]", r"found a damaged one"),
    ("evaluation.csv", "path,kind\na,good\n", r"found a damaged one \(after 0 good rows, KeyError"),
    ("evaluation.csv", "path,kind,image_score,p_value,decision,error\na,good,nan,0.5,normal,\n", "not finite"),
    ("evaluation.csv", "path,kind,image_score,p_value,decision,error\na,good,much,0.5,normal,\n", "damaged one"),
    ("metrics.json", "{", r"Expected JSON in .*metrics\.json, found a damaged file"),
    ("curves.json", "[]", r"Expected JSON in .*curves\.json, found a damaged file"),
    ("gallery.zip", "no zip", r"Expected pictures in .*gallery\.zip, found a damaged file"),
]


@pytest.mark.parametrize("name, content, message", DAMAGES)
def test_missing_and_damaged_files_are_named(folder, name, content, message):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(DataError, match=message):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_torch_is_not_needed(folder):
    program = (
        "import sys; from pathlib import Path; from blemish.report.page import write_report;"
        f"write_report(Path({str(folder)!r}));"
        "print(sorted({'torch', 'hydra', 'pytorch_lightning', 'albumentations'} & set(sys.modules)))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == "[]"


def test_figure_short_of_perfect_is_not_rounded_to_it(folder):
    metrics = {"overall": {"image_auroc": 0.99976, "aupro_0.3": 1.0}}
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    text = re.split("Calibration card", report(folder).text)[0]
    assert "0.9998" in text and text.count("1.000") == 2  # the tile and the table of the perfect one


@pytest.mark.parametrize("masks", [True, False])
def test_data_without_masks_get_no_empty_chart(folder, masks):
    roc = {"false_positive_rate": [0.0, 0.0, 1.0], "true_positive_rate": [0.0, 1.0, 1.0]}
    pro = {"false_positive_rate": [0.0, 1.0], "overlap": [0.0, 1.0]} if masks else None
    curves = {"overall": {"image_roc": roc, "pixel_roc": roc if masks else None, "pro": pro}, "kinds": {}}
    (folder / "curves.json").write_text(json.dumps(curves), encoding="utf-8")
    ids = {attributes.get("id") for _, attributes in report(folder).elements}
    assert "roc" in ids and ("pro" in ids) == masks

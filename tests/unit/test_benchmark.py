"""scripts/benchmark.py without any training: settings, what is done again, what is recorded, the table by hand."""

import importlib
import json
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from blemish.errors import BlemishError, ConfigError
from blemish.settings import config_folder

SCRIPTS = Path(__file__).parents[2] / "scripts"
SETTINGS = """
minutes: 5
common: [trainer=cpu, training.steps=100]
headline: {row: best, seeds: [0, 1, 2], minutes: 20, overrides: [training.steps=900]}
data: {tiles: {alpha: 0.1, overrides: [image.max_side=64]}}
rows:
  plain: [model=conv_ae, training.steps=200]
  best: [model=repair_ae]
"""


@pytest.fixture(scope="module", autouse=True)
def scripts():
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def bench(scripts):
    return importlib.import_module("benchmark")


@pytest.fixture(scope="module")
def report(scripts):
    return importlib.import_module("benchmark_report")


@pytest.fixture
def settings(bench, tmp_path):
    def read(text=SETTINGS):
        file = tmp_path / "settings.yaml"
        file.write_text(text)
        return bench.Settings.read(file)

    return read


def found_by_measuring(**changes):
    """What benchmark_cell.py writes, with figures to tell apart."""
    figures = dict.fromkeys(("image_ap", "pixel_ap", "pixel_auroc", "aupro_0.3", "aupro_0.05"))
    figures |= {"image_auroc": 0.9, "f1": 0.8, "false_alarms": 2, "normals": 40, "false_alarm_rate": 0.05}
    figures |= {"defects": 10, "masks": 0, "unusable": 0, "chance": 0.6}
    return {
        "figures": figures | changes,
        "synthetic": None,
        "calibration": {"alpha": 0.05, "rule": "marginal", "n": 60, "rank": 58},
        "training": {"seconds": 100.0, "steps": 100, "tiles_per_second": 16.0},
        "inference": {"peak_mib": 300.0, "batch_1": {"images_per_second": 10.0}},
        "parameters": 1234,
        "numbers": 5678,
        "images": {"train": 100, "validation": 10, "calibration": 60, "test": 50},
        "data_fingerprint": {"test": "t", "calibration": "c"},
        "hardware": {"cpu": "A", "cores": 2, "threads": 2, "device": "cpu", "torch": "2", "python": "3", "system": "L"},
    }


class Fake:
    """Stands in for the processes: trainings leave a run folder, measurings a file; `fails` and `stops` name runs."""

    def __init__(self, bench, fails=(), stops=(), output="Traceback\nblemish: The disk is full.\n"):
        self.bench, self.fails, self.stops, self.output = bench, set(fails), set(stops), output
        self.trained, self.resumed, self.measured, self.joined = [], [], [], []

    def __call__(self, command, log):
        if "train" not in command and "ensemble" not in command:
            self.measured.append(self.row_of(command[-2]))
            Path(command[-1]).write_text(json.dumps(found_by_measuring()))
            return self.bench.Ended(0, 1.0, 1.0, 50.0, "")
        words = dict(word.split("=", 1) for word in command if "=" in word)
        self.joined.append(words.get("runs"))
        run = Path(words.get("resume") or words["out"])
        (self.resumed if "resume" in words else self.trained).append(self.row_of(run))
        if self.row_of(run) in self.fails:
            return self.bench.Ended(2, 1.0, 1.0, 50.0, self.output)
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text("{}")
        stopped = self.row_of(run) in self.stops
        (run / "run.json").write_text(json.dumps({"status": "training" if stopped else "done"}))
        if stopped:
            raise KeyboardInterrupt
        return self.bench.Ended(0, 9.0, 8.0, 500.0, "")

    @staticmethod
    def row_of(run):
        return "/".join(Path(run).parts[-3:])


@pytest.fixture
def cells(settings, tmp_path):
    return settings().cells({"dice": tmp_path / "dice"})


# --- settings -----------------------------------------------------------------------------------------------------


def test_cells_of_the_settings(settings, tmp_path):
    cells = settings().cells({"dice": tmp_path / "d", "tiles": tmp_path / "t"})
    named = {(cell.data, cell.row, cell.seed): cell for cell in cells}
    assert len(named) == len(cells) == 8
    assert [cell.seed for cell in cells] == [0, 0, 0, 0, 1, 1, 2, 2], "a whole table comes first"
    plain = named["dice", "plain", 0]
    assert plain.overrides == ("trainer=cpu", "training.steps=200", "calibration.alpha=0.05", "model=conv_ae")
    assert (plain.minutes, plain.headline, plain.root) == (5, False, tmp_path / "d")
    best = named["tiles", "best", 2]
    assert set(best.overrides) == {
        *("trainer=cpu", "training.steps=900", "image.max_side=64", "calibration.alpha=0.1", "model=repair_ae")
    }
    assert (best.minutes, best.headline) == (20, True)
    assert len({cell.key for cell in cells}) == 8


JOINED = (
    SETTINGS.replace("[trainer=cpu,", "[trainer=cpu, report.images=9,")
    + """
ensembles: {both: [best, plain]}
"""
)


def test_an_ensemble_is_joined_from_the_runs_of_its_seed(bench, settings, tmp_path):
    cells = settings(JOINED).cells({"tiles": tmp_path / "t"})
    assert [(cell.row, cell.seed) for cell in cells] == [
        *(("plain", 0), ("best", 0), ("both", 0), ("best", 1), ("best", 2))
    ], "plain has one seed"
    both = cells[2]
    assert both.overrides == ("device=cpu", "report.images=9", "calibration.alpha=0.1") and both.minutes == 25
    others = settings(JOINED.replace("[model=conv_ae,", "[model=vae,")).cells({"tiles": tmp_path / "t"})
    assert others[2].key != both.key, "another member is another ensemble"
    alone = Fake(bench)
    assert bench.benchmark([both], tmp_path / "alone", alone) == 1 and not alone.trained
    failed = bench.read_results(tmp_path / "alone" / "results.jsonl")[0]
    assert failed["sentence"] == "tiles, best, seed 0 is not finished here: run its row before."
    fake = Fake(bench)
    assert bench.benchmark(cells[:3], tmp_path / "out", fake) == 0
    assert fake.joined == [
        None,
        None,
        f"[{both.members[0].folder(tmp_path / 'out')},{both.members[1].folder(tmp_path / 'out')}]",
    ]
    assert fake.trained == ["tiles/plain/0", "tiles/best/0", "tiles/both/0"] == fake.measured
    page = (tmp_path / "out" / "benchmark.md").read_text()
    assert "| both" in page and "`blemish ensemble` of best, plain: `device=cpu report.images=9`" in page
    again = Fake(bench)
    assert bench.benchmark(cells[:3], tmp_path / "out", again) == 0 and not again.trained


def test_rows_can_be_chosen(settings, tmp_path):
    assert {cell.row for cell in settings().cells({"dice": tmp_path}, ["plain"])} == {"plain"}
    with pytest.raises(ConfigError, match="did you mean 'plain'"):
        settings().cells({"dice": tmp_path}, ["plane"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rows": None}, "needs a section rows"),
        ({"rows": {"a/b": []}}, "names a folder"),
        ({"rows": {"a": ["model"]}}, "KEY=VALUE, found 'model'"),
        ({"rows": {"a": "model=vae"}}, "is a list of overrides"),
        ({"rows": {"a": ["seed=3"]}}, "sets seed, which the benchmark sets itself"),
        ({"ensembles": {"both": ["plain"]}}, r"ensembles\.both is a list of two or more rows"),
        ({"ensembles": {"both": ["plain", "bst"]}}, "joins 'bst', which is no row: did you mean 'best'"),
        ({"ensembles": {"both": [["plain"], "best"]}}, r"joins '\['plain'\]', which is no row"),
        ({"ensembles": {"both": ["plain", "plain"]}}, "joins a row with itself"),
        ({"ensembles": {"plain": ["plain", "best"]}}, "has the name of a row"),
        ({"minuts": 3}, "did you mean 'minutes'"),
        ({"minutes": "long"}, "a positive number, found 'long'"),
        ({"headline": {"row": "worst"}}, "headline.row is 'worst'"),
        ({"headline": {"row": "best", "seeds": 3}}, "headline.seeds expects a list"),
        ({"data": {"dice": {"alpha": 0}}}, "data.dice.alpha expects a positive number"),
    ],
)
def test_mistakes_in_the_settings_are_said(settings, change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        settings(yaml.safe_dump(yaml.safe_load(SETTINGS) | change))


def test_shipped_settings_are_sound(bench, tmp_path):
    cells = bench.Settings.read(SCRIPTS / "benchmark.yaml").cells({"dice": tmp_path})
    assert len([cell for cell in cells if cell.headline]) == 3


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["data.dice=/nowhere"], "no folder train/good"),
        (["a.yaml"], "out is missing"),
        (["ou=x"], "did you mean 'out'"),
        (["a.yaml", "b.yaml", "out=x"], "one file"),
    ],
)
def test_mistakes_on_the_command_line_are_said(bench, words, sentence):
    with pytest.raises(ConfigError, match=sentence):
        bench.arguments(words)


# --- what is done, and done again -----------------------------------------------------------------------------------


def test_finished_cells_are_skipped(bench, cells, tmp_path):
    first, second = Fake(bench), Fake(bench)
    assert bench.benchmark(cells, tmp_path, first, "the command") == 0
    assert len(first.trained) == len(first.measured) == 4
    assert bench.benchmark(cells, tmp_path, second) == 0
    assert second.trained == second.measured == []
    results = bench.read_results(tmp_path / "results.jsonl")
    assert [result["status"] for result in results] == ["done"] * 4
    assert results[0]["training"] == {
        **{"seconds": 100.0, "steps": 100, "tiles_per_second": 16.0, "interrupted": False},
        **{"peak_mib": 500.0, "process_seconds": 9.0, "cpu_seconds": 8.0, "cores_of_others": None},
    }
    assert "    the command" in (tmp_path / "benchmark.md").read_text()


def test_a_torn_line_survives_and_its_cell_is_done_again(bench, cells, tmp_path):
    bench.benchmark(cells[:2], tmp_path, Fake(bench))
    file = tmp_path / "results.jsonl"
    whole = file.read_text().splitlines()
    file.write_text(whole[0] + "\n" + whole[1][:70])
    again = Fake(bench)
    bench.benchmark(cells[:2], tmp_path, again)
    assert again.trained == [] and again.measured == ["dice/best/0"], "the training was finished, only measured anew"
    assert [result["row"] for result in bench.read_results(file)] == ["plain", "best"]
    assert file.read_text().splitlines()[1] == whole[1][:70]


def test_an_interrupted_training_is_resumed(bench, cells, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        bench.benchmark(cells, tmp_path, Fake(bench, stops=["dice/best/0"]))
    again = Fake(bench)
    bench.benchmark(cells, tmp_path, again)
    assert again.resumed == ["dice/best/0"] and again.trained == ["dice/best/1", "dice/best/2"]
    results = bench.read_results(tmp_path / "results.jsonl")
    marked = {(result["row"], result["seed"]): result["training"]["interrupted"] for result in results}
    assert marked == {("plain", 0): False, ("best", 0): True, ("best", 1): False, ("best", 2): False}


def test_what_cannot_be_resumed_begins_anew(bench, cells, tmp_path):
    class Stubborn(Fake):
        def __call__(self, command, log):
            if any(word.startswith("resume=") for word in command):
                return self.bench.Ended(
                    2, 1.0, 1.0, 50.0, "blemish: The images changed (part: test): start a new run.\n"
                )
            return super().__call__(command, log)

    with pytest.raises(KeyboardInterrupt):
        bench.benchmark(cells[:1], tmp_path, Fake(bench, stops=["dice/plain/0"]))
    again = Stubborn(bench)
    assert bench.benchmark(cells[:1], tmp_path, again) == 0
    assert again.trained == ["dice/plain/0"]


@pytest.mark.parametrize(
    ("code", "sentence"),
    [(-9, "killed"), (2, "Cannot write x: the disk is full"), (2, "the device is out of memory"), (70, "a bug")],
)
def test_what_could_be_resumed_another_time_is_kept(bench, cells, tmp_path, code, sentence):
    class Unlucky(Fake):
        def __call__(self, command, log):
            return self.bench.Ended(code, 1.0, 1.0, 50.0, sentence)

    with pytest.raises(KeyboardInterrupt):
        bench.benchmark(cells[:1], tmp_path, Fake(bench, stops=["dice/plain/0"]))
    assert bench.benchmark(cells[:1], tmp_path, Unlucky(bench)) == 1
    again = Fake(bench)
    assert bench.benchmark(cells[:1], tmp_path, again) == 0
    assert again.resumed == ["dice/plain/0"] and again.trained == []


def test_other_settings_begin_anew(bench, settings, cells, tmp_path):
    bench.benchmark(cells[:1], tmp_path, Fake(bench))
    changed = settings(SETTINGS.replace("training.steps=200", "training.steps=300")).cells({"dice": tmp_path / "dice"})
    again = Fake(bench)
    bench.benchmark(changed[:1], tmp_path, again)
    assert again.trained == ["dice/plain/0"] and again.resumed == []


def test_a_failing_cell_is_recorded_and_the_others_go_on(bench, report, cells, tmp_path):
    assert bench.benchmark(cells, tmp_path, Fake(bench, fails=["dice/plain/0"])) == 1
    results = bench.read_results(tmp_path / "results.jsonl")
    assert [result["status"] for result in results] == ["failed", "done", "done", "done"]
    assert results[0]["sentence"] == "The disk is full."
    assert "- plain, seed 0: The disk is full." in (tmp_path / "benchmark.md").read_text()
    assert bench.benchmark(cells, tmp_path, Fake(bench)) == 0, "it is tried again"
    assert "Failed" not in (tmp_path / "benchmark.md").read_text()


@pytest.mark.parametrize(
    ("code", "output", "sentence"),
    [
        (2, "50 %\rblemish: warning: slow.\nblemish: No images.\nmore\n", "No images."),
        (70, "Traceback\nValueError: seven\nblemish: this is a bug in blemish\n", "ValueError: seven"),
        (1, "No module named blemish\n", "No module named blemish"),
        (-signal.SIGKILL, "", "ended by signal 9 (out of memory?)"),
        (3, "", "it wrote nothing"),
    ],
)
def test_sentence_of_a_failure(bench, code, output, sentence):
    assert bench.Ended(code, 0, 0, 0, output).sentence == sentence


def test_two_benchmarks_do_not_share_a_folder(bench, tmp_path):
    with bench.alone(tmp_path), pytest.raises(BlemishError, match="Another benchmark"), bench.alone(tmp_path):
        pass
    with bench.alone(tmp_path):
        pass


def test_processes_are_measured_and_logged(bench, tmp_path):
    with bench.alone(tmp_path) as lock:
        run = bench.Processes(lock)
        code = "x = bytearray(200 * 2**20); print('blemish: so it is.'); raise SystemExit(2)"
        ended = run([sys.executable, "-c", code], tmp_path / "log")
        second = run([sys.executable, "-c", "print('second')"], tmp_path / "log")
    assert ended.code == 2 and ended.sentence == "so it is." and 200 < ended.peak_mib < 2000
    assert second.code == 0 and "so it is" not in second.output and "so it is" in (tmp_path / "log").read_text()


# --- the table ----------------------------------------------------------------------------------------------------


def line(row="best", seed=0, status="done", **changes):
    figures = {key: changes.pop(key) for key in list(changes) if key in found_by_measuring()["figures"]}
    result = found_by_measuring(**figures) | {"data": "dice", "row": row, "seed": seed, "status": status}
    result |= {"software": "blemish 1", "key": f"{row}{seed}", "overrides": ["a=b"], "minutes": 5}
    result |= {"finished": "2026-01-02T", "command": "python scripts/benchmark.py"}
    return result | changes


def row_of(page, name, table=0):
    rows = [text for text in page.splitlines() if text.startswith((f"| {name} ", f"| **{name}** "))]
    return [cell.strip() for cell in rows[table].strip("|").split("|")]


def test_mean_and_spread_by_hand(report):
    lines = [line(seed=seed, image_auroc=value, false_alarms=n, false_alarm_rate=n / 40, headline=True)
             for seed, value, n in ((0, 0.9, 1), (1, 0.96, 2), (2, 0.93, 6))]  # fmt: skip
    page = report.markdown(report.latest([*lines, line("plain", image_auroc=0.5)]))
    best = row_of(page, "best")
    assert best[:4] == ["**best**", "3", "0.930 (0.900 to 0.960)", "0.800"]
    assert best[4] == "7.5 % (2.5 % to 15.0 %), 1, 2, 6 of 40"
    assert row_of(page, "plain")[:4] == ["plain", "1", "0.500", "0.800"]
    assert "pixel AUROC |" not in page, "nobody has a mask"
    assert "4 trainings are behind these figures (2026-01-02)" in page


def test_kinds_of_defects_have_tables_of_their_own(report):
    def kinds(*values):
        found = zip(("crack", "dent"), values, strict=True)
        return {kind: {"image_auroc": value, "aupro_0.3": None, "defects": 3} for kind, value in found}

    lines = [line(seed=0, kinds=kinds(0.5, 0.9)), line(seed=1, kinds=kinds(0.7, None)), line("old")]
    page = report.markdown(lines)
    assert "By kind of defect, image AUROC:" in page and "By kind of defect, AUPRO" not in page
    assert row_of(page, "best", 1) == ["best", "0.600 (0.500 to 0.700)", "-"]
    table = page.split("By kind of defect")[1].split("\n\n")[1]
    assert "best" in table and "old" not in table
    one = {"crack": kinds(0.5, 0.9)["crack"]}
    assert "By kind" not in report.markdown([line(kinds=one)])


def test_a_figure_that_one_seed_lacks_has_no_mean(report):
    page = report.markdown([line(pixel_auroc=0.9), line(seed=1)])
    assert row_of(page, "best")[3] == "-"


def test_seeds_of_other_settings_are_not_mixed(report):
    old = [line(seed=seed, image_auroc=0.2) for seed in (0, 1)]
    new = line(seed=0, image_auroc=0.7, overrides=["a=c"], key="new")
    assert [result["key"] for result in report.latest([*old, new])] == ["new"]


def test_seeds_of_other_defaults_are_not_mixed(report):
    old = [line(seed=seed, config_fingerprint="a") for seed in (0, 1)]
    new = line(seed=0, config_fingerprint="b", key="new")
    assert [result["key"] for result in report.latest([*old, new])] == ["new"]


def test_a_fingerprint_of_settings_leaves_out_folders_and_seeds(scripts):
    fingerprint = importlib.import_module("benchmark_cell").fingerprint
    settings = {"seed": 0, "out": "a", "data": {"root": "b", "kind": "c"}, "model": {"seed": 0, "width": 4}}
    other = {"seed": 1, "out": "d", "data": {"root": "e", "kind": "c"}, "model": {"seed": 1, "width": 4}}
    assert fingerprint(settings) == fingerprint(other)
    assert fingerprint(settings) != fingerprint(settings | {"model": {"seed": 0, "width": 8}})


def test_a_changed_default_is_another_cell(bench, tmp_path, monkeypatch):
    cell = bench.Cell("dice", "plain", 0, tmp_path, ("model=conv_ae", "model.width=4"), 5)
    key = cell.key
    copy = shutil.copytree(config_folder(), tmp_path / "configs")
    (copy / "train.yaml").write_text((copy / "train.yaml").read_text("utf-8").replace("steps: 1500", "steps: 1600"))
    monkeypatch.setattr("blemish.settings.config_folder", lambda: copy)
    bench._composed.cache_clear()
    assert cell.key != key
    bench._composed.cache_clear()


def test_a_later_failure_hides_nothing(report):
    failed = line(status="failed", sentence="It broke.")
    assert [result["status"] for result in report.latest([line(), failed])] == ["done"]
    assert [result["status"] for result in report.latest([failed, line()])] == ["done"]
    assert [result["status"] for result in report.latest([failed])] == ["failed"]


def test_another_folder_under_the_same_name_is_refused(bench, tmp_path):
    first, second, out = tmp_path / "first", tmp_path / "second", tmp_path / "out"
    for folder, content in ((first, "a"), (second, "ab")):
        folder.mkdir()
        (folder / "image.png").write_text(content)
    bench.check_same_data(out, {"dice": first})
    bench.check_same_data(out, {"dice": first, "tiles": second})
    with pytest.raises(
        ConfigError, match=r"data\.dice=.*second has not the files from which the results in .* were made"
    ):
        bench.check_same_data(out, {"dice": second})


def test_images_behind_a_link_count(bench, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "image.png").write_text("a")
    root, out = tmp_path / "root", tmp_path / "out"
    root.mkdir()
    (root / "train").symlink_to(tmp_path / "elsewhere")
    bench.check_same_data(out, {"dice": root})
    (tmp_path / "elsewhere" / "image.png").write_text("ab")
    with pytest.raises(ConfigError, match="has not the files"):
        bench.check_same_data(out, {"dice": root})


def test_a_failed_seed_hides_no_other(report):
    done, other = line(config_fingerprint="new"), line(config_fingerprint="old", seed=2)
    failed = {key: value for key, value in line(status="failed", seed=1).items() if key != "config_fingerprint"}
    for results in ([other, done, failed], [other, failed, done]):
        assert [(result["seed"], result["status"]) for result in report.latest(results)] == [(0, "done"), (1, "failed")]


def test_marks_of_the_table(report):
    slow = {"seconds": 301.0, "steps": 100, "tiles_per_second": 16.0, "interrupted": True}
    page = report.markdown([line(chance=0.004), line("slow", training=slow), line("kept", minutes=None)])
    assert row_of(page, "best")[-1].endswith("2 of 40 !") and "best, seed 0 (chance 0.004)" in page
    assert row_of(page, "slow", 1)[1] == "5.0 min *, **over budget**" and "interrupted and resumed" in page
    assert row_of(page, "kept", 1)[1] == "100 s"
    assert "Not comparable" not in page and "one of these lines only" not in page


def test_the_figures_without_labels_are_held_against_the_test_part(scripts, report, tmp_path):
    ranking = importlib.import_module("rank_correlation")
    figures = ((0.5, 0.6), (0.6, 0.9), (0.7, 0.8), (0.8, 0.95), (0.9, 0.99), (0.55, 0.7))
    lines = [
        line(f"row{number}", image_auroc=test, synthetic={"image_auroc": synthetic, "pixel_auroc": None})
        for number, (synthetic, test) in enumerate(figures)
    ]
    lines.append(line("row0", seed=1, image_auroc=0.1, synthetic={"image_auroc": 0.99, "pixel_auroc": None}))
    expected = stats.spearmanr([a for a, _ in figures], [b for _, b in figures]).statistic
    page = report.markdown(lines)
    assert f"of seed 0: image AUROC {expected:.2f} (95 % interval" in page and ", n = 6)" in page
    assert "Rank correlation" not in report.markdown(lines[:4]), "too few to say"
    (tmp_path / "results.jsonl").write_text("\n".join(json.dumps(each) for each in lines))
    for source in (tmp_path, tmp_path / "results.jsonl"):
        rows = ranking.read_runs([source])
        assert [(row["group"], row["image"]) for row in rows] == [("dice, seed 0", pair) for pair in figures]
        assert {tuple(row) for row in rows} == {("group", "image")}, "no mean of one figure"
    assert ranking.in_words(np.array(figures)).startswith(f"{expected:.2f} (")


def test_the_time_allowed_is_that_of_cores_on_a_cpu(report):
    shared = {"seconds": 500.0, "core_seconds": 250.0}
    on_gpu = found_by_measuring()["hardware"] | {"device": "cuda"}
    page = report.markdown(
        [
            line("crowded", training=shared),
            line("spread", training={"seconds": 250.0, "core_seconds": 500.0}),
            line("gpu", training=shared, hardware=on_gpu),
        ]
    )
    assert row_of(page, "crowded", 1)[1:3] == ["8.3 min", "4.2 min"]
    assert row_of(page, "spread", 1)[1:3] == ["4.2 min, **over budget**", "8.3 min"]
    assert row_of(page, "gpu", 1)[1] == "8.3 min, **over budget**"


def test_a_busy_machine_is_said(report):
    busy = line("hurried")
    busy["inference"] = busy["inference"] | {"batch_32": {"images_per_second": 3.0, "cores_of_others": 1.24}}
    page = report.markdown([line(), busy])
    assert "not left alone" in page and "hurried 1.2" in page and "best 0" not in page
    assert "not left alone" not in report.markdown([line()])


def test_settings_of_all_rows_are_said_once(report):
    lines = [line(overrides=["trainer=cpu", "calibration.alpha=0.1", "model=a"]),
             line("plain", overrides=["trainer=cpu", "calibration.alpha=0.05", "model=b"])]  # fmt: skip
    page = report.markdown(lines)
    assert page.count("trainer=cpu") == 1 and "`model=a`" in page and "`model=b`" in page


def test_rows_of_another_state_of_the_source_are_told_apart(report):
    page = report.markdown([line(source="a1"), line("other", source="b2"), line("old")])
    assert "Measured with 3 states of the source" in page
    assert "a1: best; b2: other; not recorded: old" in page
    assert "states of the source" not in report.markdown([line(source="a1"), line("other", source="a1")])


def test_rows_on_other_images_or_machines_are_told_apart(report):
    other = line("other", data_fingerprint={"test": "u", "calibration": "c"})
    other["hardware"] = other["hardware"] | {"cpu": "B"}
    page = report.markdown([line(), other])
    assert "Not comparable: the test images" in page and "Not comparable: the calibration" not in page
    assert "compare within one of these lines only" in page


def test_synthetic_figures_are_found_wherever_they_stand(scripts, report, tmp_path):
    cell = importlib.import_module("benchmark_cell")
    assert cell.synthetic_of(tmp_path) is None
    content = {"made": {"seed": 0}, "kinds": [{"x": {"image_auroc": 0.75, "pixel_auroc": None, "n": 3}}]}
    (tmp_path / "synthetic.json").write_text(json.dumps(content))
    assert cell.synthetic_of(tmp_path) == {"image_auroc": 0.75}
    page = report.markdown([line(synthetic={"image_auroc": 0.75}), line("without")])
    assert row_of(page, "best")[-2:] == ["0.750", "-"] and row_of(page, "without")[-2:] == ["-", "-"]


def test_chance_of_so_many_false_alarms(scripts):
    cell = importlib.import_module("benchmark_cell")
    assert cell.chance_of_alarms(19, 19, 1, 1) == pytest.approx(1 / 20), "one new score above the largest of 19"
    assert cell.chance_of_alarms(19, 19, 10, 0) == 1.0
    assert cell.chance_of_alarms(19, 19, 0, 0) is None


def test_fingerprint_is_of_the_settings_alone(scripts):
    cell = importlib.import_module("benchmark_cell")
    settings = {"data": {"_target_": "m", "root": "/a"}, "out": "x", "seed": 0, "model": {"width": 4}}
    elsewhere = settings | {"data": {"_target_": "m", "root": "/b"}, "out": "y", "seed": 1}
    assert cell.fingerprint(settings) == cell.fingerprint(elsewhere)
    assert cell.fingerprint(settings) != cell.fingerprint(settings | {"model": {"width": 8}})


# --- the peer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("_conv_stem.weight", "conv_stem.weight"),
        ("_bn1.running_mean", "bn2.running_mean"),
        ("_blocks.0._project_conv.weight", "blocks.0.0.conv_pw.weight"),
        ("_blocks.1._expand_conv.weight", "blocks.1.0.conv_pw.weight"),
        ("_blocks.8._bn0.bias", "blocks.4.0.bn1.bias"),
        ("_blocks.15._project_conv.weight", "blocks.6.0.conv_pwl.weight"),
        ("_fc.bias", "classifier.bias"),
    ],
)
def test_names_of_the_weights_of_the_peer(scripts, key, name):
    assert importlib.import_module("peer").timm_name(key) == name


def test_commands_that_differ_in_rows_are_shown_as_one(scripts):
    given = [
        "run out=DIR rows=a,b",
        "run out=DIR rows=b,c",
        "run out=DIR",
        "peer out=DIR bank=9",
        "peer out=DIR bank=9",
    ]
    joined = importlib.import_module("benchmark_report").joined
    assert joined(given) == ["run out=DIR rows=a,b,c", "run out=DIR", "peer out=DIR bank=9"]


# --- for real -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_real_cell(bench, make_mvtec, tiny, tmp_path, capsys):
    data = make_mvtec(tmp_path / "data")
    file = tmp_path / "tiny.yaml"
    words = [word for word in tiny if not word.startswith("calibration.alpha")]
    rows = {"small": ["model=conv_ae"], "other": ["model=conv_ae", "residual=l2"], "odd": ["model=conv"]}
    settings = {"rows": rows, "ensembles": {"both": ["small", "other"]}, "common": words}
    file.write_text(yaml.safe_dump(settings | {"data": {"blobs": {"alpha": 0.1}}}, sort_keys=False))
    arguments = [str(file), f"out={tmp_path / 'out'}", f"data.blobs={data}"]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        assert bench.main(arguments) == 1, "the odd row fails"
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
            signal.signal(number, handler)
    done, other, failed, both = bench.read_results(tmp_path / "out" / "results.jsonl")
    assert failed["sentence"].startswith("There is no model 'conv'")
    metrics = json.loads((tmp_path / "out/runs/blobs/small/0/metrics.json").read_text())
    assert done["figures"]["aupro_0.05"] == metrics["overall"]["aupro_0.05"] is not None
    assert done["figures"]["false_alarms"] == metrics["normals"]["false_alarms"]
    assert done["training"]["seconds"] > 0 and done["training"]["steps"] == 4
    assert done["training"]["tiles_per_second"] == pytest.approx(16 / done["training"]["seconds"])
    assert done["training"]["peak_mib"] > 100 and done["inference"]["peak_mib"] > 100
    assert done["inference"]["batch_1"]["slowest"] <= done["inference"]["batch_1"]["images_per_second"]
    assert both["training"]["seconds"] == done["training"]["seconds"] + other["training"]["seconds"]
    assert both["parameters"] == done["parameters"] + other["parameters"]
    assert both["inference"]["batch_1"]["images_per_second"] > 0 and both["figures"]["aupro_0.05"] is not None
    assert str(tmp_path) not in (tmp_path / "out" / "benchmark.md").read_text()


@pytest.mark.slow
def test_training_seconds_add_up_over_resumes(run_copy, run_cli):
    about = json.loads((run_copy / "run.json").read_text())
    before = {"training_seconds": 1000.0, "training_core_seconds": 2000.0}
    assert all(about[name] > 0 for name in before)
    (run_copy / "run.json").write_text(json.dumps(about | {"status": "training"} | before))
    assert run_cli(["train", f"resume={run_copy}"]).code == 0
    about = json.loads((run_copy / "run.json").read_text())
    assert all(taken < about[name] < taken + 500 for name, taken in before.items())

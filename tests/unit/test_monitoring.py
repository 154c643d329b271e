"""Drift: the martingale is valid and has power; the journal survives kills, and says so when it cannot be trusted."""

import errno
import hashlib
import json
import math
import os
import sys
from dataclasses import replace
from io import FileIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from blemish import drift, monitoring
from blemish.drift import JUMP_RATES, Drift, KSTest, Martingale, ks_test
from blemish.errors import BlemishError, CalibrationError, ConfigError, DataError
from blemish.monitoring import Monitor

CALIBRATION = np.random.default_rng(7).gamma(5, size=60).tolist()
RULE = {"name": "any_pixel"}
STREAM = np.random.default_rng(8).gamma(5, size=60).tolist()


def opened(path, calibration=CALIBRATION, **changed):
    settings = {"fingerprint": "abc", "mask_rule": RULE, "threshold": 9.0, "alpha": 0.05, "seed": 3, "level": 0.01}
    return Monitor.open(path, calibration, **(settings | changed))


def sha(name):
    return hashlib.sha256(str(name).encode()).hexdigest()


def feed(monitor, scores, names="image"):
    for number, score in enumerate(scores):
        monitor.add(f"{names}{number}.png", sha(f"{names}{number}"), score)


def monitored(path, scores, **changed):
    with opened(path, **changed) as monitor:
        feed(monitor, scores)
    return monitor.result()


def logs(calibration, stream, seed=0):
    martingale, found = Martingale(calibration, seed), []
    for score in stream:
        martingale.add(score)
        found.append(martingale.log)
    return found


def by_brute_force(calibration, stream, seed):
    """Online p-values and capital after every score, by the definitions, one jumper and one bet at a time."""
    p_values, capitals = [], []
    jumpers = {(on, rate): [1 / 3, 1 / 3, 1 / 3] for on in ("p", "folded") for rate in JUMP_RATES}
    for t, score in enumerate(stream, 1):
        bag = [*calibration, *stream[:t]]
        theta = np.random.default_rng([seed, t]).random()
        p = (sum(other > score for other in bag) + theta * sum(other == score for other in bag)) / len(bag)
        for (on, rate), capital in jumpers.items():
            u = p if on == "p" else abs(2 * p - 1)
            total = sum(capital)
            moved = [(1 - rate) * part + rate / 3 * total for part in capital]
            jumpers[on, rate] = [part * (1 + e * (u - 1 / 2)) for part, e in zip(moved, (-1, 0, 1), strict=True)]
        p_values.append(p)
        capitals.append(sum(map(sum, jumpers.values())) / len(jumpers))
    return p_values, capitals


SCORES = st.lists(st.one_of(st.integers(0, 3).map(float), st.floats(0, 10)), min_size=1, max_size=25)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SCORES, SCORES, st.integers(0, 2**32))
def test_the_martingale_is_its_definition(calibration, stream, seed):
    p_values, capitals = by_brute_force(calibration, stream, seed)
    martingale = Martingale(calibration, seed)
    for score, p, capital in zip(stream, p_values, capitals, strict=True):
        assert martingale.add(score) == pytest.approx(p, rel=1e-12, abs=1e-15)
        assert martingale.log == pytest.approx(math.log(capital), rel=1e-9, abs=1e-12)


def test_ranks_are_those_of_all_scores_when_recent_ones_merge(monkeypatch):
    monkeypatch.setattr(drift, "_RECENT", 4)
    stream = np.random.default_rng(1).integers(0, 9, 50).astype(float).tolist()
    martingale = Martingale([3.0, 1.0, 5.0], 0)
    assert [martingale.add(s) for s in stream] == pytest.approx(by_brute_force([3.0, 1.0, 5.0], stream, 0)[0])


@pytest.mark.parametrize("ties", [False, True])
def test_it_seldom_grows_on_exchangeable_streams(ties):
    """Ville: at most 1 stream in 20 ever reaches 20, and 1 in 4 reaches 4."""
    highest = []
    for seed in range(120):
        scores = np.random.default_rng([int(ties), seed]).gamma(2, size=200)
        scores = np.round(scores) if ties else scores
        highest.append(max(logs(scores[:50], scores[50:].tolist(), seed)))
    for capital in (4, 20):
        reached = sum(log >= math.log(capital) for log in highest)
        assert reached <= stats.binom.ppf(0.999, len(highest), 1 / capital)


@pytest.mark.parametrize(("scores", "n"), [("continuous", 20_000), ("tied", 5000), ("constant", 5000)])
def test_online_p_values_are_uniform_and_a_long_stream_stays_finite(scores, n):
    drawn = np.random.default_rng(2).gamma(2, size=100 + n)
    drawn = {"continuous": drawn, "tied": np.round(drawn), "constant": np.ones(100 + n)}[scores]
    martingale = Martingale(drawn[:100], 5)
    p_values = [martingale.add(score) for score in drawn[100:].tolist()]
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    assert abs(stats.spearmanr(p_values[1:], p_values[:-1]).statistic) < 3 / math.sqrt(n)
    assert math.log(0.1) < martingale.log < math.log(20)  # the jumpers that always jump never lose: 2 of 10


def test_capital_may_pass_what_a_float_holds():
    found = logs([0.0], [float(score) for score in range(1, 4001)])  # ever higher
    assert found[-1] > math.log(sys.float_info.max) and np.isfinite(found).all()
    assert (np.diff(found[10:]) > 0).all()


@pytest.mark.parametrize(
    ("change", "within"),
    [
        (lambda s: s + 1, 80),
        (lambda s: s - 1, 80),
        (lambda s: 2 * s, 150),  # spread
        (lambda s: s / 2, 100),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_change_is_found_soon(change, within, seed):
    drawn = np.random.default_rng(seed).normal(size=300 + within)
    assert max(logs(drawn[:200], drawn[200:300].tolist(), seed)) < math.log(200)
    assert max(logs(drawn[:300], change(drawn[300:]).tolist(), seed)) >= math.log(200)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_positive_scores_of_another_scale_are_found(factor):
    drawn = np.random.default_rng(4).gamma(5, size=300)
    assert max(logs(drawn[:200], (factor * drawn[200:]).tolist())) >= math.log(200)


def test_a_change_amid_the_stream_is_found():
    drawn = np.random.default_rng(5).normal(size=900)
    drawn[800:] += 1.5
    found = logs(drawn[:300], drawn[300:].tolist())
    assert max(found[:500]) < math.log(200) <= max(found)


def test_kolmogorov_smirnov_is_the_largest_gap():
    random = np.random.default_rng(6)
    for higher in (0.7, -0.7):
        old, new = random.normal(size=40), random.normal(size=30) + higher
        gaps = [np.mean(old <= x) - np.mean(new <= x) for x in [*old, *new]]
        test = ks_test(old.tolist(), new.tolist())
        assert test.statistic == pytest.approx(max(map(abs, gaps)))
        assert test.direction == ("higher" if higher > 0 else "lower")


def test_kolmogorov_smirnov_is_exact_for_few_scores():
    assert ks_test([1, 2, 3], [4, 5, 6]) == KSTest(1.0, pytest.approx(2 / math.comb(6, 3)), "higher")
    assert ks_test([1.0], [1.0]) == KSTest(0.0, 1.0, "same")


def test_result_counts_and_goes_on_over_inputs(tmp_path):
    state = tmp_path / "new" / "monitor.jsonl"
    first = monitored(state, STREAM[:20])
    assert (first.images, first.new, first.repeats, first.batch) == (20, 20, 0, 20)
    assert first.false_alarms == sum(score > 9.0 for score in STREAM[:20])
    assert first.ks == ks_test(CALIBRATION, STREAM[:20])
    second = monitored(state, STREAM, threshold=5.0, alpha=0.5)  # another promise on the same scores
    assert (second.images, second.new, second.repeats, second.batch) == (60, 40, 20, 60)
    assert second.false_alarms == sum(score > 5.0 for score in STREAM)
    found = logs(CALIBRATION, STREAM, 3)
    assert second.log10_martingale == found[-1] / math.log(10)
    assert second.log10_martingale_max == max(0, *found) / math.log(10)


def test_a_rerun_says_the_same(tmp_path):
    first = monitored(tmp_path / "state", STREAM)
    again = monitored(tmp_path / "state", STREAM)
    assert again.new == 0 and again.repeats == 60
    assert again.in_words() == first.in_words() and again.ks == first.ks


def test_repeats_are_known_counted_and_kept_out(tmp_path):
    with opened(tmp_path / "state") as monitor:
        assert not monitor.seen(sha("a"))
        monitor.add("a.png", sha("a"), 1.0)
        assert monitor.seen(sha("a"))
        monitor.repeat(sha("a"))
        monitor.add("copy of a.png", sha("a"), 1.0)
    result = monitor.result()
    assert (result.images, result.new, result.repeats, result.batch) == (1, 1, 2, 1)
    assert len((tmp_path / "state").read_text().splitlines()) == 2


def test_nothing_to_monitor_is_no_evidence(tmp_path):
    result = monitored(tmp_path / "state", [])
    assert result.holds and result.ks is None and result.rate_interval is None and result.chance == 1
    assert result.in_words().startswith("No evidence")
    assert json.dumps(result.to_dict(), allow_nan=False)


def test_one_calibration_score_suffices_to_begin(tmp_path):
    result = monitored(tmp_path / "state", [2.0, 0.5, 1.0], calibration=[1.0])
    assert result.holds and math.isfinite(result.log10_martingale)


@pytest.mark.parametrize("scores", [[5.0] * 50, [0.0, -0.0] * 20])
def test_constant_scores_are_no_evidence_on_a_constant_calibration(tmp_path, scores):
    result = monitored(tmp_path / "state", scores, calibration=scores[:20])
    assert result.holds and result.ks.direction == "same"


def test_lines_say_what_was_seen(tmp_path):
    monitored(tmp_path / "state", STREAM[:2])
    header, first, second = map(json.loads, (tmp_path / "state").read_text().splitlines())
    assert list(header) == ["software", "version", "fingerprint", "calibration", "seed", "level", "unit"]
    assert list(first) == ["path", "sha256", "score", "p_value", "online_p", "log_martingale"]
    assert (first["path"], first["sha256"], first["score"]) == ("image0.png", sha("image0"), STREAM[0])
    assert second["p_value"] == (1 + sum(score >= STREAM[1] for score in CALIBRATION)) / 61
    assert [first["log_martingale"], second["log_martingale"]] == logs(CALIBRATION, STREAM[:2], 3)


def test_scores_at_the_threshold_are_normal_and_at_a_calibration_score_count_it(tmp_path):
    result = monitored(tmp_path / "state", [1.0, 2.0, 3.0], calibration=[1.0, 2.0, 2.0], threshold=2.0)
    assert result.false_alarms == 1
    lines = (tmp_path / "state").read_text().splitlines()[1:]
    assert [json.loads(line)["p_value"] for line in lines] == [1.0, 0.75, 0.25]


def test_every_image_is_on_the_disk_before_the_next(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    with opened(tmp_path / "state") as monitor:
        for number, score in enumerate(STREAM):
            monitor.add("a.png", sha(number), score)
            assert (tmp_path / "state").read_bytes().count(b"\n") == number + 2
            assert synced[-1] == (tmp_path / "state").stat().st_size


def test_a_kill_anywhere_in_the_last_line_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    whole = monitored(tmp_path / "whole", STREAM[:6])
    content = (tmp_path / "whole").read_bytes()
    last = content[:-1].rfind(b"\n") + 1
    torn = tmp_path / "torn"
    for cut in range(last, len(content) + 1):
        torn.write_bytes(content[:cut])
        result = monitored(torn, STREAM[:6])
        assert torn.read_bytes() == content
        assert (result.new, result.repeats) == ((0, 6) if cut == len(content) else (1, 5))
        assert replace(result, new=6, repeats=0) == whole


def test_a_kill_in_the_header_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monitored(tmp_path / "state", STREAM[:2])
    content = (tmp_path / "state").read_bytes()
    for cut in range(content.index(b"\n") + 1):
        (tmp_path / "state").write_bytes(content[:cut])
        monitored(tmp_path / "state", STREAM[:2])
        assert (tmp_path / "state").read_bytes() == content


@pytest.mark.parametrize("content", [b"not a journal", b'{\n  "a": 1\n}\n', b"\x89PNG\r\n\x1a\n\x00", b"\n", b"[1]\n"])
def test_another_file_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(DataError, match="no journal"):
        opened(tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == content


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"fingerprint": "xyz"}, CalibrationError, "another detector or calibration"),
        ({"calibration": [*CALIBRATION[:-1], 1.0]}, CalibrationError, "another detector or calibration"),
        ({"mask_rule": {"name": "region"}}, CalibrationError, "another detector or calibration"),
        ({"seed": 4}, ConfigError, "begun with seed=3, not 4"),
        ({"level": 0.05}, ConfigError, "begun with level=0.01, not 0.05"),
    ],
)
def test_a_journal_of_something_else_is_refused(tmp_path, changed, error, words):
    monitored(tmp_path / "state", STREAM)
    content = (tmp_path / "state").read_bytes()
    with pytest.raises(error, match=words) as caught:
        opened(tmp_path / "state", **changed)
    assert "state=" in str(caught.value) and "\n" not in str(caught.value)
    assert (tmp_path / "state").read_bytes() == content
    assert opened(tmp_path / "state", calibration=CALIBRATION[::-1]).result().images == 60  # the order is no matter


def edited(**values):
    return lambda line: json.dumps(json.loads(line) | values).encode()


DAMAGE = {
    "cut": lambda line: line[:-10],
    "empty": lambda line: b"",
    "bytes": lambda line: b"\xff" + line,
    "no object": lambda line: b"[]",
    "no field": lambda line: b'{"path": "a"}',
    "score": edited(score=100.0),
    "NaN": edited(score=math.nan),
    "text": edited(score="1.0"),
    "p-value": edited(p_value=0.5),
    "online p-value": edited(online_p=0.5),
    "martingale": edited(log_martingale=1.0),
    "text for a number": edited(log_martingale="1"),
    "the same image twice": edited(sha256=sha("image0")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_is_named_and_kept(tmp_path, damage):
    monitored(tmp_path / "state", STREAM[:10])
    lines = (tmp_path / "state").read_bytes().split(b"\n")
    lines[4] = DAMAGE[damage](lines[4])
    (tmp_path / "state").write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=r"Line 5 of .*state is damaged: choose another state="):
        opened(tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == b"\n".join(lines)


def test_a_line_left_out_is_found(tmp_path):
    monitored(tmp_path / "state", STREAM[:10])
    lines = (tmp_path / "state").read_bytes().splitlines(keepends=True)
    (tmp_path / "state").write_bytes(b"".join(lines[:4] + lines[5:]))
    with pytest.raises(DataError, match=r"Line 5 of .* is damaged"):
        opened(tmp_path / "state")


def test_a_damaged_header_is_found(tmp_path):
    monitored(tmp_path / "state", STREAM[:3])
    content = (tmp_path / "state").read_bytes()
    for damaged in (content.replace(b'"seed"', b'"sead"'), content.replace(b"}", b"", 1)):
        (tmp_path / "state").write_bytes(damaged)
        with pytest.raises(DataError, match=r"Line 1 of .* is damaged"):
            opened(tmp_path / "state")


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_refused_and_leaves_no_trace(tmp_path, score):
    with opened(tmp_path / "state") as monitor:
        with pytest.raises(CalibrationError, match=r"The score of bad\.png is"):
            monitor.add("bad.png", sha("bad"), score)
        feed(monitor, STREAM)
    assert monitor.result() == monitored(tmp_path / "other", STREAM)


@pytest.mark.parametrize("calibration", [[], [1.0, math.nan], [math.inf]])
def test_unusable_calibration_scores_are_refused(tmp_path, calibration):
    with pytest.raises(CalibrationError, match="calibration scores"):
        opened(tmp_path / "state", calibration=calibration)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("changed", [{"level": 0.0}, {"level": 1.0}, {"level": math.nan}, {"seed": -1}, {"seed": 0.5}])
def test_settings_out_of_range_are_refused(tmp_path, changed):
    with pytest.raises(ConfigError, match=f"Expected {next(iter(changed))} "):
        opened(tmp_path / "state", **changed)


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_a_journal_is_written_by_one_monitor_at_a_time(tmp_path):
    with opened(tmp_path / "state") as monitor:
        feed(monitor, STREAM[:2])
        with pytest.raises(BlemishError, match="in use by another"):
            opened(tmp_path / "state")
        feed(monitor, STREAM[:3])
    with opened(tmp_path / "state") as monitor:
        assert monitor.result().images == 3


@pytest.mark.parametrize("room", [0, 1, 100])
def test_a_full_disk_is_one_sentence_and_leaves_whole_lines(tmp_path, monkeypatch, room):
    class Full(FileIO):
        left = 10**6

        def write(self, content):
            if self.left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            taken = super().write(content[: min(self.left, 60)])  # a part at a time
            self.left -= taken
            return taken

    monkeypatch.setattr(monitoring, "FileIO", Full)
    monitor = opened(tmp_path / "state")
    feed(monitor, STREAM[:3])
    content = (tmp_path / "state").read_bytes()
    monitor._file.left = room
    with pytest.raises(BlemishError, match="the disk is full"):
        monitor.add("a.png", sha("a"), 1.0)
    assert (tmp_path / "state").read_bytes() == content
    monkeypatch.undo()
    result = monitored(tmp_path / "state", STREAM)  # and goes on
    assert (result.new, result.repeats) == (57, 3)
    monitored(tmp_path / "other", STREAM)
    assert (tmp_path / "other").read_bytes() == (tmp_path / "state").read_bytes()


def test_a_folder_in_place_of_the_journal_is_one_sentence(tmp_path):
    with pytest.raises(BlemishError, match="Cannot write"):
        opened(tmp_path)


def test_unchanged_images_are_no_evidence_in_words(tmp_path):
    said = monitored(tmp_path / "state", STREAM).in_words()
    assert said.startswith("No evidence that normal images have changed since the calibration: the martingale over all")
    assert "where at most 5 % is promised" in said and "expect" not in said


@pytest.mark.parametrize(
    ("factor", "words"),
    [(2.0, "are higher than in the calibration: expect more false alarms"), (0.4, "lower than in the calibration: ex")],
)
def test_a_broken_promise_in_words(tmp_path, factor, words):
    scores = [factor * score for score in STREAM]
    result = monitored(tmp_path / "state", scores)
    assert not result.holds and result.chance <= 0.01
    assert result.in_words().startswith("The promise no longer holds: ") and words in result.in_words()
    assert "blemish calibrate run=RUN" in result.in_words()
    crossing = next(number for number, log in enumerate(logs(CALIBRATION, scores, 3)) if log >= math.log(200))
    assert result.crossed_at == f"image{crossing}.png" and f"past 200 at image{crossing}.png" in result.in_words()
    assert result.to_dict()["crossed_at"] == result.crossed_at
    low, high = result.rate_interval
    assert low <= result.false_alarms / 60 <= high


def test_what_was_found_stays_found(tmp_path):
    """A later input that looks normal does not take back evidence over the whole stream."""
    first = monitored(tmp_path / "state", [2 * score for score in STREAM])
    with opened(tmp_path / "state") as monitor:
        feed(monitor, CALIBRATION, "later")
    later = monitor.result()
    assert not later.holds and later.crossed_at == first.crossed_at and later.ks.p_value > 0.5
    assert later.log10_martingale_max >= first.log10_martingale_max


@pytest.mark.parametrize(
    ("ks", "crossed_at", "holds"),
    [(0.0051, None, True), (0.005, None, False), (1.0, "a.png", False), (None, None, True), (None, "a.png", False)],
)
def test_the_verdict_halves_the_level(ks, crossed_at, holds):
    test = None if ks is None else KSTest(0.5, ks, "higher")
    drift = Drift(9, 9, 0, 9, 1, 0.05, test, 0.0, 400.0 if crossed_at else 0.0, crossed_at, 0.01)
    assert drift.holds == holds
    assert (drift.chance > drift.level) == holds
    assert json.dumps(drift.to_dict(), allow_nan=False)
    assert "10^400.0" in drift.in_words() or not crossed_at

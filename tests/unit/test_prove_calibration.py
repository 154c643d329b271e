"""The statistics of scripts/prove_calibration.py on made-up scores: right ranks pass, wrong ones do not."""

import importlib
import math
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from blemish.calibration import Promise
from blemish.errors import CalibrationError

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def proof():
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("prove_calibration")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def scores():
    return np.random.default_rng(0).gamma(2.0, size=240)


def examine(proof, scores, promise, n=120, repeats=1000, name="cell"):
    return proof.examine(scores, n, promise, repeats, proof.generator(0, name))


@pytest.fixture
def wrong_rank(monkeypatch):
    """Lowers every rank of blemish."""
    right = Promise.rank

    def set_off(off):
        monkeypatch.setattr(Promise, "rank", lambda promise, n, images=None: right(promise, n) - off)

    return set_off


# --- the exact laws -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "k"), [(4, 3, 4), (5, 4, 3), (3, 5, 1)])
def test_law_of_a_split_by_counting_all_splits(proof, n, m, k):
    # Whichever of the n + m ranks calibrate: count the test ranks above the k-th smallest of them.
    from itertools import combinations

    counts = np.zeros(m + 1)
    for chosen in combinations(range(n + m), n):
        threshold = sorted(chosen)[k - 1]
        counts[sum(rank > threshold for rank in range(n + m) if rank not in chosen)] += 1
    law = proof.split_law(n, m, k)
    np.testing.assert_allclose(law.pmf, counts / counts.sum(), atol=1e-12)
    assert law.mean == pytest.approx(float(Fraction(n + 1 - k, n + 1)))


def test_law_of_a_population_by_counting_all_draws(proof):
    from itertools import product

    n, size, k = 3, 4, 2
    counts = np.zeros(size + 1)
    for drawn in product(range(size), repeat=n):
        counts[sum(rank > sorted(drawn)[k - 1] for rank in range(size))] += 1
    np.testing.assert_allclose(proof.population_law(n, size, k).pmf, counts / counts.sum(), atol=1e-12)


def test_band_of_a_sum_holds_what_it_should(proof):
    law = proof.split_law(50, 40, 48)
    low, high = proof.band_of_sum(law, 200)
    sums = np.random.default_rng(1).choice(41, p=law.pmf, size=(20_000, 200)).sum(axis=1)
    below, above = (sums < low).mean(), (sums > high).mean()
    assert 0.003 < below < 0.0065 and 0.003 < above < 0.0065


def test_band_of_one_count_is_that_of_the_law(proof):
    law = proof.split_law(50, 40, 40)
    exact = stats.betabinom(40, 11, 40)
    low, high = proof.band_of_sum(law, 1)
    assert (low, high) == (exact.ppf(0.005), exact.ppf(0.995))


@pytest.mark.parametrize(("alpha", "size", "first"), [(0.05, 100, 6), (0.1, 30, 4), (0.01, 99, 1), (0.07, 100, 8)])
def test_exceeds_is_free_of_rounding(proof, alpha, size, first):
    assert proof.exceeds(alpha, size) == first == math.floor(Fraction(str(alpha)) * size) + 1


@pytest.mark.parametrize("rule", ["marginal", "pac"])
@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.07, 0.1, 0.3])
def test_rank_by_definition_is_that_of_blemish(proof, alpha, rule):
    promise = Promise(alpha, rule)
    for n in (*range(promise.needed, promise.needed + 25), 345, 999, 1300):
        if n >= promise.needed:
            assert proof.rank_by_definition(n, promise) == promise.rank(n)


def test_fit_tells_the_law_from_another(proof):
    rng = np.random.default_rng(2)
    law, other = proof.split_law(100, 80, 96), proof.split_law(100, 80, 95)
    p_values = [law.fit(rng.choice(81, p=law.pmf, size=500)) for _ in range(200)]
    assert 0.4 < np.mean(p_values) < 0.6
    assert np.mean(np.array(p_values) < 0.05) < 0.12
    assert law.fit(rng.choice(81, p=other.pmf, size=2000)) < 1e-6


# --- the experiments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["marginal", "pac"])
@pytest.mark.parametrize("alpha", [0.05, 0.1])
def test_right_rank_is_inside(proof, scores, alpha, rule):
    found = examine(proof, scores, Promise(alpha, rule))
    for part in (found["split"], found["population"]):
        assert part["low"] <= part["rate"] <= part["high"]
        assert part["low"] < part["expected"] < part["high"]
        assert part["inside"] and part["above_inside"] and part["fit_p"] > 0.01
    assert found["split"]["expected"] == pytest.approx((121 - found["k"]) / 121)
    assert found["split"]["expected"] <= alpha
    assert found["card"] and found["equal_scores"] == 0
    assert found["pac_kept"] is (True if rule == "pac" else None)


@pytest.mark.parametrize("off", [1, 3, -1])
@pytest.mark.parametrize("rule", ["marginal", "pac"])
def test_wrong_rank_is_outside(proof, scores, wrong_rank, rule, off):
    wrong_rank(off)
    found = examine(proof, scores, Promise(0.1, rule))
    assert not found["split"]["inside"]
    assert not found["population"]["inside"]
    assert found["split"]["fit_p"] < 0.01


def test_wrong_rank_breaks_the_pac_promise(proof, scores, wrong_rank):
    wrong_rank(3)
    assert examine(proof, scores, Promise(0.1, "pac"))["pac_kept"] is False


def test_wrong_rank_would_have_been_caught(proof, scores):
    assert examine(proof, scores, Promise(0.1))["caught"] == {1: True, 3: True}


def test_ties_only_lower_the_rates(proof, scores):
    tied = examine(proof, np.round(scores), Promise(0.1))
    assert tied["equal_scores"] > 200
    assert tied["split"]["inside"]
    assert tied["split"]["rate"] < tied["split"]["low"]
    assert tied["population"]["rate"] < tied["population"]["low"]
    assert tied["split"]["fit_p"] > 0.01


@pytest.mark.parametrize(("off", "inside"), [(0, True), (3, False), (-3, False)])
def test_ties_do_not_hide_a_wrong_rank(proof, scores, wrong_rank, off, inside):
    wrong_rank(off)
    few = np.round(scores, 2)
    assert len(np.unique(few)) < len(few)
    assert examine(proof, few, Promise(0.1))["split"]["inside"] is inside


def test_equal_scores_raise_no_alarm(proof):
    found = examine(proof, np.ones(240), Promise(0.1))
    assert found["split"]["rate"] == found["population"]["rate"] == 0
    assert found["split"]["inside"] and found["pac_kept"] is None


def test_same_seed_same_numbers_and_every_cell_its_own(proof, scores):
    first, again, other = (examine(proof, scores, Promise(0.1), name=name) for name in ("a", "a", "b"))
    assert all((x == y).all() for x, y in zip(first.pop("counts"), again.pop("counts"), strict=True))
    assert first == again
    assert first["split"]["rate"] != other["split"]["rate"]


def test_too_few_images_are_refused(proof, scores):
    with pytest.raises(CalibrationError, match="too few"):
        examine(proof, scores, Promise(0.01, "pac"))


def test_multiplicity_counts_cells(proof, scores, wrong_rank):
    cells = []
    for place, off in enumerate((0, 0, 0, 9, 9)):
        wrong_rank(off)
        cells.append(examine(proof, scores, Promise(0.1, "pac"), repeats=200, name=place))
    checks = {row["check"]: row for row in proof.multiplicity(cells)}
    mean = checks["splits: mean rate"]
    assert mean["cells"] == 5 and mean["outside"] == 2 and mean["expected"] == pytest.approx(0.05)
    assert mean["chance"] == pytest.approx(1 - stats.binom.cdf(1, 5, 0.01))
    assert mean["chance"] < 0.001


def test_contrast_is_ours_at_alpha_and_pooled_pixels_far_above(proof):
    rng = np.random.default_rng(3)
    maps = rng.gamma(2.0, size=(240, 400)).astype(np.float32)
    scored = proof.Scored({"any_pixel": maps.max(axis=1).astype(float)}, maps, np.median(maps, axis=1), 400, ())
    found = {(row["method"], row["alpha"]): row["rate"] for row in proof.contrast(scored, 120, 200, proof.generator(0))}
    assert 0.08 < found["blemish, marginal", 0.1] < 0.12
    assert found["blemish, pac", 0.1] < found["blemish, marginal", 0.1]
    assert found["pooled pixel quantile", 0.01] > 0.9
    assert found["largest normal score", None] == pytest.approx(1 / 121, abs=0.004)
    assert ("blemish, pac", 0.01) not in found  # 120 images are too few


def test_a_quarter_trains_and_copies_count_once(proof, tmp_path):
    for place in range(40):
        (tmp_path / f"{place:02}.png").write_bytes(bytes([place // 2]))
    training, pool = proof.divide(sorted(tmp_path.iterdir()), 0)
    assert (len(training), len(pool)) == (5, 15)
    assert len({path.read_bytes() for path in training + pool}) == 20
    assert proof.divide(sorted(tmp_path.iterdir()), 0) == (training, pool)


def test_missing_folder_is_one_sentence(proof, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prove_calibration.py", str(tmp_path), "--dice", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"^Folder .*none does not exist: check --dice\.$"):
        proof.main()

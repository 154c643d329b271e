"""Proves the promise of the calibration on real images, or shows where it breaks. `make prove` runs it.

    python scripts/prove_calibration.py OUT [--dice DIR] [--magnetic-tile DIR] [--splits 1000] [--steps 300]

Trains three models on a part of each data set's normal images, scores the rest (the pool) once, and draws from it
again and again. Two experiments for every data set, model, mask rule and promise:

1. splits: the pool is divided at random into n calibration and m test images. Without ties the number of false alarms
   is BetaBinomial(m, n + 1 - k, k), whatever the scores; given the pool, the splits are independent.
2. population: the pool is the population, n calibration images are drawn from it with replacement, and the true rate is
   known: the share of the pool above the threshold. With B from Beta(n + 1 - k, k), it is floor(N B) / N without ties.

The bands are exact: sums of such counts by convolution. Equal scores can only make false alarms rarer: the upper side
of a band is held against the counts as they came, the lower side against those with ties broken in a fixed order.
Finished trainings and scores are kept in OUT; a rerun repeats the statistics only. Needs the extras demo and dev.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
import shlex
import shutil
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import fft, stats
from tqdm import tqdm

from blemish import __version__
from blemish.calibration import Calibration, Promise
from blemish.data.records import read_mvtec
from blemish.data.splits import digest_files
from blemish.errors import BlemishError, CalibrationError
from blemish.files import atomic, write_csv
from blemish.mask_rules import MaskRule
from blemish.noise import Noise, NoiseEstimator

MODELS = {
    "plain": ["model=conv_ae", "corruption=none"],
    "denoising": ["model=conv_ae"],
    "vae": ["model=vae"],
}
RULES = (MaskRule("any_pixel"), MaskRule("area_fraction", tau=0.001), MaskRule("region", region_area=16))
ALPHAS = (0.01, 0.05, 0.1)
DELTA = 0.05
PROMISES = [Promise(alpha, rule, DELTA) for rule in ("marginal", "pac") for alpha in ALPHAS]
LEVEL = 0.99  # of every band
CONTRAST_SPLITS = 200  # sorting all pixels takes its time
BROKEN = (1, 3)  # ranks too low by this much, to see that the proof can fail
SIDE, MOST_IMAGES, MOST_TRAINED = 128, 3000, 400

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


# --- the exact laws -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Law:
    """The exact law of a count out of `size`; `pmf` has its size + 1 probabilities."""

    size: int
    pmf: Floats

    @property
    def mean(self) -> float:
        return float(self.pmf @ np.arange(self.size + 1)) / self.size

    def above(self, alpha: float) -> float:
        """The chance that count / size exceeds alpha."""
        return float(self.pmf[exceeds(alpha, self.size) :].sum())

    def fit(self, counts: Counts) -> float:
        """p-value of Pearson's chi-square test that the counts follow this law, in bins of 5 or more expected."""
        expected = self.pmf * len(counts)
        observed = np.bincount(counts, minlength=self.size + 1)
        least = max(5.0, len(counts) / 20)
        bins: list[list[float]] = [[0.0, 0.0]]
        for pair in zip(observed, expected, strict=True):
            if bins[-1][1] >= least:
                bins.append([0.0, 0.0])
            bins[-1][0] += pair[0]
            bins[-1][1] += pair[1]
        if len(bins) > 1 and bins[-1][1] < least:
            rest = bins.pop()
            bins[-1] = [bins[-1][0] + rest[0], bins[-1][1] + rest[1]]
        seen, due = np.array(bins).T
        return 1.0 if len(bins) == 1 else float(stats.chi2.sf(((seen - due) ** 2 / due).sum(), len(bins) - 1))


@cache
def split_law(n: int, m: int, k: int) -> Law:
    """Of m new scores, those above the k-th smallest of n."""
    return Law(m, stats.betabinom.pmf(np.arange(m + 1), m, n + 1 - k, k))


@cache
def population_law(n: int, size: int, k: int) -> Law:
    """Of a population, those above the k-th smallest of n drawn from it with replacement."""
    cdf = stats.beta.cdf(np.arange(size + 1) / size, n + 1 - k, k)
    return Law(size, np.append(np.diff(cdf), 0.0))


@cache
def band_of_sum(law: Law, repeats: int) -> tuple[int, int]:
    """Central band of the sum of independent counts, which it leaves with probability 1 - LEVEL at most."""
    largest = law.size * repeats
    length = fft.next_fast_len(largest + 1, real=True)
    cdf = np.cumsum(fft.irfft(fft.rfft(law.pmf, length) ** repeats, length)[: largest + 1])
    low, high = np.searchsorted(cdf, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return int(low), int(min(high, largest))


def rank_by_definition(n: int, promise: Promise) -> int:
    """The smallest rank that keeps the promise, from its definition and not from blemish.

    Of n scores whose p-values are uniform, the k-th smallest has a rate above alpha if n - k p-values or fewer are at
    most alpha.
    """
    if promise.rule == "marginal":
        return next(k for k in range(1, n + 1) if Fraction(n + 1 - k, n + 1) <= Fraction(repr(promise.alpha)))
    fails = stats.binom.cdf(n - np.arange(1, n + 1), n, promise.alpha)
    return int(np.argmax(fails <= promise.delta)) + 1


def exceeds(alpha: float, size: int) -> int:
    """The smallest count whose share of `size` exceeds alpha, the decimal number that was written."""
    return math.floor(Fraction(repr(alpha)) * size) + 1


def binomial_band(repeats: int, probability: float) -> tuple[float, float]:
    low, high = stats.binom.ppf([(1 - LEVEL) / 2, (1 + LEVEL) / 2], repeats, probability)
    return max(0.0, float(low)) / repeats, max(0.0, float(high)) / repeats


# --- the experiments ----------------------------------------------------------------------------------------------


def generator(seed: int, *names: object) -> np.random.Generator:
    """A stream of its own for every name, so that the cells of the tables are independent."""
    return np.random.default_rng([seed, zlib.crc32("/".join(map(str, names)).encode())])


def ordinal(scores: Floats) -> Floats:
    """Ranks, with ties broken by place, which no random draw depends on."""
    return stats.rankdata(scores, "ordinal").astype(np.float64)


def draw_splits(size: int, repeats: int, rng: np.random.Generator) -> Counts:
    """(repeats, size): in each row a random order of the pool; its first n images calibrate, the others test."""
    return rng.permuted(np.tile(np.arange(size), (repeats, 1)), axis=1)


def thresholds(calibration: Floats, k: int) -> Floats:
    """(repeats, n) -> (repeats, 1), the k-th smallest of each row."""
    return np.partition(calibration, k - 1, axis=1)[:, k - 1 : k]


def split_alarms(scores: Floats, splits: Counts, n: int, k: int) -> Counts:
    """False alarms among the test images of each split."""
    drawn = scores[splits]
    return (drawn[:, n:] > thresholds(drawn[:, :n], k)).sum(axis=1)


def population_alarms(scores: Floats, draws: Counts, k: int) -> Counts:
    """For each draw of calibration images, the images of the whole pool above the threshold."""
    return len(scores) - np.searchsorted(np.sort(scores), thresholds(scores[draws], k)[:, 0], side="right")


def compare(law: Law, alpha: float, counts: Counts, untied: Counts) -> dict[str, Any]:
    """Counts as they came, and with ties broken, against their law: mean, share above alpha, whole distribution."""
    repeats = len(counts)
    low, high = band_of_sum(law, repeats)
    first, above = exceeds(alpha, law.size), law.above(alpha)
    above_low, above_high = binomial_band(repeats, above)
    share, untied_share = float((counts >= first).mean()), float((untied >= first).mean())
    return {
        "rate": float(counts.mean()) / law.size,
        "expected": law.mean,
        "low": low / law.size / repeats,
        "high": high / law.size / repeats,
        "inside": bool(low <= untied.sum() and counts.sum() <= high),
        "fit_p": law.fit(untied),
        "above_alpha": share,
        "above_expected": above,
        "above_low": above_low,
        "above_high": above_high,
        "above_inside": bool(above_low <= untied_share and share <= above_high),
    }


def examine(scores: Floats, n: int, promise: Promise, repeats: int, rng: np.random.Generator) -> dict[str, Any]:
    """Both experiments for one pool of scores and one promise; "counts" holds what they counted.

    Thresholds take blemish's rank, laws the rank by definition. "caught": whether the mean rate would give away a rank
    too low by 1, by 3.

    Raises:
        CalibrationError: n is too small for the promise.
    """
    size, k, due = len(scores), promise.rank(n), rank_by_definition(n, promise)
    splits = draw_splits(size, repeats, rng)
    draws = rng.integers(size, size=(repeats, n))
    by_split, by_population = split_law(n, size - n, due), population_law(n, size, due)
    split = split_alarms(scores, splits, n, k)
    population = population_alarms(scores, draws, k)
    untied_split, untied_population = split, population
    equal = size - len(np.unique(scores))
    if equal:
        ranks = ordinal(scores)
        untied_split, untied_population = split_alarms(ranks, splits, n, k), population_alarms(ranks, draws, k)
    caught = {}
    for off in BROKEN:
        broken = split_alarms(scores, splits, n, k - off) if k > off else split
        caught[off] = not compare(by_split, promise.alpha, broken, broken)["inside"]
    true_rates = compare(by_population, promise.alpha, population, untied_population)
    limit = float(stats.binom.ppf(LEVEL, repeats, promise.delta)) / repeats if promise.rule == "pac" else None
    return {
        "n": n,
        "m": size - n,
        "k": k,
        "equal_scores": equal,
        "split": compare(by_split, promise.alpha, split, untied_split),
        "population": true_rates,
        "pac_limit": limit,
        "pac_kept": None if limit is None else true_rates["above_alpha"] <= limit,
        "card": card_agrees(scores[splits[0, :n]], promise),
        "caught": caught,
        "counts": (split, population),
    }


def card_agrees(calibration: Floats, promise: Promise) -> bool:
    """Whether blemish's own calibration card has the threshold that these experiments use."""
    card = Calibration.fit(calibration.tolist(), [str(place) for place in range(len(calibration))], promise, "")
    return card.threshold == float(np.sort(calibration)[promise.rank(len(calibration)) - 1])


def contrast(scored: Scored, n: int, repeats: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Mean false-alarm rates of images (any pixel above a threshold) for ours and other thresholds, same splits."""
    scores = scored.scores["any_pixel"]
    found: dict[tuple[str, float | None], list[float]] = {}
    places = [math.ceil((1 - alpha) * n * scored.pixels.shape[1]) - 1 for alpha in ALPHAS]
    for split in tqdm(draw_splits(len(scores), repeats, rng), "other thresholds", leave=False):
        calibration, test = scores[split[:n]], scores[split[n:]]
        mean, spread = calibration.mean(), calibration.std(ddof=1)
        ordered = np.sort(calibration)
        pooled = np.partition(scored.pixels[split[:n]], places, axis=None)[places]
        noise = Noise(float(np.median(scored.sigmas[split[:n]])), scored.largest, 0, 0, 1)
        limits: dict[tuple[str, float | None], float] = {
            ("largest normal score", None): ordered[-1],
            ("mean + 3 sigma", None): mean + 3 * spread,
        }
        for alpha, pixel in zip(ALPHAS, pooled, strict=True):
            for rule in ("pac", "marginal"):
                promise = Promise(alpha, rule, DELTA)
                if n >= promise.needed:
                    limits[f"blemish, {rule}", alpha] = ordered[promise.rank(n) - 1]
            limits["Gaussian quantile of image scores", alpha] = mean + spread * stats.norm.isf(alpha)
            limits["pooled pixel quantile", alpha] = pixel
            limits["parametric noise (assumption)", alpha] = noise.threshold(alpha)
        for key, limit in limits.items():
            found.setdefault(key, []).append(float((test > limit).mean()))
    return [
        {"method": method, "alpha": alpha, "rate": float(np.mean(rates)), "splits": repeats}
        for (method, alpha), rates in found.items()
    ]


def multiplicity(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How many cells are outside of their 99 % bands, and how likely so many or more are by chance."""
    pac = [row for row in rows if row["pac_kept"] is not None]
    families = {
        "splits: mean rate": [row["split"]["inside"] for row in rows],
        "splits: distribution of the rates": [row["split"]["fit_p"] >= 1 - LEVEL for row in rows],
        "splits: share of splits above alpha": [row["split"]["above_inside"] for row in rows],
        "population: mean true rate": [row["population"]["inside"] for row in rows],
        "population: distribution of the true rates": [row["population"]["fit_p"] >= 1 - LEVEL for row in rows],
        "population: share of true rates above alpha": [row["population"]["above_inside"] for row in rows],
        "population: pac fails in at most delta": [row["pac_kept"] for row in pac],
    }
    return [
        {
            "check": name,
            "cells": len(kept),
            "outside": len(kept) - sum(kept),
            "expected": (1 - LEVEL) * len(kept),
            "chance": float(stats.binom.sf(len(kept) - sum(kept) - 1, len(kept), 1 - LEVEL)),
        }
        for name, kept in families.items()
    ]


# --- images, models, scores ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """Of each image in the pool: a score per mask rule, some pixels of its score map, its noise."""

    scores: dict[str, Floats]
    pixels: npt.NDArray[np.float32]
    sigmas: Floats
    largest: int  # pixels of the largest image
    doubts: tuple[str, ...]  # about the noise


def normal_cells(kind: str) -> list[Path]:
    """The normal cells of one kind, mono or poly, in the package elpv-dataset."""
    from solar_cells import package_folder

    lines = (package_folder() / "labels.csv").read_text(encoding="utf-8").splitlines()
    cells = [line.split() for line in lines]
    return [package_folder() / name for name, probability, found in cells if found == kind and float(probability) == 0]


def divide(paths: Sequence[Path], seed: int) -> tuple[list[Path], list[Path]]:
    """A quarter of the images (400 at most) to train with, and the pool; copies of a file count once."""
    distinct = dict(zip(reversed(digest_files(paths)), reversed(paths), strict=True))
    chosen = sorted(distinct.values())
    random.Random(seed).shuffle(chosen)
    chosen = chosen[:MOST_IMAGES]
    trained = min(round(len(chosen) / 4), MOST_TRAINED)
    return sorted(chosen[:trained]), sorted(chosen[trained:])


def calibration_count(pool: int) -> int:
    """Half of the pool, but enough for pac at alpha = 0.01 if that leaves a quarter for testing."""
    return max(pool // 2, min(Promise(0.01, "pac", DELTA).needed, pool * 3 // 4))


def train(folder: Path, model: str, training: Sequence[Path], steps: int, seed: int) -> Path:
    """Train through the `blemish` command, unless that has been done before. Returns the run folder."""
    rows = [{"path": path, "label": "good"} for path in training]
    settings = [*MODELS[model], f"image.max_side={SIDE}", "tiling.size=128", f"training.steps={steps}", f"seed={seed}"]
    settings += ["image.channels=1", "training.steps_per_epoch=50", "training.patience=null"]
    key = hashlib.sha256(
        "\n".join([__version__, *settings, *digest_files(training, progress=False)]).encode()
    ).hexdigest()
    run = folder / f"{model}-{key[:12]}"
    if (run / "detector.pt").is_file():
        return run
    shutil.rmtree(run, ignore_errors=True)
    write_csv(folder / "manifest.csv", ("path", "label"), rows)
    command = ["train", "data=manifest", f"data.root={folder / 'manifest.csv'}", f"out={run}", *settings]
    log = folder / f"{model}.log"
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run([sys.executable, "-m", "blemish", *command], stdout=file, stderr=file, check=False)
    if done.returncode:
        raise BlemishError(f"`blemish train` ended with exit code {done.returncode}: see {log}.")
    return run


def held_key(file: Path) -> str:
    if not file.is_file():
        return ""
    with np.load(file) as held:
        return str(held["key"])


def score(run: Path, pool: Sequence[Path], seed: int, pixels: int) -> Scored:
    """Score every image of the pool once with the detector of a run, or read the scores of an earlier time."""
    from blemish import load_detector
    from blemish.pipeline import score_files

    detector = load_detector(run, "cpu", with_card=False)
    asked = [detector.fingerprint, str(seed), str(pixels), *(str(rule.to_dict()) for rule in RULES), *map(str, pool)]
    key = hashlib.sha256("\n".join(asked).encode()).hexdigest()
    file = run.with_suffix(".npz")
    if held_key(file) != key:
        rng = generator(seed, "pixels")
        kept: dict[str, list[Any]] = {rule.name: [] for rule in RULES} | {"pixels": [], "sigmas": []}
        noise, largest = NoiseEstimator(), 0
        for item in tqdm(score_files(detector, list(pool)), f"scoring {run.name}", len(pool), leave=False):
            if item.error:
                raise BlemishError(item.error)
            for rule in RULES:
                kept[rule.name].append(rule.score(item.score_map))
            kept["pixels"].append(rng.choice(item.score_map.ravel(), pixels))
            noise.add(item.score_map)
            kept["sigmas"].append(float(np.median(item.score_map) / stats.halfnorm.median()))
            largest = max(largest, item.score_map.size)
        doubts = noise.result().warnings()
        arrays = {name: np.asarray(values) for name, values in kept.items()}
        with atomic(file) as temporary, temporary.open("wb") as stream:
            np.savez(stream, key=key, largest=largest, doubts=np.asarray(doubts, str), **arrays)
    with np.load(file) as held:
        scores = {rule.name: held[rule.name].astype(np.float64) for rule in RULES}
        return Scored(scores, held["pixels"], held["sigmas"], int(held["largest"]), tuple(held["doubts"].tolist()))


# --- the proof ----------------------------------------------------------------------------------------------------


def prove(arguments: argparse.Namespace) -> dict[str, Any]:
    """All of it; returns what proof.json holds, with the counts of every cell besides."""
    out, seed, repeats = arguments.out, arguments.seed, arguments.splits
    sources = {kind: normal_cells(kind) for kind in ("mono", "poly")}
    for name, root in (("dice", arguments.dice), ("magnetic_tile", arguments.magnetic_tile)):
        if root is not None:
            sources[name] = [record.path for record in read_mvtec(root).images if record.is_normal]
    data: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    bar = tqdm([(name, model) for name in sources for model in MODELS], "models")
    divided = {name: divide(paths, seed) for name, paths in sources.items()}
    for name, model in bar:
        training, pool = divided[name]
        n = calibration_count(len(pool))
        bar.set_postfix_str(f"{name}, {model}: training")
        run = train(out / name, model, training, arguments.steps, seed)
        bar.set_postfix_str(f"{name}, {model}: scoring")
        scored = score(run, pool, seed, arguments.pixels)
        data.setdefault(name, {"trained": len(training), "pool": len(pool), "n": n, "m": len(pool) - n, "doubts": {}})
        data[name]["doubts"][model] = list(scored.doubts)
        bar.set_postfix_str(f"{name}, {model}: statistics")
        for rule in RULES:
            for promise in PROMISES:
                cell = {"data": name, "model": model, "mask_rule": rule.name, "rule": promise.rule}
                cell |= {"alpha": promise.alpha}
                scores, names = scored.scores[rule.name], tuple(cell.values())
                try:
                    found = examine(scores, n, promise, repeats, generator(seed, *names))
                except CalibrationError:
                    rows.append(cell | {"n": n, "refused": f"refused (needs {promise.needed})"})
                    continue
                rows.append(cell | {"refused": None} | found)
        rng = generator(seed, name, model)
        for entry in contrast(scored, n, min(repeats, CONTRAST_SPLITS), rng):
            others.append({"data": name, "model": model} | entry)
    kept = [row for row in rows if not row["refused"]]
    words = [Path(word).name if Path(word).is_dir() else word for word in sys.argv[1:]]  # nobody's folders
    return {
        "made": {
            "software": "blemish",
            "version": __version__,
            "command": shlex.join(["python", "scripts/prove_calibration.py", *words]),
            "seed": seed,
            "splits": repeats,
            "steps": arguments.steps,
            "band": LEVEL,
            "delta": DELTA,
            "mask_rules": [rule.to_dict() for rule in RULES],
            "models": MODELS,
        },
        "data": data,
        "checks": multiplicity(kept),
        "caught": {off: sum(row["caught"][off] for row in kept) for off in BROKEN},
        "cards_agree": sum(row["card"] for row in kept),
        "cells": rows,
        "contrast": others,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for models, scores and the proof")
    parser.add_argument("--dice", type=Path, metavar="DIR", help="more images, in the layout of MVTec AD")
    parser.add_argument("--magnetic-tile", type=Path, metavar="DIR", help="the same")
    parser.add_argument("--splits", type=int, default=1000, help="random repetitions of each experiment (1000)")
    parser.add_argument("--steps", type=int, default=300, help="of training; validity does not depend on them (300)")
    parser.add_argument("--pixels", type=int, default=2000, help="kept of each score map, to pool them (2000)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.splits < 200:
        parser.error("--splits: fewer than 200 show nothing")
    for option in ("dice", "magnetic_tile"):
        folder = getattr(arguments, option)
        if folder is not None and not folder.is_dir():
            sys.exit(f"Folder {folder} does not exist: check --{option.replace('_', '-')}.")
    arguments.out = arguments.out.absolute()
    try:
        proof = prove(arguments)
    except BlemishError as error:
        sys.exit(str(error))
    from proof_report import write_proof  # draws, so that the statistics need no matplotlib

    print(write_proof(proof, arguments.out))


if __name__ == "__main__":
    main()

"""Measures one finished run of `benchmark.py` in a process of its own, and writes what it finds as JSON.

    python scripts/benchmark_cell.py RUN FILE.json

Peak memory is that of a process that loads the detector and predicts some test images to files. Images per second are
of images that are in memory already, through the detector to decision and mask, and of nothing else.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import platform
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

MOST_IMAGES, MOST_PIXELS = 64, 2**26
SECONDS, MOST_PASSES = 5.0, 7
BATCHES = (1, 32)
_APART = ("out", "resume", "runs", "seed", "root")  # settings that tell two runs of one kind apart


def read_json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def figures_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of the tables, from metrics.json."""
    overall, normals = metrics["overall"], metrics["normals"]
    ranked = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro_0.3", "aupro_0.05")
    return {name: overall[name] for name in ranked} | {
        "f1": overall["calibrated"]["image_f1"],
        "precision": overall["calibrated"]["image_precision"],
        "recall": overall["calibrated"]["image_recall"],
        "false_alarms": normals["false_alarms"],
        "normals": normals["images"],
        "false_alarm_rate": normals["false_alarm_rate"],
        "false_alarm_rate_interval_95": normals["false_alarm_rate_interval_95"],
        "defects": overall["images"],
        "masks": overall["masks"],
        "unusable": len(metrics["unreadable"]),
    }


def kinds_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """{kind of defect: figures}, from metrics.json."""
    return {
        kind: {"image_auroc": found["image_auroc"], "aupro_0.3": found["aupro_0.3"], "defects": found["images"]}
        for kind, found in metrics["kinds"].items()
    }


def chance_of_alarms(n: int, k: int, normals: int, alarms: int) -> float | None:
    """How likely so many false alarms or more are if test and calibration normals are exchangeable: BetaBinomial."""
    from scipy import stats

    return float(stats.betabinom.sf(alarms - 1, normals, n + 1 - k, k)) if normals else None


def synthetic_of(run: Path) -> dict[str, float] | None:
    """The label-free figures of synthetic.json, wherever in it they stand; None if there are none."""
    file = run / "synthetic.json"
    for part in _mappings(read_json(file)) if file.is_file() else ():
        if isinstance(part.get("image_auroc"), (int, float)):
            names = ("image_auroc", "pixel_auroc", "aupro_0.3", "aupro_0.05")
            return {name: part[name] for name in names if isinstance(part.get(name), (int, float))}
    return None


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    """`value` and all mappings inside it, outer ones first."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _mappings(inner)


def fingerprint(settings: Mapping[str, Any]) -> str:
    """SHA-256 of a run's settings, but for its folders, and for seeds, a model's own included."""

    def kept(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        named = {
            key: Path(part).name if key == "weights" and isinstance(part, str) else part for key, part in value.items()
        }
        return {key: kept(part) for key, part in named.items() if key not in _APART}

    return hashlib.sha256(json.dumps(kept(settings), sort_keys=True).encode()).hexdigest()


def fingerprint_of(run: Path) -> str:
    """That of a run's settings; of an ensemble, with those of its members."""
    import yaml

    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    members = [fingerprint_of(Path(member["run"])) for member in read_json(run / "run.json").get("members", ())]
    return fingerprint(settings | {"members": members} if members else settings)


def source() -> str:
    """Of the package's code and configs, so that a table says where rows come from different ones."""
    import blemish
    from blemish.settings import config_folder

    package, digest = Path(blemish.__file__).parent, hashlib.sha256()
    for folder, pattern in ((package, "**/*.py"), (config_folder(), "**/*.yaml")):
        for file in sorted(folder.glob(pattern)):
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def hardware(device: str) -> dict[str, Any]:
    """What speeds depend on."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8"))):
        cpu = found[1].strip()
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": platform.system(),
    }


def busy_seconds() -> float | None:
    """CPU time that everything on this machine has used since it started; None where the system does not tell."""
    file = Path("/proc/stat")
    if not file.is_file():
        return None
    user, nice, system, _, _, *rest = map(int, file.read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def cores_of_others(before: float | None, after: float | None, own: float, wall: float) -> float | None:
    """How many cores all other processes kept busy, on average."""
    if before is None or after is None or wall <= 0:
        return None
    return round(max(0.0, after - before - own) / wall, 3)


def peak_mib() -> float:
    """Peak resident memory of this process; ru_maxrss would begin with that of the process that started it."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text(encoding="utf-8")) if status.is_file() else None
    if found:
        return int(found[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 / (1024 if sys.platform == "darwin" else 1)


def images_of(run: Path) -> list[Path]:
    """Some test images, evenly spread over the kinds."""
    with (run / "splits.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return spread_evenly([Path(row["path"]) for row in csv.DictReader(file) if row["split"] == "test"])


def spread_evenly(paths: Sequence[Path]) -> list[Path]:
    chosen = {round(place * (len(paths) - 1) / max(1, MOST_IMAGES - 1)) for place in range(MOST_IMAGES)}
    return [paths[place] for place in sorted(chosen)]


def detector_speed(detector: Any, images: Sequence[Any], batch: int) -> dict[str, Any]:
    """Images per second with up to `batch` tiles scored at once."""
    ready = with_batch(detector, batch)

    def decide(chosen: Sequence[Any]) -> None:
        for batch_scored in ready.score_batches(chosen):
            for scored in batch_scored:
                ready.decide(scored.score_map, scored.label)

    return speed(decide, images, batch)


def with_batch(detector: Any, batch: int) -> Any:
    """That scores up to so many tiles at once, each member of an ensemble for itself."""
    if hasattr(detector, "members"):
        return replace(detector, members=tuple(with_batch(member, batch) for member in detector.members))
    return replace(detector, tiling=replace(detector.tiling, batch=batch))


def scorers_of(detector: Any) -> list[Any]:
    """Its own, or those of an ensemble's members."""
    members = getattr(detector, "members", None)
    return [detector.scorer] if members is None else [one for member in members for one in scorers_of(member)]


def speed(one_pass: Callable[[Sequence[Any]], None], images: Sequence[Any], batch: int) -> dict[str, Any]:
    """Images per second, median of several passes after a warm-up, and what other processes did meanwhile."""
    one_pass(images[:batch])
    busy, own = busy_seconds(), time.process_time()
    began, rates = time.perf_counter(), []
    while not rates or (time.perf_counter() - began < SECONDS and len(rates) < MOST_PASSES):
        start = time.perf_counter()
        one_pass(images)
        rates.append(len(images) / (time.perf_counter() - start))
    others = cores_of_others(busy, busy_seconds(), time.process_time() - own, time.perf_counter() - began)
    rate = {"images_per_second": statistics.median(rates), "slowest": min(rates), "fastest": max(rates)}
    return rate | {"cores_of_others": others}


def in_memory(paths: Sequence[Path], read: Callable[[Path], Any]) -> list[Any]:
    """The pixels of the first images, as many as are no burden."""
    images: list[Any] = []
    for path in paths:
        if sum(image.size for image in images) < MOST_PIXELS:
            images.append(read(path))
    return images


def trained_steps(run: Path) -> int | None:
    """Optimiser steps until training ended, by itself or by early stopping; None for a model that fits in one pass."""
    import torch

    file = run / "checkpoints" / "last.ckpt"
    return int(torch.load(file, map_location="cpu", weights_only=True)["global_step"]) if file.is_file() else None


def training_of(run: Path, settings: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """What it cost; of an ensemble, what its members' trainings cost together."""
    if "members" in about:
        costs = [read_json(Path(member["run"]) / "run.json") for member in about["members"]]
        names = {"seconds": "training_seconds", "core_seconds": "training_core_seconds"}
        return {name: sum(cost[key] for cost in costs) for name, key in names.items()}
    steps, seconds = trained_steps(run), about.get("training_seconds")
    tiles = settings["training"]["batch_size"] * settings["training"].get("accumulate", 1)
    return {
        "seconds": seconds,
        "core_seconds": about.get("training_core_seconds"),
        "steps": steps,
        "planned_steps": settings["training"]["steps"],
        "batch_size": settings["training"]["batch_size"],
        "tiles_per_second": steps * tiles / seconds if steps and seconds else None,
    }


def measure(run: Path) -> dict[str, Any]:
    import yaml

    from blemish import load_detector, pipeline
    from blemish.data.images import read_pixels
    from blemish.errors import DataError

    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    about = read_json(run / "run.json")
    if not (run / "metrics.json").is_file():
        raise DataError("The data set has no test part: there is nothing to measure.")
    on_cpu = "cpu" in (settings.get("device"), settings.get("trainer", {}).get("accelerator"))
    detector = load_detector(run, "cpu" if on_cpu else "auto")
    card = detector.card
    paths = images_of(run)
    with tempfile.TemporaryDirectory() as name:
        inputs = Path(name) / "inputs"
        inputs.mkdir()
        for place, path in enumerate(paths):  # under names of their own: each kind may have its 000.png
            (inputs / f"{place}{path.suffix}").symlink_to(path)
        # Before anything else fills the memory.
        pipeline.predict(detector, inputs, Path(name) / "predictions", progress=False)
    inference: dict[str, Any] = {"peak_mib": round(peak_mib(), 1), "images": 0}
    images = in_memory(paths, read_pixels)
    inference["images"] = len(images)
    inference |= {f"batch_{batch}": detector_speed(detector, images, batch) for batch in BATCHES}
    metrics = read_json(run / "metrics.json")
    figures = figures_of(metrics)
    alarms, scorers = figures["false_alarms"], scorers_of(detector)
    figures["chance"] = chance_of_alarms(card.n, card.rank, figures["normals"], alarms) if card.rank else None
    return {
        "figures": figures,
        "kinds": kinds_of(metrics),
        "synthetic": synthetic_of(run),
        "calibration": {"alpha": card.promise.alpha, "rule": card.promise.rule, "n": card.n, "rank": card.rank},
        "training": training_of(run, settings, about),
        "inference": inference,
        "parameters": sum(parameter.numel() for scorer in scorers for parameter in scorer.model.parameters()),
        "numbers": sum(numbers_of(scorer.model, scorer.score) for scorer in scorers),
        "images": about["images"],
        "source": source(),
        "config_fingerprint": fingerprint_of(run),
        "detector_fingerprint": detector.fingerprint,
        "data_fingerprint": about["data_fingerprint"],
        "hardware": hardware(str(scorers[0].device)),
    }


def numbers_of(*parts: Any) -> int:
    """All that a detector is made of: parameters, frozen weights, and what was learned without gradients."""
    tensors = {
        id(tensor): tensor.numel()
        for part in parts
        if hasattr(part, "parameters")
        for tensor in chain(part.parameters(), part.buffers())
    }
    return sum(tensors.values())


def main() -> None:
    from blemish.errors import BlemishError
    from blemish.files import write_json

    try:
        write_json(Path(sys.argv[2]), measure(Path(sys.argv[1])))
    except BlemishError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

"""How fast a detector predicts: by engine, by stage, against this machine's peak and the peer, in one run.

    python scripts/benchmark_inference.py [RUN] [--out inference.md] [--sides 128 256 512 1024]

Without RUN, an untrained default model with an invented calibration serves, whose score has learned of random images:
speed does not depend on the weights.
What is compared takes turns, a second or more each, so that a machine that slows down slows all; figures are medians
over the turns. The share of the machine's peak is that of the bare forward pass: its multiplications and additions, as
PyTorch counts them, in units of what a large convolution reaches here in float32. Engines and the peer take part where
they are installed; the peer's bank holds random features, as speed does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmark_cell import busy_seconds, cores_of_others, hardware
from benchmark_report import as_table
from invented_run import invent_run, random_images, save_images

BATCHES = (1, 32)
ROUNDS, LEAST_SECONDS = 3, 1.0
STAGED_SIDES, STAGED_IMAGES = (192, 384, 768), 64
PEER_SIDE, PEER_BANK, PEER_IMAGES = 256, 1000, 100
FULL_SIZE = ("image.square=null", "image.short_side=null")

Task = Callable[[], Any]


def in_turns(tasks: Mapping[str, Task]) -> dict[str, float]:
    """Seconds per call of each task, the median over rounds in which all take part, after a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(ROUNDS):
        for name, task in tasks.items():
            start, calls = time.perf_counter(), 0
            while calls == 0 or time.perf_counter() - start < LEAST_SECONDS:
                task()
                calls += 1
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine_peak() -> dict[str, float]:
    """GFLOP per second of a large matrix product and of a large convolution, float32."""
    import torch

    side, channels, width = 2048, 128, 64
    matrix = torch.rand(side, side)
    x = torch.rand(8, channels, width, width).contiguous(memory_format=torch.channels_last)
    kernel = torch.rand(channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        product, convolution = partial(torch.mm, matrix, matrix), partial(torch.conv2d, x, kernel, None, 1, 1)
        seconds = in_turns({"matrix product": product, "convolution": convolution})
    work = {"matrix product": 2 * side**3, "convolution": 2 * 9 * channels**2 * x.shape[0] * width**2}
    return {name: work[name] / seconds[name] / 1e9 for name in work}


def gflop_per_tile(scorer: Any, channels: int, size: int) -> float:
    """Of model and score, as PyTorch counts convolutions and matrix products."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        scorer.score(scorer.model, torch.rand(1, channels, size, size))
    return counter.get_total_flops() / 1e9


# --- the engines --------------------------------------------------------------------------------------------------


def engines_of(run: Path, detector: Any, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The detector in each engine that is installed and can hold it, and why the others are missing."""
    from blemish.engines.load import PROGRAMS, load_exported
    from blemish.errors import BlemishError
    from blemish.export.run import export

    settings = (
        yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) if (run / "config.yaml").is_file() else {}
    )
    paths = save_images(random_images(2, detector.tiling.size), folder / "parity")
    found, missing = {"torch": detector}, []
    for form in ("onnx", "openvino"):
        try:
            exported = export(detector, settings, form, folder / form, paths, progress=False)
        except BlemishError as error:
            missing.append(f"{form}: {error}")
        else:
            found[form] = load_exported(exported.path, "cpu", [PROGRAMS])
    return found, missing


def tiles_of(detector: Any, side: int) -> int:
    """Into how many tiles an image of `side` pixels is cut."""
    count: int = detector.tiling.count(*detector.preprocess.scored_size(side, side))
    return count


def random_tiles(detector: Any, count: int) -> Any:
    shape = (count, detector.preprocess.channels, detector.tiling.size, detector.tiling.size)
    return np.random.default_rng(0).random(shape, np.float32)


def in_batches(scorer: Callable[[Any], Any], tiles: Any, batch: int) -> None:
    for first in range(0, len(tiles), batch):
        scorer(tiles[first : first + batch])


def score_all(detector: Any, images: Sequence[Any]) -> None:
    for _ in detector.score_batches(images):
        pass


def engine_rows(engines: Mapping[str, Any], sides: Sequence[int], work: float, peak: float) -> list[list[object]]:
    """A row for each size of image, batch and engine."""
    rows: list[list[object]] = []
    for side in sides:
        for batch in BATCHES:
            each = tiles_of(engines["torch"], side)
            images = random_images(max(1, -(-batch // each)), side)
            tiles = random_tiles(engines["torch"], each * len(images))
            tasks: dict[str, Task] = {}
            for name, detector in engines.items():
                ready = replace(detector, tiling=replace(detector.tiling, batch=batch))
                tasks[name] = partial(score_all, ready, images)
                tasks[f"{name}, bare"] = partial(in_batches, detector.scorer, tiles, batch)
            seconds = in_turns(tasks)
            for name in engines:
                whole, bare = seconds[name], seconds[f"{name}, bare"]
                rate = work * len(tiles) / bare
                rows.append(
                    [
                        *(f"{side} x {side}", each, batch, name),
                        *(f"{len(images) / whole:.3g}", f"{bare / whole:.2f}", f"{rate:.0f}", f"{rate / peak:.0%}"),
                    ]
                )
    return rows


# --- decoding to written files ------------------------------------------------------------------------------------


@dataclass
class Staged:
    """Milliseconds per image of each stage, and images per second of all together and of the bare forward pass."""

    stages: dict[str, float]
    predicted: dict[str, float]
    bare: dict[str, float]


def stages(engines: Mapping[str, Any], side: int, folder: Path) -> Staged:
    """Of STAGED_IMAGES images, 32 tiles at once."""
    from blemish import pipeline
    from blemish.data.images import read_pixels
    from blemish.outputs import note_of, save_map, save_png
    from blemish.pictures import heat_map

    detector = engines["torch"]
    paths = save_images(random_images(STAGED_IMAGES, side), folder / str(side))
    images = [read_pixels(path) for path in paths]
    tiles, size = random_tiles(detector, tiles_of(detector, side) * len(paths)), detector.tiling.size
    maps = [scored.score_map for batch in detector.score_batches(images) for scored in batch]
    decided = [detector.decide(score_map) for score_map in maps]
    pictures = [heat_map(made.score_map, made.threshold, pixels) for made, pixels in zip(decided, images, strict=True)]
    zeros = np.zeros((len(tiles), size, size), np.float32)
    cutter = replace(detector, scorer=lambda x: zeros[: len(x)], smoothing=type(detector.smoothing)(0))
    smoother = replace(detector, scorer=lambda x: zeros[: len(x)])
    note, out = note_of(pipeline.made_by(detector)), folder / "stages"
    out.mkdir(exist_ok=True)

    def draw() -> None:
        for made, pixels in zip(decided, images, strict=True):
            heat_map(made.score_map, made.threshold, pixels, made.mask)

    def write() -> None:
        for made, picture in zip(decided, pictures, strict=True):
            save_map(out / "map.tiff", made.score_map, note)
            save_png(out / "heatmap.png", picture, note)
            save_png(out / "mask.png", made.mask.astype(np.uint8) * 255, note)

    def predict(engine: Any) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            pipeline.predict(engine, paths, Path(name) / "out", progress=False)

    tasks: dict[str, Task] = {
        "decode": lambda: [read_pixels(path) for path in paths],
        "cut and blend": partial(score_all, cutter, images),
        "smooth": partial(score_all, smoother, images),
        "decide": lambda: [detector.decide(score_map) for score_map in maps],
        "draw": draw,
        "write": write,
    }
    tasks |= {f"{name}, bare": partial(in_batches, one.scorer, tiles, 32) for name, one in engines.items()}
    tasks |= {name: partial(predict, one) for name, one in engines.items()}
    seconds = in_turns(tasks)
    parts = {
        name: 1000 * seconds[name] / len(paths) for name in ("decode", "cut and blend", "smooth", "decide", "draw")
    }
    parts["smooth"] = max(0.0, parts["smooth"] - parts["cut and blend"])
    parts["write"] = 1000 * seconds["write"] / len(paths)
    return Staged(
        parts,
        {name: len(paths) / seconds[name] for name in engines},
        {name: len(paths) / seconds[f"{name}, bare"] for name in engines},
    )


def stage_tables(staged: Mapping[int, Staged]) -> list[str]:
    names = list(next(iter(staged.values())).stages)
    rows = [
        [f"{side} x {side}", *(f"{found.stages[name]:.2f}" for name in names), f"{1000 / found.bare['torch']:.2f}"]
        for side, found in staged.items()
    ]
    ratios = [
        [f"{side} x {side}", name, f"{rate:.3g}", f"{found.bare[name]:.3g}", f"{rate / found.bare[name]:.2f}"]
        for side, found in staged.items()
        for name, rate in found.predicted.items()
    ]
    return [
        as_table(["image", *names, "forward in torch"], rows),
        as_table(["image", "engine", "images/s, everything written", "bare forward, 32 tiles", "ratio"], ratios),
    ]


def mask_rules(detector: Any) -> str:
    from blemish.mask_rules import MaskRule

    score_map = detector.score_map(random_images(1, 1000, seed=2)[0])
    rules = ("any_pixel", "area_fraction", "region")
    seconds = in_turns({name: partial(MaskRule(name).score, score_map) for name in rules})
    return ", ".join(f"`{name}` {1000 * value:.2f} ms" for name, value in seconds.items())


# --- the peer -----------------------------------------------------------------------------------------------------


def against_peer(folder: Path) -> str:
    """Images per second of the default model and of the peer, the same images in memory, one tile of one size each."""
    if find_spec("anomalib") is None:
        return "The peer (anomalib) is not installed here: see `scripts/requirements-peer.txt`."
    import torch
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    from blemish import load_detector
    from peer import PatchCore, software

    detector: Any = load_detector(invent_run(folder / "peer", FULL_SIZE, PEER_SIDE), "cpu")
    images = random_images(32, PEER_SIDE)
    features = PatchCore({}).learn(images[:1]).shape[1]
    small = PatchCore({}, {"bank": torch.rand(PEER_BANK, features)})
    # As the peer has it where nothing is said: its network, and a tenth of all patches of PEER_IMAGES images.
    usual = PatchCore({})
    usual.model = PatchcoreModel(("layer2", "layer3"), "wide_resnet50_2", pre_trained=False).eval()
    patches, width = PEER_IMAGES * (PEER_SIDE // 8) ** 2 // 10, sum(usual.model.feature_extractor.out_dims)
    usual.model.memory_bank = torch.rand(patches, width)
    peers = {
        f"{software()}, PatchCore, EfficientNet-Lite0, bank of {PEER_BANK}": small,
        f"{software()}, PatchCore with its defaults (wide_resnet50_2), bank of {PEER_IMAGES} images": usual,
    }

    def all_of(batch: int) -> dict[str, Task]:
        def score(peer: Any) -> None:
            for first in range(0, len(images), batch):
                list(peer.score(images[first : first + batch]))

        ready = replace(detector, tiling=replace(detector.tiling, batch=batch))
        own: dict[str, Task] = {"blemish, the default model": partial(score_all, ready, images)}
        return own | {name: partial(score, peer) for name, peer in peers.items()}

    rows: list[list[object]] = []
    for batch in BATCHES:
        seconds = in_turns(all_of(batch))
        ours = seconds["blemish, the default model"]
        rows += [[batch, name, f"{32 / taken:.3g}", f"{taken / ours:.1f}"] for name, taken in seconds.items()]
    return as_table(["batch", f"{PEER_SIDE} x {PEER_SIDE}", "images/s", "blemish is faster by"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, default=Path("inference.md"))
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 256, 512, 1024])
    arguments = parser.parse_args()

    from blemish import __version__, load_detector
    from blemish.errors import BlemishError
    from blemish.files import write_text

    busy, own, began = busy_seconds(), time.process_time(), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            run = arguments.run or invent_run(folder / "default")
            # The default brings images to the size of a tile; here they keep theirs, and are cut.
            cutting = arguments.run or invent_run(folder / "cutting", FULL_SIZE)
            detector: Any = load_detector(cutting, "cpu")
        except BlemishError as error:
            sys.exit(f"benchmark_inference: {error}")
        peak = machine_peak()
        size, channels = detector.tiling.size, detector.preprocess.channels
        work = gflop_per_tile(detector.scorer, channels, size)
        engines, missing = engines_of(cutting, detector, folder / "cutting")
        table = engine_rows(engines, arguments.sides, work, peak["convolution"])
        engines, _ = engines_of(run, load_detector(run, "cpu"), folder / "default")
        tables = stage_tables({side: stages(engines, side, folder) for side in STAGED_SIDES})
        rules, peer = mask_rules(detector), against_peer(folder)
    others = cores_of_others(busy, busy_seconds(), time.process_time() - own, time.perf_counter() - began)
    machine = hardware("cpu")
    words = "RUN" if arguments.run else "an untrained default model"
    headers = ["image", "tiles", "at once", "engine", "images/s", "of bare forward", "GFLOP/s, bare", "of peak"]
    text = "\n\n".join(
        [
            f"# Inference: blemish {__version__}",
            f"Made by `python scripts/benchmark_inference.py` of {words}: tiles of {size} pixels, {work:.2f} GFLOP "
            f"each. {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, torch "
            f"{machine['torch']}; other processes kept {'unknown' if others is None else others} cores busy meanwhile.",
            "Peak, float32: " + ", ".join(f"{kind} {rate:.0f} GFLOP/s" for kind, rate in peak.items()) + ".",
            "## Engines",
            "From pixels in memory, scored at their own size, to score maps; the bare forward pass has its tiles "
            "ready; the peak is that of the convolution.",
            as_table(headers, table),
            *missing,
            "## Stages",
            "With the default settings, which score an image as one tile. Milliseconds per image, one thread but for "
            "the forward pass; `predict` decodes and writes in other threads meanwhile.",
            *tables,
            f"Mask rules on a map of 1000 x 1000: {rules}.",
            "## The peer",
            peer,
        ]
    )
    write_text(arguments.out, text + "\n")
    print(f"{text}\n\nwritten: {arguments.out}")


if __name__ == "__main__":
    main()

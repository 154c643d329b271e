"""Prediction speed and memory through `blemish predict`, in one run.

    python scripts/benchmark_prediction.py [RUN]

Images per second with everything written, against the bare forward pass (model and residual) of the same tiles at
the same batch size; peak memory for 500 and for 5000 images of 128 x 128; peak memory for one of 6000 x 6000 above
that of a process that has loaded the detector and done nothing; the cost of each mask rule on a map of 1000 x 1000,
against that of the map itself. Without RUN, an untrained default model with an
invented calibration serves: speed does not depend on the weights.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WORKER = """
import json, re, sys, time
from pathlib import Path
from blemish import load_detector, pipeline
def peak():  # ru_maxrss would begin with that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
run, source, out = sys.argv[1:]
detector = load_detector(run, "cpu")
idle = peak()
start = time.perf_counter()
if source != "-":
    pipeline.predict(detector, source, Path(out), progress=False)
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "idle": idle, "peak": peak()}))
"""


def measure(run: Path, source: str, out: Path) -> dict[str, float]:
    """Predict in a process of its own: seconds, and peak resident memory in KiB before and after."""
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(run), source, str(out)], check=True, capture_output=True, text=True
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def invent_run(folder: Path) -> Path:
    """An untrained default model, calibrated on its own scores of a few random images."""
    import torch
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from blemish import __version__
    from blemish.calibration import Calibration, Promise
    from blemish.checkpoint import assemble, build_model, save_detector
    from blemish.cli import config_folder

    torch.manual_seed(0)
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("train", ["data.root=.", "image.channels=1", "tiling.size=128"])
    settings: Any = OmegaConf.to_container(config, resolve=True)
    model = build_model(settings)
    detector = assemble(settings, model)
    rng = np.random.default_rng(0)
    maps = detector.score_maps(random_image(rng, 128) for _ in range(19))
    scores = [float(score_map.max()) for score_map in maps]
    calibration = Calibration.fit(scores, [str(i) for i in range(19)], Promise(), detector.fingerprint)
    save_detector(
        folder, settings, detector, calibration, {"version": __version__, "trained_on": [], "trained_groups": []}
    )
    return folder


def random_image(rng: np.random.Generator, side: int) -> np.ndarray[Any, Any]:
    """Smooth structure with a little noise, which compresses about as a photograph does."""
    import cv2

    coarse = rng.random((max(2, side // 16), max(2, side // 16)), dtype=np.float32)
    image = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC) * 200 + rng.normal(0, 3, (side, side))
    return np.clip(image, 0, 255).astype(np.uint8)[..., None]


def bare_forward(run: Path, batch: int, images: int) -> float:
    """Images per second of model and residual alone, on tiles already in memory."""
    import torch

    from blemish import load_detector

    scorer = load_detector(run, "cpu").scorer
    tiles = torch.rand(batch, 1, 128, 128).contiguous(memory_format=torch.channels_last).numpy()
    scorer(tiles)
    start = time.perf_counter()
    for _ in range(images // batch):
        scorer(tiles)
    return images // batch * batch / (time.perf_counter() - start)


def mask_rule_costs(run: Path, repeats: int = 5) -> dict[str, float]:
    """Seconds to score an image of 1000 x 1000 pixels, and to apply each mask rule to its map (medians)."""
    from blemish import load_detector
    from blemish.mask_rules import MaskRule

    detector = load_detector(run, "cpu")
    image = random_image(np.random.default_rng(2), 1000)
    score_map = detector.score_map(image)
    tasks: dict[str, Any] = {"score map": partial(detector.score_map, image)}
    for name in ("any_pixel", "area_fraction", "region"):
        tasks[name] = partial(MaskRule(name).score, score_map)
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(times)) for name, times in seconds.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = Path(sys.argv[1]) if len(sys.argv) > 1 else invent_run(folder / "run")
        rng = np.random.default_rng(1)
        for count in (500, 5000):
            (folder / str(count)).mkdir()
            for place in range(count):
                Image.fromarray(random_image(rng, 128)[..., 0]).save(folder / str(count) / f"{place:05}.png")
        (folder / "large").mkdir()
        Image.fromarray(random_image(rng, 6000)[..., 0]).save(folder / "large" / "6000.png")

        few = measure(run, str(folder / "500"), folder / "out500")
        bare = bare_forward(run, 32, 512)
        many = measure(run, str(folder / "5000"), folder / "out5000")
        large = measure(run, str(folder / "large"), folder / "outlarge")
        costs = mask_rule_costs(run)
    speed = 500 / few["seconds"]
    print(f"500 images of 128 x 128, everything written: {speed:.1f} images/s")
    print(f"bare forward pass at batch 32:               {bare:.1f} images/s; ratio {speed / bare:.2f}")
    print(
        f"peak memory: 500 images {few['peak'] / 1024:.0f} MiB, 5000 images {many['peak'] / 1024:.0f} MiB "
        f"({many['peak'] / few['peak'] - 1:+.1%}); 5000 images at {5000 / many['seconds']:.1f} images/s"
    )
    above = (large["peak"] - large["idle"]) / 1024
    whole = costs.pop("score map")
    shares = ", ".join(f"{name} {seconds:.3f} s ({seconds / whole:.2f})" for name, seconds in costs.items())
    print(f"1000 x 1000: score map {whole:.2f} s; mask rules: {shares}")
    print(f"one image of 6000 x 6000: {large['seconds']:.0f} s, peak {above:.0f} MiB above idle")


if __name__ == "__main__":
    main()

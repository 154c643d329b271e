"""A benchmark of models on data sets: trains every cell through `blemish train`, measures it, writes one table.

    python scripts/benchmark.py scripts/benchmark.yaml out=DIR data.dice=/path/to/dice data.tiles=/path/to/tiles

Each data.NAME is a folder in the layout of MVTec AD. rows=conv_ae,unet runs some rows only; `--table out=DIR` writes
the table of what is there, and trains nothing. A cell is one row of the settings on one data set with one seed: one
`blemish train`, or `blemish ensemble` of such runs, measured in a process of its own. Finished cells stand in
DIR/results.jsonl, one line each, and are skipped; interrupted trainings go on, failed cells are tried again: the same
command, as often as needed. DIR/benchmark.md is written anew after every cell. Cells run one after the other: leave the
machine to them, or speeds mean nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from benchmark_cell import busy_seconds, cores_of_others, fingerprint
from benchmark_report import latest, read_results, write_table
from blemish import __version__
from blemish.data.images import images_below
from blemish.errors import BlemishError, ConfigError, nearest_names
from blemish.files import explain_write_errors, write_json
from blemish.settings import compose_settings

RESULTS_FILE, TABLE_FILE, DATA_FILE = "results.jsonl", "benchmark.md", "data.json"
MEASURE = Path(__file__).with_name("benchmark_cell.py")
BUG = 70
_OWN = ("data", "data.root", "out", "resume", "seed", "calibration.alpha")
_NAME = re.compile(r"[\w][\w.-]*")


# --- what to run --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One training and what is measured of it; `overrides` are those of `blemish train` but for data, out and seed.

    members: for an ensemble, the cells whose runs are joined, in the place of a training; `overrides` are then those of
        `blemish ensemble`.
    """

    data: str
    row: str
    seed: int
    root: Path
    overrides: tuple[str, ...]
    minutes: float
    headline: bool = False
    members: tuple[Cell, ...] = ()

    @property
    def key(self) -> str:
        """Names what was asked for, defaults included: a result counts as long as nobody asks for something else."""
        asked = [__version__, self.data, self.row, str(self.seed), *self.overrides]
        asked += [member.key for member in self.members] or [fingerprint(_composed(self.overrides))]
        return hashlib.sha256("\n".join(asked).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        return f"{self.data}, {self.row}, seed {self.seed}"

    def folder(self, out: Path) -> Path:
        return out / "runs" / self.data / self.row / str(self.seed)


@cache
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    """The settings that they make; empty if they make none, which the training then says."""
    from omegaconf import OmegaConf

    try:
        settings: Any = OmegaConf.to_container(compose_settings("train", ["data=mvtec", *overrides]))
    except ConfigError:
        return {}
    return dict(settings)


def _on_cpu(overrides: tuple[str, ...]) -> bool:
    return _composed(overrides).get("trainer", {}).get("accelerator") == "cpu"


@dataclass(frozen=True)
class Settings:
    """What the YAML file says (see `benchmark.yaml`)."""

    rows: dict[str, tuple[str, ...]]
    ensembles: dict[str, tuple[str, ...]] = field(default_factory=dict)
    common: tuple[str, ...] = ()
    minutes: float = 5
    seeds: tuple[int, ...] = (0,)
    headline: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Raises ConfigError with a sentence for whatever cannot be used."""
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"Cannot read {path}: {error.strerror}.") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}.") from error
        if not isinstance(content, dict) or not isinstance(content.get("rows"), dict) or not content["rows"]:
            raise ConfigError(f"{path} needs a section rows: names with lists of overrides of `blemish train`.")
        known = {"rows", "ensembles", "common", "minutes", "seeds", "headline", "data"}
        _check_names(content, known, str(path))
        headline = _mapping(content, "headline")
        _check_names(headline, {"row", "seeds", "minutes", "overrides"}, "headline")
        rows = {_name(name): _words(words, f"rows.{name}") for name, words in content["rows"].items()}
        if headline and headline.get("row") not in rows:
            raise ConfigError(f"headline.row is '{headline.get('row')}', which is no row: {_nearest(headline, rows)}")
        ensembles = {_name(name): _members(name, of, rows) for name, of in _mapping(content, "ensembles").items()}
        data = _mapping(content, "data")
        for name, entry in data.items():
            _check_names(_mapping(data, name), {"alpha", "overrides"}, f"data.{name}")
            _words(entry.get("overrides"), f"data.{name}.overrides")
            _number(entry.get("alpha", 0.05), f"data.{name}.alpha")
        _words(headline.get("overrides"), "headline.overrides")
        return cls(
            rows,
            ensembles,
            _words(content.get("common"), "common"),
            _number(content.get("minutes", 5), "minutes"),
            _seeds(content.get("seeds", [0]), "seeds"),
            headline
            and {
                **headline,
                "seeds": _seeds(headline.get("seeds", [0, 1, 2]), "headline.seeds"),
                "minutes": _number(headline.get("minutes", 20), "headline.minutes"),
            },
            data,
        )

    def cells(self, roots: Mapping[str, Path], rows: Sequence[str] = ()) -> list[Cell]:
        """Every cell; the first seeds of all rows come first, so that a whole table is there early."""
        known = (*self.rows, *self.ensembles)
        unknown = [row for row in rows if row not in known]
        if unknown:
            raise ConfigError(f"There is no row '{unknown[0]}': {nearest_names(unknown[0], known)}")
        found: list[Cell] = []
        for data, root in roots.items():
            own = self.data.get(data, {})
            alpha = f"calibration.alpha={own.get('alpha', 0.05):g}"
            trained: list[Cell] = []
            for row, words in self.rows.items():
                is_headline = self.headline.get("row") == row
                extra = tuple(self.headline.get("overrides") or ()) if is_headline else ()
                overrides = _merged([*self.common, *(own.get("overrides") or ()), alpha, *words, *extra])
                minutes = self.headline["minutes"] if is_headline else self.minutes
                for seed in self.headline["seeds"] if is_headline else self.seeds:
                    trained.append(Cell(data, row, seed, root, overrides, minutes, is_headline))
            found += [*trained, *self._joined(trained, alpha)]
        return sorted((cell for cell in found if not rows or cell.row in rows), key=lambda cell: cell.seed)

    def _joined(self, trained: Sequence[Cell], alpha: str) -> Iterator[Cell]:
        """The ensembles' cells, for the seeds that all their members have, on the CPU where these are trained there."""
        report = [word for word in self.common if word.startswith("report.")]
        for row, of in self.ensembles.items():
            for seed in dict.fromkeys(cell.seed for cell in trained):
                members = tuple(cell for name in of for cell in trained if (cell.row, cell.seed) == (name, seed))
                if len(members) == len(of):
                    device = ["device=cpu"] if all(_on_cpu(member.overrides) for member in members) else []
                    overrides, minutes = (*device, *report, alpha), sum(member.minutes for member in members)
                    yield Cell(members[0].data, row, seed, members[0].root, overrides, minutes, members=members)


def _merged(words: Iterable[str]) -> tuple[str, ...]:
    """Of several overrides of one setting the last stays."""
    return tuple({word.partition("=")[0]: word for word in words}.values())


def _nearest(headline: Mapping[str, Any], rows: Iterable[str]) -> str:
    return nearest_names(str(headline.get("row")), rows)


def _check_names(given: Mapping[str, Any], known: set[str], where: str) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(f"{where} has no setting '{name}': {nearest_names(str(name), known)}")


def _mapping(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = content.get(name) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"{name} is a group of settings, found '{value}'.")
    return value


def _name(name: object) -> str:
    if not _NAME.fullmatch(str(name)):
        raise ConfigError(f"'{name}' names a folder: expected letters, digits, '_', '-' and '.' only.")
    return str(name)


def _words(words: object, where: str) -> tuple[str, ...]:
    if words is not None and not isinstance(words, list):
        raise ConfigError(f"{where} is a list of overrides as [model=vae, training.steps=500], found '{words}'.")
    for word in words or ():
        key, equals, _ = str(word).partition("=")
        if not equals or not key:
            raise ConfigError(f"{where} expects settings as KEY=VALUE, found '{word}'.")
        if key in _OWN:
            raise ConfigError(f"{where} sets {key}, which the benchmark sets itself: leave it out.")
    return tuple(map(str, words or ()))


def _members(name: str, of: object, rows: Mapping[str, Any]) -> tuple[str, ...]:
    if not isinstance(of, list) or len(of) < 2:
        raise ConfigError(f"ensembles.{name} is a list of two or more rows as [nearest, vae], found '{of}'.")
    if len(set(map(str, of))) < len(of):
        raise ConfigError(f"ensembles.{name} joins a row with itself, found '{of}'.")
    for row in of:
        if not isinstance(row, str) or row not in rows:
            raise ConfigError(f"ensembles.{name} joins '{row}', which is no row: {nearest_names(str(row), rows)}")
    if name in rows:
        raise ConfigError(f"ensembles.{name} has the name of a row: take another.")
    return tuple(of)


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ConfigError(f"{where} expects a positive number, found '{value}'.")
    return value


def _seeds(value: object, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(seed, int) and seed >= 0 for seed in value):
        raise ConfigError(f"{where} expects a list of whole numbers, found '{value}'.")
    return tuple(value)


# --- results ------------------------------------------------------------------------------------------------------


def append_result(file: Path, result: Mapping[str, Any]) -> None:
    """Add a line that is on the disk when this returns. A torn line before it stays a line of its own."""
    line = json.dumps(result, allow_nan=False) + "\n"
    with explain_write_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)  # a peer may write, too
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - 1))
            torn = size > 0 and stream.read(1) != b"\n"
            stream.write((b"\n" if torn else b"") + line.encode())
            stream.flush()
            os.fsync(stream.fileno())


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


# --- processes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a process ended, what it cost, and what it wrote."""

    code: int
    seconds: float
    cpu_seconds: float
    peak_mib: float
    output: str
    cores_of_others: float | None = None

    @property
    def sentence(self) -> str:
        """Why it failed, in its own words where it found any."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]  # progress bars end lines by \r
        if self.code < 0:
            return f"ended by signal {-self.code}" + (" (out of memory?)" if self.code == -signal.SIGKILL else "")
        if self.code == BUG and len(lines) > 1:
            return lines[-2]  # the exception, before blemish's own remark
        spoken = [line for line in lines if line.startswith("blemish: ") and "warning" not in line]
        return (spoken or lines or ["it wrote nothing"])[-1].removeprefix("blemish: ")


Runner = Callable[[Sequence[str], Path], Ended]
"""Runs a command to its end, its output appended to a log."""


class Processes:
    """The runner of real processes, each in a session of its own: Ctrl-C reaches it once, from here.

    `lock` stays open in every process, so that one which outlives a killed benchmark still holds it.
    """

    def __init__(self, lock: int) -> None:
        self._lock = lock

    def __call__(self, command: Sequence[str], log: Path) -> Ended:
        log.parent.mkdir(parents=True, exist_ok=True)
        began, busy = time.monotonic(), busy_seconds()
        with log.open("ab") as stream:
            start = stream.tell()
            stream.write(f"$ {shlex.join(command)}\n".encode())
            stream.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
                pass_fds=[self._lock],
            )
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except KeyboardInterrupt:
                self._stop(process)
                raise
        process.returncode = os.waitstatus_to_exitcode(status)
        with log.open("rb") as stream:
            stream.seek(start)
            output = stream.read().decode(errors="replace")
        # KiB on Linux. It begins with this process's own peak, which is far below that of anything with torch.
        peak = usage.ru_maxrss / 1024 / (1024 if sys.platform == "darwin" else 1)
        cpu = usage.ru_utime + usage.ru_stime
        seconds = time.monotonic() - began
        others = cores_of_others(busy, busy_seconds(), cpu, seconds)
        return Ended(process.returncode, seconds, cpu, peak, output, others)

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        print("stopping: the training keeps its last epoch ...", file=sys.stderr, flush=True)
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        try:
            process.wait()
        except KeyboardInterrupt:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def alone(out: Path) -> Iterator[int]:
    """Hold DIR/.lock. Raises BlemishError if another benchmark, or a training that it left behind, holds it."""
    with explain_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BlemishError(
                f"Another benchmark, or a training that a killed one left behind, works in {out}: wait for it to end."
            ) from error
        yield lock.fileno()


# --- a cell -------------------------------------------------------------------------------------------------------


def work(cell: Cell, out: Path, run_process: Runner, command: str = "") -> dict[str, Any]:
    """Train and measure a cell, going on where an earlier try stopped. Returns its line of results.jsonl."""
    result: dict[str, Any] = {
        "data": cell.data,
        "row": cell.row,
        "seed": cell.seed,
        "status": "failed",
        "key": cell.key,
        "software": f"blemish {__version__}",
        "command": command,
        "overrides": list(cell.overrides),
        "headline": cell.headline,
        "minutes": cell.minutes,
    }
    if cell.members:
        result["note"] = f"`blemish ensemble` of {', '.join(member.row for member in cell.members)}"
    run, log = cell.folder(out), cell.folder(out).with_suffix(".log")
    ended, interrupted = train(cell, out, run_process)
    if not _succeeded(ended, run):
        anew = f" (Without the folder {run.relative_to(out)} it trains anew.)" if interrupted else ""
        return result | {"sentence": ended.sentence + anew, "log": str(log.relative_to(out)), "finished": now()}
    measured = run.with_suffix(".measured.json")
    measuring = run_process([sys.executable, str(MEASURE), str(run), str(measured)], log)
    if measuring.code:
        sentence = f"measuring: {measuring.sentence} (Without the folder {run.relative_to(out)} it trains anew.)"
        return result | {"sentence": sentence, "log": str(log.relative_to(out)), "finished": now()}
    found = json.loads(measured.read_text(encoding="utf-8"))
    found["training"] |= _read(_costs_file(run)) | {"interrupted": interrupted}
    return result | found | {"status": "done", "finished": now()}


def train(cell: Cell, out: Path, run_process: Runner) -> tuple[Ended, bool]:
    """Train, resume, or find that it is done; whether there was an interruption.

    The peak memory and CPU time of the training processes are kept beside the run, for a kill before the measuring.
    """
    run = cell.folder(out)
    log, asked = run.with_suffix(".log"), run.with_suffix(".cell.json")
    state = _state(run) if _read(asked).get("key") == cell.key else None
    if state == "done":
        return Ended(0, 0.0, 0.0, 0.0, ""), bool(_read(asked).get("interrupted"))
    if cell.members:
        return _join(cell, out, run_process), False
    command = [sys.executable, "-m", "blemish", "train"]
    if state in ("training", "trained"):
        write_json(asked, {"key": cell.key, "interrupted": True})
        ended = run_process([*command, f"resume={run}"], log)
        if _succeeded(ended, run):
            _keep_costs(run, ended)
            return ended, True
        if not _refused(ended):
            return ended, True
        print(f"  cannot be resumed, begins anew: {ended.sentence}", flush=True)
    _clear(cell, out)
    words = ["data=mvtec", f"data.root={cell.root}", f"out={run}", f"seed={cell.seed}", *cell.overrides]
    ended = run_process([*command, *words], log)
    if _succeeded(ended, run):
        _keep_costs(run, ended)
    return ended, False


def _join(cell: Cell, out: Path, run_process: Runner) -> Ended:
    """What takes the place of training for an ensemble, which is made anew after a stop."""
    for member in cell.members:
        folder = member.folder(out)
        if _state(folder) != "done" or _read(folder.with_suffix(".cell.json")).get("key") != member.key:
            return Ended(2, 0.0, 0.0, 0.0, f"blemish: {member.name} is not finished here: run its row before.")
    _clear(cell, out)
    run, runs = cell.folder(out), ",".join(str(member.folder(out)) for member in cell.members)
    words = [f"runs=[{runs}]", f"out={run}", *cell.overrides]
    ended = run_process([sys.executable, "-m", "blemish", "ensemble", *words], run.with_suffix(".log"))
    if _succeeded(ended, run):
        _keep_costs(run, ended)
    return ended


def _clear(cell: Cell, out: Path) -> None:
    """Nothing of an earlier try is left, and what is asked for now is written down."""
    run = cell.folder(out)
    for old in (run, *run.parent.glob(f"{run.name}.*.json")):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    write_json(run.with_suffix(".cell.json"), {"key": cell.key, "interrupted": False})


def _succeeded(ended: Ended, run: Path) -> bool:
    """Exit code 1: some test images cannot be used, which the metrics count; or Python itself failed."""
    return ended.code in (0, 1) and _state(run) == "done"


def _refused(ended: Ended) -> bool:
    """Blemish said that it will never go on with that folder; not that memory, disk or the data are missing now."""
    return ended.code == 2 and any(words in ended.sentence for words in ("start a new run", "nothing to resume"))


def _costs_file(run: Path) -> Path:
    return run.with_suffix(".costs.json")


def _keep_costs(run: Path, ended: Ended) -> None:
    costs = {"peak_mib": ended.peak_mib, "process_seconds": ended.seconds, "cpu_seconds": ended.cpu_seconds}
    rounded: dict[str, float | None] = {name: round(value, 3) for name, value in costs.items()}
    write_json(_costs_file(run), rounded | {"cores_of_others": ended.cores_of_others})


def _state(run: Path) -> str | None:
    """The status of a run folder; None if there is none, or too little to go on from."""
    return _read(run / "run.json").get("status") if (run / "config.yaml").is_file() else None


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# --- all cells ----------------------------------------------------------------------------------------------------


def benchmark(cells: Sequence[Cell], out: Path, run_process: Runner, command: str = "") -> int:
    """Work on every cell that is not finished. Returns how many failed."""
    file, failed = out / RESULTS_FILE, 0
    finished = {result["key"] for result in read_results(file) if result["status"] == "done"}
    todo = [cell for cell in cells if cell.key not in finished]
    print(f"{len(cells)} cells, {len(cells) - len(todo)} of them finished before", flush=True)
    for place, cell in enumerate(todo, 1):
        print(f"[{place}/{len(todo)}] {cell.name}", flush=True)
        result = work(cell, out, run_process, command)
        append_result(file, result)
        failed += result["status"] == "failed"
        print(f"  {in_short(result)}", flush=True)
        write_table(out / TABLE_FILE, read_results(file))
    write_table(out / TABLE_FILE, read_results(file))
    return failed


def check_same_data(out: Path, roots: Mapping[str, Path]) -> None:
    """Raise ConfigError if a data set was another folder, or had other files, when results in `out` were made of it."""
    file = out / DATA_FILE
    known = _read(file)
    for name, root in roots.items():
        digest = hashlib.sha256()
        # All files, and images behind links.
        for path in sorted({*(path for path in root.rglob("*") if path.is_file()), *images_below(root)}):
            digest.update(f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode())
        if known.setdefault(name, digest.hexdigest()) != digest.hexdigest():
            raise ConfigError(
                f"data.{name}={root} has not the files from which the results in {out} were made: take another name or "
                "another out=."
            )
    write_json(file, known)


def in_short(result: Mapping[str, Any]) -> str:
    if result["status"] == "failed":
        return f"failed: {result['sentence']}"
    figures, seconds = result["figures"], result["training"]["seconds"]
    shown = {"image AUROC": figures["image_auroc"], "pixel AUROC": figures["pixel_auroc"], "F1": figures["f1"]}
    words = [f"{name} {value:.3f}" for name, value in shown.items() if value is not None]
    return ", ".join([*words, f"trained for {seconds:.0f} s" if seconds is not None else "training not timed"])


def arguments(words: Sequence[str]) -> tuple[Path | None, dict[str, str], dict[str, Path]]:
    """(settings file, KEY=VALUE, data sets)"""
    files, values, roots = [], {}, {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            files.append(Path(word))
        elif key.startswith("data."):
            root = Path(value).expanduser().absolute()
            if not (root / "train" / "good").is_dir():
                raise ConfigError(f"{key}: {root} has no folder train/good, which the layout of MVTec AD needs.")
            roots[_name(key.removeprefix("data."))] = root
        elif key in ("out", "rows"):
            values[key] = value
        else:
            raise ConfigError(f"There is no setting '{key}': {nearest_names(key, ('out', 'rows', 'data.NAME'))}")
    if len(files) > 1:
        raise ConfigError(f"Expected one file with settings, found {' and '.join(map(str, files))}.")
    if not values.get("out"):
        raise ConfigError("The setting out is missing: out=DIR is the folder for trainings, results and table.")
    return (files[0] if files else None), values, roots


def nameless(settings: Path) -> str:
    """The settings file as seen from the root of the repository; elsewhere only its name."""
    inside = settings.resolve().parent == Path(__file__).resolve().parent
    return f"scripts/{settings.name}" if inside else settings.name


def _as_typed(settings: Path, values: Mapping[str, str], roots: Mapping[str, Path]) -> str:
    """The command, without anybody's folders."""
    words = [nameless(settings), "out=DIR", *(f"data.{name}=FOLDER" for name in roots)]
    return " ".join(["python scripts/benchmark.py", *words, *(f"rows={rows}" for rows in [values.get("rows")] if rows)])


def stop_cleanly() -> None:
    """Let SIGINT and SIGTERM end the benchmark, in the background of a shell, too, and the processes it starts."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, stop)


def main(words: Sequence[str]) -> int:
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    path, values, roots = arguments([word for word in words if word != "--table"])
    out = Path(values["out"]).expanduser().absolute()
    file = out / RESULTS_FILE
    if "--table" in words:
        results = read_results(file)
        if not results:
            raise ConfigError(f"{file} has no result yet: run the benchmark first.")
        write_table(out / TABLE_FILE, results)
        print(f"table: {out / TABLE_FILE}")
        return int(any(result["status"] == "failed" for result in latest(results)))
    if path is None or not roots:
        raise ConfigError(
            "Expected a file with settings and one or more data sets: python scripts/benchmark.py "
            "scripts/benchmark.yaml out=DIR data.NAME=FOLDER"
        )
    settings = Settings.read(path)
    cells = settings.cells(roots, [row for row in values.get("rows", "").split(",") if row])
    stop_cleanly()
    with alone(out) as lock:
        check_same_data(out, roots)
        failed = benchmark(cells, out, Processes(lock), _as_typed(path, values, roots))
    print(f"{failed} cells failed; " if failed else "", f"table: {out / TABLE_FILE}", sep="")
    return int(failed > 0)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BlemishError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)

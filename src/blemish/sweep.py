"""A sweep: many trainings below one folder, by grid or by search, some at a time; a kill costs none that is finished.

What is known of the runs is in `sweep.json`; a search also keeps Optuna's study in `study.db`. The same command goes on
where an interrupted one stopped: finished runs stay, an interrupted run resumes from its last epoch.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from blemish import __version__
from blemish.errors import ConfigError
from blemish.files import explain_write_errors, held, write_json

SWEEP_FILE, STUDY_FILE, LOG_FILE = "sweep.json", "study.db", "log.txt"
_FAILED = 2  # exit code of a sweep in which a run failed

Report = Callable[[int, float], bool]
"""Told an epoch (from 1) and a figure (higher is better), says whether the training shall stop: it is a poor one."""


@dataclass(frozen=True)
class Choice:
    """A setting with the values to try, as they are written on the command line."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Interval:
    """A setting to be searched between two numbers, both included."""

    key: str
    low: float
    high: float
    integer: bool
    log: bool


Space = Sequence[Choice | Interval]


class Ending(NamedTuple):
    """How a run ended: exit code, the sentence of its failure, and whether it was stopped as a poor one."""

    code: int
    sentence: str = ""
    pruned: bool = False


Train = Callable[[list[str], Path, bool, "Report | None"], Ending]
"""(overrides, run folder, whether to resume what is there, report) -> Ending; a function of a module, so that another
process can call it."""


@dataclass(frozen=True)
class SweepSettings:
    """The section `sweep` of the settings; see configs/sweep.

    Raises:
        ConfigError: a number is out of range.
    """

    sampler: str
    jobs: int = 1
    trials: int = 1
    seed: int = 0
    prune: bool = False
    startup_trials: int = 0
    warmup_epochs: int = 0

    def __post_init__(self) -> None:
        if self.sampler not in ("grid", "tpe"):
            raise ConfigError(f"Expected sweep.sampler to be grid or tpe, found '{self.sampler}'.")
        for name, least in (("jobs", 1), ("trials", 1), ("seed", 0), ("startup_trials", 0), ("warmup_epochs", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"Expected sweep.{name} >= {least}, found {getattr(self, name)}.")


@dataclass
class Run:
    """A row of sweep.json. status: running, done, pruned, failed, or repeated (the same as an earlier run)."""

    run: str
    overrides: list[str]
    status: str = "running"
    figure: float | None = None
    exit_code: int = 0
    note: str = ""


class _Trials(Protocol):
    """Which run comes next, and what is made of the results."""

    @property
    def prunes(self) -> bool: ...

    def next(self) -> Run | None:
        """None when there is nothing left to begin."""

    def report(self, run: Run, epoch: int, figure: float) -> bool: ...

    def tell(self, run: Run) -> None: ...


class _Grid:
    """Every combination, the last setting changing fastest. Failed runs of an earlier attempt are tried again."""

    prunes = False

    def __init__(self, space: Space, table: _Table) -> None:
        intervals = [part.key for part in space if isinstance(part, Interval)]
        if intervals:
            raise ConfigError(f"A grid cannot enumerate the interval of {intervals[0]}: give values, or sweep=optuna.")
        combinations = itertools.product(*(part.values for part in space if isinstance(part, Choice)))
        keys = [part.key for part in space]
        self._todo = []
        for number, values in enumerate(combinations):
            overrides = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
            if table.status(str(number)) != "done":
                self._todo.append(Run(str(number), overrides))

    def next(self) -> Run | None:
        return self._todo.pop(0) if self._todo else None

    def report(self, run: Run, epoch: int, figure: float) -> bool:
        return False

    def tell(self, run: Run) -> None:
        pass


class _Search:
    """Optuna's tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011), stopping runs below the median.

    The sampler is seeded anew for each trial, by its number: an interrupted search asks what an uninterrupted one asks
    (with one job; with several, what is known when a trial begins depends on the clock).
    """

    def __init__(self, folder: Path, settings: SweepSettings, space: Space, table: _Table) -> None:
        self._optuna, self._settings, self._table = _import_optuna(), settings, table
        if not space:
            raise ConfigError(
                "sweep=optuna has nothing to vary: give values, as in model.width=8,16, or an interval, as in "
                "'training.learning_rate=interval(1e-4,1e-2)'."
            )
        self.prunes = settings.prune
        optuna = self._optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with explain_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        # SQLAlchemy takes the file's name from the creator, so that it may hold any character.
        storage = optuna.storages.RDBStorage(
            "sqlite:///study.db",
            engine_kwargs={"creator": partial(sqlite3.connect, folder / STUDY_FILE, check_same_thread=False)},
        )
        pruner = optuna.pruners.MedianPruner(settings.startup_trials, settings.warmup_epochs + 1)
        self._study = optuna.create_study(
            storage=storage, study_name="sweep", direction="maximize", load_if_exists=True, pruner=pruner
        )
        self._space = space
        self._trials: dict[str, Any] = {}
        self._interrupted = [
            optuna.trial.Trial(self._study, trial._trial_id)
            for trial in self._study.trials
            if trial.state == optuna.trial.TrialState.RUNNING
        ]

    def _distribution(self, part: Choice | Interval) -> Any:
        kinds = self._optuna.distributions
        if isinstance(part, Choice):
            return kinds.CategoricalDistribution(part.values)
        if part.integer:
            return kinds.IntDistribution(int(part.low), int(part.high), log=part.log)
        return kinds.FloatDistribution(part.low, part.high, log=part.log)

    def _begun(self) -> Any | None:
        """The next trial, with a value for each setting; None if there were enough."""
        distributions = {part.key: self._distribution(part) for part in self._space}
        if self._interrupted:
            trial = self._interrupted.pop(0)
            if not distributions.keys() <= trial.params.keys():
                self._draw_the_rest(trial, distributions)
            return trial
        number = len(self._study.get_trials(deepcopy=False))
        if number >= self._settings.trials:
            return None
        self._study.sampler = self._sampler(number)
        return self._study.ask(distributions)

    def _sampler(self, number: int) -> Any:
        """That of the trial with this number."""
        return self._optuna.samplers.TPESampler(
            seed=(self._settings.seed * 1_000_003 + number) % 2**32,
            n_startup_trials=self._settings.startup_trials,
            constant_liar=self._settings.jobs > 1,
        )

    def _draw_the_rest(self, trial: Any, distributions: Mapping[str, Any]) -> None:
        """For a trial that was killed between two of its values: those it has are drawn again, so that the others
        follow as they would; first what is drawn jointly, as by any trial that is begun."""
        kinds = self._optuna.distributions
        self._study.sampler = sampler = self._sampler(trial.number)
        frozen, joint = self._study.get_trials(deepcopy=True)[trial.number], trial.relative_params
        for key, distribution in distributions.items():
            if key in trial.params:
                if key not in joint:
                    sampler.sample_independent(self._study, frozen, key, distribution)
            elif isinstance(distribution, kinds.CategoricalDistribution):
                trial.suggest_categorical(key, distribution.choices)
            else:
                suggest = trial.suggest_int if isinstance(distribution, kinds.IntDistribution) else trial.suggest_float
                suggest(key, distribution.low, distribution.high, log=distribution.log)

    def next(self) -> Run | None:
        while True:
            trial = self._begun()
            if trial is None:
                return None
            overrides = [f"{part.key}={_written(trial.params[part.key])}" for part in self._space]
            run = Run(str(trial.number), overrides)
            self._trials[run.run] = trial
            known = self._table.runs.get(run.run)
            if known is not None and known.overrides == overrides and known.status in ("done", "pruned"):
                self.tell(known)  # a kill came between the table and the study
                continue
            twin = self._table.finished_with(overrides)
            if twin is None:
                return run
            run.status, run.figure, run.note = twin.status, twin.figure, f"same as run {twin.run}"
            self.tell(run)
            run.status = "repeated"
            self._table.put(run)

    def report(self, run: Run, epoch: int, figure: float) -> bool:
        trial = self._trials[run.run]
        known = self._study.get_trials(deepcopy=False)[trial.number].intermediate_values
        if epoch not in known:  # an epoch may be trained twice, before and after a kill
            trial.report(figure, epoch)
        return bool(trial.should_prune())

    def tell(self, run: Run) -> None:
        states = self._optuna.trial.TrialState
        trial = self._trials.pop(run.run)
        if run.status == "done" and run.figure is not None:
            self._study.tell(trial, run.figure)
        else:
            self._study.tell(trial, state=states.PRUNED if run.status == "pruned" else states.FAIL)


def _written(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "sweep=optuna needs the package optuna: pip install 'blemish[sweep]', or choose sweep=grid."
        ) from error
    return optuna


@dataclass
class _Table:
    """sweep.json: the question, which may not change when a sweep goes on, and a row for each run begun."""

    folder: Path
    question: dict[str, Any]
    runs: dict[str, Run] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, question: dict[str, Any]) -> _Table:
        """Raises ConfigError if the folder holds something else than this sweep."""
        file = folder / SWEEP_FILE
        if not file.is_file():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise ConfigError(f"{folder} exists and is not empty: choose another out=.")
            return cls(folder, question)
        content = json.loads(file.read_text(encoding="utf-8"))
        changed = [key for key, value in question.items() if content["question"].get(key) != value]
        if changed:
            raise ConfigError(
                f"{folder} holds a sweep with other {changed[0]}: give the command that began it (it is in {file}), or "
                "choose another out=."
            )
        return cls(folder, question, {row["run"]: Run(**row) for row in content["runs"]})

    def status(self, name: str) -> str | None:
        return self.runs[name].status if name in self.runs else None

    def finished_with(self, overrides: list[str]) -> Run | None:
        for run in self.runs.values():
            if run.overrides == overrides and run.status in ("done", "pruned"):
                return run
        return None

    def put(self, run: Run) -> None:
        self.runs[run.run] = run
        self.save()

    def save(self) -> None:
        rows = [asdict(self.runs[name]) for name in sorted(self.runs, key=int)]
        content = {"software": "blemish", "version": __version__, "question": self.question, "runs": rows}
        write_json(self.folder / SWEEP_FILE, content)

    def best(self) -> Run | None:
        done = [run for run in self.runs.values() if run.status == "done" and run.figure is not None]
        return max(done, key=lambda run: (run.figure, -int(run.run)), default=None)


def sweep(
    folder: Path,
    settings: SweepSettings,
    fixed: list[str],
    space: Space,
    metric: str,
    train: Train,
    figure: Callable[[Path, str], float | None],
) -> int:
    """Train all runs of a sweep in `folder`/0, `folder`/1, ..., or those that are left; the exit code.

    Args:
        fixed: overrides of every run. space: what varies.
        metric: the name of the figure that a search makes large, which `figure` reads from a finished run's folder.

    Raises:
        ConfigError: a setting does not fit, or `folder` holds something else. BlemishError: another sweep is at it.
        KeyboardInterrupt: Ctrl-C; with one argument, how to go on.
    """
    question = {
        "sampler": settings.sampler,
        "metric": metric,
        "settings": fixed,
        "space": json.loads(json.dumps([asdict(part) for part in space])),
    }
    table = _Table.open(folder, question)
    if settings.sampler == "tpe":
        _import_optuna()  # before the folder is made
    # Two processes in one sweep would train the same runs.
    with held(folder, f"Another `blemish train --multirun` works in {folder}: wait for it, or choose another out=."):
        if table.runs:
            states = [run.status for run in table.runs.values()]
            print(f"going on with the sweep in {folder}: {states.count('done')} of its runs are done", flush=True)
        table.save()
        trials: _Trials = _Grid(space, table) if settings.sampler == "grid" else _Search(folder, settings, space, table)
        driver = _Driver(folder, fixed, metric, trials, table, train, figure)
        try:
            driver.several(settings.jobs) if settings.jobs > 1 else driver.one_by_one()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"; the same command with out={folder} goes on with what is left") from None
    return driver.conclude()


@dataclass
class _Driver:
    folder: Path
    fixed: list[str]
    metric: str
    trials: _Trials
    table: _Table
    train: Train
    figure: Callable[[Path, str], float | None]

    def _begin(self, run: Run) -> tuple[list[str], Path, bool] | None:
        """What to call `train` with; None if the run was finished before a kill."""
        print(f"run {run.run}: {' '.join(run.overrides)}", flush=True)
        self.table.put(run)
        folder = self.folder / run.run
        state = folder / "run.json"
        if state.is_file():
            if json.loads(state.read_text(encoding="utf-8"))["status"] == "done":
                self._end(run, Ending(0))
                return None
            if (folder / "checkpoints" / "last.ckpt").is_file():
                return [], folder, True
        if folder.is_dir():  # ours: its name is in the table, and nothing in it can be gone on with
            shutil.rmtree(folder)
        return [*self.fixed, *run.overrides], folder, False

    def _end(self, run: Run, ending: Ending) -> None:
        best = self.table.best()
        run.status = "pruned" if ending.pruned else "failed" if ending.code > 1 else "done"
        run.exit_code, run.note = ending.code, ending.sentence
        if run.status == "done":
            run.figure = self.figure(self.folder / run.run, self.metric)
        self.table.put(run)
        self.trials.tell(run)
        if run.status != "done":
            said = "stopped early: others did better" if run.status == "pruned" else "failed"
            print(f"run {run.run} {said}{f' ({ending.sentence})' if ending.pruned else ''}", flush=True)
        elif run.figure is not None:
            is_best = best is None or best.figure is None or run.figure > best.figure
            print(f"run {run.run} done: {self.metric} {run.figure:.4f}{', the best so far' * is_best}", flush=True)

    def one_by_one(self) -> None:
        """In this process, with all that a run prints on the terminal."""
        while (run := self.trials.next()) is not None:
            work = self._begin(run)
            if work is not None:
                ending = self.train(*work, partial(self.trials.report, run) if self.trials.prunes else None)
                if ending.pruned:
                    print(file=sys.stderr)  # the progress bar stands in the middle of its line
                self._end(run, ending)

    def several(self, jobs: int) -> None:
        """Each run in a process of its own, which writes to log.txt in its folder and dies with this one."""
        context = multiprocessing.get_context("spawn")
        active: dict[Connection, tuple[Run, Any]] = {}
        threads = max(1, (os.cpu_count() or 1) // jobs)
        try:
            while True:
                while len(active) < jobs and (run := self.trials.next()) is not None:
                    work = self._begin(run)
                    if work is None:
                        continue
                    here, there = context.Pipe()
                    process = context.Process(
                        target=_child, args=(there, threads, self.train, work, self.trials.prunes)
                    )
                    process.start()
                    there.close()
                    active[here] = (run, process)
                if not active:
                    return
                for connection in wait(list(active)):
                    assert isinstance(connection, Connection)
                    run, process = active[connection]
                    ending = self._heard(connection, run)
                    if ending is None:
                        continue
                    process.join()
                    del active[connection]
                    connection.close()
                    if ending.code > 1:
                        log = self.folder / run.run / LOG_FILE
                        sentence = ending.sentence or f"its process ended with exit code {process.exitcode}"
                        ending = ending._replace(sentence=sentence)
                        print(f"blemish: run {run.run}: {sentence} (all it said: {log})", file=sys.stderr, flush=True)
                    self._end(run, ending)
        finally:
            for _, process in active.values():
                process.terminate()
            for _, process in active.values():
                process.join(10)
                process.kill()
                process.join()

    def _heard(self, connection: Connection, run: Run) -> Ending | None:
        """Answer a report, or return how the run ended."""
        try:
            message = connection.recv()
            if isinstance(message, Ending):
                return message
            connection.send(self.trials.report(run, *message))
        except (EOFError, OSError):
            return Ending(70)
        return None

    def conclude(self) -> int:
        """Print what came of it; the largest exit code."""
        runs = self.table.runs.values()
        names = {"done": "done", "pruned": "stopped early", "failed": "failed", "repeated": "repeated"}
        counts = [f"{number} {name}" for key, name in names.items() if (number := sum(r.status == key for r in runs))]
        print(f"{len(runs)} runs: {', '.join(counts)}; table: {self.folder / SWEEP_FILE}")
        best = self.table.best()
        if best is not None:
            print(f"best: run {best.run}, {self.metric} {best.figure:.4f}: {' '.join(best.overrides)}")
            print(f"use it: blemish predict run={self.folder / best.run} input=DIR out=OUT")
        print(f"compare: blemish compare {self.folder}")
        failed = _FAILED if any(run.status == "failed" for run in runs) else 0
        return max([failed, *(run.exit_code for run in runs if run.status in ("done", "failed"))])


def _child(
    connection: Connection, threads: int, train: Train, work: tuple[list[str], Path, bool], reports: bool
) -> None:
    """A run in its own process."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # before torch is imported
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its children
    folder = work[1]
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(130)

    threading.Thread(target=follow, daemon=True).start()

    def report(epoch: int, figure: float) -> bool:
        connection.send((epoch, figure))
        return bool(connection.recv())

    ending = train(*work, report if reports else None)
    with suppress(OSError):
        connection.send(ending)


def read_settings(section: Mapping[str, Any]) -> SweepSettings:
    """The section `sweep`, checked. Raises ConfigError."""
    try:
        return SweepSettings(**section)
    except TypeError as error:
        raise ConfigError(f"sweep does not fit: {error}.") from error

"""A stream of images against a calibration, kept in a journal that survives a kill. The tests are in `drift.py`."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from blemish import __version__
from blemish.drift import Drift, Martingale, ks_test
from blemish.errors import CalibrationError, ConfigError, DataError
from blemish.files import append_line, explain_write_errors, hold

_BEGINNING = b'{"software": "blemish", "version": '  # of every journal
_BEGIN_AGAIN = "choose another state=, or delete it to begin again"


class Monitor:
    """A stream of images against a calibration, in a journal from which a later call, or one after a kill, goes on.

    The journal is JSON Lines: a header, then one line an image, on the disk before `add` returns.

        with Monitor.open(...) as monitor:
            for path, sha256 in ...:
                if monitor.seen(sha256):
                    monitor.repeat(sha256)
                else:
                    monitor.add(path, sha256, score)
        drift = monitor.result()
    """

    def __init__(
        self,
        path: Path,
        file: FileIO,
        calibration_scores: npt.NDArray[np.float64],
        threshold: float,
        alpha: float,
        seed: int,
        level: float,
    ) -> None:
        """Use `open`. `calibration_scores` ascend."""
        self._path, self._file, self._calibration = path, file, calibration_scores
        self._threshold, self._alpha, self._level = threshold, alpha, level
        self._martingale = Martingale(calibration_scores, seed)
        self._scores: dict[str, float] = {}  # by SHA-256
        self._paths: set[str] = set()
        self._batch: dict[str, float] = {}
        self._new = self._repeats = 0
        self._log = self._log_max = 0.0
        self._crossed_at: str | None = None

    @classmethod
    def open(
        cls,
        state: Path,
        calibration_scores: Sequence[float],
        fingerprint: str,
        mask_rule: Mapping[str, Any],
        threshold: float,
        alpha: float,
        seed: int = 0,
        level: float = 0.01,
        unit: str = "image",
    ) -> Monitor:
        """Open the journal `state`, or begin it; a line torn by a kill is cut off.

        Args:
            calibration_scores, fingerprint, mask_rule: of the calibration; a journal of another one is refused.
            threshold, alpha: for the count of false alarms; they may change from one input to the next.
            seed: breaks ties, >= 0. level: see `Drift`, in (0, 1). unit: what a score is of. All three stay the same
                for a journal.

        Raises:
            ConfigError: seed or level is out of range, or not what the journal was begun with.
            CalibrationError: no calibration scores, one that is not finite, or a journal of another calibration.
            DataError: the journal is damaged, or is none. BlemishError: it is in use, or cannot be written.
        """
        if not 0 < level < 1:
            raise ConfigError(f"Expected level between 0 and 1, found {level}.")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ConfigError(f"Expected seed to be a whole number, 0 or more, found {seed}.")
        scores = np.sort(np.asarray(calibration_scores, dtype=np.float64))
        if len(scores) == 0 or not np.isfinite(scores).all():
            raise CalibrationError("Expected calibration scores, all finite: run `blemish calibrate` again.")
        with explain_write_errors(state):
            state.parent.mkdir(parents=True, exist_ok=True)
            file = FileIO(state, "ab")
        monitor = cls(state, file, scores, threshold, alpha, seed, level)
        header = {
            "software": "blemish",
            "version": __version__,
            "fingerprint": fingerprint,
            "calibration": _digest(scores, mask_rule),
            "seed": seed,
            "level": level,
            "unit": unit,
        }
        try:
            hold(
                monitor._file,
                f"{state} is in use by another `blemish monitor`: wait for it, or choose another state=.",
            )
            if not monitor._read(header):
                monitor._append(header)
        except BaseException:
            monitor.close()
            raise
        return monitor

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the journal; `result` goes on answering."""
        self._file.close()

    def knows(self, path: str | Path) -> bool:
        """Whether an image (a unit) of this path is in the journal, whatever it held."""
        return str(path) in self._paths

    def seen(self, sha256: str) -> bool:
        """Whether the image (the unit) is in the journal: a repeat is not exchangeable with anything."""
        return sha256 in self._scores

    def repeat(self, sha256: str) -> None:
        """Count an image that was seen. It joins the batch with the score it had, so that a rerun says the same."""
        self._repeats += 1
        self._batch[sha256] = self._scores[sha256]

    def add(self, path: str | Path, sha256: str, score: float) -> None:
        """Add the next image (the unit) of the stream; one that was seen counts as a repeat.

        Raises:
            CalibrationError: the score is NaN or infinite. BlemishError: the journal cannot be written.
        """
        if self.seen(sha256):
            return self.repeat(sha256)
        score = float(score)
        if not math.isfinite(score):
            raise CalibrationError(f"The score of {path} is {score}: it cannot be monitored.")
        self._append(self._take(str(path), sha256, score))
        self._new += 1
        self._batch[sha256] = score

    def result(self) -> Drift:
        batch = list(self._batch.values())
        return Drift(
            images=len(self._scores),
            new=self._new,
            repeats=self._repeats,
            batch=len(batch),
            false_alarms=sum(score > self._threshold for score in batch),
            alpha=self._alpha,
            ks=ks_test(self._calibration, batch) if batch else None,
            log10_martingale=self._log / math.log(10),
            log10_martingale_max=self._log_max / math.log(10),
            crossed_at=self._crossed_at,
            level=self._level,
        )

    def _take(self, path: str, sha256: str, score: float) -> dict[str, Any]:
        """Bet on a score; return the journal's line."""
        online_p = self._martingale.add(score)
        self._log = self._martingale.log
        self._log_max = max(self._log_max, self._log)
        if self._crossed_at is None and self._log >= math.log(2 / self._level):
            self._crossed_at = path
        self._scores[sha256] = score
        self._paths.add(path)
        n = len(self._calibration)
        at_least = n - int(self._calibration.searchsorted(score, "left"))
        return {
            "path": path,
            "sha256": sha256,
            "score": score,
            "p_value": (1 + at_least) / (n + 1),
            "online_p": online_p,
            "log_martingale": self._log,
        }

    def _append(self, line: Mapping[str, Any]) -> None:
        """Put a line on the disk, or leave the journal as it was and close it."""
        with explain_write_errors(self._path):
            before = os.fstat(self._file.fileno()).st_size
            try:
                append_line(self._file, line)
                os.fsync(self._file.fileno())
            except OSError:
                with self._file:
                    self._file.truncate(before)
                raise

    def _read(self, header: Mapping[str, Any]) -> bool:
        """Rebuild the state from the journal, if it has begun; cut off its last line if that is torn."""
        whole = 0  # bytes
        with explain_write_errors(self._path), self._path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.startswith(_BEGINNING[: len(line)]) and number == 1:
                    raise DataError(f"{self._path} is no journal of `blemish monitor`: choose another state=.")
                if not line.endswith(b"\n"):
                    self._file.truncate(whole)
                elif number == 1:
                    self._check_header(line, header)
                else:
                    self._check_line(number, line)
                whole += len(line) if line.endswith(b"\n") else 0
        return whole > 0

    def _check_header(self, line: bytes, expected: Mapping[str, Any]) -> None:
        found = self._parse(1, line)
        if found.keys() != expected.keys():
            raise self._damaged(1)
        if any(found[key] != expected[key] for key in ("fingerprint", "calibration")):
            raise CalibrationError(f"{self._path} is the journal of another detector or calibration: {_BEGIN_AGAIN}.")
        if found["unit"] != expected["unit"]:
            raise ConfigError(
                f"{self._path} is about each {found['unit']}, not each {expected['unit']}: set by_folder, "
                f"{_BEGIN_AGAIN}."
            )
        for key in ("seed", "level"):
            if found[key] != expected[key]:
                raise ConfigError(
                    f"{self._path} was begun with {key}={found[key]}, not {expected[key]}: set that, {_BEGIN_AGAIN}."
                )

    def _check_line(self, number: int, line: bytes) -> None:
        found = self._parse(number, line)
        try:
            path, sha256, score = found["path"], found["sha256"], found["score"]
            usable = isinstance(path, str) and isinstance(sha256, str) and sha256 not in self._scores
            usable = usable and isinstance(score, float) and math.isfinite(score)
            taken = self._take(path, sha256, score) if usable else {}
            # Another machine may round a logarithm another way.
            same = usable and all(
                math.isclose(found[key], taken[key], rel_tol=1e-9, abs_tol=1e-9)
                for key in ("p_value", "online_p", "log_martingale")
            )
        except (KeyError, TypeError) as error:
            raise self._damaged(number) from error
        if not same:
            raise self._damaged(number)

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            found = json.loads(line)
        except ValueError as error:
            raise self._damaged(number) from error
        if not isinstance(found, dict):
            raise self._damaged(number)
        return found

    def _damaged(self, number: int) -> DataError:
        return DataError(f"Line {number} of {self._path} is damaged: {_BEGIN_AGAIN}.")


def _digest(calibration_scores: npt.NDArray[np.float64], mask_rule: Mapping[str, Any]) -> str:
    """SHA-256 of the sorted scores and the rule that made them."""
    rule = json.dumps(dict(mask_rule), sort_keys=True).encode()
    return hashlib.sha256(calibration_scores.astype("<f8").tobytes() + rule).hexdigest()

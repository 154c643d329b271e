"""Tables written row by row: what a kill leaves is kept, and the same command goes on from it."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from blemish.errors import BlemishError
from blemish.files import append_line, atomic, explain_write_errors, hold, write_json

_MAKERS = {
    "run.json": "a run",
    "evaluation.csv": "an evaluation",
    "predict.json": "predictions",
    "diff.json": "differences",
}


def check_own(out: Path, made_file: str, what: str) -> None:
    """Raise BlemishError if a folder holds results of another kind than those that `made_file` marks."""
    for name, found in _MAKERS.items():
        if name != made_file and (out / name).exists():
            raise BlemishError(f"{out} holds {found} ({name}): choose another out= for {what}.")


def check_apart(out: Path, inputs: Iterable[Path]) -> None:
    """Raise BlemishError if an input lies where the results go."""
    folder = out.resolve()
    for path in inputs:
        if folder in path.resolve().parents:
            raise BlemishError(f"{path} lies in {out}, where the results would go: choose another out=.")


class UnfinishedRows:
    """The rows of a table in the making, in a hidden `.part` file of JSON lines, and what made them.

    Args:
        out: folder of the results. table: name of the finished tables, NAME.csv and NAME.jsonl, which says that all is
            done.
        made_file: name of the file that says how the results were made. made: its content.
        same: keys of `made` that must not change while the table is unfinished.
        owned: other files and folders that belong to these results: `overwrite` removes them.
        what: the results, for messages. others: what has made them if something of `same` has changed, likewise.

    Raises:
        BlemishError: `out` holds results of another kind, or finished ones, or unfinished ones made otherwise, or
            another process is writing there.
    """

    def __init__(
        self,
        out: Path,
        table: str,
        made_file: str,
        made: Mapping[str, Any],
        same: Sequence[str],
        owned: Sequence[str],
        overwrite: bool,
        what: str,
        others: str,
    ) -> None:
        self.file = out / f".{table}.jsonl.part"
        self._finished, about = out / f"{table}.jsonl", out / made_file
        check_own(out, made_file, what)
        finished = BlemishError(f"{out} already holds {what}: choose another out=, or set overwrite=true.")
        if self._finished.exists() and not overwrite:
            raise finished
        with explain_write_errors(self.file):
            out.mkdir(parents=True, exist_ok=True)
            self._rows = FileIO(self.file, "ab")
        try:
            hold(self._rows, f"Another `blemish` is writing {what} to {out}: wait for it, or choose another out=.")
            if overwrite and about.is_file():
                self._remove(out / name for name in owned)
            elif self._finished.exists():  # by the one that was waited for
                self._rows.close()
                self.file.unlink(missing_ok=True)
                raise finished
            if os.fstat(self._rows.fileno()).st_size and about.is_file():
                before = json.loads(about.read_text(encoding="utf-8"))
                if any(before.get(key) != made[key] for key in same):
                    raise BlemishError(
                        f"{out} holds unfinished {what} of {others}: choose another out=, or set overwrite=true."
                    )
            write_json(about, dict(made))
        except BaseException:
            self._rows.close()
            raise

    def _remove(self, others: Iterable[Path]) -> None:
        """Earlier results, finished or not."""
        self._rows.truncate(0)
        for old in (self._finished, self._finished.with_suffix(".csv"), *others):
            if old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.unlink(missing_ok=True)

    def done(self) -> list[dict[str, Any]]:
        """The rows that an interrupted run has finished; one torn by a kill is cut off."""
        with explain_write_errors(self.file):
            content = self.file.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            self._rows.truncate(len(whole))
        return [json.loads(line) for line in whole.splitlines()]

    def append(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Append rows, each flushed before it is handed on."""
        for row in rows:
            with explain_write_errors(self.file):
                append_line(self._rows, row)
            yield row

    def finish(self, columns: Sequence[str], rows: Iterator[dict[str, Any]] | None = None) -> None:
        """Turn the rows, or the changed ones of `rows`, into NAME.csv and NAME.jsonl; lists are JSON in the former."""
        with (
            atomic(self._finished) as lines_path,  # appears last: it says that all is done
            atomic(self._finished.with_suffix(".csv")) as table_path,
            table_path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as table,
            lines_path.open("w", encoding="utf-8") as lines,
        ):
            writer = csv.DictWriter(table, columns)
            writer.writeheader()
            for row in self if rows is None else rows:
                lines.write(json.dumps(row, allow_nan=False) + "\n")
                nested = {key: json.dumps(value) for key, value in row.items() if isinstance(value, (list, dict))}
                writer.writerow(row | nested)
        self._rows.close()
        with explain_write_errors(self.file):
            self.file.unlink()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows so far, one at a time."""
        with self.file.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)

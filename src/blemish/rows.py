"""Tables written row by row: what a kill leaves is kept, and the same command goes on from it."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blemish.errors import BlemishError
from blemish.files import atomic, explain_write_errors, write_json

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
        BlemishError: `out` holds results of another kind, or finished ones, or unfinished ones made otherwise.
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
        if overwrite and about.is_file():
            for old in (self.file, self._finished, self._finished.with_suffix(".csv"), *(out / name for name in owned)):
                if old.is_dir():
                    shutil.rmtree(old, ignore_errors=True)
                else:
                    old.unlink(missing_ok=True)
        if self._finished.exists():
            raise BlemishError(f"{out} already holds {what}: choose another out=, or set overwrite=true.")
        if self.file.exists() and about.is_file():
            before = json.loads(about.read_text(encoding="utf-8"))
            if any(before.get(key) != made[key] for key in same):
                raise BlemishError(
                    f"{out} holds unfinished {what} of {others}: choose another out=, or set overwrite=true."
                )
        write_json(about, dict(made))

    def done(self) -> list[dict[str, Any]]:
        """The rows that an interrupted run has finished; one torn by a kill is cut off."""
        if not self.file.exists():
            return []
        with explain_write_errors(self.file):
            content = self.file.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                self.file.write_bytes(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def append(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Append rows, each flushed before it is handed on."""
        with explain_write_errors(self.file):
            file = self.file.open("ab", buffering=0)  # closing has nothing left to write, and to fail with
        with file:
            for row in rows:
                with explain_write_errors(self.file):
                    file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
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
        with explain_write_errors(self.file):
            self.file.unlink()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows so far, one at a time."""
        with self.file.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)

"""Tables written row by row: what a kill leaves is kept, and the same command goes on from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blemish.errors import BlemishError
from blemish.files import explain_write_errors, write_json


class UnfinishedRows:
    """The rows of a table in the making, in a hidden `.part` file of JSON lines, and what made them.

    Args:
        out: folder of the results. table: name of the finished table, NAME.jsonl; it says that all is done.
        made_file: name of the file that says how the results were made. made: its content.
        same: keys of `made` that must not change while the table is unfinished.
        owned: other files and folders that belong to these results: `overwrite` removes them.
        what: the results, for messages.

    Raises:
        BlemishError: `out` holds a run, an evaluation or finished results, or unfinished ones made otherwise.
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
    ) -> None:
        self.file = out / f".{table}.jsonl.part"
        finished, about = out / f"{table}.jsonl", out / made_file
        other = next((name for name in ("run.json", "evaluation.csv") if (out / name).exists()), None)
        if other:
            raise BlemishError(f"{out} holds a run or an evaluation ({other}): choose another out= for {what}.")
        if overwrite and about.is_file():
            for old in (self.file, finished, *(out / name for name in owned)):
                if old.is_dir():
                    shutil.rmtree(old, ignore_errors=True)
                else:
                    old.unlink(missing_ok=True)
        if finished.exists():
            raise BlemishError(f"{out} already holds {what}: choose another out=, or set overwrite=true.")
        if self.file.exists() and about.is_file():
            before = json.loads(about.read_text(encoding="utf-8"))
            if any(before.get(key) != made[key] for key in same):
                raise BlemishError(
                    f"{out} holds unfinished {what}, made with other settings: choose another out=, or set "
                    "overwrite=true."
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
            file = self.file.open("a", encoding="utf-8")
        with file:
            for row in rows:
                with explain_write_errors(self.file):
                    file.write(json.dumps(row, allow_nan=False) + "\n")
                    file.flush()
                yield row

    def remove(self) -> None:
        """To be called when the finished table stands."""
        with explain_write_errors(self.file):
            self.file.unlink()

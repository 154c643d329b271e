"""Writing files so that nothing half-written is ever left under its final name."""

from __future__ import annotations

import csv
import errno
import json
import os
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from blemish.errors import BlemishError

if sys.platform != "win32":
    import fcntl

CARD_FILE = "card.json"
"""The calibration card, beside every artefact that rests on it."""
CONFIG_FILE, RUN_FILE, DETECTOR_FILE = "config.yaml", "run.json", "detector.pt"
"""The resolved settings of a run, how it came about and how far, and what it came to."""
GALLERY_FILE = "gallery.zip"
"""Thumbnails for the report, beside the table of the images that they show."""


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write `path` into one sentence."""
    try:
        yield
    except FileNotFoundError:
        raise  # the folder has been made: something else is missing
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = "the disk is full: free some space or choose another folder"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = "no permission: choose a folder that you may write to"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            reason = "a file stands where a folder is needed, or the reverse: choose another name"
        else:
            reason = error.strerror or str(error)
        raise BlemishError(f"Cannot write {path}: {reason}.") from error


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on failure.

    Raises:
        BlemishError: the folder cannot be made or written to, or the disk is full.
    """
    # Not the process's number alone: two machines may write to one folder.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


@contextmanager
def held(folder: Path, taken: str) -> Iterator[None]:
    """Make a folder, and keep other processes that ask from it, as `hold` does; no file is left."""
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":  # folders cannot be opened
        yield
        return
    with explain_write_errors(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        hold(descriptor, taken)
        yield
    finally:
        os.close(descriptor)


def hold(file: IO[bytes] | int, taken: str) -> None:
    """Keep other processes from an open file until it is closed; where there are no locks, nothing happens.

    Raises:
        BlemishError: another process holds it; `taken` is the sentence that says so.
    """
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlemishError(taken) from error
        except OSError:
            pass  # some network drives have no locks


def append_line(file: IO[bytes], content: Mapping[str, Any]) -> None:
    """Add a line of strict JSON to an unbuffered file. Raises OSError, which may leave a part of the line."""
    line = json.dumps(content, allow_nan=False).encode() + b"\n"
    while line:
        line = line[file.write(line) :]  # a nearly full disk takes a part


def write_bytes(path: Path, content: bytes) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON (no NaN or infinity), keys in the given order."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)

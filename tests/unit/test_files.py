"""Writing files: all or nothing, and one sentence when it cannot be done."""

import errno
import json
import os
from pathlib import Path

import pytest

from blemish.errors import BlemishError
from blemish.files import atomic, explain_write_errors, write_bytes, write_csv, write_json, write_text


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_content_arrives_and_nothing_else_is_left(tmp_path):
    write_bytes(tmp_path / "a.bin", b"\x00\xff")
    write_text(tmp_path / "b.txt", "grün\n")
    assert (tmp_path / "a.bin").read_bytes() == b"\x00\xff"
    assert (tmp_path / "b.txt").read_bytes() == "grün\n".encode()
    assert listing(tmp_path) == ["a.bin", "b.txt"]


def test_missing_folders_are_made(tmp_path):
    write_text(tmp_path / "new" / "deep" / "a.txt", "x")
    assert listing(tmp_path / "new" / "deep") == ["a.txt"]


def test_old_content_is_replaced(tmp_path):
    write_text(tmp_path / "a.txt", "a long old text")
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert listing(tmp_path) == ["a.txt"]


def test_old_content_stands_until_the_new_is_complete(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with atomic(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert (tmp_path / "a.txt").read_text() == "old"
    assert (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [None, "old"])
def test_failure_leaves_nothing_new(tmp_path, exception, before):
    if before is not None:
        write_text(tmp_path / "a.txt", before)
    with pytest.raises(exception), atomic(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise exception
    assert listing(tmp_path) == ([] if before is None else ["a.txt"])
    assert before is None or (tmp_path / "a.txt").read_text() == before


def test_failure_before_the_first_byte_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="early"), atomic(tmp_path / "a.txt"):
        raise ValueError("early")
    assert listing(tmp_path) == []


@pytest.fixture
def failing_write(monkeypatch):
    """Let every write stop half-way with an error of the operating system."""

    def install(number):
        def write(path, content):
            with path.open("wb") as file:
                file.write(content[: len(content) // 2])
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, "write_bytes", write)

    return install


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "the disk is full: free some space"),
        (errno.EACCES, "no permission: choose a folder that you may write to"),
        (errno.EROFS, "no permission: choose a folder that you may write to"),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
def test_refusals_are_explained_and_old_content_kept(tmp_path, failing_write, number, reason):
    target = tmp_path / "a.txt"
    target.write_text("old")
    failing_write(number)
    with pytest.raises(BlemishError) as refusal:
        write_text(target, "new content")
    assert str(refusal.value).startswith(f"Cannot write {target}: {reason}")
    assert isinstance(refusal.value.__cause__, OSError)
    assert target.read_text() == "old"
    assert listing(tmp_path) == ["a.txt"]


def test_a_file_in_the_place_of_a_folder_is_explained(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BlemishError, match="a file stands where a folder is needed"):
        write_text(tmp_path / "file" / "a.txt", "y")


def test_a_folder_in_the_place_of_a_file_is_explained(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(BlemishError, match="or the reverse"):
        write_text(tmp_path / "a.txt", "y")
    assert listing(tmp_path) == ["a.txt"]


def test_other_exceptions_pass_unchanged(tmp_path):
    with pytest.raises(KeyError), explain_write_errors(tmp_path):
        raise KeyError("mine")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_is_strict_and_a_refusal_keeps_the_old(tmp_path, value):
    write_json(tmp_path / "a.json", {"b": 1, "a": [0.1, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1, "a": [0.1, None]}
    assert list(json.loads((tmp_path / "a.json").read_text())) == ["b", "a"]
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"a": value})
    assert json.loads((tmp_path / "a.json").read_text())["b"] == 1
    assert listing(tmp_path) == ["a.json"]


def test_csv_has_a_header_and_quotes_what_needs_it(tmp_path):
    write_csv(
        tmp_path / "a.csv", ("path", "score"), iter([{"path": "a,b.png", "score": 0.1}, {"path": "c", "score": None}])
    )
    assert (tmp_path / "a.csv").read_text().splitlines() == ["path,score", '"a,b.png",0.1', "c,"]


def test_csv_whose_rows_fail_is_not_written(tmp_path):
    def rows():
        yield {"path": "a"}
        raise ValueError("second row")

    with pytest.raises(ValueError, match="second row"):
        write_csv(tmp_path / "a.csv", ("path",), rows())
    assert listing(tmp_path) == []

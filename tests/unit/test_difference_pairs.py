"""Which reference and which mask belong to which query."""

from __future__ import annotations

from pathlib import Path

import pytest

from blemish.difference.pairs import Pair, find_pairs
from blemish.errors import BlemishError, DataError

pytestmark = pytest.mark.usefixtures("in_tmp")
FOLDERS = [Path(name) for name in ("references", "queries", "masks")]


@pytest.fixture
def put():
    """Make empty files; no pair is read to be found."""

    def make(*paths):
        for path in map(Path, paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    return make


def test_two_files_and_a_mask(put):
    put("golden.png", "part.jpg", "truth.png")
    paths = [Path(name) for name in ("golden.png", "part.jpg")]
    assert find_pairs(*paths) == [Pair(paths[1], paths[0], Path("part"))]
    assert find_pairs(*paths, Path("truth.png")) == [Pair(paths[1], paths[0], Path("part"), Path("truth.png"))]


def test_one_reference_serves_a_folder(put):
    put("golden.png", "queries/b.png", "queries/lot/a.png")
    found = find_pairs(Path("golden.png"), Path("queries"))
    assert [(pair.query.as_posix(), pair.reference.as_posix(), pair.name.as_posix()) for pair in found] == [
        ("queries/b.png", "golden.png", "b"),
        ("queries/lot/a.png", "golden.png", "lot/a"),
    ]


def test_folders_pair_by_path_without_suffix_and_references_may_be_left_over(put):
    put("references/lot/a.png", "references/a.png", "references/left_over.png", "queries/lot/a.jpg", "queries/a.bmp")
    found = {pair.query.as_posix(): pair.reference.as_posix() for pair in find_pairs(*FOLDERS[:2])}
    assert found == {"queries/a.bmp": "references/a.png", "queries/lot/a.jpg": "references/lot/a.png"}


def test_masks_may_be_missing_left_over_or_have_a_suffix_of_their_own(put):
    names = ("plain", "marked", "true", "none")
    put(*(f"{folder}/{name}.png" for folder in FOLDERS[:2] for name in names))
    put("masks/plain.tiff", "masks/marked_mask.png", "masks/true_gt.png", "masks/left_over.png")
    found = {pair.name.as_posix(): pair.mask and pair.mask.name for pair in find_pairs(*FOLDERS)}
    assert found == {"plain": "plain.tiff", "marked": "marked_mask.png", "true": "true_gt.png", "none": None}


def test_the_plain_name_of_a_mask_comes_first(put):
    put("references/a.png", "queries/a.png", "masks/a_mask.png", "masks/a.png")
    assert find_pairs(*FOLDERS)[0].mask == Path("masks/a.png")


def test_queries_of_one_name_share_reference_and_mask_and_keep_their_suffix(put):
    put("references/a.png", "queries/a.png", "queries/a.jpg", "masks/a_gt.png")
    found = find_pairs(*FOLDERS)
    assert sorted(pair.name.name for pair in found) == ["a.jpg", "a.png"]
    assert {(pair.reference.name, pair.mask.name) for pair in found} == {("a.png", "a_gt.png")}


def test_only_the_last_suffix_is_left_out(put):
    put("references/board.png", "references/board.1.png", "queries/board.1.jpg", "queries/board.jpg")
    found = {pair.query.name: pair.reference.name for pair in find_pairs(*FOLDERS[:2])}
    assert found == {"board.1.jpg": "board.1.png", "board.jpg": "board.png"}
    Path("references/board.1.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 queries have no reference.*board\.1\.jpg.*references/board\.1\.\*"):
        find_pairs(*FOLDERS[:2])


def test_queries_without_a_reference_are_counted(put):
    put("references/a.png", *(f"queries/{name}.png" for name in "abc"))
    with pytest.raises(DataError, match=r"^2 of 3 queries have no reference, the first is queries/b\.png: expected an"):
        find_pairs(*FOLDERS[:2])


@pytest.mark.parametrize("folder", ["references", "masks"])
def test_two_files_that_could_both_belong_to_a_query_are_refused(put, folder):
    put("references/a.png", "queries/a.png", "masks/a.png", f"{folder}/a.tiff")
    with pytest.raises(DataError, match=rf"{folder}/a\.png and {folder}/a\.tiff have one name"):
        find_pairs(*FOLDERS)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nowhere.png", "query.png"), r"^The reference nowhere\.png does not exist"),
        (("file.png", "nowhere"), r"^The query nowhere does not exist"),
        (("file.png", "query.png", "nowhere"), r"^The mask nowhere does not exist"),
        (("folder", "query.png"), r"^The query is a file, the reference folder a folder"),
        (("file.png", "query.png", "folder"), r"^The query is a file, the mask folder a folder"),
        (("folder", "folder", "file.png"), r"^The query is a folder, the mask file\.png a file"),
        (("file.png", "empty"), r"empty"),
        (("empty", "folder"), r"empty"),
    ],
)
def test_mistakes_get_one_sentence(put, arguments, sentence):
    put("file.png", "query.png", "folder/a.png")
    Path("empty").mkdir()
    with pytest.raises(BlemishError, match=sentence) as refusal:
        find_pairs(*map(Path, arguments))
    assert "\n" not in str(refusal.value)

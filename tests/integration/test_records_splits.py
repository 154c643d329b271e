"""From layouts to records, and from records to disjoint, reproducible parts."""

from __future__ import annotations

import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from blemish.calibration import Promise
from blemish.data.records import Record, read_folder, read_manifest, read_mvtec
from blemish.data.splits import SPLITS, split_records
from blemish.errors import ConfigError, DataError


@pytest.fixture
def distinct(tmp_path):
    """(count, fields) -> records of that many files with different content."""

    def make(count, start=0, **fields):
        records = []
        for number in range(start, start + count):
            path = tmp_path / f"files/{number:03d}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(f"content {number}".encode())
            records.append(Record(path, **fields))
        return records

    return make


def paths(splits, split):
    return {item.record.path for item in splits.of(split)}


def split(records, seed=0, **settings):
    return split_records(records, seed, progress=False, **settings)


# --- layouts --------------------------------------------------------------------------------------------------


def test_folder_takes_every_image_at_any_depth(normal_folder, save, texture):
    nested = save(normal_folder / "a/b/c.png", texture(99))
    records = read_folder(str(normal_folder)).sound()
    assert len(records) == 61 and nested in {record.path for record in records}
    assert all(record.is_normal and record.split is None and record.mask is None for record in records)


def test_folder_reader_recognises_the_mvtec_layout(mvtec_root):
    with pytest.raises(DataError, match="use data=mvtec"):
        read_folder(mvtec_root)


def test_mvtec_reads_parts_kinds_and_masks(mvtec_root):
    records = read_mvtec(mvtec_root).sound()
    assert Counter((record.split, record.kind) for record in records) == {
        ("train", "good"): 60,
        ("test", "good"): 8,
        ("test", "blob"): 5,
    }
    for record in records:
        expected = mvtec_root / f"ground_truth/blob/{record.path.stem}_mask.png" if record.kind == "blob" else None
        assert record.mask == expected


def test_mvtec_takes_masks_named_like_their_image(mvtec_root):
    for mask in (mvtec_root / "ground_truth/blob").iterdir():
        mask.rename(mask.with_name(mask.name.replace("_mask", "")))
    assert all(record.mask for record in read_mvtec(mvtec_root).sound() if record.kind == "blob")


@pytest.mark.parametrize("part", ["ground_truth", "test"])
def test_mvtec_without_masks_or_test_part_is_fine(mvtec_root, part):
    shutil.rmtree(mvtec_root / "ground_truth")
    if part == "test":
        shutil.rmtree(mvtec_root / "test")
    assert all(record.mask is None for record in read_mvtec(mvtec_root).sound())


@pytest.mark.parametrize("reader", [read_folder, read_mvtec, read_manifest])
def test_missing_root_is_named(tmp_path, reader):
    with pytest.raises(DataError, match="does not exist") as caught:
        reader(tmp_path / "gone")
    assert str(tmp_path / "gone") in str(caught.value)


def test_mvtec_without_train_good_suggests_folder(normal_folder):
    with pytest.raises(DataError, match=r"no folder train/good.*data=folder"):
        read_mvtec(normal_folder)


def test_mask_without_image_is_a_problem(mvtec_root):
    (mvtec_root / "test/blob/001.png").unlink()
    (problem,) = read_mvtec(mvtec_root).problems
    assert "001_mask.png has no image" in problem


def test_mask_of_a_good_image_is_a_problem(mvtec_root):
    (mvtec_root / "ground_truth/good").mkdir()
    shutil.copy(mvtec_root / "ground_truth/blob/000_mask.png", mvtec_root / "ground_truth/good/000_mask.png")
    (problem,) = read_mvtec(mvtec_root).problems
    assert "defect-free" in problem


def _move(path, name):
    target = path.parent / name
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)


@pytest.mark.parametrize("both", [True, False], ids=["images and masks", "images"])
def test_mvtec_finds_masks_of_images_in_folders_of_a_kind(mvtec_root, both):
    _move(mvtec_root / "test/blob/001.png", "lot/001.png")
    if both:
        _move(mvtec_root / "ground_truth/blob/001_mask.png", "lot/001_mask.png")
    assert all(record.mask for record in read_mvtec(mvtec_root).sound() if record.kind == "blob")


@pytest.mark.parametrize(
    ("source", "target", "sentence"),
    [
        ("test/blob/001.png", "../001.png", "001.png lies in no folder of its kind"),
        ("ground_truth/blob/001_mask.png", "../001_mask.png", "001_mask.png lies in no folder of a kind of defect"),
        ("ground_truth/blob/001_mask.png", "lot/001_mask.png", "001_mask.png has no image in"),
    ],
)
def test_what_lies_at_no_place_of_the_layout_is_a_problem(mvtec_root, source, target, sentence):
    _move(mvtec_root / source, target)
    assert sentence in read_mvtec(mvtec_root).problems[0]


def test_two_masks_of_one_image_are_a_problem(mvtec_root):
    shutil.copy(mvtec_root / "ground_truth/blob/001_mask.png", mvtec_root / "ground_truth/blob/001.png")
    (problem,) = read_mvtec(mvtec_root).problems
    assert "are of one image" in problem


def test_two_images_of_one_mask_are_a_problem(mvtec_root):
    shutil.copy(mvtec_root / "test/blob/001.png", mvtec_root / "test/blob/001.bmp")
    (problem,) = read_mvtec(mvtec_root).problems
    assert "have one mask" in problem


def test_a_folder_called_normal_is_a_problem(mvtec_root):
    (mvtec_root / "test/good").rename(mvtec_root / "test/Normal")
    (problem,) = read_mvtec(mvtec_root).problems
    assert "call it good" in problem


def test_hidden_folders_are_not_of_the_layout(mvtec_root):
    for part in ("train", "test"):
        (mvtec_root / part / ".checkpoints").mkdir()
    assert read_mvtec(mvtec_root).sound()


def test_masks_in_a_linked_folder_are_found(mvtec_root, tmp_path):
    (mvtec_root / "ground_truth/blob").rename(tmp_path / "masks")
    (mvtec_root / "ground_truth/blob").symlink_to(tmp_path / "masks")
    assert all(record.mask for record in read_mvtec(mvtec_root).sound() if record.kind == "blob")


def test_linked_folders_count_once(normal_folder, tmp_path):
    before = len(read_folder(normal_folder).images)
    other = tmp_path / "elsewhere"
    shutil.copytree(normal_folder, other)
    (normal_folder / "linked").symlink_to(other)
    (normal_folder / "around").symlink_to(normal_folder)
    assert len(read_folder(normal_folder).images) == 2 * before


def test_defective_training_folder_is_a_problem(mvtec_root):
    shutil.copytree(mvtec_root / "test/blob", mvtec_root / "train/blob")
    (problem,) = read_mvtec(mvtec_root).problems
    assert "only defect-free images train" in problem


def test_problems_are_counted_when_the_layout_is_refused(mvtec_root):
    for name in ("001", "002", "003"):
        (mvtec_root / f"test/blob/{name}.png").unlink()
    with pytest.raises(DataError, match=r"001_mask.*\(2 more such problems\).*blemish check"):
        read_mvtec(mvtec_root).sound()


# --- manifests ------------------------------------------------------------------------------------------------


@pytest.fixture
def manifest(tmp_path, save, texture):
    """Text below the columns path,label,mask,split,group -> what `read_manifest` makes of it."""
    for name in ("a.png", "b.png", "c.png", "m.png"):
        save(tmp_path / "img" / name, texture(ord(name[0])))

    def read(text, columns="path,label,mask,split,group"):
        (tmp_path / "manifest.csv").write_text(f"{columns}\n{text}\n", encoding="utf-8")
        return read_manifest(tmp_path)

    return read


def test_manifest_reads_every_column(manifest, tmp_path):
    text = "img/a.png,good,,calibration,lot 1\nimg/b.png,Normal,,,\nimg/c.png,scratch,img/m.png,,lot 2"
    assert manifest(text).sound() == [
        Record(tmp_path / "img/a.png", "good", None, "calibration", "lot 1"),
        Record(tmp_path / "img/b.png"),
        Record(tmp_path / "img/c.png", "scratch", tmp_path / "img/m.png", "test", "lot 2"),
    ]


def test_manifest_is_its_file_or_folder(manifest, tmp_path):
    expected = manifest("img/a.png,good,,,")
    assert read_manifest(tmp_path / "manifest.csv") == expected
    (tmp_path / "manifest.csv").rename(tmp_path / "other.csv")
    assert read_manifest(tmp_path, manifest="other.csv") == expected


def test_manifest_may_have_two_columns_and_a_byte_order_mark(manifest):
    assert manifest("img/a.png,good", columns="\ufeffpath,label").sound()[0].kind == "good"


@pytest.mark.parametrize("columns", ["path", "label,mask", "path,label,colour", ""])
def test_manifest_with_wrong_columns_is_refused(manifest, columns):
    with pytest.raises(DataError, match=r"has the columns .* expected path and label"):
        manifest("img/a.png,good,x", columns=columns)


@pytest.mark.parametrize(
    ("row", "fragment"),
    [
        ("img/a.png,scratch,,train,", "defective image .'scratch'. into the train part"),
        ("img/a.png,scratch,,calibration,", "defective image .'scratch'. into the calibration part"),
        ("img/gone.png,good,,,", "gone.png, which does not exist"),
        ("img/a.png,scratch,img/gone.png,,", "mask .*gone.png, which does not exist"),
        ("img/a.png,good,,training,", "split 'training': expected one of train, validation, calibration, test"),
        (",good,,,", "lacks a path or a label"),
        ("img/a.png,,,,", "lacks a path or a label"),
        ("manifest.csv,good,,,", "expected a file ending in"),
    ],
)
def test_manifest_problem_names_its_line(manifest, row, fragment):
    with pytest.raises(DataError, match=f"Line 3 of .*manifest.csv.*{fragment}"):
        manifest(f"img/b.png,good,,,\n{row}").sound()


def test_manifest_with_a_surplus_field_is_a_problem(manifest):
    with pytest.raises(DataError, match="Line 3"):
        manifest("img/b.png,good,,,\nimg/a.png,good,,,,surplus").sound()


def test_manifest_that_names_an_image_twice_is_a_problem(manifest):
    with pytest.raises(DataError, match="twice"):
        manifest("img/a.png,good,,,\nimg/a.png,scratch,,,").sound()


def test_manifest_in_another_encoding_is_a_sentence(tmp_path):
    (tmp_path / "manifest.csv").write_bytes("path,label\nbüro.png,good\n".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        read_manifest(tmp_path)


def test_empty_manifest_is_refused(manifest):
    with pytest.raises(DataError, match="lists no image"):
        manifest("")


# --- splits ---------------------------------------------------------------------------------------------------


def test_parts_are_disjoint_and_complete(distinct):
    records = distinct(50) + distinct(10, 50, kind="blob", split="test")
    splits = split(records)
    parts = [paths(splits, name) for name in SPLITS]
    assert sum(map(len, parts)) == 60 and set().union(*parts) == {record.path for record in records}
    assert [len(part) for part in parts] == [35, 5, 10, 10]


def test_split_depends_on_the_seed_alone(distinct):
    records = distinct(50)
    first, again, other = split(records, 7), split(records[::-1], 7), split(records, 8)
    for name in SPLITS[:3]:
        assert paths(first, name) == paths(again, name)
    assert paths(first, "train") != paths(other, "train")
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_split_does_not_depend_on_where_the_data_lie(distinct, tmp_path):
    records = distinct(50)
    before = split(records).fingerprint()
    moved = [Record(record.path.rename(tmp_path / f"{i:03d}.png")) for i, record in enumerate(records[::-1])]
    assert split(moved).fingerprint() == before


def test_groups_are_never_divided(distinct):
    records = [record for lot in range(30) for record in distinct(3, 3 * lot, group=f"lot {lot}")]
    splits = split(records)
    where = {}
    for item in splits.records:
        where.setdefault(item.record.group, set()).add(item.record.split)
    assert all(len(parts) == 1 for parts in where.values())
    assert len({item.unit for item in splits.records}) == 30
    assert len(splits.of("calibration")) == 18


def test_equal_files_stay_together(distinct):
    records = distinct(40)
    for record in records[:10]:
        twin = record.path.with_name(f"twin {record.path.name}")
        shutil.copy(record.path, twin)
        records.append(Record(twin))
    for seed in range(5):
        where = {}
        for item in split(records, seed).records:
            where.setdefault(item.digest, set()).add(item.record.split)
        assert len(where) == 40 and all(len(parts) == 1 for parts in where.values())


def test_groups_and_equal_files_chain_into_one_unit(distinct):
    records = distinct(20)
    a, b, c = distinct(1, 20, group="x")[0], distinct(1, 21, group="x")[0], distinct(1, 22, group="y")[0]
    shutil.copy(b.path, c.path)
    splits = split([*records, a, b, c])
    assert len({item.unit for item in splits.records if item.record.group}) == 1


def test_training_images_that_are_in_the_test_part_are_left_out(distinct):
    records = distinct(40)
    twin = records[0].path.with_name("twin.png")
    shutil.copy(records[0].path, twin)
    splits = split([*records, Record(twin, split="test")])
    assert splits.dropped == 1
    assert records[0].path not in {item.record.path for item in splits.records}
    assert paths(splits, "test") == {twin}


def test_groups_of_the_test_part_are_left_out_of_training(distinct):
    records = distinct(40) + distinct(3, 40, group="lot") + distinct(1, 43, group="lot", split="test", kind="blob")
    splits = split(records)
    assert splits.dropped == 3 and len(splits.records) == 41


def test_explicit_splits_are_respected(distinct):
    named = {"train": distinct(20, 0, split="train"), "validation": distinct(5, 20, split="validation")}
    named |= {"calibration": distinct(9, 25, split="calibration"), "test": distinct(4, 34, split="test")}
    splits = split([record for part in named.values() for record in part])
    for name, part in named.items():
        assert paths(splits, name) == {record.path for record in part}


def test_named_calibration_still_leaves_validation_to_blemish(distinct):
    splits = split(distinct(20, split="train") + distinct(9, 20, split="calibration"))
    assert [len(splits.of(name)) for name in SPLITS] == [18, 2, 9, 0]


def test_unit_named_in_two_splits_is_refused(distinct):
    records = distinct(20) + distinct(1, 20, group="a", split="validation")
    with pytest.raises(DataError, match="another split"):
        split(records + distinct(1, 21, group="a", split="calibration"))


def test_explicit_training_image_is_never_moved_by_a_relative(distinct):
    records = distinct(20) + distinct(1, 20, group="a", split="train") + distinct(1, 21, group="a", split="calibration")
    with pytest.raises(DataError, match="another split"):
        split(records)


@pytest.mark.parametrize(("needed", "expected"), [(0, 20), (19, 20), (35, 35), (50, 50), (99, 50)])
def test_calibration_takes_a_fifth_or_what_the_promise_needs_up_to_half(distinct, needed, expected):
    assert len(split(distinct(100), needed=needed).of("calibration")) == expected


def test_a_fifth_is_what_the_default_promise_needs_of_100_images():
    assert Promise(0.05).needed <= 20


def test_explicit_share_is_taken(distinct):
    splits = split(distinct(100), validation=0.25, calibration=0.3)
    assert [len(splits.of(name)) for name in SPLITS] == [45, 25, 30, 0]


@pytest.mark.parametrize(
    "shares", [{"validation": 0}, {"validation": 1}, {"calibration": 0}, {"validation": 0.5, "calibration": 0.5}]
)
def test_shares_out_of_range_are_refused(distinct, shares):
    with pytest.raises(ConfigError, match=r"split.validation and split.calibration"):
        split(distinct(10), **shares)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_images_are_refused(distinct, count):
    with pytest.raises(DataError, match=f"Too few images: {count} distinct"):
        split(distinct(count))


def test_three_images_are_enough_for_one_each(distinct):
    splits = split(distinct(3))
    assert [len(splits.of(name)) for name in SPLITS] == [1, 1, 1, 0]


def test_copies_of_one_image_are_too_few(tmp_path):
    records = []
    for number in range(20):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / f"{number}.png")
        records.append(Record(tmp_path / f"{number}.png"))
    with pytest.raises(DataError, match="Too few images: 1 distinct"):
        split(records)


def test_classes_are_named_by_folders_or_a_column(tmp_path, save, texture):
    paths = [save(tmp_path / name, texture(0)) for name in ("one/a.png", "two/deep/b.png")]
    assert [(item.path, item.label) for item in read_folder(tmp_path, "folders").sound()] == [
        (paths[0], "one"),
        (paths[1], "two"),
    ]
    assert {item.label for item in read_folder(tmp_path).sound()} == {None}
    (tmp_path / "manifest.csv").write_text("path,label,class\none/a.png,good,face 1\ntwo/deep/b.png,good,\n")
    assert [item.label for item in read_manifest(tmp_path).sound()] == ["face 1", None]
    save(tmp_path / "c.png", texture(0))
    with pytest.raises(DataError, match=r"c\.png lies in no folder below .* which would name its class: move it"):
        read_folder(tmp_path, "folders").sound()
    with pytest.raises(ConfigError, match=r"data\.classes to be folders or null, found 'names'"):
        read_folder(tmp_path, "names")

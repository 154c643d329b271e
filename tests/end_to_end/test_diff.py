"""`blemish diff` as a user calls it: a pair, folders, masks, a card, mistakes."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

pytestmark = pytest.mark.usefixtures("in_tmp")
SHAPE = (96, 128)
DEFECT = (slice(30, 42), slice(60, 75))


def pattern(seed, noise=0.0):
    """(H, W) in [0, 1]: the same print for all seeds, with noise of their own."""
    rng = np.random.default_rng(7)
    blobs = ndimage.gaussian_filter(rng.normal(size=SHAPE), 3)
    printed = 0.3 + 0.4 * (blobs > 0.02)
    return printed + noise * np.random.default_rng(seed).normal(size=SHAPE)


def as_bytes(image):
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


@pytest.fixture
def pair(tmp_path, save):
    """Reference, query with a defect, its mask."""
    query, mask = pattern(2, 0.01), np.zeros(SHAPE, np.uint8)
    query[DEFECT], mask[DEFECT] = 1.0, 255
    return (
        save(tmp_path / "reference.png", as_bytes(pattern(1, 0.01))),
        save(tmp_path / "query.png", as_bytes(query)),
        save(tmp_path / "mask.png", mask),
    )


@pytest.fixture
def folders(tmp_path, save):
    """Twelve pairs, the first three with a defect and a mask."""
    for number in range(12):
        query, mask = pattern(100 + number, 0.01), np.zeros(SHAPE, np.uint8)
        if number < 3:
            query[DEFECT], mask[DEFECT] = 1.0, 255
            save(tmp_path / f"masks/lot/{number:02}_mask.png", mask)
        save(tmp_path / f"queries/lot/{number:02}.png", as_bytes(query))
        save(tmp_path / f"references/lot/{number:02}.png", as_bytes(pattern(200 + number, 0.01)))
    return tmp_path


def rows_of(out):
    with (out / "differences.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (out / "differences.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["query"] for row in rows] == [line["query"] for line in lines]
    return lines


def test_a_defect_is_found_where_it_is(pair, tmp_path, run_cli):
    reference, query, mask = pair
    result = run_cli(["diff", reference, query, f"mask={mask}", "out=out"])
    assert result.code == 0, result.err
    (row,) = rows_of(tmp_path / "out")
    assert row["decision"] == "different" and row["regions"] == 1
    left, top, width, height = row["boxes"][0]
    assert abs(left - 60) <= 3 and abs(top - 30) <= 3 and abs(width - 15) <= 5 and abs(height - 12) <= 5
    assert row["precision"] > 0.5 and row["recall"] > 0.5 and row["roc_area"] > 0.8
    assert "against the masks (mean, and over how many pairs): dice" in result.out and "different: " in result.out
    found = np.array(Image.open(tmp_path / "out" / row["mask"])) > 0
    score_map = np.array(Image.open(tmp_path / "out" / row["map"]))
    assert found.shape == score_map.shape == SHAPE and found[DEFECT].mean() > 0.5
    assert Image.open(tmp_path / "out" / row["side_by_side"]).size == (3 * SHAPE[1] + 16, SHAPE[0])
    assert Image.open(tmp_path / "out" / row["overlay"]).size == SHAPE[::-1]
    made = json.loads((tmp_path / "out" / "diff.json").read_text())
    assert made["settings"]["alignment"]["motion"] == "auto" and len(made["fingerprint"]) == 64


def test_equal_images_do_not_differ(pair, tmp_path, run_cli):
    result = run_cli(["diff", pair[0], pair[0], "out=out"])
    assert result.code == 0 and result.out.splitlines()[1] == "same: 0 % of the pixels, 0 regions"


def test_a_shifted_query_is_aligned_and_its_border_hatched(pair, tmp_path, run_cli, save):
    reference, query, _ = pair
    moved = np.roll(np.array(Image.open(query)), (5, -4), (0, 1))
    moved[:5], moved[:, -4:] = 128, 128
    save(tmp_path / "moved.png", moved)
    aligned = run_cli(["diff", reference, "moved.png", "out=aligned"])
    assert aligned.code == 0, aligned.err
    run_cli(["diff", reference, "moved.png", "out=as_it_lies", "alignment.motion=none"])
    (row,), (other,) = rows_of(tmp_path / "aligned"), rows_of(tmp_path / "as_it_lies")
    assert row["motion"] != "identity" and row["verdict"] == "improved"
    np.testing.assert_allclose(np.array(row["matrix"])[:2, 2], (4, -5), atol=0.2)
    assert row["valid_share"] < 1 and other["valid_share"] == 1
    score_map, unmoved = (
        np.array(Image.open(tmp_path / place)) for place in (f"aligned/{row['map']}", f"as_it_lies/{other['map']}")
    )
    assert score_map.mean() < unmoved.mean() / 2
    assert (score_map[:4] == 0).all() and (score_map[:, -3:] == 0).all()
    overlay = np.array(Image.open(tmp_path / "aligned" / row["overlay"]))
    assert set(np.unique(overlay[:4])) == {110, 170}


def test_folders_are_paired_by_name(folders, run_cli):
    words = ["diff", "references", "queries", "mask=masks", "out=out"]
    result = run_cli(words)
    assert result.code == 0, result.err
    rows = rows_of(folders / "out")
    assert [row["decision"] for row in rows] == ["different"] * 3 + ["same"] * 9
    assert "12 pairs: 3 different, 0 unusable" in result.out and "recall 1.000 (3)" in result.out
    assert (folders / "out/maps/lot/00.tiff").is_file() and (folders / "out/side_by_side/lot/11.png").is_file()
    again = run_cli(words)
    assert again.code == 2 and "already holds differences" in again.sentences[0]
    assert run_cli([*words, "overwrite=true"]).code == 0


def test_one_reference_serves_many_queries(folders, run_cli):
    result = run_cli(["diff", "references/lot/03.png", "queries", "out=out"])
    assert result.code == 0 and "12 pairs: 3 different" in result.out


def test_an_interrupted_comparison_goes_on(folders, run_cli, monkeypatch):
    from blemish.difference.outputs import DifferenceFiles

    write, seen = DifferenceFiles.write_images, []

    def interrupted(self, pair, found):
        if len(seen) >= 5:
            raise KeyboardInterrupt
        seen.append(pair.query)
        return write(self, pair, found)

    words = ["diff", "references", "queries", "out=out"]
    monkeypatch.setattr(DifferenceFiles, "write_images", interrupted)
    stopped = run_cli(words)
    assert stopped.code == 130 and "the same command goes on" in stopped.sentences[0]
    monkeypatch.setattr(DifferenceFiles, "write_images", write)
    result = run_cli(words)
    assert result.code == 0 and "before the interruption" in result.out
    assert len(rows_of(folders / "out")) == 12 and not list((folders / "out").glob(".*"))


def test_a_card_is_learned_and_decides(folders, tmp_path, save, run_cli):
    for number in range(19):
        save(tmp_path / f"normal/{number:02}.png", as_bytes(pattern(500 + number, 0.01)))
    learned = run_cli(["diff", "references/lot/00.png", "normal", "learn=true", "out=card", "calibration.alpha=0.05"])
    assert learned.code == 0, learned.err
    assert "from 19 calibration images" in learned.out and (tmp_path / "card/card.json").is_file()
    result = run_cli(["diff", "references/lot/00.png", "queries", "card=card", "out=out"])
    assert result.code == 0, result.err
    rows = rows_of(tmp_path / "out")
    assert [row["decision"] for row in rows[:3]] == ["different"] * 3
    assert all(row["p_value"] == pytest.approx(1 / 20) for row in rows[:3])
    card = json.loads((tmp_path / "card/card.json").read_text())
    assert {row["threshold"] for row in rows} == {card["threshold"]}
    other = run_cli(["diff", "references/lot/00.png", "queries", "card=card", "out=other", "tolerance=0"])
    assert other.code == 2 and "learned with other settings" in other.sentences[0]


def test_too_few_pairs_to_learn_from(folders, run_cli):
    result = run_cli(["diff", "references", "queries", "learn=true", "out=card"])
    assert result.code == 2 and "12 calibration images are too few" in result.sentences[0]
    assert not (folders / "card").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["residual=ssim"],
        ["residual=ms_ssim"],
        ["residual=psnr"],
        ["residual=gradient", "threshold.kind=li"],
        ["residual=l2", "strategy=gradient"],
        ["residual=ssim", "strategy=gradient", "postprocessing.chain=[median,gaussian]"],
        ["preprocessing.chain=[clahe,wavelet]", "threshold.kind=hysteresis"],
        ["preprocessing.chain=[normalise,high_pass]", "threshold.kind=triangle"],
        ["preprocessing.chain=[]", "tolerance=0", "threshold.kind=fixed", "threshold.value=0.2"],
        ["alignment.motion=homography", "alignment.illumination=blocks"],
        ["postprocessing.chain=[opening,closing]", "alignment.motion=translation", "tiling.size=64"],
    ],
    ids=" ".join,
)
def test_every_way_to_compare_finds_the_defect(pair, tmp_path, run_cli, words):
    result = run_cli(["diff", *pair[:2], f"mask={pair[2]}", "out=out", *words])
    assert result.code == 0, result.err
    (row,) = rows_of(tmp_path / "out")
    score_map, mask = (np.array(Image.open(tmp_path / "out" / row[name])) for name in ("map", "mask"))
    around = (slice(26, 46), slice(56, 79))  # gradients and details show at a defect's edge
    assert mask[around].any() and score_map[around].max() > np.quantile(score_map, 0.99)


@pytest.mark.parametrize("bits", ["grey", "colour", "deep", "float"])
def test_modes_and_depths_mix(pair, tmp_path, run_cli, bits):
    reference, query, _ = pair
    pixels = np.array(Image.open(query))
    if bits == "colour":
        Image.fromarray(np.stack([pixels] * 3, 2)).save("other.png")
    elif bits == "deep":
        Image.fromarray(pixels.astype(np.uint16) * 257).save("other.png")
    elif bits == "float":
        Image.fromarray(pixels.astype(np.float32) / 255).save("other.tiff")
    else:
        Image.fromarray(pixels).save("other.png")
    other = "other.tiff" if bits == "float" else "other.png"
    assert run_cli(["diff", reference, query, "out=expected"]).code == 0
    assert run_cli(["diff", reference, other, "out=found"]).code == 0
    maps = [np.array(Image.open(next((tmp_path / out / "maps").iterdir()))) for out in ("expected", "found")]
    np.testing.assert_allclose(maps[0], maps[1], atol=2e-3)


def test_a_larger_picture_of_the_same_thing_is_aligned(pair, tmp_path, run_cli):
    reference, query, _ = pair
    grown = Image.open(reference).resize((SHAPE[1] + 6, SHAPE[0] + 5), Image.Resampling.BICUBIC)
    grown.save("grown.png")
    result = run_cli(["diff", "grown.png", query, "out=out", "alignment.motion=affine"])
    assert result.code == 0, result.err
    (row,) = rows_of(tmp_path / "out")
    assert row["decision"] == "different" and row["share"] < 0.1


def test_another_size_without_a_motion_is_refused(pair, run_cli, save, tmp_path):
    save(tmp_path / "small.png", as_bytes(pattern(3)[:60, :70]))
    result = run_cli(["diff", "small.png", pair[1], "out=out", "alignment.motion=none"])
    assert result.code == 1 and "no motion was found" in result.sentences[0] and "70 x 60" in result.sentences[0]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["missing.png", "query.png"], "The reference"),
        (["reference.png"], "The setting query is missing"),
        (["reference.png", "query.png", "mask.png"], "Expected settings as KEY=VALUE"),
        (["reference.png", "query.png", "threshold.kind=atsu"], "did you mean 'otsu'"),
        (["reference.png", "query.png", "threshold.kind=noise", "residual=ssim"], "threshold.kind=otsu"),
        (["reference.png", "query.png", "preprocessing.chain=[blur]"], "Unknown filter 'blur'"),
        (["reference.png", "query.png", "tolerance=-1"], "tolerance"),
        (["reference.png", "query.png", "card=nowhere"], "card= takes the folder that learn=true made"),
        (["reference.png", "query.png", "image.channels=2"], "image.channels"),
        (["reference.png", "query.png", "strategy=differnce"], "difference"),
        (["reference.png", "query.png", "alignment.motion=afine"], "affine"),
        (["reference.png", "query.png", "strategy=siamese"], "strategy.run is not set"),
        (["reference.png", "query.png", "strategy=siamese", "strategy.run=nowhere"], "No detector found at nowhere"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_mistakes_get_one_sentence(pair, tmp_path, run_cli, words, sentence):
    result = run_cli(["diff", *words, "out=out"])
    assert result.code == 2 and len(result.sentences) == 1, result.err
    assert sentence in result.sentences[0] and "Traceback" not in result.err
    assert not (tmp_path / "out").exists()


def test_a_bad_image_costs_its_own_pair_only(folders, run_cli):
    (folders / "queries/lot/05.png").write_bytes(b"")
    (folders / "masks/lot/01_mask.png").write_bytes(b"no image")
    result = run_cli(["diff", "references", "queries", "mask=masks", "out=out"])
    assert result.code == 1 and "12 pairs: 2 different, 2 unusable" in result.out
    assert len(result.sentences) == 2 and "05.png" in "".join(result.sentences)


def test_a_query_without_a_reference(folders, run_cli):
    (folders / "references/lot/04.png").unlink()
    result = run_cli(["diff", "references", "queries", "out=out"])
    assert result.code == 2 and "1 of 12 queries have no reference" in result.sentences[0]


def test_a_run_is_not_written_over(pair, run_copy, run_cli):
    card = (run_copy / "card.json").read_text()
    for words in ([], ["learn=true", "overwrite=true"]):
        result = run_cli(["diff", *pair[:2], f"out={run_copy}", *words])
        assert result.code == 2 and "holds a run (run.json)" in result.sentences[0]
    assert (run_copy / "card.json").read_text() == card


def test_results_go_nowhere_near_the_inputs(folders, run_cli):
    before = {path: path.read_bytes() for path in sorted((folders / "masks").rglob("*.png"))}
    result = run_cli(["diff", "references", "queries", "mask=masks", "out=."])
    assert result.code == 2 and "where the results would go" in result.sentences[0]
    assert {path: path.read_bytes() for path in sorted((folders / "masks").rglob("*.png"))} == before


def test_results_are_no_inputs(folders, run_cli):
    assert run_cli(["diff", "references/lot/03.png", "queries", "out=queries/results"]).code == 0
    assert "12 pairs" in run_cli(["diff", "references/lot/03.png", "queries", "out=out"]).out


def interrupt(run_cli, monkeypatch, words):
    from blemish.difference.outputs import DifferenceFiles

    write = DifferenceFiles.write_images

    def until_the_seventh(self, pair, found):
        if pair.query.stem == "07":
            raise KeyboardInterrupt
        return write(self, pair, found)

    with monkeypatch.context() as patch:
        patch.setattr(DifferenceFiles, "write_images", until_the_seventh)
        assert run_cli(words).code == 130


def test_an_unfinished_comparison_goes_on_with_its_own_settings_and_images_only(folders, run_cli, monkeypatch):
    words = ["diff", "references", "queries", "out=out"]
    interrupt(run_cli, monkeypatch, words)
    for other in (["threshold.kind=fixed"], ["cleaning.min_area=500"], ["mask=masks"]):
        result = run_cli([*words, *other])
        assert result.code == 2 and "unfinished differences of other images, settings or card" in result.sentences[0]
    (folders / "queries/lot/00.png").unlink()
    result = run_cli(words)
    assert result.code == 2 and "unfinished differences of other images" in result.sentences[0]


def test_a_card_lies_beside_what_rests_on_it_only(folders, tmp_path, save, run_cli):
    for number in range(19):
        save(tmp_path / f"normal/{number:02}.png", as_bytes(pattern(500 + number, 0.01)))
    words = ["diff", "references/lot/00.png", "normal"]
    assert run_cli([*words, "out=out"]).code == 0
    refused = run_cli([*words, "learn=true", "out=out"])
    assert refused.code == 2 and "holds differences" in refused.sentences[0]
    assert run_cli([*words, "learn=true", "out=card"]).code == 0
    refused = run_cli([*words, "out=card"])
    assert refused.code == 2 and "holds a card" in refused.sentences[0]
    region = ["calibration.mask_rule=region", "calibration.region_area=99999"]
    refused = run_cli([*words, "learn=true", "out=other", *region])
    assert refused.code == 2 and "no mask could ever break the rule" in refused.sentences[0]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["threshold.kind=fixed", "threshold.value=inf"], "finite"),
        (["preprocessing.sigma=1e6"], "at most 256"),
        (["tolerance=60000"], "0 to 64"),
        (["postprocessing.radius=60000"], "1 to 256"),
        (["learn=true", "mask=mask.png"], "leave mask= out"),
    ],
    ids=str,
)
def test_numbers_out_of_range(pair, run_cli, words, sentence):
    result = run_cli(["diff", *pair[:2], "out=out", *words])
    assert result.code == 2 and sentence in result.sentences[0]


def test_masks_of_nothing(folders, run_cli):
    for path in sorted((folders / "masks/lot").iterdir()):
        path.rename(path.with_name(f"x{path.name}"))
    result = run_cli(["diff", "references", "queries", "mask=masks", "out=out"])
    assert result.code == 2 and "None of the 3 masks" in result.sentences[0]


def test_a_word_without_a_name_takes_the_place_that_is_left(pair, tmp_path, run_cli):
    assert run_cli(["diff", f"reference={pair[0]}", pair[1], "out=out"]).code == 0
    assert rows_of(tmp_path / "out")[0]["reference"] == str(pair[0])

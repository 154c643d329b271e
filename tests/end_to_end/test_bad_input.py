"""Every mistake is one sentence and exit code 2; nothing is left behind."""

from __future__ import annotations

import errno
import gc
import re
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("in_tmp")

FEW = "train data.root={world}/few {tiny} "
PREDICT = "predict run={run} input={world}/few "
TABLE = [
    # the command
    ("trian data.root={world}/few", "no verb 'trian': did you mean 'train'"),
    (FEW + "foo", "KEY=VALUE, found 'foo'"),
    (FEW + "modle=vae", "no setting 'modle'"),
    ("train model.latent_dim=4 model=conv_ae modle=vae", "no setting 'modle'"),  # not latent_dim, which conv_ae has
    (FEW + "training.step=5", "did you mean 'training.steps'"),
    (FEW + "model.nope=3", "no setting 'model.nope'"),
    (FEW + "+model.nope=3", "nope"),
    (FEW + "model=vaee", "no model 'vaee': did you mean 'vae'"),
    (FEW + "residual=ssmi", "did you mean 'ssim'"),
    (FEW + "trainer=gpuu", "did you mean 'gpu'"),
    (FEW + "model=conv_ae,vae", "add --multirun"),
    (FEW + "training.steps=2,4", "add --multirun"),
    (FEW + "model.width=[", "model.width=["),
    (FEW + "model._target_=nowhere.Model", "cannot be imported"),
    # what is missing
    ("train", "data.root is missing"),
    ("train data.root=", "data.root"),
    ("check", "data.root is missing"),
    ("predict input={world}/few", "run is missing"),
    ("predict run={run}", "input is missing"),
    ("evaluate", "run is missing"),
    ("calibrate", "run is missing"),
    ("compare", "dir is missing"),
    # folders and files
    ("train data.root={world}/missing", "does not exist"),
    ("train data.root={world}/empty", "No image found"),
    ("train data.root={world}/file.png", "Expected a folder of images, found a file"),
    ("train data=mvtec data.root={world}/missing", "does not exist"),
    ("train data=mvtec data.root={world}/few", "data=folder"),
    ("train data=mvtec data.root={world}/no_train", "No image found"),
    ("train data=manifest data.root={world}/few", "Manifest"),
    ("train data=folder data.root={data}", "data=mvtec"),
    ("train resume={world}/few", "Nothing to resume"),
    (FEW + "out={world}/busy", "exists and is not empty"),
    (FEW + "out={world}/file.png", "exists and is not empty"),
    (FEW + "out={world}/file.png/run", "Cannot write"),
    ("check {world}/missing", "does not exist"),
    ("check {world}/empty", "No image found"),
    ("compare {world}/few", "No run found"),
    ("compare {world}/missing", "No run found"),
    ("predict run={world}/few input={world}/few", "No detector found"),
    ("predict run={world}/missing input={world}/few", "No detector found"),
    ("predict run={run} input={world}/missing", "does not exist"),
    ("predict run={run} input={world}/empty", "No image found"),
    ("predict run={run} input={world}/notes.txt", "is no image"),
    ("predict run={run} input=[]", "No input was given"),
    (PREDICT + "out={world}/file.png", "Cannot write"),
    (PREDICT + "device=nonsense", "device 'nonsense'"),
    ("evaluate run={world}/few", "No detector found"),
    ("evaluate run={run} data=folder data.root={world}/few", "no test images"),
    ("evaluate run={run} data.root={world}/missing", "does not exist"),
    ("calibrate run={world}/few data.root={world}/few", "No detector found"),
    ("calibrate run={run} data.root={world}/missing", "does not exist"),
    ("calibrate run={run} data.root={data}/train/good", "took part in training"),
    ("calibrate run={run} calibration.alpha=0", "calibration.alpha between 0 and 1"),
    ("calibrate run={run} calibration.alpha=0.01", "needs 99 (marginal) or 299 (pac"),
    # images
    ("train data.root={world}/mixed {tiny}", "mix grey"),
    ("train data=manifest data.root={world}/train.csv {tiny}", "3 of 17 images"),
    ("train data=manifest data.root={world}/train.csv {tiny}", "broken/3.png: "),
    ("train data=manifest data.root={world}/validation.csv {tiny}", "0 bytes"),
    ("train data=manifest data.root={world}/calibration.csv {tiny}", "0 bytes"),
    # the promise
    (FEW + "calibration.alpha=0", "calibration.alpha between 0 and 1, found 0"),
    (FEW + "calibration.alpha=1", "calibration.alpha between 0 and 1, found 1"),
    (FEW + "calibration.alpha=-0.1", "calibration.alpha between 0 and 1"),
    (FEW + "calibration.alpha=null", "calibration.alpha"),
    (FEW + "calibration.delta=2", "calibration.delta between 0 and 1"),
    (FEW + "calibration.rule=packed", "calibration.rule to be one of marginal, pac"),
    (FEW + "calibration.mask_rule=nope", "calibration.mask_rule to be one of any_pixel"),
    (FEW + "calibration.tau=2", "calibration.tau in [0, 1), found 2"),
    (FEW + "calibration.tau=-0.1", "calibration.tau in [0, 1), found -0.1"),
    (FEW + "calibration.tau=much", "calibration.tau expects a number"),
    (FEW + "calibration.region_area=0", "calibration.region_area >= 1, found 0"),
    (FEW + "calibration.region_area=2.5", "calibration.region_area expects a whole number"),
    (FEW + "normalisation.kind=x", "normalisation.kind to be one of none, robust, mean_std, found 'x'"),
    (FEW + "normalisation.source=calibration", "normalisation.source to be one of validation, train"),
    (FEW + "normalisation.images=1", "normalisation.images >= 2, found 1"),
    (FEW + "normalisation.kin=robust", "did you mean 'normalisation.kind'"),
    ("train data.root={world}/unequal {tiny} normalisation.kind=robust", "aligned images of equal size"),
    ("train data.root={data}/train out={world}/a::b", "without '::' in its path"),
    ("train data.root=[a]", "data.root expects text"),
    ("train data.root={data}/train model=nearest model.seed=abc", "model.seed expects a whole number, found 'abc'"),
    ("train data.root={data}/train out=[a]", "out expects text"),
    ("train data.root={data}/train --resolve", "do not go together"),
    ("train data.root={data}/train --multirun --cfg job", "do not go together"),
    ("predict run={run} input={data} device=null", "device expects text, found nothing"),
    ("predict run=[a] input={data}", "run expects text"),
    ("calibrate run={run} calibration.mask_rule=nope", "calibration.mask_rule to be one of any_pixel"),
    ("calibrate run={run} calibration.mask_rule=area_fraction calibration.tau=1", "calibration.tau in [0, 1)"),
    ("calibrate run={run} calibration.region_area=many", "calibration.region_area"),
    (PREDICT + "fdr=2", "fdr between 0 and 1, found 2"),
    (PREDICT + "fdr=0", "fdr between 0 and 1, found 0"),
    (PREDICT + "fdr=few", "fdr between 0 and 1, found few"),
    (PREDICT + "report.images=-1", "report.images >= 0, found -1"),
    (FEW + "report.images=-1", "report.images >= 0, found -1"),
    ("evaluate run={run} report.images=-1", "report.images >= 0, found -1"),
    (FEW + "training.learning_rate=nan", "training.learning_rate expects a finite number, found 'nan'"),
    (
        FEW + "tiling.size=16 model.depth=4 training.batch_size=1",
        "one place to normalise over",
    ),
    (FEW + "smoothing.sigma=inf", "smoothing.sigma expects a finite number, found 'inf'"),
    (
        "train data.root={world}/few calibration.alpha=0.3 model=golden_template score=flips",
        "TemplateBank learns each place of an image by itself",
    ),
    (
        "train data.root={world}/few calibration.alpha=0.3 model=kde backbone=run backbone.run={world}/ü,(1)",
        "ü,(1) cannot be used: No detector found",
    ),
    ("monitor run={run}", "input is missing"),
    ("monitor run={run} input={world}/missing", "does not exist"),
    ("monitor run={run} input={data}/train/good state={world}/m.jsonl", "took part in training"),
    ("monitor run={run} input={data}/test/good state={world}/notes.txt", "notes.txt"),
    ("monitor run={run} input={data}/test/good level=2", "level between 0 and 1, found 2"),
    ("monitor run={run} input={data}/test/good order=random", "order to be shuffled or name"),
    ("report", "run is missing"),
    ("report run={world}/few", "card.json"),
    ("report {world}/missing", "card.json"),
    (
        "train data.root={world}/few calibration.alpha=0.01",
        "15 calibration images are too few for alpha = 0.01 (marginal): it needs 99",
    ),
    (FEW + "calibration.rule=pac", "it needs 9 (marginal) or 29 (pac"),
    (FEW + "split.validation=0", "split.validation"),
    (FEW + "split.calibration=2", "split.calibration"),
    # numbers and names
    (FEW + "training.steps=abc", "training.steps"),
    (FEW + "training.steps=", "training.steps"),
    (FEW + "training.steps=null", "training.steps"),
    (FEW + "training.steps=0", "training.steps to be positive"),
    (FEW + "training.steps=5", "multiple of training.steps_per_epoch"),
    (FEW + "training.steps=4.5", "training.steps"),
    (FEW + "training.batch_size=0", "training.batch_size"),
    (FEW + "training.batch_size=many", "expects a whole number or auto"),
    ("train data.root={world}/few model=ganomaly calibration.alpha=0.1 training.batch_size=auto", "set a number"),
    (FEW + "training.learning_rate=-1", "training.learning_rate"),
    (FEW + "training.learning_rate=fast", "training.learning_rate"),
    (FEW + "training.workers=-1", "training.workers"),
    (FEW + "training.patience=0", "training.patience"),
    (FEW + "training.max_tiles=0", "training.max_tiles >= 1 or null"),
    (FEW + "training.channels_last=3", "training.channels_last"),
    (FEW + "training.cache_gb=-1", "training.cache_gb"),
    (FEW + "seed=abc", "seed"),
    (FEW + "seed=-1", "seed"),
    (FEW + "tiling.size=30", "multiple of 4, such as 32"),
    (FEW + "model.depth=4 tiling.size=100", "multiple of 16, such as 96"),
    (FEW + "tiling.size=0", "tiling.size >= 1"),
    (FEW + "+image.foo=3", "foo"),
    (FEW + "tiling.overlap=1", "tiling.overlap"),
    (FEW + "tiling.batch=0", "tiling.batch"),
    (FEW + "smoothing.sigma=-1", "smoothing.sigma"),
    (FEW + "cleaning.min_area=0", "cleaning.min_area"),
    (FEW + "image.channels=2", "channels 1 (grey) or 3 (colour), found 2"),
    (FEW + "image.max_side=0", "image.max_side"),
    (FEW + "model.normalisation=bach", "did you mean 'batch'"),
    (FEW + "model.activation=rely", "did you mean 'relu'"),
    (FEW + "model.latent=flatt", "did you mean 'flat'"),
    (FEW + "model.width=0", "model.width"),
    (FEW + "model.depth=0", "model.depth"),
    (FEW + "objective.beta=-1", "objective.beta"),
    (FEW + "corruption.std=-1", "corruption.std"),
    (FEW + "residual=ms_ssim", "larger tiles or fewer scales"),
    (FEW + "residual=ms_ssim residual.scales=9", "residual.scales"),
    (FEW + "residual=l1_ssim residual.weights=[1]", "one weight >= 0 per residual"),
    (FEW + "augment.transforms=[{HorizontalFlop:{}}]", "did you mean 'HorizontalFlip'"),
    (FEW + "augment.transforms=[{HorizontalFlip:{p:7}}]", "HorizontalFlip"),
    (FEW + "trainer.accelerator=gpux", "gpux"),
    (FEW + "trainer.precision=7", "precision"),
    (FEW + "trainer.devices=0", "devices"),
    (FEW + "trainer.nonsense=1", "no setting 'trainer.nonsense'"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory, save, texture):
    """Folders with something wrong in each."""
    root = tmp_path_factory.mktemp("world")
    for name in ("empty", "busy", "no_train/train/good"):
        (root / name).mkdir(parents=True)
    (root / "busy/thesis.txt").write_text("do not lose me")
    (root / "notes.txt").write_text("x")
    save(root / "file.png", texture(0))
    for number in range(30):
        for folder in ("few", "mixed"):
            save(root / f"{folder}/{number:03d}.png", texture(number))
        save(root / f"unequal/{number:03d}.png", texture(number, (40, 48) if number else (40, 49)))
    save(root / "mixed/010.png", np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8))
    for number in (3, 4, 5):
        broken = save(root / f"broken/{number}.png", texture(100 + number))
        broken.write_bytes(broken.read_bytes()[: 500 + number])
    (root / "broken/empty.png").write_bytes(b"")
    parts = ["train"] * 14 + ["validation"] * 4 + ["calibration"] * 12
    rows = [f"few/{number:03d}.png,good,{part}" for number, part in enumerate(parts)]
    broken = {"train": ["3", "4", "5"], "validation": ["empty"], "calibration": ["empty"]}
    for part, names in broken.items():
        lines = ["path,label,split", *rows, *(f"broken/{name}.png,good,{part}" for name in names)]
        (root / f"{part}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def assert_one_sentence(result, fragment):
    assert result.code == 2, result
    assert len(result.sentences) == 1, result.err
    assert fragment in result.sentences[0]
    assert "Traceback" not in result.err and "HYDRA_FULL_ERROR" not in result.err
    assert result.err.endswith(result.sentences[0] + "\n")


def rows():
    """Numbers out of range all take the same way to the user; of those, a few are enough for every day."""
    number = re.compile(r".* \w+\.\w+=[-\d.]+$")
    plain = [place for place, (row, _) in enumerate(TABLE) if number.fullmatch(row)]
    for place, (row, fragment) in enumerate(TABLE):
        marks = [pytest.mark.slow] if place in plain and place % 5 else []
        yield pytest.param(row, fragment, marks=marks, id=f"{row} | {fragment}")


@pytest.mark.parametrize(("command", "fragment"), rows())
def test_mistake_is_one_sentence_and_leaves_nothing(
    command, fragment, world, tiny, tiny_run, tiny_data, run_cli, tmp_path
):
    command = command.replace("{tiny}", " ".join(tiny))
    words = [_filled(word, world=world, run=tiny_run, data=tiny_data) for word in command.split()]
    before = sorted(world.rglob("*"))
    assert_one_sentence(run_cli(words), fragment)
    assert list(tmp_path.iterdir()) == []
    assert sorted(world.rglob("*")) == before


def _filled(word, **paths):
    for name, path in paths.items():
        word = word.replace("{" + name + "}", str(path))
    return word


def test_settings_that_do_not_resolve_are_one_sentence(run_cli, world, tiny):
    words = ["train", f"data.root={world / 'few'}", *tiny, "model.width=${nowhere}"]
    assert_one_sentence(run_cli(words), "nowhere")


def full_disk(*arguments, **keywords):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("writer", ["PIL.Image.Image.save", "pathlib.Path.write_bytes"])
def test_full_disk_ends_a_prediction_in_one_sentence(run_cli, tiny_run, world, monkeypatch, tmp_path, writer):
    monkeypatch.setattr(writer, full_disk)
    result = run_cli(["predict", f"run={tiny_run}", f"input={world / 'few'}", "out=out"])
    assert_one_sentence(result, "the disk is full")
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "out/predictions.csv").exists()


def test_full_disk_ends_a_training_in_one_sentence(run_cli, world, tiny, monkeypatch):
    monkeypatch.setattr("pytorch_lightning.trainer.trainer.Trainer.save_checkpoint", full_disk)
    result = run_cli(["train", f"data.root={world / 'few'}", "out=run", *tiny])
    assert_one_sentence(result, "the disk is full")
    gc.collect()  # Lightning's bars stay open in a reference cycle, and would move those of later tests down a line


def limit_files_to(size):
    import resource

    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits there")
def test_file_that_grows_too_large_is_one_sentence(spawn_cli, world, tiny, tmp_path):
    words = ["train", f"data.root={world / 'few'}", "out=run", *tiny]
    result = spawn_cli(words, preexec_fn=limit_files_to(20_000), cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert [line.startswith("blemish: Cannot write") for line in result.stderr.splitlines()].count(True) == 1
    assert "Traceback" not in result.stderr


def test_target_without_permission_is_one_sentence(run_cli, tiny_run, world, tiny, read_only_folder):
    words = ["predict", f"run={tiny_run}", f"input={world / 'few'}", f"out={read_only_folder / 'out'}"]
    assert_one_sentence(run_cli(words), "no permission")
    words = ["train", f"data.root={world / 'few'}", f"out={read_only_folder / 'run'}", *tiny]
    assert_one_sentence(run_cli(words), "no permission")


def test_unreadable_file_is_one_sentence(run_cli, world, tiny, monkeypatch):
    open_path = Path.open

    def denied(self, *arguments, **keywords):
        if self.is_relative_to(world):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return open_path(self, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", denied)
    result = run_cli(["train", f"data.root={world / 'few'}", *tiny])
    assert result.code == 2 and len(result.sentences) == 1 and "few/000.png" in result.sentences[0]
    assert "Error executing job" not in result.err


@pytest.mark.slow
def test_diagnosis_reaches_a_process_without_traceback(spawn_cli, tmp_path):
    result = spawn_cli(["train", "data.root=missing"], cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("blemish: ") and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []

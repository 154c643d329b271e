"""Every file in configs composes, and fits the code that it names."""

import inspect
from pydoc import locate

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pytorch_lightning import Trainer

from blemish.build import build
from blemish.commands import ACTIONS
from blemish.difference.build import build_comparison
from blemish.errors import ConfigError
from blemish.settings import config_folder

GROUPS = ("model", "backbone", "residual", "score", "corruption", "augment", "data", "trainer", "sweep", "strategy")
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((config_folder() / group).glob("*.yaml"))]
MASK_SETTINGS = ("mask_rule", "tau", "region_area")
every_option = pytest.mark.parametrize(("group", "option"), OPTIONS, ids=[f"{g}-{o}" for g, o in OPTIONS])


def targets(config, where=""):
    """Each part of a config that names a target, with the place where it stands."""
    if isinstance(config, dict):
        if "_target_" in config:
            yield where, config
        for key, value in config.items():
            yield from targets(value, f"{where}.{key}")
    elif isinstance(config, list):
        for position, value in enumerate(config):
            yield from targets(value, f"{where}[{position}]")


def assert_fits(config):
    for where, part in targets(config):
        target = locate(part["_target_"])
        assert callable(target), f"{where}: there is no {part['_target_']}"
        inspect.signature(target).bind(**{key: value for key, value in part.items() if key != "_target_"})


def test_every_folder_of_options_is_covered():
    assert sorted(path.name for path in config_folder().iterdir() if path.is_dir()) == sorted(GROUPS)
    assert {group for group, _ in OPTIONS} == set(GROUPS)


@every_option
def test_option_composes_and_fits_its_target(settings, group, option):
    verb = "diff" if group == "strategy" else "train"
    composed = settings(f"{group}={option}", "image.channels=1", verb=verb)
    own = written(group, option)
    assert composed[group].keys() == own.keys()
    assert composed[group].get("_target_") == own.get("_target_")
    assert_fits(composed)


def written(group, option):
    """The settings in an option's file, and in the file that it begins with, if there is one."""
    text = (config_folder() / group / f"{option}.yaml").read_text("utf-8")
    content = yaml.safe_load(text)
    own = dict(content[group] if text.startswith("# @package _global_") else content)  # settings of other groups, too
    for part in own.pop("defaults", ()):
        if isinstance(part, dict):  # an option of another group, or of this one, inside
            own |= {key.partition("@")[2]: None for key in part if "@" in key}
        elif part != "_self_":
            own = written(group, part) | own
    return own


@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == "model"])
def test_another_score_than_the_models_own_can_be_chosen(settings, option):
    chosen = settings(f"model={option}", "score=residual", "image.channels=1")["score"]
    assert chosen.keys() == settings("score=residual", "image.channels=1")["score"].keys()


@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == "residual"])
def test_training_and_scoring_use_the_residual_that_was_chosen(settings, option):
    composed = settings(f"residual={option}", "score=residual", "image.channels=1")
    assert composed["objective"]["residual"] == composed["score"]["residual"] == composed["residual"]


@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == "residual"])
def test_a_difference_uses_the_residual_that_was_chosen(settings, installed, option):
    composed = settings(f"residual={option}", verb="diff")
    assert composed["strategy"]["residual"] == composed["residual"]
    with installed():
        assert build_comparison(composed).threshold.kind == ("noise" if option == "l1" else "otsu")


OF_GRADIENTS = ("repair", "repaired")


@pytest.mark.parametrize(
    "option", [option for group, option in OPTIONS if group == "score" and option not in OF_GRADIENTS]
)
def test_every_score_uses_the_residual_that_was_chosen(settings, option):
    """But for two, which say why."""
    composed = settings(f"score={option}", "residual=ms_ssim", "image.channels=1")
    parts = [part for _, part in targets(composed["score"])]
    assert all(part["residual"] == composed["residual"] for part in parts if "residual" in part)
    own = yaml.safe_load((config_folder() / "score" / f"{option}.yaml").read_text("utf-8"))
    assert all(part["_target_"].startswith("blemish.scores.") for _, part in targets(own)), "write ${residual}"


@pytest.mark.parametrize("option", ["flips", "multi_scale", "noise_draws"])
@pytest.mark.parametrize("inner", ["repaired", "repair_mask", "elbo"])
def test_an_inner_score_is_chosen_by_its_name(settings, option, inner):
    composed = settings(f"score={option}", f"score@score.score={inner}", "image.channels=1")["score"]
    assert composed["score"] == settings(f"score={inner}", "image.channels=1")["score"]
    build(composed, where="score")


def test_an_unknown_inner_score_is_named(settings):
    with pytest.raises(ConfigError, match=r"There is no score@score\.score 'repeired': did you mean 'repaired'"):
        settings("score=flips", "score@score.score=repeired")


@pytest.mark.parametrize("model", ["gaussian", "isolation_forest", "kde"])
def test_a_projection_can_be_left_out(settings, model):
    chosen = settings(f"model={model}", "model.projection=none", "model.dimensions=null", "image.channels=1")["model"]
    assert (chosen["projection"], chosen["dimensions"]) == ("none", None)


@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == "model"])
@pytest.mark.parametrize("channels", [1, 3])
def test_models_follow_the_channels_and_the_tiles(settings, option, channels):
    model = settings(f"model={option}", f"image.channels={channels}", "tiling.size=96")["model"]
    assert model.get("channels", channels) == channels
    assert model.get("tile_size", 96) == 96


def test_a_model_brings_what_fits_it_and_the_command_line_wins(settings):
    plain = settings("image.channels=1")
    fitting = settings("model=feature_ae", "image.channels=1")
    assert fitting["score"]["_target_"].endswith("ResidualScore") and fitting["residual"]["_target_"].endswith("L2")
    assert (fitting["image"]["size"], plain["image"]["size"]) == (256, None)
    words = ("score=recursive", "residual=l1", "image.size=128", "tiling.standardise=true")
    for chosen in (settings("model=feature_ae", *words), settings(*words, "model=feature_ae")):
        assert chosen["score"]["_target_"].endswith("RecursiveScore")
        assert chosen["residual"]["_target_"].endswith("L1")
        assert chosen["image"]["size"] == 128 and chosen["tiling"]["standardise"]


@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == "trainer"])
def test_trainers_know_their_arguments(settings, option):
    assert (
        settings(f"trainer={option}", "image.channels=1")["trainer"].keys()
        <= inspect.signature(Trainer).parameters.keys()
    )


@pytest.mark.parametrize("group", ["corruption", "augment"])
def test_options_without_side_effects_build(settings, group):
    for option in [option for of_group, option in OPTIONS if of_group == group]:
        assert callable(build(settings(f"{group}={option}", "image.channels=1")[group], where=group))


def test_there_is_a_config_for_every_verb_and_no_other():
    assert {path.stem for path in config_folder().glob("*.yaml")} == set(ACTIONS)


@pytest.mark.parametrize("verb", sorted(ACTIONS))
def test_verb_composes_and_fits_its_targets(verb):
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose(verb)
    assert_fits(OmegaConf.to_container(config, resolve=True))


def test_settings_fit_the_classes_they_are_handed_to(settings):
    from blemish.calibration import Promise, read_settings
    from blemish.normalisation import NormalisationSettings
    from blemish.postprocess import Cleaning, Smoothing
    from blemish.preprocess import Preprocess
    from blemish.tiling import Tiling
    from blemish.training.fit import TrainingSettings

    composed = settings("data=folder", "image.channels=1", "tiling.size=128")
    calibration = composed["calibration"]
    promise, mask_rule = read_settings(calibration)
    assert vars(mask_rule) == {key.replace("mask_rule", "name"): calibration.pop(key) for key in MASK_SETTINGS}
    assert vars(promise) == calibration
    for kind, arguments in (
        (Promise, calibration),
        (NormalisationSettings, composed["normalisation"]),
        (Cleaning, composed["cleaning"]),
        (Smoothing, composed["smoothing"]),
        (Preprocess, composed["image"]),
        (Tiling, composed["tiling"]),
        (TrainingSettings, composed["training"]),
    ):
        assert vars(kind(**arguments)) == arguments

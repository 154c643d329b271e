"""What every residual in configs/residual promises; a new file joins by itself."""

import pytest
import torch

from blemish.build import TRUSTED, build
from blemish.errors import ConfigError
from blemish.residuals import Residual
from blemish.settings import config_folder

NAMES = sorted(path.stem for path in (config_folder() / "residual").glob("*.yaml"))
every_residual = pytest.mark.parametrize("name", NAMES)
every_channels = pytest.mark.parametrize("channels", [1, 3])
SIZE = 64


@pytest.fixture
def make(settings, installed):
    def build_residual(name):
        with installed():
            return build(settings(f"residual={name}", "image.channels=1")["residual"], TRUSTED, "residual")

    return build_residual


def images(channels=1, size=(SIZE, SIZE)):
    return torch.rand(2, 2, channels, *size, generator=torch.Generator().manual_seed(0))


@every_residual
def test_builds_a_residual_without_weights(make, name):
    residual = make(name)
    assert isinstance(residual, Residual)
    assert list(residual.parameters()) == []
    assert all(value.numel() == 1 for value in residual.state_dict().values())  # fingerprints of what is frozen


@every_residual
@every_channels
@pytest.mark.parametrize("size", [(64, 64), (64, 97)])
def test_shape_sign_and_type(make, name, channels, size):
    result = make(name)(*images(channels, size))
    assert result.shape == (2, 1, *size)
    assert result.dtype == torch.float32
    assert result.min() >= 0
    assert torch.isfinite(result).all()
    assert result.mean() > 0.01


@every_residual
@every_channels
def test_zero_where_equal(make, name, channels):
    x, _ = images(channels)
    assert (make(name)(x, x.clone()) == 0).all()


@every_residual
def test_images_of_a_batch_do_not_mix(make, name):
    x, y = images()
    residual = make(name)
    together = residual(x, y)
    alone = torch.cat([residual(a[None], b[None]) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@every_residual
def test_both_orders_give_the_same(make, name):
    x, y = images()
    residual = make(name)
    torch.testing.assert_close(residual(x, y), residual(y, x), atol=1e-5, rtol=0)


@every_residual
@pytest.mark.parametrize("kind", ["random", "equal", "flat", "black and white"])
def test_gradient_is_finite(make, name, kind):
    x, y = {
        "random": images(3),
        "equal": images(3)[[0, 0]],
        "flat": torch.full((2, 2, 3, SIZE, SIZE), 0.5),
        "black and white": torch.stack([torch.zeros(2, 3, SIZE, SIZE), torch.ones(2, 3, SIZE, SIZE)]),
    }[kind]
    y = y.clone().requires_grad_()
    make(name)(x, y).mean().backward()
    assert torch.isfinite(y.grad).all()
    assert kind != "random" or y.grad.any()


@every_residual
def test_descent_brings_the_images_together(make, name):
    x, y = images()
    y = y.clone().requires_grad_()
    residual = make(name)
    before = residual(x, y).mean()
    optimizer = torch.optim.Adam([y], 0.02)
    for _ in range(20):
        optimizer.zero_grad()
        residual(x, y).mean().backward()
        optimizer.step()
    assert residual(x, y).mean() < 0.9 * before


@every_residual
@pytest.mark.parametrize("size", [1, 2, 3, 5, 11])
def test_tiny_tiles_work_or_are_refused_in_words(make, name, size):
    x, y = images(size=(size, size))
    try:
        result = make(name)(x, y)
    except ConfigError as refusal:
        assert "use larger tiles or fewer scales" in str(refusal)
    else:
        assert result.shape == (2, 1, size, size)
        assert torch.isfinite(result).all()

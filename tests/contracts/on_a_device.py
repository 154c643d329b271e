"""Parts on a pretended device, compared with the CPU. A process of its own (see `test_on_a_device.py`).

    python on_a_device.py model=NAME score=NAME residual=NAME corruption=NAME ...

Prints a line for each: "model=NAME: fine", or what went wrong, or "needs ..." where a package is missing.
"""

import sys
import traceback
from copy import deepcopy

import pretended_device  # before blemish, which takes torch as it finds it
import test_models as models
import test_score_contract as scores
import torch

from blemish.build import TRUSTED, build
from blemish.errors import ConfigError
from blemish.models.contracts import Fittable
from blemish.scores.contracts import FittableScore, learning_parts
from blemish.scores.engine import TorchScorer
from conftest import composed

DRAWN_THERE = ("siamese", "monte_carlo", "noise_draws")  # a device has random numbers of its own


def settings(*overrides):
    return deepcopy(composed("train", *overrides))


def check_model(name):
    """It learns there what it learns here, shows there what it shows here, and gradients reach its parameters."""
    fresh = models.fresh(settings, name)
    outputs = []
    for device in ("cpu", pretended_device.NAME):
        torch.manual_seed(0)
        model = models.learned(deepcopy(fresh).to(device), device=device)
        if not isinstance(model, Fittable):
            models.everything(model.train()(models.tiles(seed=2).to(device))).backward()
            assert all(part.grad.device.type == device for part in model.parameters() if part.grad is not None)
        outputs.append([part.cpu() for part in models.evaluated(model, models.tiles(seed=3).to(device))])
    compare(name, *outputs)


def check_score(name):
    """It learns there what it learns here, and gives there what it gives here."""
    score, fitting = scores.build_fitting(settings, name)
    outputs = []
    for device in ("cpu", pretended_device.NAME):
        model, own = deepcopy(fitting).to(device), deepcopy(score)
        own = own.to(device) if isinstance(own, torch.nn.Module) else own
        for part in learning_parts(own):
            part.learn(model, [scores.tiles(count=8, seed=5).to(device)])
        if isinstance(own, FittableScore):
            own.fit(model, [scores.tiles(count=8, seed=6).to(device)])
        torch.manual_seed(0)
        outputs.append([torch.from_numpy(TorchScorer(model, own, device)(scores.tiles(seed=7).numpy()))])
    compare(name, *outputs)


def check_residual(name):
    residual = build(settings(f"residual={name}", "image.channels=1")["residual"], TRUSTED, "residual")
    observed, expected = models.tiles(seed=1), models.tiles(seed=2)
    there = residual.to(pretended_device.NAME)(observed.to(pretended_device.NAME), expected.to(pretended_device.NAME))
    compare(name, [residual.to("cpu")(observed, expected)], [there.cpu()])


def check_corruption(name):
    """What is drawn differs, but it is drawn there."""
    corruption = build(settings(f"corruption={name}", "image.channels=1")["corruption"], where="corruption")
    clean = models.tiles()
    corrupted = corruption(clean.to(pretended_device.NAME))
    assert all(part.device.type == pretended_device.NAME for part in corrupted)
    image, target, mask = (part.cpu() for part in corrupted)
    assert image.shape == target.shape == clean.shape and mask.shape == clean[:, :1].shape
    assert torch.isfinite(image).all() and ((mask == 0) | (mask == 1)).all()


def compare(name, here, there):
    assert len(here) == len(there) > 0
    for one, other in zip(here, there, strict=True):
        if name in DRAWN_THERE:
            assert one.shape == other.shape and torch.isfinite(other).all()
        else:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


CHECKS = {
    "model": check_model,
    "score": check_score,
    "residual": check_residual,
    "corruption": check_corruption,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in sys.argv[1:]:
        group, _, name = part.partition("=")
        try:
            CHECKS[group](name)
        except ConfigError as error:
            print(f"{part}: {'needs ' * ('pip install' in str(error))}{error}", flush=True)
        except Exception as error:
            traceback.print_exc()
            print(f"{part}: {type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        else:
            print(f"{part}: fine", flush=True)

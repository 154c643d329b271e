"""Mixed precision once reached the corruption, whose tensors then had two dtypes, and structured corruption raised."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from blemish import load_detector
from blemish.data.corruption import FILLS, SHAPES, Corrupted, Structured
from blemish.models.repair import RepairAutoencoder
from blemish.residuals import L1
from blemish.training.objectives import ReconstructionObjective
from blemish.training.task import ReconstructionTask


class Watched:
    """Corrupts as another does, and notes under which precision."""

    def __init__(self, corruption):
        self.corruption, self.autocast, self.dtypes = corruption, [], set()

    def __call__(self, x):
        self.autocast.append(torch.is_autocast_enabled(x.device.type))
        found = self.corruption(x)
        self.dtypes |= {part.dtype for part in found}
        return Corrupted(*found)


class Model(nn.Module):
    """A model that notes under which precision it is asked."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.autocast = RepairAutoencoder(width=4, depth=2), []

    def forward(self, x):
        self.autocast.append(torch.is_autocast_enabled(x.device.type))
        return self.model(x)


@pytest.fixture
def fitted(tmp_path):
    """Two steps and a validation in bf16-mixed: (corruption, model)."""

    def fit(structured, standardise=False):
        corruption, model = Watched(structured), Model()
        objective = ReconstructionObjective(L1(), mask_weight=1.0)
        task = ReconstructionTask(model, objective, corruption, 1e-3, 0, 2, 0, standardise=standardise)
        tiles = torch.randint(0, 256, (16, 1, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        loader = DataLoader(list(tiles), batch_size=8)
        trainer = pl.Trainer(
            accelerator="cpu",
            precision="bf16-mixed",
            max_epochs=1,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(task, loader, loader)
        assert trainer.global_step == 2
        assert np.isfinite(float(trainer.callback_metrics["val/loss"]))
        return corruption, model

    return fit


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("standardise", [False, True])
def test_corruption_runs_in_full_precision_and_the_model_in_mixed(fitted, standardise):
    corruption, model = fitted(Structured(), standardise)
    assert corruption.autocast == [False] * 4  # two steps, two batches of validation
    assert corruption.dtypes == {torch.float32}
    assert len(model.autocast) == 6 and all(model.autocast)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "choice",
    [{"shapes": [name]} for name in SHAPES] + [{"fills": [name]} for name in FILLS],
    ids=[*SHAPES, *FILLS],
)
def test_every_shape_and_fill_trains_in_mixed_precision(fitted, choice):
    fitted(Structured(**choice, probability=1.0, most=1))


def test_mixed_precision_and_structured_corruption_train_to_a_detector(run_cli, tiny, tiny_data, tmp_path):
    run = tmp_path / "run"
    words = [word for word in tiny if not word.startswith(("model=", "model.latent_dim", "corruption="))]
    settings = ("model=repair_ae", "corruption=structured", "trainer.precision=bf16-mixed")
    result = run_cli(["train", "data=mvtec", f"data.root={tiny_data}", f"out={run}", *words, *settings])
    assert result.code == 0, result.err
    assert np.isfinite(load_detector(run)(tiny_data / "test/blob/000.png").score_map).all()

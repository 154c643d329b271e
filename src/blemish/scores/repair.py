"""The score of models that tell themselves what they repaired."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.errors import ConfigError
from blemish.scores.contracts import ExplainedScore


class MaskScore(ExplainedScore):
    """The model's own belief that it repaired a pixel (Zavrtanik et al., DRAEM, ICCV 2021), as -log(1 - probability).

    In nats, not as a probability, which would be 1 for all that is certain, and would not tell which is worse.

    `CombinedScore` joins it to a residual: see configs/score/repaired.yaml.

    Args:
        required: refuse a model that does not say where it repaired; else its score is 1 everywhere, which
            changes no product, and no fitted sum.

    Raises:
        ConfigError: (in use) the model does not say where it repaired, and is required to.
    """

    def __init__(self, required: bool = True) -> None:
        super().__init__()
        self.required = required

    @torch.inference_mode()
    def explain(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        output = model(x)
        if output.repaired is None and not self.required:
            return torch.ones_like(x[:, :1]), output.expected
        if output.repaired is None:
            raise ConfigError(
                "MaskScore expects a model that says where it repaired, such as model=repair_ae with "
                "model.mask_head=true, found one that does not: choose another model, or another score."
            )
        return F.softplus(output.repaired.float()), output.expected

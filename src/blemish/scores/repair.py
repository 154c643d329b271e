"""The score of models that tell themselves what they repaired."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blemish.errors import ConfigError
from blemish.scores.contracts import ExplainedScore


class MaskScore(ExplainedScore):
    """The model's own belief, in [0, 1], that it repaired a pixel (Zavrtanik et al., DRAEM, ICCV 2021).

    `CombinedScore` joins it to a residual: see configs/score/repair.yaml.

    Raises:
        ConfigError: (in use) the model does not say where it repaired.
    """

    @torch.inference_mode()
    def explain(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        output = model(x)
        if output.repaired is None:
            raise ConfigError(
                "MaskScore expects a model that says where it repaired, such as model=repair_ae with "
                "model.mask_head=true, found one that does not: choose another model, or another score."
            )
        return output.repaired.float().sigmoid(), output.expected

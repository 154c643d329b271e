"""The score that most need: one pass, one comparison."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blemish.residuals import Residual
from blemish.scores.contracts import ExplainedScore, compared, residual_tile


class ResidualScore(ExplainedScore):
    """The residual between what is observed and what the model expects, be it pixels or features."""

    def __init__(self, residual: Residual) -> None:
        super().__init__()
        self.residual = residual

    @torch.inference_mode()
    def explain(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        output = model(x)
        return compared(residual_tile(self.residual, output, x), output), output.expected

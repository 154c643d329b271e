"""The score of models that judge without saying what they expect."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blemish.errors import ConfigError
from blemish.scores.contracts import ExplainedScore, compared, enlarged


class EvidenceScore(ExplainedScore):
    """The model's own evidence that a place is unusual, in the model's own units; a coarse grid is enlarged bilinearly.

    Raises:
        ConfigError: (in use) the model has no evidence, as it says what it expects.
    """

    @torch.inference_mode()
    def explain(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        output = model(x)
        if output.evidence is None:
            raise ConfigError(
                "EvidenceScore expects a model that judges without saying what it expects, such as "
                "model=isolation_forest, found one that says: set score=residual, or choose another model."
            )
        return compared(enlarged(output.evidence.float(), x), output), output.expected

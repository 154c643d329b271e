"""From a model and a batch of tiles to raw score tiles. Torch ends here: `TorchScorer` speaks NumPy."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from blemish.data.images import FloatArray
from blemish.residuals import Residual


class Score(Protocol):
    """Turns a model and tiles into score tiles; owns the gradient mode."""

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> (B, 1, H, W), >= 0, higher is worse."""


class ResidualScore(nn.Module):
    """The residual between what is observed and what the model expects."""

    def __init__(self, residual: Residual) -> None:
        super().__init__()
        self.residual = residual

    @torch.inference_mode()
    def forward(self, model: nn.Module, x: Tensor) -> Tensor:
        output = model(x)
        score: Tensor = self.residual(output.observed, output.expected)
        return score


class TorchScorer:
    """The tile scorer that runs a PyTorch model: (b, C, t, t) float32 array -> (b, t, t) float32 array.

    The model is put into evaluation mode, channels-last (oneDNN and cuDNN are faster with it).
    """

    def __init__(self, model: nn.Module, score: Score, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.model = model.eval().to(self.device).to(memory_format=torch.channels_last)
        self.score = score.to(self.device) if isinstance(score, nn.Module) else score

    def __call__(self, tiles: FloatArray) -> FloatArray:
        x = torch.from_numpy(tiles).to(self.device, memory_format=torch.channels_last)
        score_tiles: FloatArray = self.score(self.model, x)[:, 0].float().cpu().numpy()
        return score_tiles

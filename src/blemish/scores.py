"""From a model and a batch of tiles to raw score tiles. Torch ends here: `TorchScorer` speaks NumPy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from blemish.data.images import FloatArray
from blemish.residuals import Residual


class Score(Protocol):
    """Turns a model and tiles into score tiles; owns the gradient mode."""

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> (B, 1, H, W), >= 0, higher is worse."""


@runtime_checkable
class FittableScore(Protocol):
    """A score that learns of normal tiles after training, and keeps it in buffers, which the checkpoint carries."""

    def fit(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """Batches of normal tiles (B, C, H, W) in [0, 1], none of which calibrates."""


class ResidualScore(nn.Module):
    """The residual between what is observed and what the model expects."""

    def __init__(self, residual: Residual) -> None:
        super().__init__()
        self.residual = residual

    def forward(self, model: nn.Module, x: Tensor) -> Tensor:
        return self.explain(model, x)[0]

    @torch.inference_mode()
    def explain(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """The score, and what the model expected: (B, D, h, w)."""
        output = model(x)
        return self.residual(output.observed, output.expected), output.expected


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

    def explain(self, tiles: FloatArray) -> FloatArray:
        """(b, 1 + C, t, t): the score, and what defect-free tiles would have shown.

        (b, 1, t, t) if the model expects something else than pixels, or the score does not tell.
        """
        explainer = getattr(self.score, "explain", None)
        if explainer is None:
            return self(tiles)[:, None]
        x = torch.from_numpy(tiles).to(self.device, memory_format=torch.channels_last)
        score, expected = explainer(self.model, x)
        parts = [score, expected] if expected.shape == x.shape else [score]
        explained: FloatArray = torch.cat([part.float() for part in parts], 1).cpu().numpy()
        return explained

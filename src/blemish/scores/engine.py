"""Where torch ends: `TorchScorer` speaks NumPy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blemish.data.images import FloatArray
from blemish.models.contracts import classes_of
from blemish.scores.contracts import Score, explain
from blemish.standardise import Light


class TorchScorer:
    """The tile scorer that runs a PyTorch model: (b, C, t, t) float32 array -> (b, t, t) float32 array.

    The model is put into evaluation mode, channels-last (oneDNN and cuDNN are faster with it). With `standardise`,
    model and score see standardised tiles (`Light`). `classes`: of parts, that the model tells apart; none, for most.
    """

    def __init__(
        self, model: nn.Module, score: Score, device: torch.device | str = "cpu", standardise: bool = False
    ) -> None:
        self.device, self.standardise = torch.device(device), standardise
        self.model = model.eval().to(self.device).to(memory_format=torch.channels_last)
        self.score = score.to(self.device) if isinstance(score, nn.Module) else score
        self.classes = classes_of(model)

    def __call__(self, tiles: FloatArray) -> FloatArray:
        x, _ = self._input(tiles)
        score_tiles: FloatArray = self.score(self.model, x)[:, 0].float().cpu().numpy()
        return score_tiles

    def explain(self, tiles: FloatArray) -> FloatArray:
        """(b, 1 + C, t, t): the score, and what defect-free tiles would have shown.

        (b, 1, t, t) if the model expects something else than pixels, or the score does not tell.
        """
        x, light = self._input(tiles)
        score, expected = explain(self.score, self.model, x)
        parts = [score, light.restore(expected) if light else expected] if expected.shape == x.shape else [score]
        explained: FloatArray = torch.cat([part.float() for part in parts], 1).cpu().numpy()
        return explained

    def classify(self, tiles: FloatArray) -> tuple[FloatArray, list[str]]:
        """What `explain` gives, and the class of each tile, for a model that has `classes`.

        It is the choice that the model makes when the score first shows it the tiles, so that it need not look twice.
        """
        choices: list[Tensor] = []
        hook = self.model.register_forward_hook(lambda _model, _tiles, output: choices.append(output.choice))
        try:
            explained = self.explain(tiles)
        finally:
            hook.remove()
        return explained, [self.classes[number] for number in choices[0].tolist()]

    def _input(self, tiles: FloatArray) -> tuple[Tensor, Light | None]:
        x = torch.from_numpy(tiles).to(self.device, memory_format=torch.channels_last)
        light = Light.of(x) if self.standardise else None
        return (light.remove(x) if light else x), light

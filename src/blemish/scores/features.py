"""The score of models that compare more than pixels: two codes, or two looks of a discriminator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blemish.errors import ConfigError, nearest_names
from blemish.models.contracts import Output
from blemish.residuals import L1, L2, Residual
from blemish.scores.contracts import ExplainedScore, check_not_negative, compared, residual_tile

DISTANCES: dict[str, type[Residual]] = {"l1": L1, "l2": L2}


class FeatureScore(ExplainedScore):
    """pixels * residual + features * distance of the model's `Output.features`, enlarged bilinearly.

    Sources: with pixels = 0 and distance l1, the distance of the two codes in GANomaly (Akcay et al., arXiv
    1805.06725); with pixels = 1, distance l2 and an l2 residual, the score of f-AnoGAN (Schlegl et al., 2019), whose
    kappa is `features`. Both papers have one number an image; here it is one a pixel, of the place that it belongs to.

    Args:
        residual: the per-pixel distance.
        pixels, features: weights, >= 0, not both 0.
        distance: "l1" or "l2", mean absolute or squared difference over the features of a place.

    Raises:
        ConfigError: an argument is out of range, or (in use) the model compares pixels only.
    """

    def __init__(self, residual: Residual, pixels: float, features: float, distance: str = "l2") -> None:
        super().__init__()
        check_not_negative(pixels=pixels, features=features)
        if not pixels + features > 0:
            raise ConfigError("Expected score.pixels or score.features above 0, found both 0.")
        if distance not in DISTANCES:
            raise ConfigError(f"Unknown score.distance '{distance}': {nearest_names(distance, DISTANCES)}")
        self.residual, self.distance = residual, DISTANCES[distance]()
        self.pixels, self.features = pixels, features

    @torch.inference_mode()
    def explain(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        output = model(x)
        if output.features is None:
            raise ConfigError(
                f"{type(self).__name__} expects a model that compares features beside pixels, such as model=ganomaly, "
                "found one that does not: choose another model, or another score."
            )
        score = self.features * residual_tile(self.distance, Output(*output.features), x)
        if self.pixels:
            score = score + self.pixels * compared(residual_tile(self.residual, output, x), output)
        return score, output.expected

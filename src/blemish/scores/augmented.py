"""A score of several views of the tile: flipped, at other scales, with noise; mean over the views."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import combinations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.errors import ConfigError
from blemish.models.contracts import Output
from blemish.scores.contracts import (
    NO_RANDOM_NUMBERS,
    ExplainedScore,
    FittableScore,
    Score,
    check_counts,
    check_not_negative,
    expected_tile,
    explain,
    learning_parts,
)


class View(NamedTuple):
    """What is scored, and the way back from its score map (or what was expected) to the tile's own pixels."""

    model: nn.Module
    tiles: Tensor
    back: Callable[[Tensor], Tensor]


class AugmentedScore(ExplainedScore):
    """Base: the mean of another score over the `views` that subclasses make.

    A score that learns of normal tiles learns of them as they are. `moves`: a view shows what lies at one place of the
    tile at another, which a score that learned each place by itself must not be asked about.

    Raises:
        ConfigError: the inner score did that.
    """

    moves = True

    def __init__(self, score: Score) -> None:
        super().__init__()
        if self.moves and (parts := learning_parts(score)):
            raise ConfigError(
                f"{type(parts[0]).__name__} learns each place of a tile by itself, and {type(self).__name__} moves "
                "them: take another inner score, such as score@score.score=repaired."
            )
        self.score = score

    @abstractmethod
    def views(self, model: nn.Module, x: Tensor) -> Iterator[View]:
        """One or more views of tiles (B, C, H, W)."""

    def explain(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, expected = [], []
        for view in self.views(model, x):
            of_score, of_expected = explain(self.score, view.model, view.tiles)
            scores.append(view.back(of_score))
            expected.append(view.back(of_expected))
        return torch.stack(scores).mean(dim=0), torch.stack(expected).mean(dim=0)

    def fit(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """As `FittableScore`, for a score inside that learns."""
        if isinstance(self.score, FittableScore):
            self.score.fit(model, batches)


class FlipsScore(AugmentedScore):
    """Mean of a score over the flips of the tile, each flipped back; for models that know no left and right.

    Args:
        score: what is averaged.
        horizontal, vertical: the flips; both make four views.

    Raises:
        ConfigError: neither flip is chosen.
    """

    def __init__(self, score: Score, horizontal: bool = True, vertical: bool = True) -> None:
        super().__init__(score)
        if not (horizontal or vertical):
            raise ConfigError("Expected score.horizontal or score.vertical to be true, found neither.")
        self.horizontal, self.vertical = horizontal, vertical

    def views(self, model: nn.Module, x: Tensor) -> Iterator[View]:
        axes = [-2] * self.vertical + [-1] * self.horizontal
        for count in range(len(axes) + 1):
            for flipped in combinations(axes, count):
                flip = partial(torch.flip, dims=flipped)
                yield View(model, flip(x), flip)


class MultiScaleScore(AugmentedScore):
    """Mean of a score over several scales of the tile: shrunk by area, scored, the map enlarged bilinearly.

    A large defect that the model can follow at full size may be one that it cannot at half of it.

    Args:
        score: what is averaged.
        scales: of the tile's sides, each in (0, 1].

    Raises:
        ConfigError: a scale is out of range, or (in use) one that model or score cannot take.
    """

    def __init__(self, score: Score, scales: Sequence[float] = (1.0, 0.5)) -> None:
        super().__init__(score)
        if not scales or not all(0 < scale <= 1 for scale in scales):
            raise ConfigError(f"Expected score.scales in (0, 1], found {list(scales)}.")
        self.scales = list(scales)

    def views(self, model: nn.Module, x: Tensor) -> Iterator[View]:
        size = x.shape[-2:]

        def enlarge(tiles: Tensor) -> Tensor:
            if tiles.shape[1] == 0:  # nothing was told
                return tiles[..., :1, :1].expand(-1, -1, *size)
            return F.interpolate(tiles, size, mode="bilinear", align_corners=False)

        for scale in self.scales:
            smaller = [max(1, round(scale * side)) for side in size]
            yield View(model, x if scale == 1 else F.interpolate(x, smaller, mode="area"), enlarge)

    def explain(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return super().explain(model, x)
        except ConfigError as error:
            sizes = f"tiles of {x.shape[-2]} x {x.shape[-1]} pixels"
            raise ConfigError(f"At score.scales={self.scales} of {sizes}: {error}") from error


class NoiseDrawsScore(AugmentedScore):
    """Mean of a score over draws of white noise that is added to the model's input, but not to what is observed.

    For models trained with corruption=gaussian, which expect noise. Every tile sees the same noise, on every device.

    Args:
        score: what is averaged.
        std: of the noise, in units of what the model is shown, of which standardised tiles have a standard deviation
            of 0.2. Training adds noise before it standardises, so that there it depends on a tile's contrast.
        draws: how many. seed: of the noise.

    Raises:
        ConfigError: std is negative, draws below 1, or (in use) the model is not in pixel space.
    """

    moves = False
    unexportable = NO_RANDOM_NUMBERS

    def __init__(self, score: Score, std: float = 0.1, draws: int = 4, seed: int = 0) -> None:
        super().__init__(score)
        check_not_negative(std=std)
        check_counts(draws=draws)
        self.std, self.draws, self.seed = std, draws, seed

    def views(self, model: nn.Module, x: Tensor) -> Iterator[View]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.draws):
            noise = self.std * torch.randn(1, *x.shape[1:], generator=generator)
            yield View(InputWithNoise(model, noise.to(x.device)), x, lambda tiles: tiles)


class InputWithNoise(nn.Module):
    """A model that sees noise (1, C, H, W) on its input, and observes what was there before."""

    def __init__(self, model: nn.Module, noise: Tensor) -> None:
        super().__init__()
        self.model, self.noise, self.training = model, noise, model.training

    def forward(self, x: Tensor) -> Output:
        output: Output = self.model(x + self.noise)
        return output._replace(observed=x, expected=expected_tile(output, x, self))

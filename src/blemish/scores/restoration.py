"""Scores that let the model restore the tile in several passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from blemish.errors import ConfigError
from blemish.residuals import Residual
from blemish.scores.contracts import NO_RANDOM_NUMBERS, ExplainedScore, bounded, check_counts, expected_tile
from blemish.standardise import Light


class RecursiveScore(ExplainedScore):
    """Residual between the tile and what is expected in the end, when what is expected becomes the next input.

    What a first pass leaves of a defect, the next ones may remove. Between passes values stay in the range of
    `bounded`.

    Args:
        residual: the per-pixel distance.
        times: that what is expected is fed back, >= 1.

    Raises:
        ConfigError: times is below 1, or (in use) the model is not in pixel space.
    """

    def __init__(self, residual: Residual, times: int = 3) -> None:
        super().__init__()
        check_counts(times=times)
        self.residual, self.times = residual, times

    @torch.inference_mode()
    def explain(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        expected = expected_tile(model(x), x, self)
        for _ in range(self.times):
            expected = expected_tile(model(bounded(expected, x)), x, self)
        return self.residual(x, expected), expected


class InpaintingScore(ExplainedScore):
    """Residual between the tile and what the model paints where it cannot see, mean over sizes of the hidden cells.

    Source: Zavrtanik et al., Reconstruction by inpainting (RIAD), Pattern Recognition 2021; for models trained with
    corruption=grid_mask. For each size, the cells are dealt to `parts` sets at random, always the same ones. Each set
    in turn is hidden under the mean of what stays visible, so no pixel takes part in its own prediction.

    Args:
        residual: the per-pixel distance.
        cells: sides of the square cells, in pixels. parts: number of sets. seed: of the dealing.
        standardise: tiles are standardised, so that what is left visible is brought to the same light again, as
            training does with its own fill, the mean of the whole tile; what the model paints is brought back.

    Raises:
        ConfigError: arguments out of range, or (in use) a tile has too few cells, or the model is not in pixel space.
    """

    unexportable = NO_RANDOM_NUMBERS

    def __init__(
        self,
        residual: Residual,
        cells: Sequence[int] = (4, 8, 16),
        parts: int = 3,
        seed: int = 0,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        check_counts(parts=parts)
        if not cells or any(not isinstance(cell, int) or cell < 1 for cell in cells) or parts < 2:
            raise ConfigError(
                f"Expected score.cells of whole pixels and score.parts >= 2, found {list(cells)} and {parts}."
            )
        self.residual, self.cells, self.parts, self.seed = residual, list(cells), parts, seed
        self.standardise = standardise

    @torch.inference_mode()
    def explain(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        painted = torch.stack([self.paint(model, x, cell) for cell in self.cells])
        scores = torch.stack([self.residual(x, expected) for expected in painted])
        return scores.mean(dim=0), painted.mean(dim=0)

    def paint(self, model: nn.Module, x: Tensor, cell: int) -> Tensor:
        """What is expected of each cell when it is hidden: (B, C, H, W)."""
        painted = torch.zeros_like(x)
        whole = Light.of(x)
        for hidden in self.masks(x.shape[-2], x.shape[-1], cell):
            hidden = hidden.to(x.device)
            visible = ~hidden
            mean = (x * visible).sum(dim=(2, 3), keepdim=True) / visible.sum()
            given = torch.where(hidden, mean, x)
            # Hiding takes contrast away; in training it came first, and the tile was standardised after it.
            light = Light.of(given).relative_to(whole) if self.standardise else None
            expected = expected_tile(model(light.remove(given) if light else given), x, self)
            painted = torch.where(hidden, light.restore(expected) if light else expected, painted)
        return painted

    def masks(self, height: int, width: int, cell: int) -> Iterator[Tensor]:
        """`parts` masks (H, W) that together cover each pixel once; True is hidden."""
        rows, columns = -(-height // cell), -(-width // cell)
        if rows * columns < self.parts:
            raise ConfigError(
                f"A tile of {height} x {width} pixels has fewer than score.parts={self.parts} cells of {cell} pixels: "
                "use smaller score.cells, or larger tiles."
            )
        order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(self.seed))
        dealt = (order % self.parts).view(rows, columns)
        dealt = dealt.repeat_interleave(cell, 0).repeat_interleave(cell, 1)[:height, :width]
        for part in range(self.parts):
            yield dealt == part

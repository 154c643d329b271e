"""A model that learns from pixels what a frozen network says of normal tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.models.blocks import Encoder, check_architecture, check_tile, dilated_blocks, level_widths
from blemish.models.contracts import FeatureSource, Output
from blemish.models.features import TrainedInFeatureSpace


class Student(TrainedInFeatureSpace):
    """Learns from pixels what a frozen network, the teacher, says of normal tiles; of others it knows nothing.

    Source: Bergmann et al., Uninformed students, CVPR 2020; Wang et al., Student-teacher feature pyramid matching,
    arXiv 2103.04257. Where its input is corrupted in training it learns to expect the clean tile's features.

    Args:
        backbone, projection, dimensions, cache_gb, seed: those of `FeatureSpace`.
        channels: 1 (grey) or 3 (colour).
        width: channels of the first level; they double per level, up to 8 times.
        depth: number of halvings; tile sides must be multiples of 2^depth.
        dilations: of the residual blocks after them, one each.
        normalisation: batch, instance, group or none. activation: silu, relu, leaky_relu or gelu.

    Raises:
        ConfigError: an argument is out of range, or (in `forward`) the tile's sides do not fit the depth.
    """

    def __init__(
        self,
        backbone: FeatureSource,
        channels: int = 1,
        width: int = 32,
        depth: int = 3,
        dilations: Sequence[int] = (1, 2, 4),
        normalisation: str = "batch",
        activation: str = "silu",
        projection: str = "none",
        dimensions: int | None = None,
        cache_gb: float = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, projection, dimensions, cache_gb, seed)
        check_architecture(channels, width, depth, 1)
        self.depth = depth
        self._grids: dict[torch.Size, torch.Size] = {}
        style = (normalisation, activation)
        last = level_widths(width, depth)[-1]
        self.student = nn.Sequential(
            Encoder(channels, width, depth, *style),
            dilated_blocks(last, dilations, *style),
            nn.Conv2d(last, self.dimensions, 1),
        )

    def forward(self, x: Tensor) -> Output:
        """(B, C, H, W) in [0, 1] -> observed and expected (B, D, h, w).

        In training the teacher need not look at the corrupted tile, which is half of the time: nothing is observed, and
        zeros, the mean of normal features, stand in its place.
        """
        check_tile(x.shape[-2], x.shape[-1], self.depth)
        observed = None if self.training else self.observe(x)
        expected = self.student(x)
        grid = self._grid(x) if observed is None else observed.shape[-2:]
        if expected.shape[-2:] != grid:
            expected = F.interpolate(expected, grid, mode="bilinear", align_corners=False)
        return Output(torch.zeros_like(expected) if observed is None else observed, expected)

    def _grid(self, x: Tensor) -> torch.Size:
        """Height and width of the teacher's grid, which it is asked for once for each size of tiles."""
        if x.shape[-2:] not in self._grids:
            self._grids[x.shape[-2:]] = self.observe(x[:1]).shape[-2:]
        return self._grids[x.shape[-2:]]

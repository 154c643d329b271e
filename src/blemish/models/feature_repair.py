"""A model that sees a corrupted tile's features and is trained to expect those of the clean one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.models.arguments import check_counts
from blemish.models.blocks import conv_block, dilated_blocks
from blemish.models.contracts import FeatureSource, Output
from blemish.models.features import TrainedInFeatureSpace


class FeatureRepair(TrainedInFeatureSpace):
    """Repairs features: from those of a corrupted tile to those of the clean one, and tells where it repaired.

    The repair of pixels (Bauer et al., arXiv 2206.11723; DRAEM, ICCV 2021) brought to features of a frozen network,
    as in You et al., A unified model for multi-class anomaly detection, NeurIPS 2022, and Zhang et al., DeSTSeg,
    arXiv 2211.11317, which segments from the difference of features. Dilated residual blocks at the grid's own
    resolution; the mask head sees what was observed, and how it differs from what is expected.

    Args:
        backbone, projection, dimensions, cache_gb, seed: those of `FeatureSpace`.
        width: channels of the blocks. dilations: of the blocks, one each.
        mask_head: also predict where the tile was repaired.
        normalisation: batch, instance, group or none. activation: silu, relu, leaky_relu or gelu.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        backbone: FeatureSource,
        width: int = 128,
        dilations: Sequence[int] = (1, 2, 4, 1, 2, 4),
        mask_head: bool = True,
        normalisation: str = "batch",
        activation: str = "silu",
        projection: str = "none",
        dimensions: int | None = None,
        cache_gb: float = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, projection, dimensions, cache_gb, seed)
        check_counts(width=width)
        style = (normalisation, activation)
        self.repair = nn.Sequential(
            nn.Conv2d(self.dimensions, width, 1),
            dilated_blocks(width, dilations, *style),
            nn.Conv2d(width, self.dimensions, 1),
        )
        self.compare: nn.Sequential | None = None
        if mask_head:
            self.compare = nn.Sequential(
                conv_block(3 * self.dimensions, width, 1, *style), conv_block(width, width, 1, *style)
            )
            last = nn.Conv2d(width, 4, 3, padding=1)
            assert last.bias is not None
            nn.init.constant_(last.bias, -3.0)  # few pixels are corrupted
            self.mask = nn.Sequential(last, nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Output:
        """(B, 1 or 3, H, W) in [0, 1] -> observed and expected (B, D, h, w), and the repaired logits (B, 1, H, W).

        Shown as activations: what was observed, and what the mask is made of, if there is one.
        """
        observed = self.observe(x)
        expected: Tensor = self.repair(observed)
        if self.compare is None:
            return Output(observed, expected, activations=(observed,))
        # The mask must not make what is expected worse: no gradient from one to the other.
        difference = (observed - expected).detach()
        compared = self.compare(torch.cat([observed, difference, difference.abs()], 1))
        repaired = F.interpolate(self.mask(compared), x.shape[-2:], mode="bilinear", align_corners=False)
        return Output(observed, expected, repaired=repaired, activations=(observed, compared))

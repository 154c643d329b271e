"""The autoencoder that rebuilds from memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blemish.errors import ConfigError
from blemish.models.autoencoder import ConvAutoencoder
from blemish.models.blocks import check_tile
from blemish.models.contracts import Output


class MemoryAutoencoder(ConvAutoencoder):
    """Decodes a mixture of few remembered items in place of each code; a defect is nothing it remembers.

    Source: Gong et al., Memorizing normality to detect anomaly (MemAE), ICCV 2019, arXiv 1904.02639. Several blocks
    follow the idea of Hou et al., Divide-and-Assemble, ICCV 2021, arXiv 2107.13118: they cut the feature map into
    blocks that are remembered on their own, and the finer the cut, the more can be rebuilt, of normal tiles and of
    defects. Here the channels of the code are cut, as its positions are apart already; their skip connections and
    discriminator are left out. `Output.penalty` is the entropy of the addressing, weighted.

    Args:
        channels, width, depth, latent_dim, normalisation, activation: those of `ConvAutoencoder`, spatial.
        slots: number of items in the memory of each block, at least 2.
        blocks: number of groups of channels, each with its own memory; must divide latent_dim. 1 is MemAE.
        shrinkage: a weight below this many times 1 / slots becomes 0, in [0, slots); the paper suggests 1 to 3.
        entropy_weight: of the penalty, >= 0.

    Raises:
        ConfigError: an argument is out of range, or (in `forward`) the tile's sides do not fit the depth.
    """

    def __init__(
        self,
        channels: int = 1,
        width: int = 16,
        depth: int = 4,
        latent_dim: int = 64,
        slots: int = 256,
        blocks: int = 1,
        shrinkage: float = 1.0,
        entropy_weight: float = 0.0002,
        normalisation: str = "batch",
        activation: str = "silu",
    ) -> None:
        super().__init__(channels, width, depth, latent_dim, normalisation=normalisation, activation=activation)
        if entropy_weight < 0:
            raise ConfigError(f"Expected model.entropy_weight >= 0, found {entropy_weight}.")
        self.entropy_weight = entropy_weight
        self.memory = Memory(latent_dim, slots, blocks, shrinkage)

    def forward(self, x: Tensor) -> Output:
        """(B, C, H, W) in [0, 1] -> observed = x, expected (B, C, H, W), and the weighted entropy."""
        check_tile(x.shape[-2], x.shape[-1], self.depth)
        code = self.into_code(self.encoder(x))
        weights = self.memory.address(code)
        # The small number keeps the slope finite at weights of 0.
        entropy = -(weights * (weights + 1e-12).log()).sum(dim=-1).mean()
        expected = self.decoder(self.from_code(self.memory.read(weights)))
        return Output(x, expected, penalty=self.entropy_weight * entropy)


class Memory(nn.Module):
    """Items that are addressed by their likeness to a code, at each position and for each block of channels.

    Likeness is the dot product, as in the code that the authors published, where the paper has the cosine: training
    can then sharpen the addressing, while 256 cosines in [-1, 1] stay near a uniform one.

    Args:
        dimensions: of the code, a multiple of `blocks`. slots, blocks, shrinkage: as in `MemoryAutoencoder`.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(self, dimensions: int, slots: int, blocks: int = 1, shrinkage: float = 1.0) -> None:
        super().__init__()
        if not isinstance(slots, int) or slots < 2:
            raise ConfigError(f"Expected model.slots to be a whole number of at least 2, found {slots}.")
        if not isinstance(blocks, int) or blocks < 1 or dimensions % blocks:
            raise ConfigError(f"Expected model.blocks to divide model.latent_dim ({dimensions}), found {blocks}.")
        if not 0 <= shrinkage < slots:
            raise ConfigError(f"Expected model.shrinkage in [0, model.slots) = [0, {slots}), found {shrinkage}.")
        self.threshold = shrinkage / slots
        bound = (blocks / dimensions) ** 0.5
        self.items = nn.Parameter(torch.empty(blocks, slots, dimensions // blocks).uniform_(-bound, bound))

    def address(self, code: Tensor) -> Tensor:
        """(B, D, h, w) -> weights (B, h, w, blocks, slots) in float32, >= 0, that sum to 1 over the slots."""
        batch, _, height, width = code.shape
        queries = code.movedim(1, -1).reshape(batch, height, width, len(self.items), -1)  # last: D / blocks
        likeness = torch.einsum("bhwnd,nsd->bhwns", queries, self.items)
        return shrink(likeness.float().softmax(dim=-1), self.threshold)

    def read(self, weights: Tensor) -> Tensor:
        """(B, h, w, blocks, slots) -> the weighted sums of items, (B, D, h, w)."""
        return torch.einsum("bhwns,nsd->bhwnd", weights, self.items).flatten(-2).movedim(-1, 1)


def shrink(weights: Tensor, threshold: float) -> Tensor:
    """Hard shrinkage: weights below the threshold become 0, and the others again sum to 1 over the last dimension.

    The largest weight always stays: where none reached the threshold, nothing would be left to learn from.
    """
    bound = weights.amax(dim=-1, keepdim=True).clamp(max=threshold)
    kept = torch.where(weights >= bound, weights, 0.0)
    return kept / kept.sum(dim=-1, keepdim=True)

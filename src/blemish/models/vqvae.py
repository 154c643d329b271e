"""The autoencoder whose code is a choice among learned vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.errors import ConfigError
from blemish.models.autoencoder import ConvAutoencoder
from blemish.models.blocks import check_tile
from blemish.models.contracts import Output


class VectorQuantisedAutoencoder(ConvAutoencoder):
    """Puts the nearest entry of a code book in place of each code; a defect has no entry, so it is not rebuilt.

    Source: van den Oord et al., Neural discrete representation learning, arXiv 1711.00937, with the code book of its
    appendix A.1 (see `CodeBook`). Gradients pass the code book unchanged to the encoder. `Output.penalty` is the
    commitment loss, weighted.

    Args:
        channels, width, depth, latent_dim, normalisation, activation: those of `ConvAutoencoder`, spatial.
        codes: number of entries in the code book, at least 2.
        decay: of the moving averages that move the entries, between 0 and 1.
        commitment: weight of the commitment loss, >= 0.

    Raises:
        ConfigError: an argument is out of range, or (in `forward`) the tile's sides do not fit the depth.
    """

    def __init__(
        self,
        channels: int = 1,
        width: int = 16,
        depth: int = 4,
        latent_dim: int = 32,
        codes: int = 256,
        decay: float = 0.99,
        commitment: float = 0.25,
        normalisation: str = "batch",
        activation: str = "silu",
    ) -> None:
        super().__init__(channels, width, depth, latent_dim, normalisation=normalisation, activation=activation)
        if commitment < 0:
            raise ConfigError(f"Expected model.commitment >= 0, found {commitment}.")
        self.commitment = commitment
        self.code_book = CodeBook(codes, latent_dim, decay)

    def forward(self, x: Tensor) -> Output:
        """(B, C, H, W) in [0, 1] -> observed = x, expected (B, C, H, W), and the commitment loss."""
        check_tile(x.shape[-2], x.shape[-1], self.depth)
        code = self.into_code(self.encoder(x)).float()
        nearest = self.code_book(code)
        penalty = self.commitment * F.mse_loss(code, nearest)
        straight_through = code + (nearest - code).detach()
        return Output(x, self.decoder(self.from_code(straight_through)), penalty=penalty)


class CodeBook(nn.Module):
    """Finds the nearest entry; in training it moves each entry to the moving average of the codes that chose it.

    An entry that hardly any code chooses is dead: before the next training batch is looked up, it is placed on a
    random code of it (as in Dhariwal et al., Jukebox, arXiv 2005.00341). All are dead at first, so the first batch
    fills the book. Nothing here is learned by gradient, all is in buffers; on several devices, those of the first
    count.

    Args:
        codes: number of entries, at least 2. dimensions: of an entry. decay: of the moving averages, between 0 and 1.

    Raises:
        ConfigError: an argument is out of range.
    """

    entries: Tensor  # (K, D)
    usage: Tensor  # (K,), moving average of the share of codes that chose an entry
    dead_below = 0.03  # of the usage that entries have on average
    born_with = 0.1  # so that an entry is soon where it is needed, or dead again

    def __init__(self, codes: int, dimensions: int, decay: float = 0.99) -> None:
        super().__init__()
        if not isinstance(codes, int) or codes < 2:
            raise ConfigError(f"Expected model.codes to be a whole number of at least 2, found {codes}.")
        if not 0 < decay < 1:
            raise ConfigError(f"Expected model.decay between 0 and 1, found {decay}.")
        self.decay = decay
        self.register_buffer("entries", torch.randn(codes, dimensions))
        self.register_buffer("usage", torch.zeros(codes))

    @torch.no_grad()
    def forward(self, code: Tensor) -> Tensor:
        """(B, D, h, w) float32 -> the nearest entry at each position, (B, D, h, w), without gradient."""
        flat = code.movedim(1, -1).flatten(0, -2)
        if self.training:
            self._restart_the_dead(flat)
        choice = self.nearest(flat)
        found = F.embedding(choice.view(code.shape[0], *code.shape[2:]), self.entries).movedim(-1, 1)
        if self.training:
            self._follow(flat, choice)
        return found

    def nearest(self, flat: Tensor) -> Tensor:
        """Index of the nearest entry by Euclidean distance: (N, D) -> (N,)."""
        with torch.autocast(flat.device.type, enabled=False):  # near entries differ by less than bfloat16 resolves
            # |code - entry|^2 without |code|^2, which is the same for all entries.
            distance: Tensor = self.entries.square().sum(dim=1) - 2 * flat @ self.entries.T
            return distance.argmin(dim=1)

    def _restart_the_dead(self, flat: Tensor) -> None:
        mean_usage = 1 / len(self.usage)
        dead = self.usage < self.dead_below * mean_usage
        drawn = flat[torch.randint(len(flat), (len(dead),), device=flat.device)]
        self.entries.copy_(torch.where(dead[:, None], drawn, self.entries))
        self.usage.masked_fill_(dead, self.born_with * mean_usage)

    def _follow(self, flat: Tensor, choice: Tensor) -> None:
        share = torch.full_like(flat[:, 0], 1 / len(flat))  # of one code
        chosen = torch.zeros_like(self.usage).index_add_(0, choice, share)
        sums = torch.zeros_like(self.entries).index_add_(0, choice, flat / len(flat))
        usage = torch.lerp(chosen, self.usage, self.decay)
        self.entries.copy_(torch.lerp(sums, self.entries * self.usage[:, None], self.decay) / usage[:, None])
        self.usage.copy_(usage)

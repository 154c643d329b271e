"""What training minimises."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from blemish.errors import ConfigError
from blemish.models.contracts import Output
from blemish.residuals import Residual


class Loss(NamedTuple):
    """Scalars. `total` is minimised; the others are its parts before weighting, 0 where a model lacks what they need.

    kl: in nats per pixel value. mask: of the model's belief where it repaired. penalty: the model's own.
    """

    total: Tensor
    reconstruction: Tensor
    kl: Tensor
    mask: Tensor
    penalty: Tensor


class ReconstructionObjective(nn.Module):
    """Mean residual, plus what the model gives beside its reconstruction: KL divergence, mask, penalty.

    The KL term is divided by the number of pixel values of the tile, like the mean residual. With the l1
    residual this is the negative ELBO, up to constants, of a Laplace likelihood of scale beta; with l2, of a
    Gaussian of variance beta / 2. beta is thus in units of the noise that the model need not explain.

    Sources: Kingma and Welling, arXiv 1312.6114; beta: Higgins et al., ICLR 2017; warm-up: Bowman et al.,
    arXiv 1511.06349; free bits: Kingma et al., arXiv 1606.04934; corrupted and clean regions: Bauer et al.,
    arXiv 2206.11723. The mask loss is the binary cross-entropy: the focal and Dice losses usual for rare pixels told
    synthetic defects from normal pixels no better, and their logits are no probabilities.

    Args:
        residual: the per-pixel distance.
        corrupted_weight: of a pixel that was corrupted, where a clean one has weight 1.
        mask_weight: of the mask loss, for models that predict where they repaired.
        penalty_weight: of the model's own penalty (of a code book, of a memory).
        beta: weight of the KL term, >= 0.
        warmup_steps: over which beta grows linearly from 0.
        free_bits: nats per latent dimension (batch mean) that cost nothing.

    Raises:
        ConfigError: an argument is negative, or no pixel would count.
    """

    def __init__(
        self,
        residual: Residual,
        corrupted_weight: float = 1.0,
        mask_weight: float = 1.0,
        penalty_weight: float = 1.0,
        beta: float = 0.01,
        warmup_steps: int = 0,
        free_bits: float = 0.0,
    ) -> None:
        super().__init__()
        numbers = {
            "corrupted_weight": corrupted_weight,
            "mask_weight": mask_weight,
            "penalty_weight": penalty_weight,
            "beta": beta,
            "warmup_steps": warmup_steps,
            "free_bits": free_bits,
        }
        for name, value in numbers.items():
            if value < 0:
                raise ConfigError(f"Expected objective.{name} >= 0, found {value}.")
        self.residual = residual
        self.corrupted_weight, self.mask_weight, self.penalty_weight = corrupted_weight, mask_weight, penalty_weight
        self.beta, self.warmup_steps, self.free_bits = beta, warmup_steps, free_bits

    def forward(self, output: Output, target: Tensor, mask: Tensor, step: int) -> Loss:
        """`target`: the clean tiles, or their features, (B, D, h, w); `mask`: (B, 1, H, W), 1 where corrupted; `step`:
        steps done."""
        residual = self.residual(target, output.expected)
        grid = residual.shape[-2:]  # of which a share of each place is corrupted
        share = mask if mask.shape[-2:] == grid else F.adaptive_avg_pool2d(mask, grid)
        weight = 1 + (self.corrupted_weight - 1) * share
        reconstruction = (weight * residual).mean() / weight.mean().clamp(min=1e-6)
        nothing = reconstruction.new_zeros(())
        kl = nothing
        for latent in output.latents:
            kl = kl + latent.kl().float().mean(dim=0).clamp(min=self.free_bits).sum() / target[0].numel()
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        found = nothing
        if output.repaired is not None:
            found = F.binary_cross_entropy_with_logits(output.repaired.float(), mask.float())
        penalty = nothing if output.penalty is None else output.penalty.float()
        total = reconstruction + self.beta * warm * kl + self.mask_weight * found + self.penalty_weight * penalty
        return Loss(total, reconstruction, kl, found, penalty)

"""An embedding that is trained to tell what is the same from what is not, and a bank of normal embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from blemish.errors import ConfigError, nearest_names
from blemish.models.arguments import check_counts, check_positive
from blemish.models.blocks import Encoder, check_architecture, check_tile, dilated_blocks, level_widths
from blemish.models.contracts import Corrupt
from blemish.models.feature_cache import FeatureCache, cached
from blemish.models.nearest import NearestFeature

NEGATIVES = ("corruption", "others", "both")
_COVERED = 0.25  # of a place of the grid: so much of it is corrupted that it is another thing
_OTHERS = 256  # clean places that a corrupted one is compared with
_PATIENCE = 50  # steps, in which something must have been corrupted


class Embedding(nn.Sequential):
    """(B, C, H, W) -> (B, D, H / 2^depth, W / 2^depth), of length 1 at each place; D is `features`."""

    def __init__(
        self,
        channels: int,
        features: int,
        width: int,
        depth: int,
        dilations: Sequence[int],
        normalisation: str,
        activation: str,
    ) -> None:
        style = (normalisation, activation)
        last = level_widths(width, depth)[-1]
        super().__init__(
            Encoder(channels, width, depth, *style),
            dilated_blocks(last, dilations, *style),
            nn.Conv2d(last, features, 1),
        )
        self.features, self.depth = features, depth

    def forward(self, x: Tensor) -> Tensor:
        check_tile(x.shape[-2], x.shape[-1], self.depth)
        for layer in self:
            x = layer(x)
        return F.normalize(x)


class Siamese(NearestFeature):
    """Expects at each place the nearest of many normal embeddings, where the embedding has learned what is the same.

    Sources: Bromley et al., Signature verification using a "siamese" time delay neural network, NeurIPS 1993; the loss
    is that of Schroff et al., FaceNet, arXiv 1503.03832, at each place of a grid. In `fit`, parts of normal tiles are
    shown twice, each time in another light, and once corrupted. One network embeds all three, and is trained by Adam
    with a rate that falls along a cosine, see `contrast`; then it embeds whole tiles, for the bank.

    Args:
        channels: 1 (grey) or 3 (colour).
        dimensions: of the embedding.
        width: channels of the first level; they double per level, up to 8 times.
        depth: number of halvings; tile sides must be multiples of 2^depth.
        dilations: of the residual blocks after them, one each.
        negatives: what is not the same: corruption, corrupted places; others, a place elsewhere; or both.
        margin: by which what is not the same shall be farther away than what is, in squared distance, from 0 to 4.
        light: by which brightness and contrast of what is the same may change, as a fraction. noise: the largest
            standard deviation of what is put on it.
        crop: side of the parts that are learned from, in pixels.
        steps: of the training. crops_per_step: so many parts make a batch. learning_rate: at its start.
        normalisation: batch, instance, group or none. activation: silu, relu, leaky_relu or gelu.
        bank, coreset, candidates, cache_gb, seed: those of `NearestFeature`.

    Raises:
        ConfigError: an argument is out of range, or (in `forward`) the tile's sides do not fit the depth.
    """

    backbone: Embedding

    def __init__(
        self,
        channels: int = 1,
        dimensions: int = 64,
        width: int = 16,
        depth: int = 3,
        dilations: Sequence[int] = (1, 2),
        negatives: str = "corruption",
        margin: float = 1.0,
        light: float = 0.2,
        noise: float = 0.02,
        crop: int = 96,
        steps: int = 1200,
        crops_per_step: int = 8,
        learning_rate: float = 0.002,
        normalisation: str = "batch",
        activation: str = "silu",
        bank: int = 4000,
        coreset: str = "greedy",
        candidates: int = 60_000,
        cache_gb: float = 4.0,
        seed: int = 0,
    ) -> None:
        check_architecture(channels, width, depth, 1)
        check_counts(dimensions=dimensions, crop=crop, steps=steps, crops_per_step=crops_per_step)
        check_positive(margin=margin, learning_rate=learning_rate)
        if negatives not in NEGATIVES:
            raise ConfigError(f"Unknown model.negatives '{negatives}': {nearest_names(negatives, NEGATIVES)}")
        if not (0 <= light < 1 and noise >= 0):
            raise ConfigError(f"Expected 0 <= model.light < 1 and model.noise >= 0, found {light} and {noise}.")
        embedding = Embedding(channels, dimensions, width, depth, dilations, normalisation, activation)
        super().__init__(embedding, bank, coreset, candidates, "none", None, cache_gb, seed)
        self.negatives, self.margin, self.light, self.noise = negatives, margin, light, noise
        self.crop, self.steps, self.crops_per_step, self.learning_rate = crop, steps, crops_per_step, learning_rate
        self._corrupt: Corrupt | None = None

    def contrast_with(self, corrupt: Corrupt) -> None:
        """As `Contrasting`."""
        self._corrupt = corrupt

    def encode(self, x: Tensor) -> Tensor:
        """Tiles (B, C, H, W) -> their embeddings (B, D, h, w), of length 1."""
        return self.observe(x)

    def prepared(self, features: Tensor) -> Tensor:
        """As they are: directions say it all, and have no deviations to be divided by."""
        return features.to(self.mean)

    def fit(self, batches: Iterable[Tensor], labels: Sequence[str | None] = ()) -> None:
        """As `Fittable`.

        Raises:
            ConfigError: there is no tile, or nothing to contrast with.
        """
        if self._corrupt is None and self.negatives != "others":
            raise ConfigError(
                f"model.negatives={self.negatives} expects corrupted tiles, and was not told how to make them: call "
                "contrast_with(corruption) before fit, or set model.negatives=others."
            )
        device, training = self.mean.device, self.training
        with (
            torch.autocast(device.type, enabled=False),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            cached(lambda tile: tile, batches, self.cache_gb, device) as tiles,  # a pixel is a feature, too
        ):
            torch.manual_seed(self.seed)  # for corruption, which draws from the global generator
            self._learn_embedding(tiles)
        self.eval()
        super().fit(batches, labels)
        self.train(training)

    def _learn_embedding(self, tiles: FeatureCache) -> None:
        self.train()
        generator, found = self.generator(), False
        optimizer = torch.optim.Adam(self.backbone.parameters(), self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        with torch.enable_grad(), tqdm(range(self.steps), "embedding", unit="step", leave=False) as bar:
            for step in bar:
                views, mask = self._views(tiles, generator)
                anchor, same, corrupted = self.backbone(views).chunk(3)
                covered = F.adaptive_avg_pool2d(mask, anchor.shape[-2:])[:, 0]
                found |= bool((covered > _COVERED).any())
                if step + 1 == min(self.steps, _PATIENCE) and self.negatives == "corruption" and not found:
                    raise ConfigError(
                        "model.negatives=corruption found nothing corrupted: set corruption=structured, or "
                        "model.negatives=others."
                    )
                loss = contrast(anchor, same, corrupted, covered, self.margin, self.negatives)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
        optimizer.zero_grad(set_to_none=True)

    def _views(self, tiles: FeatureCache, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Parts of normal tiles, the same in another light, and corrupted: (3 B, C, s, s); the last ones' mask."""
        step = 2**self.backbone.depth
        side = max(step, min(self.crop, *tiles.values.shape[1:3]) // step * step)
        # Standardised tiles leave [0, 1], which is all that a corruption knows.
        clean = tiles.windows(self.crops_per_step, side, generator).to(self.mean.device).clamp(0, 1)
        given, mask = clean, torch.zeros_like(clean[:, :1])
        if self._corrupt is not None and self.negatives != "others":
            given, _, mask = self._corrupt(clean)
        views = torch.cat([self._in_other_light(view) for view in (clean, clean, given)])
        return views.contiguous(memory_format=torch.channels_last), mask

    def _in_other_light(self, x: Tensor) -> Tensor:
        """Each of (B, C, H, W) with another contrast, brightness, and noise."""
        gain, brightness, noise = torch.rand(3, len(x), 1, 1, 1, device=x.device)
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        lit = (x - mean) * (1 + self.light * (2 * gain - 1)) + mean + self.light * (brightness - 0.5)
        varied: Tensor = lit + self.noise * noise * torch.randn_like(x)
        return varied


def contrast(anchor: Tensor, same: Tensor, corrupted: Tensor, covered: Tensor, margin: float, negatives: str) -> Tensor:
    """The loss of a batch: a scalar, the sum of its parts' means over the places that they are about.

    What is the same comes near: two views of a place, and a clean place of a corrupted tile. What is not the same goes
    farther away than that by `margin`: max(0, margin + near - far), as in FaceNet. How far a corrupted place is, is
    the distance to its own clean self or to the nearest of up to 256 other clean places, as the bank will see it.

    Args:
        anchor, same, corrupted: embeddings (B, D, h, w) of length 1.
        covered: (B, h, w), the share of a place that was corrupted; a place that hardly was belongs to neither side.
        margin: in squared distance. negatives: see `Siamese`. Other places are drawn from the global generator.
    """
    near, moved = _apart(anchor, same), _apart(anchor, corrupted)
    parts = [near]
    if negatives != "others":
        wrong = covered > _COVERED
        clean = anchor.movedim(1, -1).flatten(0, 2)
        clean = clean[torch.randperm(len(clean), device=clean.device)[:_OTHERS]]
        nearest_clean = (2 - 2 * corrupted.movedim(1, -1)[wrong] @ clean.T).amin(dim=1)
        far = torch.minimum(moved[wrong], nearest_clean)
        parts += [moved[covered == 0], (margin + near[wrong] - far).relu()]
    if negatives != "corruption":
        shift = [1, *(int(torch.randint(side, ())) for side in anchor.shape[-2:])]
        parts.append((margin + near - _apart(anchor, anchor.roll(shift, (0, 2, 3)))).relu())
    return torch.stack([part.mean() for part in parts if part.numel()]).sum()


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """Squared distance at each place: (B, D, h, w) x 2 -> (B, h, w)."""
    return (one - other).square().sum(dim=1)

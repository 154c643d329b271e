"""The bottleneck of a trained run as a source of features."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from blemish.checkpoint import load_detector
from blemish.detector import TileDetector
from blemish.errors import CheckpointError, ConfigError
from blemish.frozen import FrozenNetwork
from blemish.models.contracts import Encoding
from blemish.scores.engine import TorchScorer
from blemish.seen import Seen
from blemish.standardise import standardised


class RunEncoder(FrozenNetwork):
    """What the bottleneck of another run's autoencoder says, frozen; a checkpoint carries the fingerprint alone.

    Tiles are standardised if that run standardised them. A flat code makes a grid of one place. Encoders pad with
    zeros, as they did while they were trained: what they say at a tile's border is not what they say inside. The images
    that trained that run (`seen`) count among those that train the model which asks.

    Tiles must have sides in multiples of `step` pixels.

    Args:
        run: folder that `blemish train` made, of a model that is `Encoding`, such as conv_ae, vae or repair_ae.

    Raises:
        ConfigError: no run, or one whose model has no bottleneck, or (in `forward`) tiles do not fit. CheckpointError:
            the run cannot be loaded.
    """

    def __init__(self, run: str | None) -> None:
        if run is None:
            raise ConfigError(
                "backbone.run is not set: name the folder of a trained run, such as one of model=conv_ae, or choose "
                "another backbone."
            )
        try:
            detector = load_detector(run, "cpu", with_card=False)
        except CheckpointError as error:
            raise CheckpointError(f"backbone.run={run} cannot be used: {error}") from error
        scorer = detector.scorer if isinstance(detector, TileDetector) else None
        model = scorer.model if isinstance(scorer, TorchScorer) else detector
        if not (isinstance(detector, TileDetector) and isinstance(model, nn.Module) and isinstance(model, Encoding)):
            raise ConfigError(
                "Expected a run of a model with an encoder, such as conv_ae, vae or repair_ae, found "
                f"{type(model).__name__} in {run}: train one, and name its folder."
            )
        super().__init__(f"the run '{run}'", model)
        self.run, self.seen = run, Seen.read(detector.about)
        self.channels, self.standardise = detector.preprocess.channels, detector.tiling.standardise
        size = detector.tiling.size
        with torch.no_grad():
            grid = self._grid(torch.zeros(1, self.channels, size, size))
        self.features, self.step = grid.shape[1], max(1, size // grid.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1 or 3, H, W), values around [0, 1] -> (B, D, h, w), D = `features`."""
        if x.shape[1] not in (1, self.channels):
            raise ConfigError(
                f"Expected tiles of {self.channels} channels, as {self.name} was trained on, found {x.shape[1]}: set "
                f"image.channels={self.channels}."
            )
        return self._grid(x.expand(-1, self.channels, -1, -1))

    def _grid(self, x: Tensor) -> Tensor:
        x = standardised(x) if self.standardise else x
        # One memory format, so that equal images have equal features, bit for bit.
        code = cast(Encoding, self.network).encode(x.contiguous(memory_format=torch.channels_last))
        return code if code.ndim == 4 else code[:, :, None, None]

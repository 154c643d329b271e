"""A detector that was never trained, for measurements of speed and memory, which do not depend on the weights.

What its score learns of normal tiles, it learns of random images: a score that learned nothing does less.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

_REMEMBERED = 500  # tiles, as many as the default score keeps


def invent_run(folder: Path, overrides: Sequence[str] = (), side: int = 192) -> Path:
    """The default model with settings of `blemish train`, calibrated on a few random images of `side` pixels.

    Its tiles have that side, too, as the default's have wherever half of the images are large enough. Its score has
    learned of `_REMEMBERED` of them.
    """
    import torch

    from blemish import __version__
    from blemish.calibration import Calibration, Promise
    from blemish.checkpoint import assemble, build_model, save_detector
    from blemish.scores.contracts import FittableScore, learning_parts
    from blemish.settings import settings_of
    from blemish.standardise import standardised

    torch.manual_seed(0)
    settled = ["data.root=.", "image.channels=1", "trainer=cpu"]
    settings = settings_of("train", [*settled, f"tiling.size={side}", *overrides])
    detector = assemble(settings, build_model(settings))
    model, score = detector.scorer.model, detector.scorer.score

    def tiles(count: int, seed: int) -> list[torch.Tensor]:
        """Batches as model and score see them."""
        pixels = torch.from_numpy(np.stack(random_images(count, side, seed))).permute(0, 3, 1, 2).float() / 255
        return list((standardised(pixels) if detector.tiling.standardise else pixels).split(8))

    for part in learning_parts(score):
        part.learn(model, tiles(_REMEMBERED, 1))
    if isinstance(score, FittableScore):
        with torch.no_grad():
            score.fit(model, tiles(19, 2))
    detector = assemble(settings, model, score=score)
    images = random_images(19, side)
    scores = [float(score_map.max()) for score_map in detector.score_maps(images)]
    calibration = Calibration.fit(scores, [str(place) for place in range(19)], Promise(), detector.fingerprint)
    about = {"version": __version__, "trained_on": [], "trained_groups": []}
    save_detector(folder, settings, detector, calibration, about)
    return folder


def random_images(count: int, side: int, seed: int = 0) -> list[npt.NDArray[np.uint8]]:
    """(side, side, 1) of smooth structure with a little noise, which compresses about as a photograph does."""
    import cv2

    rng, images = np.random.default_rng(seed), []
    for _ in range(count):
        coarse = rng.random((max(2, side // 16), max(2, side // 16)), dtype=np.float32)
        image = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC) * 200
        image += rng.normal(0, 3, (side, side)).astype(np.float32)
        images.append(np.clip(image, 0, 255).astype(np.uint8)[..., None])
    return images


def save_images(images: Sequence[npt.NDArray[np.uint8]], folder: Path) -> list[Path]:
    """As 00000.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{place:05}.png" for place in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image[..., 0]).save(path)
    return paths

"""Did an alignment help? Judged from the images alone, without the true motion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from blemish.alignment.motion import BoolArray
from blemish.data.images import FloatArray

Overall = Literal["improved", "worse", "undecided"]

_CONTRAST = 0.25  # the tolerance, in local standard deviations
_LEAST = 2 / 255  # and at least this: rounding and compression are no change
_JOINED = 5.0  # neighbours that the 3 x 3 median makes alike count as one pixel
_SIGMAS = 2.0  # by which a block's lead, and then the blocks' votes, must stand out
_MAJORITY = 2.0  # votes for one side, for each vote for the other


@dataclass(frozen=True, eq=False)
class Verdict:
    """What an alignment did to the difference between reference and query.

    blocks: (h, w) int8, 1 where it became smaller, -1 where it became larger, 0 where that cannot be told.
    better, worse: the shares of the valid pixels that came nearer to the query, and that went away from it.
    """

    overall: Overall
    blocks: npt.NDArray[np.int8]
    better: float
    worse: float

    @property
    def share(self) -> float:
        """Of the pixels that changed, those that came nearer; 0.5 if none changed."""
        changed = self.better + self.worse
        return self.better / changed if changed else 0.5

    @property
    def votes(self) -> tuple[int, int]:
        """Blocks that improved, and blocks that became worse."""
        return int(np.count_nonzero(self.blocks > 0)), int(np.count_nonzero(self.blocks < 0))


def judge(
    query: FloatArray,
    warped: FloatArray,
    unwarped: FloatArray,
    valid: BoolArray,
    block: int | None = None,
    least: float = 0.02,
) -> Verdict:
    """Compare |warped - query| with |unwarped - query|, pixel by pixel and block by block.

    A pixel changed if the two differ by more than a tolerance, a quarter of its block's contrast. A block votes if
    at least a share `least` of it changed, and if one side leads by more than two standard deviations of a coin.
    Overall, one side needs two votes for each of the other's, a lead of two standard deviations in votes (four, if
    there is no other), and most of the changed pixels.

    Args:
        query, warped, unwarped: (H, W) in [0, 1], on the query's grid. A 3 x 3 median clears them of single pixels.
        valid: (H, W), where all three show something.
        block: side in pixels; 32 if not given, and less in images below 256 pixels.
    """
    block = block or max(8, min(32, min(valid.shape) // 8))
    rows, columns = (max(1, round(side / block)) for side in valid.shape)
    grid = (columns, rows)
    query, warped, unwarped = (np.asarray(cv2.medianBlur(image, 3), np.float32) for image in (query, warped, unwarped))
    tolerance = _CONTRAST * _contrast((query, warped), grid) + np.float32(_LEAST)
    change = np.abs(unwarped - query) - np.abs(warped - query)
    limit = cv2.resize(tolerance, (valid.shape[1], valid.shape[0]), interpolation=cv2.INTER_LINEAR)
    better, worse = (change > limit) & valid, (change < -limit) & valid
    pixels = valid.size / (rows * columns)
    nearer, farther = (
        cv2.resize(each.astype(np.float32), grid, interpolation=cv2.INTER_AREA) * pixels for each in (better, worse)
    )
    changed, lead = nearer + farther, nearer - farther
    speaks = (changed >= least * pixels) & (np.abs(lead) >= _SIGMAS * np.sqrt(_JOINED * changed))
    blocks = np.where(speaks, np.sign(lead), 0).astype(np.int8)
    total = max(1, int(np.count_nonzero(valid)))
    shares = np.count_nonzero(better) / total, np.count_nonzero(worse) / total
    return Verdict(_overall(blocks, float(lead.sum())), blocks, *shares)


def _contrast(images: tuple[FloatArray, ...], grid: tuple[int, int]) -> FloatArray:
    """(h, w): the standard deviation within each block, averaged over the images."""
    found = np.zeros(grid[::-1], np.float32)
    for image in images:
        mean, square = (cv2.resize(each, grid, interpolation=cv2.INTER_AREA) for each in (image, image * image))
        found += np.sqrt(np.maximum(square - mean * mean, 0)) / len(images)
    return found


def _overall(blocks: npt.NDArray[np.int8], lead: float) -> Overall:
    votes_for, votes_against = np.count_nonzero(blocks > 0), np.count_nonzero(blocks < 0)
    if not votes_for and not votes_against:
        return "undecided"
    if abs(votes_for - votes_against) < _SIGMAS * np.sqrt(votes_for + votes_against):
        return "undecided"
    if lead > 0 and votes_for >= _MAJORITY * votes_against:
        return "improved"
    if lead < 0 and votes_against >= _MAJORITY * votes_for:
        return "worse"
    return "undecided"

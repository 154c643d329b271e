"""What tile scorers of exported graphs share: the graph's outputs as score tiles."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from blemish.data.images import FloatArray


class GraphScorer(ABC):
    """Base: (b, C, t, t) float32 array -> (b, t, t) float32 array; subclasses say how their engine runs the graph."""

    def __call__(self, tiles: FloatArray) -> FloatArray:
        return self.run(np.ascontiguousarray(tiles), explain=False)[0][:, 0]

    def explain(self, tiles: FloatArray) -> FloatArray:
        """(b, 1 + C, t, t): the score, and what defect-free tiles would have shown; (b, 1, t, t) without that."""
        return np.concatenate(self.run(np.ascontiguousarray(tiles), explain=True), axis=1)

    @abstractmethod
    def run(self, tiles: FloatArray, explain: bool) -> list[FloatArray]:
        """The score (b, 1, t, t) and, where the graph tells it and `explain` asks for it, what was expected."""

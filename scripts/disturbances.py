"""What may lie between two photographs of one thing: motion, noise, light. Drawn at random, known exactly."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from blemish.alignment import Motion, warp
from blemish.data.images import FloatArray


@dataclass(frozen=True)
class Disturbance:
    """One row of a table. Angles in degrees, scale in percent, noise in grey levels of 255."""

    group: str
    shift: float = 0.0
    turn: float = 0.0
    scale: float = 0.0
    noise: float = 0.0
    gain: float = 1.0
    offset: float = 0.0
    ramp: float = 0.0  # the contrast falls by this share from left to right

    @property
    def full(self) -> bool:
        return bool(self.turn or self.scale)


def draw(disturbance: Disturbance, shape: tuple[int, int], rng: np.random.Generator) -> Motion:
    """A random motion about the image's middle; the shift is uniform in a square."""
    angle = np.deg2rad(rng.uniform(-disturbance.turn, disturbance.turn))
    scale = 1 + rng.uniform(-disturbance.scale, disturbance.scale) / 100
    linear = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    middle = (np.array(shape[::-1]) - 1) / 2
    matrix = np.eye(3)
    matrix[:2, :2] = linear
    matrix[:2, 2] = middle - linear @ middle + rng.uniform(-disturbance.shift, disturbance.shift, 2)
    return Motion("affine" if disturbance.full else "translation", matrix)


def observe(image: FloatArray, motion: Motion, disturbance: Disturbance, rng: np.random.Generator) -> FloatArray:
    """What a camera sees of an image; sampled 4 times as finely as its 1/32 pixel, so that the truth is true."""
    query = image
    if not np.array_equal(motion.matrix, np.eye(3)):
        large = cv2.resize(image, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)
        finer = motion.halved(-2)
        seen, _ = warp(large, finer, (large.shape[0], large.shape[1]))
        query = cv2.resize(seen, image.shape[1::-1], interpolation=cv2.INTER_AREA)
    contrast = disturbance.gain * (1 - disturbance.ramp * np.linspace(0, 1, query.shape[1], dtype=np.float32))
    query = query * contrast + disturbance.offset + rng.normal(0, disturbance.noise / 255, query.shape)
    return np.clip(query, 0, 1).astype(np.float32)[..., None]

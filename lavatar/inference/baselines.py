"""What a model must beat: the mean training frame, and the training frame with the nearest landmarks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lavatar.datasets.loader import FrameStore

MEAN_POOL = 150  # frames averaged: the mean of a portrait video has settled long before


def spread(total: int, wanted: int) -> np.ndarray:
    """At most `wanted` positions of 0..total-1, evenly spaced, in order; 0 means all."""
    if wanted <= 0 or wanted >= total:
        return np.arange(total)
    return np.unique(np.linspace(0, total - 1, wanted).round().astype(int))


def mean_frame(train: FrameStore) -> np.ndarray:
    """The average training frame over white, uint8 (H, W, 3)."""
    chosen = spread(len(train), MEAN_POOL)
    total = np.zeros((train.image_size, train.image_size, 3), np.float64)
    for index in chosen:
        total += train.frame(int(index)).image
    return np.asarray((total / len(chosen)).round().astype(np.uint8))


@dataclass(frozen=True)
class NearestFrame:
    """Looks up training frames by the distance of the 68 landmarks, in the picture's own coordinates divided by its
    side: where the head is counts as well as what the face does."""

    train: FrameStore
    pool_P: np.ndarray
    landmarks_P136: np.ndarray

    @staticmethod
    def over(train: FrameStore, pool: int) -> NearestFrame:
        """Search among at most `pool` training frames, evenly spaced."""
        chosen = spread(len(train), pool)
        return NearestFrame(train, chosen, train.landmarks_N68x2[chosen].reshape(len(chosen), -1))

    def find(self, landmarks_B68x2: np.ndarray) -> np.ndarray:
        """(B,) indices of the nearest training frames."""
        query = landmarks_B68x2.reshape(len(landmarks_B68x2), -1)
        squared = (query**2).sum(1)[:, None] - 2 * query @ self.landmarks_P136.T + (self.landmarks_P136**2).sum(1)[None]
        return self.pool_P[squared.argmin(axis=1)]

    def images(self, landmarks_B68x2: np.ndarray) -> np.ndarray:
        """The nearest training frames themselves, uint8 (B, H, W, 3)."""
        return np.stack([self.train.frame(int(i)).image for i in self.find(landmarks_B68x2)])

"""Face batches of one subject: what the Y-network and the mapping MLP are trained on (Sec. 4).

Shapes: B batch, N frames, H face side, L numbers of a shape, D code θ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lavatar.configs.recipe import Recipe
from lavatar.datasets.loader import BatchSampler, FrameStore
from lavatar.models.avatar import LatentAvatar
from lavatar.training.augmentation import add_noise, generator_for, jitter, tint
from lavatar.training.avatar import at_side
from lavatar.training.emphasis import feature_weights
from lavatar.training.shape import expression_shape

CHUNK = 64
"""Faces that are encoded at once."""


@dataclass(frozen=True)
class FaceBatch:
    """Faces of one subject: as the encoder gets them, as the decoder should draw them, weights of the pixels."""

    input_B3HH: Tensor
    face_B3HH: Tensor
    weight_B1HH: Tensor
    shape_BL: Tensor  # what the landmarks say of the expression (training/shape.py)
    keys: tuple[str, ...]


class FaceSource:
    """Face batches of one subject, pure functions of a step."""

    def __init__(self, recipe: Recipe, store: FrameStore, batch_size: int, seed: int) -> None:
        self.recipe, self.store, self.seed = recipe, store, seed
        self.learning, self.side = recipe.pair_learning, recipe.ynet.face_size
        self.sampler = BatchSampler(store, batch_size, seed, self.learning.balance)
        landmarks_N68x2 = in_face_crop(store, [meta.landmarks for meta in store.metas])
        seen = all(meta.irises for meta in store.metas)
        irises_N2x2 = in_face_crop(store, [meta.irises for meta in store.metas]) if seen else None
        self._landmarks_N68x2 = torch.from_numpy(landmarks_N68x2)
        self.shape_NL = torch.from_numpy(expression_shape(landmarks_N68x2, irises_N2x2))

    def batch(self, step: int, rank: int = 0, world: int = 1) -> FaceBatch:
        """Faces of `step`; what is random depends on (seed, step, rank) alone."""
        frames = self.sampler.batch(step, rank, world)
        face = at_side(frames.face_B3HW, self.side)
        index_B = frames.index_B
        return FaceBatch(
            self.augment(face, step, rank), face, self._weights(index_B), self.shape_NL[index_B], frames.keys
        )

    def augment(self, face_B3HH: Tensor, step: int, rank: int) -> Tensor:
        """The encoder's input: moved, tinted and noisy, so that γ holds none of these."""
        generator = generator_for(self.seed, step, rank)
        moved = jitter(face_B3HH, self.learning.shift, generator)
        return add_noise(tint(moved, self.learning.color, generator), self.recipe.ynet.input_noise, generator)

    def drawn(self, count: int) -> tuple[Tensor, Tensor]:
        """About `count` faces, unchanged, drawn as the training draws them, and what their landmarks say."""
        steps = range(-(-count // self.sampler.batch_size))
        chosen = np.concatenate([self.sampler.indices(step) for step in steps])
        return self.faces(chosen), self.shape_NL[chosen]

    def faces(self, indices: np.ndarray) -> Tensor:
        """Faces of chosen frames, unchanged."""
        return at_side(self.store.batch(indices).face_B3HW, self.side)

    def _weights(self, index_B: Tensor) -> Tensor:
        return feature_weights(self._landmarks_N68x2[index_B], self.side, self.learning.feature_weight)


def in_face_crop(store: FrameStore, points_NP2: Sequence[Sequence[tuple[float, float]]]) -> np.ndarray:
    """P points of each frame, from pixels of the portrait to its face crop: N×P×2 in [0, 1]."""
    transform_N23 = np.array([meta.face_transform for meta in store.metas], np.float32)
    points = np.array(points_NP2, np.float32)
    moved = np.einsum("nij,npj->npi", transform_N23[:, :, :2], points) + transform_N23[:, None, :, 2]
    return np.asarray(moved / store.manifest.face_size, np.float32)


@torch.no_grad()
def theta_of(avatar: LatentAvatar, face_B3HH: Tensor) -> Tensor:
    """Eq. 2, frozen: θ_p of faces of any size."""
    return avatar.encode(at_side(face_B3HH, avatar.config.face_size))

"""Which part of the pictures a step draws: all of it, all of it at half the resolution, or a square on the face.

Shapes: B batch, r rays along a side, s pixels along a side.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from lavatar.configs.avatar import AvatarConfig
from lavatar.configs.recipe import Recipe
from lavatar.models.losses import coarse
from lavatar.models.rendering import View

FEATURES = (*range(17, 68),)
"""Landmarks that a square may be centred near: brows, eyes, nose, mouth."""


class SeenFrames(NamedTuple):
    """What Eq. 4 compares with: portraits over white, masks, and weights of the pixels if there are any."""

    image_B3ss: Tensor
    mask_B1ss: Tensor
    weight_B1ss: Tensor | None


def draw_view(step: int, landmarks_B68x2: Tensor, recipe: Recipe, generator: Generator) -> View:
    """The view of a step. A square is centred near one of the frame's FEATURES (landmarks in [0, 1]), drawn at random.

    Whether there is a square depends on seed and step, so that all workers of a step have as much to do; where it lies,
    on the generator.
    """
    learning, training, rays = recipe.avatar_learning, recipe.avatar_training, recipe.avatar.ray_size
    if step < learning.progressive * training.steps:
        return View(rays // 2, rays // 2)
    if np.random.default_rng((training.seed, 3, step)).random() >= learning.crop:
        return View(rays, rays)
    B, side = len(landmarks_B68x2), rays // 2
    chosen_B = torch.tensor(FEATURES)[torch.randint(len(FEATURES), (B,), generator=generator)]
    centre_B2 = landmarks_B68x2[torch.arange(B), chosen_B].flip(-1) * rays  # rows, columns
    shift_B2 = (torch.rand(B, 2, generator=generator) - 0.5) * side / 2
    corner_B2 = (centre_B2 + shift_B2 - side / 2).round().clamp(0, rays - side).long()
    return View(rays, side, corner_B2)


def seen_through(view: View, config: AvatarConfig, frames: SeenFrames) -> SeenFrames:
    """The same part of the true frames as the view draws, at the same resolution."""
    size = config.image_size * view.ray_size // config.ray_size
    pictures = [None if p is None else coarse(p, size) if p.shape[-1] != size else p for p in frames]
    ratio = config.image_size // config.ray_size
    if view.corner_B2 is not None:
        pictures = [None if p is None else squares(p, view.corner_B2 * ratio, view.side * ratio) for p in pictures]
    image, mask, weight = pictures
    assert image is not None
    assert mask is not None
    return SeenFrames(image, mask, weight)


def squares(picture_BCss: Tensor, corner_B2: Tensor, side: int) -> Tensor:
    """A square of `side` of each picture, from its corner (row, column) on: B×C×side×side."""
    parts = [p[:, y : y + side, x : x + side] for p, (y, x) in zip(picture_BCss, corner_B2.tolist(), strict=True)]
    return torch.stack(parts)

"""The baseline NeRFace in training (Sec. 5.2): random rays, most of them on the face, against the pixels they meet.

Shapes: B batch, R rays a frame, N training frames, s image side, L width of a frame's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lavatar.configs.recipe import Recipe
from lavatar.datasets.coefficients import coefficients
from lavatar.datasets.loader import BatchSampler, FrameBatch, FrameStore
from lavatar.models.nerface import NeRFace
from lavatar.models.rendering import rays_through
from lavatar.training.augmentation import generator_for
from lavatar.training.avatar import PICTURES, sheet
from lavatar.training.tasks import ParamGroup

BOX_MARGIN = 0.35  # around the landmarks' box, in its own sides: about the head


class NeRFaceModule(nn.Module):
    """What a checkpoint holds: both fields, and the frames' codes, of which the mean is taken at test time."""

    def __init__(self, avatar: NeRFace, frames: int, width: int) -> None:
        super().__init__()
        self.avatar = avatar
        self.codes_NL = nn.Parameter(torch.zeros(frames, width))


@dataclass(frozen=True)
class RayBatch:
    """Frames, their coefficients, and the pixels (row, column) that rays are sent through."""

    frames: FrameBatch
    coefficients_BK: Tensor
    pixel_BR2: Tensor


class NeRFaceTask:
    """TrainingTask of the avatar stage with `avatar.field: mlp`."""

    module: NeRFaceModule

    def __init__(self, recipe: Recipe, store: FrameStore, rank: int = 0, world: int = 1) -> None:
        self.recipe, self.store, self.rank, self.world = recipe, store, rank, world
        self.training, self.learning = recipe.avatar_training, recipe.avatar_learning
        self.sampler = BatchSampler(store, self.training.batch_size, self.training.seed, self.learning.balance)
        self.coefficients_NK = torch.from_numpy(coefficients(store))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.training.seed)
            self.module = NeRFaceModule(NeRFace(recipe.avatar), len(store), recipe.avatar.frame_code)
        self.avatar.encoder.fix(self.coefficients_NK)
        self.groups = {group["name"] for group in self.param_groups()}

    @property
    def avatar(self) -> NeRFace:
        """The model in training."""
        return self.module.avatar

    def param_groups(self) -> list[ParamGroup]:
        rate = self.training.learning_rate
        groups: list[ParamGroup] = [{"name": "decoder", "params": list(self.avatar.parameters()), "lr": rate}]
        if self.module.codes_NL.shape[1]:
            groups.append({"name": "codes", "params": [self.module.codes_NL], "lr": rate})
        return groups

    def active_groups(self, step: int) -> set[str]:
        return self.groups

    def batches(self, step: int) -> RayBatch:
        frames = self.sampler.batch(step, self.rank, self.world)
        generator = generator_for(self.training.seed, step, self.rank)
        side = self.recipe.avatar.image_size
        pixel_BR2 = draw_pixels(
            frames.landmarks_B68x2, side, self.learning.ray_batch, self.learning.ray_face_share, generator
        )
        return RayBatch(frames, self.coefficients_NK[frames.index_B], pixel_BR2)

    def losses(self, batch: RayBatch, step: int) -> dict[str, Tensor]:
        """Mean squared errors of the coarse and the fine field's colours, and the codes kept small."""
        frames, config = batch.frames, self.recipe.avatar
        s = config.image_size
        theta_BK = self.avatar.encode(batch.coefficients_BK)
        offset_BR2 = ((batch.pixel_BR2 + 0.5) / s - 0.5) * (512 / config.focal)
        rays = rays_through(offset_BR2, frames.rotation_B33, frames.translation_B3, frames.scale_B)
        codes_NL = self.module.codes_NL - self.module.codes_NL.mean(0)
        shaded = self.avatar.shade(theta_BK, rays, noise=True, code_BL=codes_NL[frames.index_B])
        where_BR = batch.pixel_BR2[..., 0] * s + batch.pixel_BR2[..., 1]
        truth_B3R = frames.image_B3HW.flatten(2).gather(2, where_BR[:, None].expand(-1, 3, -1))
        terms = {
            "coarse": F.mse_loss(shaded.coarse_B3R, truth_B3R),
            "fine": F.mse_loss(shaded.fine_B3R, truth_B3R),
            "codes": codes_NL[frames.index_B].square().sum() / max(1, codes_NL.shape[1] * len(frames.index_B)),
        }
        total = terms["coarse"] + terms["fine"] + self.learning.frame_code_penalty * terms["codes"]
        return {**terms, "total": total}

    def after_step(self, step: int) -> None:
        """Nothing runs beside the optimizer."""

    @torch.no_grad()
    def pictures(self, step: int) -> dict[str, np.ndarray]:
        """Truth above result, for frames spread over the training video."""
        chosen = np.linspace(0, len(self.store) - 1, PICTURES).astype(int)
        device = next(self.module.parameters()).device
        frames = self.store.batch(chosen).to(device)
        self.module.eval()
        theta_BK = self.avatar.encode(self.coefficients_NK[chosen].to(device))
        drawn = self.avatar.render(theta_BK, frames.rotation_B33, frames.translation_B3, frames.scale_B)
        return {"truth_above_result": sheet([frames.image_B3HW, drawn.I_hr])}

    def released(self) -> dict[str, Tensor]:
        """The tensors of the release: the fields, without the frames' codes."""
        return dict(self.avatar.state_dict())

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Everything is in the module."""


def draw_pixels(landmarks_B68x2: Tensor, side: int, count: int, face_share: float, generator: Generator) -> Tensor:
    """B×count×2 rows and columns: `face_share` of them in the box around the landmarks (in [0, 1]), others anywhere."""
    B = len(landmarks_B68x2)
    low_B2, high_B2 = landmarks_B68x2.amin(1).flip(-1), landmarks_B68x2.amax(1).flip(-1)
    margin_B2 = BOX_MARGIN * (high_B2 - low_B2)
    low_B12, high_B12 = (low_B2 - margin_B2)[:, None], (high_B2 + margin_B2)[:, None]
    place_BR2 = torch.rand(B, count, 2, generator=generator)
    on_face = torch.arange(count)[:, None] < round(face_share * count)
    place_BR2 = torch.where(on_face, low_B12 + place_BR2 * (high_B12 - low_B12), place_BR2)
    return (place_BR2 * side).long().clamp(0, side - 1)

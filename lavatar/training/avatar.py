"""The latent head NeRF in training (Sec. 3.3): encoder and decoder end to end from the image losses of Eq. 4.

Shapes: B batch, N training frames, s image side, H face side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavatar.configs.recipe import Recipe
from lavatar.datasets.coefficients import coefficients
from lavatar.datasets.loader import BatchSampler, FrameBatch, FrameStore
from lavatar.models import parts
from lavatar.models.avatar import LatentAvatar
from lavatar.models.encoder import AvatarEncoder
from lavatar.models.encoder_coefficients import CoefficientEncoder
from lavatar.models.encoder_whitened import WhitenedEncoder
from lavatar.models.losses import eq4
from lavatar.models.rendering import View, multiplied
from lavatar.training.augmentation import add_noise, generator_for, jitter, tint
from lavatar.training.average import WeightAverage
from lavatar.training.crops import SeenFrames, draw_view, seen_through
from lavatar.training.emphasis import feature_weights
from lavatar.training.tasks import ParamGroup
from lavatar.training.warmstart import PosedFrames, warm_start

PICTURES = 4
BEGIN_FRAMES = 512


class PoseCorrection(nn.Module):
    """A small learned change of each training frame's pose: the tracker's jitter would else blur the head.

    Six numbers a frame: a rotation vector (radians, camera axes) and a translation in head units. Begins at zero.
    """

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(frames, 6))

    def forward(
        self, index_B: Tensor, rotation_B33: Tensor, translation_B3: Tensor, scale_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Corrected rotation and translation of the frames `index`."""
        values_B6 = self.values[index_B]
        with torch.autocast(values_B6.device.type, enabled=False):  # in bf16 a head would be off by pixels
            turn_B33 = torch.linalg.matrix_exp(_skew(values_B6[:, :3]))
            return multiplied(turn_B33, rotation_B33), translation_B3 + scale_B[:, None] * values_B6[:, 3:]


def _skew(vector_B3: Tensor) -> Tensor:
    """Cross-product matrix of each vector."""
    x, y, z = vector_B3.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).view(-1, 3, 3)


class AvatarModule(nn.Module):
    """What a checkpoint of this stage holds: the avatar, and the pose corrections where they are learned."""

    def __init__(self, avatar: LatentAvatar, correction: PoseCorrection | None) -> None:
        super().__init__()
        self.avatar = avatar
        self.correction = correction


@dataclass(frozen=True)
class AvatarBatch:
    """Frames, the encoder's input made from their faces (or their coefficients), and the part that the step draws."""

    frames: FrameBatch
    input_B3HH: Tensor
    view: View


Perceptual = Callable[[Tensor, Tensor], Tensor]


class AvatarTask:
    """TrainingTask of the avatar stage. `perceptual` gives B distances; needed where avatar_loss.lambda_vgg > 0."""

    module: AvatarModule

    def __init__(
        self, recipe: Recipe, store: FrameStore, rank: int = 0, world: int = 1, perceptual: Perceptual | None = None
    ) -> None:
        self.recipe, self.store, self.rank, self.world, self.perceptual = recipe, store, rank, world, perceptual
        self.training, self.learning = recipe.avatar_training, recipe.avatar_learning
        self.sampler = BatchSampler(store, self.training.batch_size, self.training.seed, self.learning.balance)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.training.seed)
            correction = PoseCorrection(len(store)) if self.learning.rate_pose > 0 else None
            self.module = AvatarModule(LatentAvatar(recipe.avatar), correction)
        self.coefficients_NK: Tensor | None = None
        if isinstance(self.avatar.encoder, CoefficientEncoder):
            self.coefficients_NK = torch.from_numpy(coefficients(store))
            self.avatar.encoder.fix(self.coefficients_NK)
        self._begin()
        self.average = WeightAverage(self.avatar, self.learning.average) if self.learning.average > 0 else None
        self.groups = {group["name"] for group in self.param_groups()}

    @torch.no_grad()
    def _begin(self) -> None:
        """Data-dependent beginning of our encoder and generator, from frames drawn as the training draws them."""
        encoder = self.avatar.encoder
        if isinstance(encoder, AvatarEncoder):
            return
        steps = range(-(-BEGIN_FRAMES // self.training.batch_size))
        frames = self.store.batch(np.concatenate([self.sampler.indices(step) for step in steps]))
        pose = (frames.rotation_B33, frames.translation_B3, frames.scale_B)
        face_N3HH = self._input(frames)
        if isinstance(encoder, WhitenedEncoder):
            encoder.begin_with(face_N3HH)
        theta_ND = torch.cat([encoder(part) for part in face_N3HH.split(32)])
        warm_start(self.avatar, PosedFrames(frames.image_B3HW, frames.mask_B1HW, *pose, theta_ND))

    def _input(self, frames: FrameBatch) -> Tensor:
        """What drives these frames: their faces at the encoder's size, or their coefficients."""
        if self.coefficients_NK is not None:
            return self.coefficients_NK[frames.index_B.cpu()].to(frames.face_B3HW.device)
        return at_side(frames.face_B3HW, self.recipe.avatar.face_size)

    @property
    def avatar(self) -> LatentAvatar:
        """The model in training."""
        return self.module.avatar

    def param_groups(self) -> list[ParamGroup]:
        """Encoder, static planes, basis (of the basis generator), the rest of the decoder, pose corrections."""
        rate, learning = self.training.learning_rate, self.learning
        factors = {"encoder": learning.rate_encoder, "planes": learning.rate_planes, "basis": learning.rate_basis}
        members: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.avatar.named_parameters():
            members.setdefault(_group_of(name), []).append(parameter)
        groups: list[ParamGroup] = [
            {"name": name, "params": parameters, "lr": rate * factors.get(name, 1.0)}
            for name, parameters in members.items()
        ]
        if self.module.correction is not None:
            own = list(self.module.correction.parameters())
            groups.append({"name": "pose", "params": own, "lr": rate * learning.rate_pose})
        for group in groups:
            group["betas"], group["eps"] = (0.9, learning.beta2), learning.epsilon
        return groups

    def active_groups(self, step: int) -> set[str]:
        return self.groups

    def batches(self, step: int) -> AvatarBatch:
        frames = self.sampler.batch(step, self.rank, self.world)
        generator = generator_for(self.training.seed, step, self.rank)
        face = self._input(frames)
        if self.coefficients_NK is None:
            face = jitter(face, self.learning.shift, generator)
            face = tint(face, self.learning.color, generator)
            face = add_noise(face, self.recipe.avatar.input_noise, generator)
        return AvatarBatch(frames, face, draw_view(step, frames.landmarks_B68x2, self.recipe, generator))

    def losses(self, batch: AvatarBatch, step: int) -> dict[str, Tensor]:
        """Eq. 4, with eyes and mouth emphasised and the pose corrections kept small where the recipe says so."""
        frames, learning = batch.frames, self.learning
        rotation_B33, translation_B3 = frames.rotation_B33, frames.translation_B3
        if self.module.correction is not None:
            rotation_B33, translation_B3 = self.module.correction(
                frames.index_B, rotation_B33, translation_B3, frames.scale_B
            )
        theta_BD = self.avatar.encode(batch.input_B3HH)
        rendering = self.avatar.render(
            theta_BD, rotation_B33, translation_B3, frames.scale_B, noise=True, view=batch.view
        )
        weight_B1ss = None
        if learning.feature_weight > 1:
            side = frames.image_B3HW.shape[-1]
            weight_B1ss = feature_weights(frames.landmarks_B68x2, side, learning.feature_weight)
        seen = seen_through(
            batch.view, self.recipe.avatar, SeenFrames(frames.image_B3HW, frames.mask_B1HW, weight_B1ss)
        )
        loss = self.recipe.avatar_loss
        if step % learning.perceptual_every:
            loss = loss.model_copy(update={"lambda_vgg": 0.0})
        terms = eq4(rendering, seen.image_B3ss, seen.mask_B1ss, loss, self._perceptual, seen.weight_B1ss)
        if self.module.correction is not None:
            terms["pose"] = self.module.correction.values[frames.index_B].square().mean()
            terms["total"] = terms["total"] + learning.pose_penalty * terms["pose"]
        return terms

    def _perceptual(self, drawn_B3ss: Tensor, image_B3ss: Tensor) -> Tensor:
        """VGG(·) of Eq. 4, on the first frames of the batch where the recipe takes only some."""
        assert self.perceptual is not None
        frames = len(drawn_B3ss) * parts.parts()
        count = min(self.learning.perceptual_frames or frames, frames)
        here = parts.of_the_first(count, len(drawn_B3ss))
        if not here:
            return drawn_B3ss.new_zeros(1)
        distance_B = self.perceptual(drawn_B3ss[:here], image_B3ss[:here])
        if count == frames:
            return distance_B
        return distance_B * (here * parts.parts() / count)  # the parts' means are averaged

    def after_step(self, step: int) -> None:
        """The running mean of the weights follows."""
        if self.average is not None:
            self.average.follow(step)

    @torch.no_grad()
    def pictures(self, step: int) -> dict[str, np.ndarray]:
        """Truth above result, for frames spread over the training video."""
        chosen = np.linspace(0, len(self.store) - 1, PICTURES).astype(int)
        device = next(self.module.parameters()).device
        frames = self.store.batch(chosen).to(device)
        self.module.eval()
        theta_BD = self.avatar.encode(self._input(frames))
        drawn = self.avatar.render(theta_BD, frames.rotation_B33, frames.translation_B3, frames.scale_B)
        return {"truth_above_result": sheet([frames.image_B3HW, drawn.I_hr])}

    def released(self) -> dict[str, Tensor]:
        """The avatar's tensors as they are released: the running mean of the weights where there is one."""
        return {**self.avatar.state_dict(), **(self.average.values if self.average is not None else {})}

    def state(self) -> dict[str, Tensor]:
        return dict(self.average.values) if self.average is not None else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """What is not in the module: the running mean of the weights."""
        if self.average is not None:
            self.average.take(state)


def at_side(face_B3HH: Tensor, side: int) -> Tensor:
    """Faces at another size, averaging where they get smaller."""
    if face_B3HH.shape[-1] == side:
        return face_B3HH
    return F.interpolate(face_B3HH, size=(side, side), mode="bilinear", antialias=True, align_corners=False)


def sheet(rows: list[Tensor]) -> np.ndarray:
    """Rows of B×3×H×W images in [0, 1] as one uint8 HWC picture, one row above the other."""
    lines = [torch.cat(list(row_B3HW.detach().float().cpu()), dim=-1) for row_B3HW in rows]
    picture_3HW = torch.cat(lines, dim=-2).clamp(0, 1)
    return (picture_3HW * 255).round().byte().permute(1, 2, 0).numpy()


def _group_of(name: str) -> str:
    """Parameter group of one of the avatar's parameters, by its name in the module."""
    if name.startswith("encoder."):
        return "encoder"
    return {"generator.planes": "planes", "generator.basis": "basis"}.get(name, "decoder")

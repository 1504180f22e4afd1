"""The mapping MLP (Sec. 4.2) in training: of a pair, or of one avatar of a network of many subjects.

Shapes: B batch, N frames, H face side, G code γ, D code θ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lavatar.configs.recipe import Recipe
from lavatar.models.avatar import LatentAvatar
from lavatar.models.losses import eq8
from lavatar.models.mapping import MappingMLP, SubjectFrames, build_mapping
from lavatar.models.ynet import SUBJECTS, Subject
from lavatar.training.faces import CHUNK, FaceBatch, FaceSource, theta_of
from lavatar.training.shape import LOWER_LIP, UPPER_LIP
from lavatar.training.tasks import ParamGroup
from lavatar.training.ynet import YNetTask

AT_REST = 0.2


@dataclass(frozen=True)
class MappingBatch:
    """Faces of the avatar, and of the actor `driver` where the mapping also learns from swapped faces."""

    avatar: FaceBatch
    actor: FaceBatch | None
    driver: Subject


class MappingTask:
    """TrainingTask of Sec. 4.2, Eq. 8: everything but the mapping MLP is frozen.

    `subjects` are the one whose avatar it is, and then the actors that are to drive it.
    """

    module: MappingMLP

    def __init__(
        self,
        recipe: Recipe,
        ynet: YNetTask,
        avatar: LatentAvatar,
        rank: int = 0,
        world: int = 1,
        subjects: Sequence[Subject] = SUBJECTS,
    ) -> None:
        self.recipe, self.rank, self.world = recipe, rank, world
        self.own, self.actors = subjects[0], tuple(subjects[1:])
        self.training = recipe.mapping_training
        self.ynet = ynet.ynet.eval().requires_grad_(False)
        self.avatar = avatar.eval().requires_grad_(False)
        self.sources = {
            subject: FaceSource(
                recipe, ynet.stores[subject], self.training.batch_size, 2 * self.training.seed + 100 + i
            )
            for i, subject in enumerate(subjects)
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.training.seed)
            self.module = build_mapping(recipe, subjects)
        self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        """Statistics of all subjects' codes, and the regression that a linear mapping begins at."""
        config, readout, learning = self.recipe.mapping, self.ynet.readout, self.recipe.pair_learning
        begins_at_regression = not config.hidden and learning.regression
        if readout is not None and self.module.reads_landmarks:
            self.module.read_through(readout.cpu())
        if config.align == "none" and not begins_at_regression:
            return
        self._follow(torch.device("cpu"))
        drawn = {subject: source.drawn(learning.align_frames) for subject, source in self.sources.items()}
        frames = {subject: self._frames(*each) for subject, each in drawn.items()}
        if config.align != "none":
            self.module.align(frames)
        if begins_at_regression:
            faces_N3HH, _ = drawn[self.own]
            theta_ND = torch.cat([theta_of(self.avatar, part) for part in faces_N3HH.split(CHUNK)])
            self.module.begin_with(frames, theta_ND, config)

    def _frames(self, faces_N3HH: Tensor, shape_NL: Tensor) -> SubjectFrames:
        """Their codes; at rest are those whose mouth is open least."""
        gap_N = shape_NL[:, LOWER_LIP] - shape_NL[:, UPPER_LIP]
        gamma_NG = torch.cat([self.ynet.encode(part) for part in faces_N3HH.split(CHUNK)])
        return SubjectFrames(gamma_NG, shape_NL, gap_N <= gap_N.quantile(AT_REST))

    def param_groups(self) -> list[ParamGroup]:
        return [{"name": "mapping", "params": list(self.module.parameters()), "lr": self.training.learning_rate}]

    def active_groups(self, step: int) -> set[str]:
        return {"mapping"}

    def batches(self, step: int) -> MappingBatch:
        driver = self.actors[int(np.random.default_rng((self.training.seed, 4, step)).integers(len(self.actors)))]
        swaps = self.recipe.pair_learning.swapped > 0
        actor = self.sources[driver].batch(step, self.rank, self.world) if swaps else None
        return MappingBatch(self.sources[self.own].batch(step, self.rank, self.world), actor, driver)

    def losses(self, batch: MappingBatch, step: int) -> dict[str, Tensor]:
        """Eq. 8; with `swapped`, also for actor frames, θ being read off the avatar's face that the Y-network draws."""
        self._follow(batch.avatar.face_B3HH.device)
        with torch.no_grad():
            theta_BD = theta_of(self.avatar, batch.avatar.face_B3HH)
            gamma_BG = self.ynet.encode(batch.avatar.input_B3HH)
        terms = eq8(self.module(gamma_BG, self.own), theta_BD)
        if batch.actor is None:
            return terms
        with torch.no_grad():
            swapped_B3HH = self.ynet.decode(self.ynet.encode(batch.actor.face_B3HH), self.own)
            theta_BD = theta_of(self.avatar, swapped_B3HH)
            gamma_BG = self.ynet.encode(batch.actor.input_B3HH)
        terms["swapped"] = eq8(self.module(gamma_BG, batch.driver), theta_BD)["total"]
        return {**terms, "total": terms["total"] + self.recipe.pair_learning.swapped * terms["swapped"]}

    def _follow(self, device: torch.device) -> None:
        """The frozen networks are on the device of the one in training."""
        self.avatar.encoder.to(device)
        self.ynet.to(device)

    def after_step(self, step: int) -> None:
        """Nothing runs beside the optimizer."""

    @torch.no_grad()
    def pictures(self, step: int) -> dict[str, np.ndarray]:
        """None: what the mapping does shows in the preview."""
        return {}

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Everything is in the module."""

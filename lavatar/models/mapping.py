"""Sec. 4.2: the MLP from the shared code γ to the avatar's own code θ_p.

Shapes: B batch, N frames, M frames of all actors, 2 the avatar and its actor (its actors in a network of many
subjects), G code γ, D code θ, L landmark read-out, F what the MLP reads (G, or L + G).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavatar.configs.pair import MappingConfig
from lavatar.configs.recipe import Recipe
from lavatar.models.encoder import mlp
from lavatar.models.regression import begin_at_regression, unseen_covariance
from lavatar.models.ynet import SUBJECTS, Subject

SMALLEST_DEVIATION = 1e-3
READOUT_NOISE = 0.3  # of tracked landmarks, in the shape's units: a landmark that moves less than this stands still
MOST_GAIN = 3.0


class SubjectFrames(NamedTuple):
    """Training frames of one subject, from which a mapping takes its statistics."""

    gamma_NG: Tensor
    shape_NL: Tensor  # what their tracked landmarks say, which γ's read-out is meant to say
    rest_N: Tensor  # the frames at rest, a mask


class MappingMLP(nn.Module):
    """Mapping(γ) → θ (Eq. 8): B×gamma_dim → B×theta_dim.

    Eq. 6 asks the codes of both subjects to share one distribution. What is left of a difference is taken out here
    where the configuration says so (`align`). With `reads: landmarks` the MLP sees, beside γ weakened to `code_share`,
    what γ says of the landmarks: the part of γ that means the same on both faces.
    """

    mean_2F: Tensor
    deviation_2F: Tensor
    gain_F: Tensor
    noise_F: Tensor
    readout_LG: Tensor
    readout_L: Tensor

    def __init__(
        self,
        config: MappingConfig,
        gamma_dim: int,
        theta_dim: int,
        landmark_dim: int = 0,
        subjects: Sequence[Subject] = SUBJECTS,
    ) -> None:
        """`subjects`: the avatar, then its actors; each has statistics of its own for `align`."""
        super().__init__()
        self.subjects = tuple(subjects)
        self.alignment = config.align
        self.reads_landmarks = config.reads == "landmarks"
        read = landmark_dim if self.reads_landmarks else 0
        gain_F, noise_F = torch.ones(read + gamma_dim), torch.full((read + gamma_dim,), SMALLEST_DEVIATION)
        noise_F[:read] = READOUT_NOISE
        if self.reads_landmarks:
            self.register_buffer("readout_LG", torch.zeros(read, gamma_dim))
            self.register_buffer("readout_L", torch.zeros(read))
            gain_F[read:] = config.code_share
        self.layers = mlp((read + gamma_dim, *config.hidden, theta_dim))
        self.register_buffer("mean_2F", torch.zeros(len(self.subjects), read + gamma_dim))
        self.register_buffer("deviation_2F", torch.ones(len(self.subjects), read + gamma_dim))
        self.register_buffer("gain_F", gain_F)
        self.register_buffer("noise_F", noise_F, persistent=False)

    @torch.no_grad()
    def read_through(self, readout: nn.Linear) -> None:
        """Take over the Y-network's frozen read-out of landmarks."""
        self.readout_LG.copy_(readout.weight)
        self.readout_L.copy_(readout.bias)

    def features(self, gamma_BG: Tensor) -> Tensor:
        """What is aligned and mapped: B×F."""
        if not self.reads_landmarks:
            return gamma_BG
        return torch.cat([F.linear(gamma_BG, self.readout_LG, self.readout_L), gamma_BG], dim=1)

    @torch.no_grad()
    def align(self, frames: Mapping[Subject, SubjectFrames]) -> None:
        """Take the statistics of each subject's codes over its training frames.

        mean: each subject's mean becomes 0; rest: the mean of its frames at rest does. Both leave one deviation, the
        avatar's, for all subjects; but where γ's read-out of an actor's landmarks moves more than they do, or less, by
        another factor than the avatar's, that is made up for. deviation: each subject's mean becomes 0 and its
        deviation 1, as if all of them acted alike.
        """
        own_shape_NL = frames[self.subjects[0]].shape_NL
        read = len(self.readout_L) if self.reads_landmarks else 0
        too_large_by = {}
        for which, subject in enumerate(self.subjects):
            gamma_NG, shape_NL, rest_N = frames[subject]
            feature_NF = self.features(gamma_NG)
            self.mean_2F[which] = (feature_NF[rest_N] if self.alignment == "rest" else feature_NF).mean(0)
            self.deviation_2F[which] = self._deviation(feature_NF, self.noise_F)
            if read:
                factor_L = self.deviation_2F[which, :read] / self._deviation(shape_NL, READOUT_NOISE)
                untracked_L = (shape_NL == shape_NL[0]).all(0) | (own_shape_NL == own_shape_NL[0]).all(0)  # no irises
                too_large_by[which] = (factor_L, untracked_L)
        if self.alignment != "deviation":
            for which in range(1, len(self.subjects)):
                self.deviation_2F[which] = self.deviation_2F[0]
                if read:
                    (own_L, _), (factor_L, untracked_L) = too_large_by[0], too_large_by[which]
                    self.deviation_2F[which, :read] *= torch.where(untracked_L, 1.0, factor_L / own_L)

    @staticmethod
    def _deviation(value_NF: Tensor, noise: Tensor | float) -> Tensor:
        return (value_NF.var(0) + noise**2).sqrt()

    def aligned(self, gamma_BG: Tensor, subject: Subject) -> Tensor:
        """The MLP's input: B×F."""
        which = self.subjects.index(subject)
        return (self.features(gamma_BG) - self.mean_2F[which]) / self.deviation_2F[which] * self.gain_F

    @torch.no_grad()
    def begin_with(self, frames: Mapping[Subject, SubjectFrames], theta_ND: Tensor, config: MappingConfig) -> None:
        """A mapping without hidden layers begins at the ridge regression of the avatar's θ on its γ (Eq. 8 solved).

        With `unseen` it relies little on directions in which the codes of the actors vary and the avatar's do not: a
        face that never pursed its lips has no θ for it, and whatever happened to go with their noise would be driven.
        `theta_ND` are the codes of the avatar's frames.
        """
        (layer,) = self.layers
        assert isinstance(layer, nn.Linear)
        own, *actors = self.subjects
        input_NF = self.aligned(frames[own].gamma_NG, own)
        noise_FF = None
        if config.unseen > 0:
            actor_MF = torch.cat([self.aligned(frames[actor].gamma_NG, actor) for actor in actors])
            noise_FF = config.unseen * unseen_covariance(input_NF - input_NF.mean(0), actor_MF)
        begin_at_regression(layer, input_NF, theta_ND, config.ridge, noise_FF)
        # what regression cannot explain it leaves out; the driven code shall vary as θ does
        lost = theta_ND.var(0).sum() / layer(input_NF).var(0).sum().clamp(min=1e-12)
        layer.weight.mul_(config.gain * lost.sqrt().clamp(max=MOST_GAIN))
        layer.bias.add_(theta_ND.mean(0) - layer(input_NF).mean(0))

    def forward(self, gamma_BG: Tensor, subject: Subject = "actor") -> Tensor:
        theta_BD: Tensor = self.layers(self.aligned(gamma_BG, subject))
        return theta_BD


def build_mapping(recipe: Recipe, subjects: Sequence[Subject] = SUBJECTS) -> MappingMLP:
    """The mapping MLP of a recipe."""
    return MappingMLP(recipe.mapping, recipe.ynet.code_dim, recipe.avatar.code_dim, recipe.ynet.landmarks, subjects)

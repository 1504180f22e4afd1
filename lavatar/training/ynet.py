"""The Y-shaped network (Sec. 4.1) in training: of a pair, or one of many subjects.

Shapes: B batch, N frames, H face side, G code γ, D code θ.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lavatar.configs.recipe import Recipe
from lavatar.datasets.loader import FrameStore
from lavatar.models.avatar import LatentAvatar
from lavatar.models.encoder_whitened import WhitenedEncoder
from lavatar.models.losses import eq5, eq6, eq7, eq8
from lavatar.models.mapping import MappingMLP, build_mapping
from lavatar.models.regression import begin_at_regression
from lavatar.models.ynet import SUBJECTS, Subject, YNetwork
from lavatar.training.avatar import BEGIN_FRAMES, sheet
from lavatar.training.errorcurve import ErrorCurve, savings
from lavatar.training.faces import CHUNK, FaceBatch, FaceSource, theta_of
from lavatar.training.shape import whitening
from lavatar.training.tasks import ParamGroup
from lavatar.training.warmpair import WarmPair, begin_warm

PICTURES = 6
MOST_BEGIN_FRAMES = 4 * BEGIN_FRAMES  # of all subjects of a network together: a square matrix of this side is solved
READOUT_RIDGE = 0.003


class PairModule(nn.Module):
    """What a checkpoint of the Y step holds: the Y-network, and the mapping MLP where it is trained jointly."""

    def __init__(self, ynet: YNetwork, mapping: MappingMLP | None) -> None:
        super().__init__()
        self.ynet = ynet
        self.mapping = mapping


class YNetTask:
    """TrainingTask of Sec. 4.1, Eq. 5-7. `avatar` is needed only where the mapping is trained jointly.

    `stores` are the frames of each subject: of "avatar" and "actor", or of more under other names. Those in `avatars`
    take the avatar's weights of the losses, the others the actor's.
    """

    module: PairModule

    def __init__(
        self,
        recipe: Recipe,
        stores: Mapping[Subject, FrameStore],
        avatar: LatentAvatar | None = None,
        rank: int = 0,
        world: int = 1,
        avatars: Collection[Subject] = SUBJECTS[:1],
        warm: WarmPair | None = None,
    ) -> None:
        self.recipe, self.rank, self.world, self.avatar, self.warm = recipe, rank, world, avatar, warm
        self.loss, self.training = recipe.ynet_loss, recipe.ynet_training
        self.stores, self.subjects, self.avatars = stores, tuple(stores), frozenset(avatars)
        self.errors = ErrorCurve.of(self.subjects)
        self.sources = {
            subject: FaceSource(recipe, store, self.training.batch_size, 2 * self.training.seed + i)
            for i, (subject, store) in enumerate(self.stores.items())
        }
        self._whitening_LL = torch.from_numpy(whitening([source.shape_NL.numpy() for source in self.sources.values()]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.training.seed)
            mapping = None
            if recipe.mapping.joint:
                mapping = build_mapping(recipe)
            self.module = PairModule(YNetwork(recipe.ynet, self.subjects), mapping)
        if warm is None:
            self._begin()
        else:
            begin_warm(self.ynet, warm)

    @torch.no_grad()
    def _begin(self) -> None:
        """Data-dependent beginning of our encoder and of the landmark read-out, from frames drawn as in training."""
        encoder = self.ynet.encoder
        if not isinstance(encoder, WhitenedEncoder):
            return
        count = min(BEGIN_FRAMES // 2, MOST_BEGIN_FRAMES // len(self.subjects))
        drawn = [source.drawn(count) for source in self.sources.values()]
        encoder.begin_with(*(faces_N3HH for faces_N3HH, _ in drawn))
        if self.ynet.readout is not None:
            gamma_NG = torch.cat([encoder(part) for faces_N3HH, _ in drawn for part in faces_N3HH.split(CHUNK)])
            shape_NL = torch.cat([shape for _, shape in drawn])
            begin_at_regression(self.ynet.readout, gamma_NG, shape_NL, READOUT_RIDGE)

    @property
    def ynet(self) -> YNetwork:
        """The network in training."""
        return self.module.ynet

    def chosen(self, step: int) -> tuple[Subject, ...]:
        """Sec. 4.1: the subject drawn at random for this step, the same on every worker; or both (all of them)."""
        if self.loss.subjects == "both":
            return self.subjects
        return (self.subjects[int(np.random.default_rng((self.training.seed, 2, step)).integers(len(self.subjects)))],)

    def rival(self, subject: Subject, step: int) -> Subject:
        """Whose decoder the cycle of `subject` goes through: the other one of a pair, of more one drawn at random."""
        which = self.subjects.index(subject)
        others = self.subjects[which + 1 :] + self.subjects[:which]
        return others[int(np.random.default_rng((self.training.seed, 3, step, which)).integers(len(others)))]

    def param_groups(self) -> list[ParamGroup]:
        """Shared encoder (with a shared neck and a joint mapping), and one group a decoder."""
        rate = self.training.learning_rate
        own = {f"decoder_{s}": list(self.ynet.decoders[s].parameters()) for s in self.subjects}
        taken = {id(p) for parameters in own.values() for p in parameters}
        shared = [p for p in self.module.parameters() if id(p) not in taken]
        groups = {"shared": shared, **own}
        return [{"name": name, "params": parameters, "lr": rate} for name, parameters in groups.items()]

    def active_groups(self, step: int) -> set[str]:
        """The decoder of the subject that was not drawn stays as it is."""
        return {"shared", *(f"decoder_{subject}" for subject in self.chosen(step))}

    def batches(self, step: int) -> dict[str, FaceBatch]:
        return {s: self.sources[s].batch(step, self.rank, self.world) for s in self.chosen(step)}

    def losses(self, batch: Mapping[Subject, FaceBatch], step: int) -> dict[str, Tensor]:
        """Eq. 7 of each subject of the step, its terms under its name; with a joint mapping also Eq. 8."""
        terms: dict[str, Tensor] = {}
        totals: list[Tensor] = []
        for subject, faces in batch.items():
            gamma_BG = self.ynet.encode(faces.input_B3HH)
            own = self.subject_losses(faces, gamma_BG, subject, self.rival(subject, step))
            totals.append(own.pop("total"))
            if subject == "avatar" and self.module.mapping is not None:
                assert self.avatar is not None
                self.avatar.to(faces.face_B3HH.device)  # frozen, so the engine does not move it with the module
                theta_BD = theta_of(self.avatar, faces.face_B3HH)
                own["mapping"] = eq8(self.module.mapping(gamma_BG, subject), theta_BD)["total"]
                totals.append(self.recipe.mapping.lambda_mapping * own["mapping"])
            if self.ynet.readout is not None:
                off_BL = self.ynet.readout(gamma_BG) - faces.shape_BL
                own["landmarks"] = (off_BL @ self._whitening_LL.to(off_BL)).square().sum(1).mean()
                totals.append(self.recipe.pair_learning.landmark_weight * own["landmarks"])
            terms |= {f"{subject}_{name}": value for name, value in own.items()}
        return {**terms, "total": torch.stack(totals).sum()}

    def subject_losses(self, faces: FaceBatch, gamma_BG: Tensor, subject: Subject, rival: Subject) -> dict[str, Tensor]:
        """Eq. 5-7 with `subject` in the place of the text's actor and `rival` in that of its avatar."""
        which = 0 if subject in self.avatars else 1
        target, weight = faces.face_B3HH, faces.weight_B1HH
        reconstruction = eq5(self.ynet.decode(gamma_BG, subject), target, self.loss, weight)
        if not self.loss.image_cycle and self.loss.lambda_code[which] == 0:  # Sec. 5.2.3: Eq. 7 is L_rec alone
            nothing = {"total": torch.zeros_like(reconstruction["total"])}
            return eq7(reconstruction, nothing, self.loss.lambda_image[which])
        with torch.set_grad_enabled(self.loss.cross_gradient and torch.is_grad_enabled()):
            swapped_B3HH = self.ynet.decode(gamma_BG, rival)  # I*_ava
        cycled_code_BG = self.ynet.encode(swapped_B3HH)  # γ*_ava
        cycled = self.ynet.decode(cycled_code_BG, subject) if self.loss.image_cycle else None  # I*_act
        cycle = eq6(cycled, target, cycled_code_BG, gamma_BG, self.loss, self.loss.lambda_code[which], weight)
        return eq7(reconstruction, cycle, self.loss.lambda_image[which])

    def after_step(self, step: int) -> None:
        """Nothing runs beside the optimizer."""

    @torch.no_grad()
    def pictures(self, step: int) -> dict[str, np.ndarray]:
        """For each subject: its faces, the reconstructions, and another subject with the same expression."""
        self.module.eval()
        device = next(self.module.parameters()).device
        pictures = {}
        for subject, source in self.sources.items():
            chosen = np.linspace(0, len(source.store) - 1, PICTURES).astype(int)
            face = source.faces(chosen).to(device)
            gamma = self.ynet.encode(face)
            drawn = [self.ynet.decode(gamma, subject), self.ynet.decode(gamma, self.rival(subject, step))]
            pictures[f"{subject}_truth_own_swapped"] = sheet([face, *drawn])
        return pictures

    def measure(self, done: int) -> dict[str, float]:
        """Eq. 5 of each subject, at every `error_every` steps and at the end."""
        if done % self.recipe.pair_learning.error_every and done != self.training.steps:
            return {}
        errors = {subject: self.reconstruction_error(subject) for subject in self.subjects}
        self.errors.add(done, errors)
        return {"error/mean": self.errors.mean[-1], **{f"error/{subject}": value for subject, value in errors.items()}}

    @torch.no_grad()
    def reconstruction_error(self, subject: Subject) -> float:
        """Eq. 5, no pixel weighing more than another, on frames spread evenly over the subject's training part."""
        self.module.eval()
        source, device = self.sources[subject], next(self.module.parameters()).device
        count = min(self.recipe.pair_learning.error_frames, len(source.store))
        face_N3HH = source.faces(np.linspace(0, len(source.store) - 1, count).round().astype(int))
        total = 0.0
        for face_B3HH in face_N3HH.to(device).split(CHUNK):
            drawn_B3HH = self.ynet.decode(self.ynet.encode(face_B3HH), subject)
            total += float(eq5(drawn_B3HH, face_B3HH, self.loss)["total"]) * len(face_B3HH)
        return total / count

    def figures(self) -> dict[str, Any]:
        """The error's curve; after a warm start also the steps it saved (Saving of errorcurve.py)."""
        curve = {"error": self.errors.to_json()}
        if self.warm is None:
            return curve
        cold = self.warm.cold
        compared = savings(cold.curve, self.errors) if cold and self.errors.steps else {}
        return {
            **curve,
            "warm": {
                "source": self.warm.name,
                "cold": cold.pair if cold else None,
                **{part: found.to_json() for part, found in compared.items()},
            },
        }

    def state(self) -> dict[str, Tensor]:
        """The error's curve so far: steps, then a row for each subject."""
        rows = [[float(step) for step in self.errors.steps], *(self.errors.errors[s] for s in self.subjects)]
        return {"errors": torch.tensor(rows, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Everything else is in the module. (Checkpoints of an earlier lavatar hold no curve.)"""
        if "errors" in state:
            steps, *rows = state["errors"].tolist()
            self.errors = ErrorCurve([int(step) for step in steps], dict(zip(self.subjects, rows, strict=True)))

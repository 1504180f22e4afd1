"""The Y-shaped network (Sec. 4.1) and the mapping MLP (Sec. 4.2) in training: of a pair, or one of many subjects.

Shapes: B batch, N frames, H face side, G code γ, D code θ.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lavatar.configs.recipe import Recipe
from lavatar.datasets.loader import BatchSampler, FrameStore
from lavatar.models.avatar import LatentAvatar
from lavatar.models.encoder_whitened import WhitenedEncoder
from lavatar.models.losses import eq5, eq6, eq7, eq8
from lavatar.models.mapping import MappingMLP
from lavatar.models.regression import begin_at_regression
from lavatar.models.ynet import SUBJECTS, Subject, YNetwork
from lavatar.training.augmentation import add_noise, generator_for, jitter, tint
from lavatar.training.avatar import BEGIN_FRAMES, at_side, sheet
from lavatar.training.emphasis import feature_weights
from lavatar.training.errorcurve import ErrorCurve, savings
from lavatar.training.shape import LOWER_LIP, UPPER_LIP, expression_shape, whitening
from lavatar.training.tasks import ParamGroup
from lavatar.training.warmpair import WarmPair, begin_warm

PICTURES = 6
MOST_BEGIN_FRAMES = 4 * BEGIN_FRAMES  # of all subjects of a network together: a square matrix of this side is solved
CHUNK = 64
AT_REST = 0.2
READOUT_RIDGE = 0.003


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


def build_mapping(recipe: Recipe, subjects: Sequence[Subject] = SUBJECTS) -> MappingMLP:
    """The mapping MLP of a recipe."""
    return MappingMLP(recipe.mapping, recipe.ynet.code_dim, recipe.avatar.code_dim, recipe.ynet.landmarks, subjects)


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
                own["mapping"] = eq8(self.module.mapping(gamma_BG), theta_BD)["total"]
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
        config, readout = self.recipe.mapping, self.ynet.readout
        if readout is not None and self.module.reads_landmarks:
            self.module.read_through(readout.cpu())
        if config.align != "none":
            for subject in self.sources:
                gamma_NG = self._codes(subject)
                self.module.align(subject, gamma_NG, self._at_rest(gamma_NG))
        if not config.hidden and self.recipe.pair_learning.regression:
            faces_N3HH, _ = self.sources[self.own].drawn(self.recipe.pair_learning.align_frames)
            theta_ND = torch.cat([theta_of(self.avatar, part) for part in faces_N3HH.split(CHUNK)])
            actors = {actor: self._codes(actor) for actor in self.actors}
            self.module.begin_with(self._codes(self.own), theta_ND, config, actors)

    def _at_rest(self, gamma_NG: Tensor) -> Tensor | None:
        """The frames whose mouth is open least, by what γ says of the lips; None where it says nothing."""
        if self.ynet.readout is None:
            return None
        shape_NL = self.ynet.readout.cpu()(gamma_NG)
        gap_N = shape_NL[:, LOWER_LIP] - shape_NL[:, UPPER_LIP]
        return gap_N <= gap_N.quantile(AT_REST)

    @torch.no_grad()
    def _codes(self, subject: Subject) -> Tensor:
        """γ of frames of one subject, drawn as the training draws them: N×G."""
        faces_N3HH, _ = self.sources[subject].drawn(self.recipe.pair_learning.align_frames)
        self._follow(torch.device("cpu"))
        return torch.cat([self.ynet.encode(part) for part in faces_N3HH.split(CHUNK)])

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


@torch.no_grad()
def theta_of(avatar: LatentAvatar, face_B3HH: Tensor) -> Tensor:
    """Eq. 2, frozen: θ_p of faces of any size."""
    return avatar.encode(at_side(face_B3HH, avatar.config.face_size))

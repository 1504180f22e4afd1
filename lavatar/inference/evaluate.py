"""Sec. 5.2: how good the results are on held-out frames: the picture, and whether the expression follows.

Everything is measured at the avatar's training resolution, truth and results by the same meter in the same way.
Beside the model stand the mean and the nearest training frame: a frozen face can win on PSNR.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lavatar.configs.recipe import Recipe
from lavatar.contracts import Event, EventSink, NullSink
from lavatar.datasets.loader import FrameStore
from lavatar.inference.background import Background
from lavatar.inference.baselines import spread
from lavatar.inference.cross_evaluation import CrossEvaluation
from lavatar.inference.figures import in_order
from lavatar.inference.images import perceptual_metric
from lavatar.inference.loading import Avatar, Pair
from lavatar.inference.measured import CACHE_MB, Evaluation
from lavatar.inference.reenact import driven_poses, poses_of, reenact_cross, reenact_self
from lavatar.inference.self_evaluation import SelfEvaluation
from lavatar.models.perceptual import LPIPS

__all__ = ["CrossEvaluation", "Evaluation", "evaluate_both", "evaluate_cross", "evaluate_self"]


def evaluate_self(
    avatar: Avatar,
    dataset: Path,
    recipe: Recipe,
    *,
    lpips: LPIPS | None = None,
    events: EventSink | None = None,
    stage: str = "evaluate",
) -> Evaluation:
    """Self reenactment of the avatar's held-out frames, and the two trivial predictions of the same frames."""
    events, size, options = events or NullSink(), avatar.config.image_size, recipe.evaluation
    events.emit(Event(stage, "loading frames and meters"))
    held_out = FrameStore(dataset, size, "eval", CACHE_MB, events=events, stage=stage)
    train = FrameStore(dataset, size, "train", CACHE_MB, events=events, stage=stage)
    done = 0
    with SelfEvaluation(avatar, held_out, train, recipe, lpips) as measured, Background() as background:
        total = len(measured.indices)
        for batch in reenact_self(avatar, held_out, measured.indices, options.batch_size, options.self_smoothing):
            measured.add(batch, background)
            done += len(batch.index_B)
            events.emit(Event(stage, "self reenactment", done=done, total=total, unit="frames"))
    for store in (held_out, train):
        store.close()
    return measured.finish()


def evaluate_cross(
    avatar: Avatar,
    pair: Pair | None,
    avatar_dataset: Path,
    actor_dataset: Path,
    recipe: Recipe,
    *,
    lpips: LPIPS | None = None,
    events: EventSink | None = None,
    stage: str = "evaluate",
) -> Evaluation:
    """Cross reenactment of the actor's held-out frames, without a video."""
    events, options = events or NullSink(), recipe.evaluation
    actor = FrameStore(actor_dataset, avatar.config.image_size, "eval", CACHE_MB, events=events, stage=stage)
    held_out = FrameStore(avatar_dataset, avatar.config.image_size, "eval", CACHE_MB, events=events, stage=stage)
    every = np.arange(len(actor))
    poses = driven_poses(avatar.poses, poses_of(actor), every, options.pose_smoothing)
    indices = spread(len(actor), options.max_frames)
    done = 0
    with CrossEvaluation(avatar, held_out, actor, recipe, lpips) as measured, Background() as background:
        for batch in reenact_cross(avatar, pair, actor, indices, poses[indices], options.batch_size):
            background.run(measured.add, batch.index_B, batch.images_BHW3, poses[batch.index_B])
            done += len(batch.index_B)
            events.emit(Event(stage, "cross reenactment", done=done, total=len(indices), unit="frames"))
    for store in (actor, held_out):
        store.close()
    return measured.finish()


@dataclass(frozen=True)
class Evaluations:
    """Self and, with an actor, cross reenactment."""

    own: Evaluation
    cross: Evaluation | None
    note: str = ""  # of a metric whose weights are missing

    @property
    def metrics(self) -> dict[str, Any]:
        """As in metrics.json."""
        return in_order({**self.own.metrics, **(self.cross.metrics if self.cross else {})})

    @property
    def notes(self) -> tuple[str, ...]:
        """Each sentence once."""
        cross = self.cross.notes if self.cross else ()
        return tuple(dict.fromkeys((*((self.note,) if self.note else ()), *self.own.notes, *cross)))


def evaluate_both(
    avatar: Avatar,
    avatar_dataset: Path,
    recipe: Recipe,
    pair: Pair | None = None,
    actor_dataset: Path | None = None,
    *,
    events: EventSink | None = None,
    stage: str = "evaluate",
) -> Evaluations:
    """Self reenactment, and cross reenactment if an actor's dataset is given: through the pair, or without one by the
    actor's own coefficients, where the avatar is driven by such (the baselines).
    """
    lpips, note = perceptual_metric(avatar.device)
    own = evaluate_self(avatar, avatar_dataset, recipe, lpips=lpips, events=events, stage=stage)
    cross = None
    if actor_dataset is not None:
        cross = evaluate_cross(
            avatar, pair, avatar_dataset, actor_dataset, recipe, lpips=lpips, events=events, stage=stage
        )
    return Evaluations(own, cross, note)

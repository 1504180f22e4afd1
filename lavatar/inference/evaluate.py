"""Sec. 5.2: how good the results are on held-out frames: the picture, and whether the expression follows.

Everything is measured at the avatar's training resolution, truth and results by the same meter in the same way.
Beside the model stand the mean and the nearest training frame: a frozen face can win on PSNR.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from lavatar.configs.recipe import Recipe
from lavatar.contracts import EXPRESSIONS, Event, EventSink, FrameMeta, NullSink
from lavatar.datasets.loader import FrameStore
from lavatar.datasets.meter import ExpressionMeter
from lavatar.inference.background import Background
from lavatar.inference.baselines import NearestFrame, mean_frame, spread
from lavatar.inference.candidates import Candidate
from lavatar.inference.cross_evaluation import CrossEvaluation
from lavatar.inference.figures import in_order
from lavatar.inference.images import ImageScores, Truth, face_side, perceptual_metric
from lavatar.inference.loading import Avatar, Pair
from lavatar.inference.measured import CACHE_MB, Evaluation, notes_of, open_meter, series_of
from lavatar.inference.reenact import Portraits, driven_poses, poses_of, reenact_cross, reenact_self
from lavatar.models.perceptual import LPIPS

__all__ = ["CrossEvaluation", "Evaluation", "evaluate", "evaluate_cross", "evaluate_self"]
PREDICTIONS = ("self", "mean_frame", "nearest_frame")


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
    events = events or NullSink()
    size, options = avatar.config.image_size, recipe.evaluation
    held_out = FrameStore(dataset, size, "eval", CACHE_MB, events=events, stage=stage)
    train = FrameStore(dataset, size, "train", CACHE_MB, events=events, stage=stage)
    side = face_side(held_out.landmarks_N68x2, size)
    indices = spread(len(held_out), options.max_frames)
    candidates = {name: Candidate(ImageScores(lpips)) for name in PREDICTIONS}
    stack = ExitStack()
    meter = stack.enter_context(open_meter(held_out.manifest, recipe))
    truth_series = series_of(held_out, meter, size)
    baselines = _Baselines(train, NearestFrame.over(train, options.nearest_pool), meter)

    def measure(batch: Portraits, truth: np.ndarray, landmarks: np.ndarray) -> None:
        metas = [held_out.metas[int(i)] for i in batch.index_B]
        truth_series.add(meter.measure(truth, metas))
        measures = {"self": meter.measure(batch.images_BHW3, metas), **baselines.measures(landmarks)}
        for name, candidate in candidates.items():
            candidate.expression.add(measures[name])

    done = 0
    with stack, Background() as background:
        for batch in reenact_self(avatar, held_out, indices, options.batch_size, options.self_smoothing):
            truth = np.stack([held_out.frame(int(i)).image for i in batch.index_B])
            landmarks = held_out.landmarks_N68x2[batch.index_B]
            background.run(measure, batch, truth, landmarks)
            images = {"self": batch.images_BHW3, **baselines.images(landmarks)}
            compared = Truth.of(truth, landmarks, side, avatar.device)
            numbers = np.array([held_out.metas[int(i)].frame for i in batch.index_B])
            for name, candidate in candidates.items():
                candidate.add(images[name], compared, numbers)
            done += len(batch.index_B)
            events.emit(Event(stage, "self reenactment", done=done, total=len(indices), unit="frames"))
    for store in (held_out, train):
        store.close()
    metrics = {name: candidate.summary(truth_series) for name, candidate in candidates.items()}
    result = candidates["self"].expression.series()
    return Evaluation(metrics, truth_series.series(), result, notes_of("self", metrics["self"], truth_series, meter))


class _Baselines:
    """The two trivial predictions and their expression, each training frame measured once."""

    def __init__(self, train: FrameStore, nearest: NearestFrame, meter: ExpressionMeter) -> None:
        self.train, self.nearest, self.meter = train, nearest, meter
        self.mean = mean_frame(train)
        self.of_mean = self._measure([self.mean], train.metas[:1])
        self.of_frame: dict[int, dict[str, float]] = {}

    def images(self, landmarks_B68x2: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 (B, H, W, 3) by the name of the prediction."""
        count = len(landmarks_B68x2)
        return {
            "mean_frame": np.broadcast_to(self.mean, (count, *self.mean.shape)),
            "nearest_frame": self.nearest.images(landmarks_B68x2),
        }

    def measures(self, landmarks_B68x2: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
        """Expression of those pictures."""
        found = [int(i) for i in self.nearest.find(landmarks_B68x2)]
        new = sorted(set(found) - set(self.of_frame))
        if new:
            images, metas = [self.train.frame(i).image for i in new], [self.train.metas[i] for i in new]
            measured = self._measure(images, metas)
            for position, i in enumerate(new):
                self.of_frame[i] = {name: float(values[position]) for name, values in measured.items()}
        names = self.of_frame[found[0]]
        return {
            "mean_frame": {n: np.repeat(v, len(found)) for n, v in self.of_mean.items()},
            "nearest_frame": {n: np.array([self.of_frame[i][n] for i in found]) for n in names},
        }

    def _measure(self, images: list[np.ndarray], metas: list[FrameMeta]) -> dict[str, np.ndarray]:
        return {n: v for n, v in self.meter.measure(np.stack(images), metas).items() if n in EXPRESSIONS}


def evaluate_cross(
    avatar: Avatar,
    pair: Pair,
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


def evaluate(
    avatar: Avatar,
    avatar_dataset: Path,
    recipe: Recipe,
    pair: Pair | None = None,
    actor_dataset: Path | None = None,
    *,
    events: EventSink | None = None,
    stage: str = "evaluate",
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """`lavatar evaluate`: metrics as in metrics.json, with "cross" if a pair and its actor's dataset are given."""
    lpips, note = perceptual_metric(avatar.device)
    own = evaluate_self(avatar, avatar_dataset, recipe, lpips=lpips, events=events, stage=stage)
    metrics, notes = dict(own.metrics), ((note,) if note else ()) + own.notes
    if pair is not None and actor_dataset is not None:
        cross = evaluate_cross(
            avatar, pair, avatar_dataset, actor_dataset, recipe, lpips=lpips, events=events, stage=stage
        )
        metrics, notes = {**metrics, **cross.metrics}, notes + cross.notes
    return in_order(metrics), tuple(dict.fromkeys(notes))

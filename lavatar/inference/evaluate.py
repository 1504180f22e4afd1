"""Sec. 5.2: how good the results are on held-out frames: the picture, and whether the expression follows.

Everything is measured at the avatar's training resolution, truth and results by the same meter in the same way.
Beside the model stand the mean and the nearest training frame: a frozen face can win on PSNR.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lavatar.configs.recipe import Recipe
from lavatar.contracts import EXPRESSIONS, Event, EventSink, FrameMeta, NullSink
from lavatar.datasets.loader import FrameStore
from lavatar.datasets.meter import ExpressionMeter, meter_for, noise_of
from lavatar.datasets.shards import Manifest
from lavatar.inference.background import Background
from lavatar.inference.baselines import NearestFrame, mean_frame, spread
from lavatar.inference.expression import ExpressionSeries, compare, faces_lost
from lavatar.inference.figures import in_order
from lavatar.inference.images import ImageScores, Truth, face_side, perceptual_metric
from lavatar.inference.loading import Avatar, Pair
from lavatar.inference.panels import fit
from lavatar.inference.reenact import Portraits, driven_poses, poses_of, reenact_cross, reenact_self
from lavatar.inference.retarget import PoseTrack
from lavatar.inference.truth import TransferTruth
from lavatar.models.perceptual import LPIPS

PREDICTIONS = ("self", "mean_frame", "nearest_frame")
NOISE_FRAMES = 8  # true pictures that tell the meter's noise
CACHE_MB = 256  # decoded frames kept: a few batches, and the training frames that are nearest again and again


@dataclass(frozen=True)
class Evaluation:
    """Figures as in metrics.json, the measures they come from (for the curves), and sentences for the user."""

    metrics: dict[str, Any]
    truth: dict[str, np.ndarray]
    result: dict[str, np.ndarray]
    notes: tuple[str, ...] = ()


@dataclass
class Candidate:
    """One kind of result: its image metrics and its expression."""

    scores: ImageScores
    expression: ExpressionSeries = field(default_factory=ExpressionSeries)

    def summary(self, truth: ExpressionSeries) -> dict[str, Any]:
        figures = {**self.scores.summary(), "expression": compare(truth, self.expression)}
        return {**figures, "frames": len(truth.found()), "no_face": faces_lost(truth, self.expression)}


@contextmanager
def open_meter(manifest: Manifest, recipe: Recipe) -> Iterator[ExpressionMeter]:
    """The meter of a subject, closed at the end where it holds a network."""
    meter = meter_for(manifest, recipe.preprocess)
    try:
        yield meter
    finally:
        getattr(meter, "close", lambda: None)()


def series_of(store: FrameStore, meter: ExpressionMeter, size: int) -> ExpressionSeries:
    """An empty series for the true pictures of a store, with the meter's noise on them."""
    chosen = spread(len(store), NOISE_FRAMES)
    pictures = np.stack([fit(store.frame(int(i)).image, size) for i in chosen])
    return ExpressionSeries(noise_of(meter, pictures, [store.metas[int(i)] for i in chosen]))


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
            for name, candidate in candidates.items():
                candidate.scores.add(images[name], compared)
            done += len(batch.index_B)
            events.emit(Event(stage, "self reenactment", done=done, total=len(indices), unit="frames"))
    for store in (held_out, train):
        store.close()
    metrics = {name: candidate.summary(truth_series) for name, candidate in candidates.items()}
    result = candidates["self"].expression.series()
    return Evaluation(metrics, truth_series.series(), result, _notes("self", metrics["self"], truth_series, meter))


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


def _notes(what: str, figures: dict[str, Any], truth: ExpressionSeries, *meters: ExpressionMeter) -> tuple[str, ...]:
    """Sentences for the user: measures that are missing or still, and results in which no face was found."""
    notes = [meter.note for meter in meters if meter.note]
    if truth.still():
        notes.append(f"{what}: too still in these frames to be measured: {', '.join(truth.still())}")
    if figures["no_face"]:
        lost = f"{what}: no face was found in {figures['no_face']} of {figures['frames']} results"
        notes.append(f"{lost}; they do not count in r and amplitude")
    return tuple(dict.fromkeys(notes))


class CrossEvaluation:
    """Cross reenactment, measured while it streams by: the actor's portraits against the results.

    On synthetic pairs also against the truth that only they have: the actor's expression drawn on the avatar's
    identity at the pose used.
    """

    def __init__(
        self, avatar: Avatar, avatar_store: FrameStore, actor: FrameStore, recipe: Recipe, lpips: LPIPS | None
    ) -> None:
        self.size, self.actor = avatar.config.image_size, actor
        self.camera = avatar_store.metas[0].camera
        self.stack = ExitStack()
        self.avatar_meter = self.stack.enter_context(open_meter(avatar_store.manifest, recipe))
        self.actor_meter = self.stack.enter_context(open_meter(actor.manifest, recipe))
        self.driver, self.result = series_of(actor, self.actor_meter, self.size), ExpressionSeries()
        self.truth = TransferTruth.between(avatar_store, actor, self.size)
        self.side, self.device = face_side(avatar_store.landmarks_N68x2, self.size), avatar.device
        self.against_truth = Candidate(ImageScores(lpips))
        self.truth_series = ExpressionSeries()

    def __enter__(self) -> CrossEvaluation:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def add(self, index_B: np.ndarray, results_BHW3: np.ndarray, poses: PoseTrack) -> None:
        """Measure a batch: frames of the actor, the avatar's portraits and the poses they were drawn under."""
        metas = [self.actor.metas[int(i)] for i in index_B]
        portraits = np.stack([fit(self.actor.frame(int(i)).image, self.size) for i in index_B])
        self.driver.add(self.actor_meter.measure(portraits, metas))
        drawn = [replace(m, pose=p, camera=self.camera) for m, p in zip(metas, poses.poses(), strict=True)]
        measured = self.avatar_meter.measure(results_BHW3, drawn)
        self.result.add(measured)
        if self.truth is not None:
            images, landmarks = self.truth.draw(drawn)
            self.against_truth.scores.add(results_BHW3, Truth.of(images, landmarks, self.side, self.device))
            self.against_truth.expression.add(measured)
            self.truth_series.add(self.avatar_meter.measure(images, drawn))

    def finish(self) -> Evaluation:
        """The figures of everything added."""
        figures: dict[str, Any] = {
            "expression": compare(self.driver, self.result),
            "frames": len(self.driver.found()),
            "no_face": faces_lost(self.driver, self.result),
        }
        if self.truth is not None:
            figures["truth"] = self.against_truth.summary(self.truth_series)
        notes = _notes("cross", figures, self.driver, self.avatar_meter, self.actor_meter)
        return Evaluation({"cross": figures}, self.driver.series(), self.result.series(), notes)


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

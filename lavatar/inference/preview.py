"""The last stage of a job: self and cross evaluation, the mp4, the still and metrics.json of one avatar and one actor.

The folder appears by rename when everything in it is complete.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lavatar.configs.recipe import Recipe
from lavatar.contracts import EXPRESSIONS, TIMING, Event, EventSink, MetricSink, NullSink, StageResult, StageSpec
from lavatar.datasets.loader import FrameStore
from lavatar.inference.audio import AudioSpan
from lavatar.inference.background import Background
from lavatar.inference.baselines import spread
from lavatar.inference.cross_evaluation import CrossEvaluation
from lavatar.inference.encode_video import EncodedVideo, constant_rate, storage_error, write_video
from lavatar.inference.evaluate import Evaluations, evaluate_self
from lavatar.inference.figures import flat
from lavatar.inference.images import perceptual_metric
from lavatar.inference.loading import Avatar, Pair, load_avatar, load_pair
from lavatar.inference.measured import CACHE_MB, Evaluation
from lavatar.inference.page import FILES, METRICS, PAGE
from lavatar.inference.panels import choose_frames, sheet, side_by_side
from lavatar.inference.reenact import driven_poses, poses_of, reenact_cross, reenact_self
from lavatar.inference.showcase import strips
from lavatar.inference.write_evaluation import write_evaluation
from lavatar.models.perceptual import LPIPS

VIDEO, STILL, SELF_STILL, CURVES = "preview.mp4", "still.png", "self.png", "expression.png"


@dataclass
class Preview:
    """What one run of the stage works with."""

    spec: StageSpec
    recipe: Recipe
    events: EventSink
    metrics: MetricSink
    device: str
    folder: Path  # where the files are written before the rename
    lpips: LPIPS | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def stage(self) -> str:
        return self.spec.name

    def tell(self, text: str) -> None:
        self.events.emit(Event(self.stage, text))


def make_preview(
    spec: StageSpec, events: EventSink | None = None, metrics: MetricSink | None = None, device: str = "cpu"
) -> StageResult:
    """Evaluate and show, in `spec.out_dir`: preview.mp4, still.png, self.png, expression.png, and the folder of an
    evaluation (metrics.json, table.txt, index.html).

    Inputs: `avatar`, `pair` (releases), `avatar_dataset`, `actor_dataset`; sound from `spec.sources["actor"].path`.
    """
    part = spec.out_dir.with_name(f".{spec.out_dir.name}.{os.getpid()}.part")
    try:
        for left in spec.out_dir.parent.glob(f".{spec.out_dir.name}.*.part"):  # by an attempt that was killed
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True)
        run = Preview(
            spec, Recipe.model_validate(spec.recipe), events or NullSink(), metrics or NullSink(), device, part
        )
        figures = _run(run)
        if spec.out_dir.exists():
            shutil.rmtree(spec.out_dir)
        os.replace(part, spec.out_dir)
        for file in (METRICS, PAGE, STILL, VIDEO):
            run.metrics.log_file(spec.out_dir / file)
    except OSError as error:
        raise storage_error(spec.out_dir, error) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    files = {"video": VIDEO, "still": STILL, "self_still": SELF_STILL, "curves": CURVES, **FILES}
    return StageResult({name: spec.out_dir / file for name, file in files.items()}, figures, tuple(run.notes))


def _run(run: Preview) -> dict[str, Any]:
    """The stage's work; everything is written to `run.folder`."""
    inputs, began = run.spec.inputs, time.monotonic()
    run.tell("loading the models")
    avatar = load_avatar(inputs["avatar"], run.device)
    pair = load_pair(inputs["pair"], run.device)
    run.lpips, note = perceptual_metric(run.device)
    if note:
        run.events.emit(Event(run.stage, note, level="warning"))
    own = evaluate_self(
        avatar, inputs["avatar_dataset"], run.recipe, lpips=run.lpips, events=run.events, stage=run.stage
    )
    _write_picture(run, SELF_STILL, _self_still(run, avatar))
    cross, video = _cross(run, avatar, pair)
    both = Evaluations(own, cross, note)
    run.notes += both.notes
    _write_picture(run, CURVES, strips(own, cross))
    run.tell("drawing the page")
    write_evaluation(run.folder, both, avatar, inputs["avatar_dataset"], run.recipe, pair, inputs["actor_dataset"])
    seconds = time.monotonic() - began
    run.metrics.log_metrics(0, {**flat(both.metrics), f"{TIMING}frames_per_second": video.frames / seconds})
    run.tell(f"{video.frames} frames of video, {seconds:.0f} s")
    return both.metrics


def _write_picture(run: Preview, name: str, picture: np.ndarray) -> None:
    """As PNG into the folder, and to the metric sink."""
    done, data = cv2.imencode(".png", picture[..., ::-1])
    assert done, name
    (run.folder / name).write_bytes(data.tobytes())
    run.metrics.log_picture(0, Path(name).stem, picture)


def _self_still(run: Preview, avatar: Avatar) -> np.ndarray:
    """Truth above result for held-out frames of the avatar that cover its range of expression."""
    options = run.recipe.evaluation
    store = FrameStore(run.spec.inputs["avatar_dataset"], avatar.config.image_size, "eval", CACHE_MB)
    chosen = choose_frames(_measures(store, np.arange(len(store))), options.still_frames)
    drawn = reenact_self(avatar, store, np.array(chosen), options.batch_size, options.self_smoothing)
    results = [image for batch in drawn for image in batch.images_BHW3]
    truth = [store.frame(i).image for i in chosen]
    store.close()
    return sheet([truth, results], [f"{avatar.subject}: truth", "result"], min(options.panel_size, 256))


def _measures(store: FrameStore, indices: np.ndarray) -> dict[str, np.ndarray]:
    """The tracker's own measures of some frames; good enough to choose pictures by."""
    return {name: store.expression[name][indices] for name in EXPRESSIONS if name in store.expression}


def _cross(run: Preview, avatar: Avatar, pair: Pair) -> tuple[Evaluation, EncodedVideo]:
    """Draw the actor's held-out frames once: measured, filmed and eight of them kept for the still."""
    options, inputs = run.recipe.evaluation, run.spec.inputs
    size = avatar.config.image_size
    filmed = FrameStore(
        inputs["actor_dataset"], max(options.panel_size, size), "eval", CACHE_MB, events=run.events, stage=run.stage
    )
    actor = FrameStore(inputs["actor_dataset"], size, "eval", CACHE_MB)  # as `lavatar evaluate` sees it, to the bit
    held_out = FrameStore(inputs["avatar_dataset"], size, "eval", CACHE_MB)
    fps = actor.manifest.fps
    measured = CrossEvaluation(avatar, held_out, actor, run.recipe, run.lpips)
    with measured, Background() as background:
        film = _Film(run, avatar, pair, filmed, measured, background)
        pictures = constant_rate(film.pictures(), fps)
        video = write_video(run.folder / VIDEO, pictures, fps, film.sound(), options.crf)
    _write_picture(run, STILL, film.still())
    result = measured.finish()
    for store in (filmed, actor, held_out):
        store.close()
    return result, video


class _Film:
    """The cross reenactment as it streams: to the evaluation, to the video, and to the still."""

    def __init__(
        self,
        run: Preview,
        avatar: Avatar,
        pair: Pair,
        actor: FrameStore,
        measured: CrossEvaluation,
        background: Background,
    ) -> None:
        self.run, self.avatar, self.pair, self.actor = run, avatar, pair, actor
        self.measured, self.background = measured, background
        options = run.recipe.evaluation
        every = np.arange(len(actor))
        self.poses = driven_poses(avatar.poses, poses_of(actor), every, options.pose_smoothing)
        self.times = np.array([m.time for m in actor.metas])
        self.filmed = self.times - self.times[0] < (options.video_seconds or np.inf)
        self.to_measure = set(spread(len(actor), options.max_frames).tolist())
        in_film = np.flatnonzero(self.filmed)
        self.chosen = [int(in_film[i]) for i in choose_frames(_measures(actor, in_film), options.still_frames)]
        self.kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def sound(self) -> AudioSpan | None:
        """The time span of the filmed frames in the actor's own file."""
        source = self.run.spec.sources.get("actor")
        if source is None or source.path is None:
            return None
        last = self.times[self.filmed][-1]
        start = float(self.times[0])
        return AudioSpan(source.path, start, float(last) - start + 1 / self.actor.manifest.fps)

    def pictures(self) -> Iterator[tuple[float, np.ndarray]]:
        """Timed pictures of the video, actor | result; frames beyond the film are drawn and measured only."""
        options, run = self.run.recipe.evaluation, self.run
        wanted = np.array([i for i in range(len(self.actor)) if self.filmed[i] or i in self.to_measure])
        labels = (self.pair.actor, f"{self.avatar.subject} (lavatar)")
        done = 0
        for batch in reenact_cross(self.avatar, self.pair, self.actor, wanted, self.poses[wanted], options.batch_size):
            inside = np.array([int(i) in self.to_measure for i in batch.index_B])
            if inside.any():
                index = batch.index_B[inside]
                self.background.run(self.measured.add, index, batch.images_BHW3[inside], self.poses[index])
            for i, result in zip(batch.index_B.tolist(), batch.images_BHW3, strict=True):
                portrait = self.actor.frame(i).image
                if i in self.chosen:
                    self.kept[i] = (portrait, result)
                if self.filmed[i]:
                    yield float(self.times[i]), side_by_side((portrait, result), labels, options.panel_size)
            done += len(batch.index_B)
            run.events.emit(Event(run.stage, "cross reenactment", done=done, total=len(wanted), unit="frames"))

    def still(self) -> np.ndarray:
        """The chosen frames, actor above result."""
        pairs = [self.kept[i] for i in self.chosen]
        labels = (self.pair.actor, self.avatar.subject)
        size = min(self.run.recipe.evaluation.panel_size, 256)
        return sheet([[p[0] for p in pairs], [p[1] for p in pairs]], labels, size)

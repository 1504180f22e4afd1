"""What each kind of stage does, whatever runs it. Called where the stage runs; the rooms below are imported there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavatar.cluster.logs import log_path, note
from lavatar.cluster.memory import memory_notes
from lavatar.cluster.plans import RELEASE, Phase, PlanFactory, TrainingPlan, Worker
from lavatar.cluster.results import write_result
from lavatar.cluster.store import TRAINED, earlier_result, fetch_inputs, open_store, with_videos
from lavatar.configs.recipe import Recipe
from lavatar.contracts import (
    TIMING,
    Event,
    EventSink,
    MetricSinkFactory,
    NullSink,
    ParallelMap,
    StageKind,
    StageResult,
    StageSpec,
)
from lavatar.errors import Interrupted

if TYPE_CHECKING:
    from lavatar.training.tasks import TrainingTask


@dataclass(frozen=True)
class Context:
    """What a body needs besides its spec."""

    events: EventSink
    cancelled: Callable[[], bool]
    metrics: MetricSinkFactory | None
    parallel: ParallelMap
    train: Callable[[PlanFactory], dict[str, Any]]  # trains a plan to its end, returns its figures
    device: str = "cpu"


Body = Callable[[StageSpec, Context], StageResult]


@dataclass(frozen=True)
class Heeding:
    """An `EventSink` for stages without checkpoints: after a cancel the next word is their last."""

    spec: StageSpec
    context: Context

    def emit(self, event: Event) -> None:
        self.context.events.emit(event)
        if self.context.cancelled():
            raise stopped(self.spec)


def stopped(spec: StageSpec) -> Interrupted:
    """The end of a stage that was cancelled and keeps no checkpoint."""
    return Interrupted(f"{spec.name} was stopped", "Repeat the command to start it again.")


def run_body(spec: StageSpec, context: Context, bodies: Mapping[StageKind, Body] | None = None) -> StageResult:
    """Runs the stage and marks it as finished, here and in the store; one that was finished before is not run again.

    Raises ShardError where a dataset that it reads is damaged, ObjectError where something that the store has is.
    """
    store = open_store(spec.home, partial(note, log_path(spec)))
    kept = earlier_result(spec, store, context.events)
    if kept is not None:
        return kept  # by an attempt whose process died before it could say so, or on another node
    fetch_inputs(spec, store, context.events)  # they are looked through here; processes that train elsewhere fetch too
    if spec.kind not in TRAINED:
        spec = with_videos(spec, store)
    result = write_result(spec, (bodies or BODIES)[spec.kind](spec, context))
    if store is not None:
        if spec.kind not in TRAINED:
            store.publish(spec)
        store.finish(spec)
    return result


def preprocess_body(spec: StageSpec, context: Context) -> StageResult:
    """Video or synthetic subject → shards and manifest."""
    from lavatar.datasets.preprocess import preprocess

    (source,) = spec.sources.values()
    config = Recipe.model_validate(spec.recipe).preprocess
    events, began = Heeding(spec, context), time.monotonic()
    with closing(context.metrics() if context.metrics else NullSink()) as metrics:
        manifest = preprocess(source, config, spec.out_dir, parallel=context.parallel, events=events, stage=spec.name)
        metrics.log_metrics(0, {f"{TIMING}frames_per_second": manifest.frames / (time.monotonic() - began)})
    figures: dict[str, Any] = {
        "frames": manifest.frames,
        "train": manifest.train,
        "eval": manifest.eval,
        "dropped": len(manifest.dropped),
        "reprojection_px": manifest.reprojection_px,
    }
    notes = (_dropped(manifest.dropped),) if manifest.dropped else ()
    return StageResult({"manifest": spec.out_dir / "manifest.json"}, figures, notes)


def _dropped(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many frames are not used, which, and why."""
    from lavatar.datasets.tracks import ranges

    reasons = dict.fromkeys(row["reason"] for row in rows)
    parts = (f"{reason}: {ranges([row['frame'] for row in rows if row['reason'] == reason])}" for reason in reasons)
    return f"{len(rows)} frames dropped ({'; '.join(parts)})"


def avatar_body(spec: StageSpec, context: Context) -> StageResult:
    """Shards → latent head NeRF (Sec. 3)."""
    _require_data(spec)
    figures = context.train(avatar_plan)
    return StageResult({"release": spec.out_dir / RELEASE}, figures, memory_notes(figures))


def pair_body(spec: StageSpec, context: Context) -> StageResult:
    """Shards of both, avatar → Y-network, mapping MLP (Sec. 4): two trainings in one worker."""
    _require_data(spec)
    figures = context.train(pair_plan)
    notes = (*memory_notes(figures), *_warm_notes(figures.get("ynet", {}).get("warm")))
    return StageResult({"release": spec.out_dir / RELEASE}, figures, notes)


def _warm_notes(warm: Mapping[str, Any] | None) -> tuple[str, ...]:
    """What the warm start came to, if there was one."""
    from lavatar.training.errorcurve import Saving, warm_note

    if not warm:
        return ()
    found = {part: Saving.from_json(warm[part]) for part in ("mean", "avatar") if part in warm}
    return (warm_note(warm["source"], warm["cold"], found),)


def shared_body(spec: StageSpec, context: Context) -> StageResult:
    """Shards of all, avatars → one Y-network, a mapping MLP for each avatar (Sec. 7)."""
    from lavatar.cluster.shared import shared_plan

    _require_data(spec)
    figures = context.train(shared_plan)
    return StageResult({"release": spec.out_dir / RELEASE}, figures, memory_notes(figures))


def preview_body(spec: StageSpec, context: Context) -> StageResult:
    """Releases → mp4, still, figures."""
    from lavatar.inference.preview import make_preview

    _require_data(spec)
    with closing(context.metrics() if context.metrics else NullSink()) as metrics:
        return make_preview(spec, Heeding(spec, context), metrics, context.device)


def _require_data(spec: StageSpec) -> None:
    """Every tar that the stage will read is still the one that preprocessing wrote."""
    from lavatar.datasets.shards import require_whole

    for role, folder in spec.inputs.items():
        if role.partition("/")[0].endswith("dataset"):
            require_whole(folder)


BODIES: Mapping[StageKind, Body] = {
    StageKind.PREPROCESS: preprocess_body,
    StageKind.AVATAR: avatar_body,
    StageKind.PAIR: pair_body,
    StageKind.SHARED: shared_body,
    StageKind.PREVIEW: preview_body,
}


def avatar_plan(spec: StageSpec, events: EventSink) -> TrainingPlan:
    """One task: encoder and decoder end to end."""
    from lavatar.training.avatar import AvatarTask
    from lavatar.training.nerface import NeRFaceTask

    recipe = Recipe.model_validate(spec.recipe)

    def build(before: Sequence[TrainingTask], worker: Worker) -> TrainingTask:
        store = _store(spec.inputs["dataset"], recipe.avatar.image_size, recipe.avatar_training.cache_mb, events, spec)
        perceptual = _perceptual(worker) if recipe.avatar_loss.lambda_vgg > 0 else None
        if recipe.avatar.field == "mlp":
            return NeRFaceTask(recipe, store, worker.rank, worker.world)
        return AvatarTask(recipe, store, worker.rank, worker.world, perceptual)

    def write(folder: Path, tasks: Sequence[TrainingTask]) -> None:
        from lavatar.training.release import write_avatar_release

        (task,) = tasks
        assert isinstance(task, AvatarTask | NeRFaceTask)
        write_avatar_release(folder, task)

    return TrainingPlan((Phase("avatar", recipe.avatar_training, build),), write)


def pair_plan(spec: StageSpec, events: EventSink) -> TrainingPlan:
    """Two tasks in one worker: the Y-network (Sec. 4.1), then the mapping MLP with all else frozen (Sec. 4.2)."""
    from lavatar.training.mapping import MappingTask
    from lavatar.training.release import read_frozen_avatar, read_warm_pair, write_pair_release
    from lavatar.training.ynet import YNetTask

    recipe, start = Recipe.model_validate(spec.recipe), spec.inputs.get("warm")
    if start is not None:
        recipe = recipe.warm()
    joint = recipe.mapping.joint

    def store(role: str) -> Any:
        return _store(spec.inputs[role], recipe.avatar.image_size, recipe.ynet_training.cache_mb, events, spec)

    def ynet(before: Sequence[TrainingTask], worker: Worker) -> TrainingTask:
        avatar = read_frozen_avatar(spec.inputs["avatar"]) if joint else None
        warm = read_warm_pair(start) if start is not None else None
        stores = {"avatar": store("avatar_dataset"), "actor": store("actor_dataset")}
        return YNetTask(recipe, stores, avatar, worker.rank, worker.world, warm=warm)

    def mapping(before: Sequence[TrainingTask], worker: Worker) -> TrainingTask:
        first = before[0]
        assert isinstance(first, YNetTask)
        return MappingTask(recipe, first, read_frozen_avatar(spec.inputs["avatar"]), worker.rank, worker.world)

    def write(folder: Path, tasks: Sequence[TrainingTask]) -> None:
        first, last = tasks[0], tasks[-1]
        assert isinstance(first, YNetTask)
        write_pair_release(folder, first, last if isinstance(last, MappingTask) else None)

    phases = [Phase("ynet", recipe.ynet_training, ynet)]
    if not joint:
        phases.append(Phase("mapping", recipe.mapping_training, mapping))
    return TrainingPlan(tuple(phases), write)


def _store(folder: Path, image_size: int, cache_mb: int, events: EventSink, spec: StageSpec) -> Any:
    """The training frames of a dataset, at the size they are trained at. One that is damaged ends the stage: it was
    whole when it was written, and is made again."""
    from lavatar.datasets.loader import FrameStore

    return FrameStore(folder, image_size, "train", cache_mb, max_bad=0, events=events, stage=spec.name)


def _perceptual(worker: Worker) -> Any:
    """VGG(·) of Eq. 4."""
    import safetensors.torch

    from lavatar.datasets import weights
    from lavatar.models.perceptual import LPIPS

    return LPIPS(safetensors.torch.load_file(weights.find("lpips_vgg16")), "vgg").to(worker.device)

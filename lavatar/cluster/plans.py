"""What a training stage trains, one task after the other in the same worker, and how its release is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavatar.configs.training import TrainingConfig
from lavatar.contracts import EventSink, MetricSink, StageSpec
from lavatar.errors import ConfigError
from lavatar.training.files import storage_errors

if TYPE_CHECKING:  # torch takes 3 seconds, and the process that only coordinates needs none
    import torch

    from lavatar.training.engine import Engine
    from lavatar.training.loop import TrainingOutcome
    from lavatar.training.optimizer import GroupAdam
    from lavatar.training.tasks import TrainingTask

RELEASE = "release"


@dataclass(frozen=True)
class Worker:
    """Which of how many workers this process is, and where it computes."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class Phase:
    """One task's training. `build` gets the tasks trained before it."""

    label: str  # folder of its checkpoints, prefix of its curves
    config: TrainingConfig
    build: Callable[[Sequence[TrainingTask], Worker], TrainingTask]


@dataclass(frozen=True)
class TrainingPlan:
    """The phases in order, and what writes the release folder from the trained tasks."""

    phases: tuple[Phase, ...]
    write_release: Callable[[Path, Sequence[TrainingTask]], None]


PlanFactory = Callable[[StageSpec, EventSink], TrainingPlan]
"""Picklable: called in the process that trains."""


def run_plan(
    plan: TrainingPlan,
    spec: StageSpec,
    worker: Worker,
    metrics: MetricSink,
    events: EventSink,
    stop: Callable[[], bool],
) -> dict[str, Any]:
    """Trains every phase from its last checkpoint, writes the release; figures of the last step by phase."""
    from lavatar.cluster.shelf import Shelf
    from lavatar.training.loop import Span, train
    from lavatar.training.optimizer import build_optimizer

    tasks: list[TrainingTask] = []
    figures: dict[str, Any] = {}
    offset, total = 0, sum(phase.config.steps for phase in plan.phases)
    engine: Engine | None = None
    with Shelf(spec, events) as shelf:
        shelf.fetch_inputs()
        for phase in plan.phases:
            task = phase.build(tasks, worker)
            optimizer = build_optimizer(task.param_groups(), task.module, phase.config)
            engine = open_engine(task.module, optimizer, phase.config, worker)
            folder, span = spec.out_dir / phase.label, Span(phase.label, offset, total)
            shelf.restore(folder, engine)
            sinks = (metrics, events, spec.name)
            outcome = train(task, phase.config, engine, folder, *sinks, span=span, stop=stop, saved=shelf.send)
            engine.close()
            figures[phase.label] = {**_figures(outcome), **_measured(task)}
            tasks.append(task)
            offset += phase.config.steps
        if worker.rank == 0:
            release(spec.out_dir, lambda folder: plan.write_release(folder, tasks))
            shelf.publish()
        if engine is not None:
            engine.any(False)  # no worker leaves before the release is there
    return figures


def release(out_dir: Path, write: Callable[[Path], None]) -> None:
    """`write` fills a folder that appears as out_dir/release only when it is complete."""
    target, partial = out_dir / RELEASE, out_dir / f".{RELEASE}.{os.getpid()}.part"
    with storage_errors(target):
        for old in out_dir.glob(f".{RELEASE}.*.part"):
            shutil.rmtree(old)
        partial.mkdir(parents=True)
        try:
            write(partial)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def open_engine(module: torch.nn.Module, optimizer: GroupAdam, config: TrainingConfig, worker: Worker) -> Engine:
    """The engine that the configuration names."""
    import torch

    from lavatar.training.engine import TorchEngine

    device = torch.device(worker.device)
    if config.engine == "torch":
        if worker.world > 1:
            raise ConfigError(
                "engine 'torch' trains on one worker only",
                "Take engine=deepspeed, or resources...workers=1.",
            )
        return TorchEngine(module, optimizer, config, device)
    from lavatar.cluster.engine import DeepSpeedEngine

    return DeepSpeedEngine(module, optimizer, config, device)


def _measured(task: TrainingTask) -> dict[str, Any]:
    from lavatar.training.tasks import MeasuredTask

    return task.figures() if isinstance(task, MeasuredTask) else {}


def _figures(outcome: TrainingOutcome) -> dict[str, Any]:
    return {
        "steps": outcome.steps,
        "first_step": outcome.first_step,  # where this process took up: `seconds` are of the steps after it
        "seconds": round(outcome.seconds, 3),
        "losses": outcome.losses,
    }

"""The avatar's real training, with a task that also takes memory a sample, and a kernel that gives a process only so
much. The parts that run in Ray's processes."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch

from lavatar.cluster import bodies
from lavatar.cluster.bodies import Body, Context
from lavatar.cluster.plans import Phase, PlanFactory, TrainingPlan, Worker
from lavatar.contracts import EventSink, StageKind, StageResult, StageSpec
from lavatar.training.tasks import TrainingTask

FROM_STEP = 6
SAMPLE = 400 * 2**20
"""Bytes that a sample takes: more than may lie unused in what a process has of its memory already."""
SECONDS = 15
"""How long a part that is too large waits for Ray to kill it, taking a sample's bytes more each five seconds."""
ROOM = 150 * 2**20
"""Bytes that the rest of the training may take more than at the step at which the limit is set."""


@dataclass(frozen=True)
class Limit:
    """How a process is held to `samples` samples' memory. Pickled into the worker."""

    samples: int
    group: Path | None = None
    watched: bool = False  # by Ray, which gives the machine only so much and looks now and then
    sample: int = SAMPLE
    from_step: int = FROM_STEP
    room: int = ROOM

    def hold(self) -> None:
        """This process from now on: by its address space (allocations fail), or by a group of the kernel's (it is
        killed)."""
        if self.watched:
            return
        more = int(self.samples * self.sample * 1.01) + self.room
        if self.group is None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more,) * 2)
        else:
            (self.group / "memory.limit_in_bytes").write_text(str(more))
            (self.group / "cgroup.procs").write_text(str(os.getpid()))


def body(limit: Limit) -> Body:
    """`avatar_body` whose task is hungry."""

    def hungry_body(spec: StageSpec, context: Context) -> StageResult:
        return bodies.avatar_body(spec, replace(context, train=lambda plan: context.train(hungry(plan, limit))))

    return hungry_body


def hungry(plan: PlanFactory, limit: Limit) -> PlanFactory:
    def make(spec: StageSpec, events: EventSink) -> TrainingPlan:
        real = plan(spec, events)
        (phase,) = real.phases

        def build(before: Sequence[TrainingTask], worker: Worker) -> TrainingTask:
            task = phase.build(before, worker)
            task.losses = eating(task.losses, limit)  # type: ignore[method-assign]
            return task

        return TrainingPlan((Phase(phase.label, phase.config, build),), real.write_release)

    return make


def eating(losses: Callable[[Any, int], Any], limit: Limit) -> Callable[[Any, int], Any]:
    held = False

    def eat(batch: Any, step: int) -> Any:
        nonlocal held
        if step == limit.from_step or (step > limit.from_step and not limit.watched):
            if not held:
                limit.hold()
                held = True
            meals = [torch.ones(len(batch.frames.keys) * limit.sample, dtype=torch.uint8)]
            if limit.watched and len(batch.frames.keys) > limit.samples:
                for _ in range(SECONDS // 5):  # whoever else freed memory meanwhile, made room for more
                    time.sleep(5)
                    meals.append(torch.ones(limit.sample, dtype=torch.uint8))
            elif limit.watched:
                time.sleep(1)
            meals.clear()
        return losses(batch, step)

    return eat


def ship() -> None:
    """Test modules are not importable in Ray's workers: send this one by value."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def bodies_of(limit: Limit) -> dict[StageKind, Body]:
    return {StageKind.AVATAR: body(limit)}

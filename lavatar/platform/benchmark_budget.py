"""How long each method of a benchmark trains: equal steps, or an equal time, turned into steps by timing some."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lavatar.configs.recipe import Recipe

if TYPE_CHECKING:
    from lavatar.cluster.plans import TrainingPlan, Worker
    from lavatar.configs.training import TrainingConfig
    from lavatar.training.tasks import TrainingTask

WARM_STEPS, TIMED_STEPS = 3, 24


@dataclass(frozen=True)
class Budget:
    """How long each method trains: steps, or minutes that are turned into steps; avatar and Y-network by themselves."""

    kind: str  # "steps" or "minutes"
    avatar: float
    pair: float

    @property
    def name(self) -> str:
        unit = "steps" if self.kind == "steps" else "min"
        return f"{self.avatar:g} + {self.pair:g} {unit}"


def with_steps(recipe: Recipe, which: str, steps: int) -> Recipe:
    """The training section `which` with so many steps, a tenth of them warm-up at most; no more for the mapping."""
    name = f"{which}_training"
    section, mapping = getattr(recipe, name), recipe.mapping_training
    warmup = min(section.warmup_steps, steps // 10)
    changed = {name: section.model_copy(update={"steps": steps, "warmup_steps": warmup})}
    if which == "ynet":
        changed["mapping_training"] = mapping.model_copy(update={"steps": min(mapping.steps, steps)})
    return recipe.model_copy(update=changed)


def affordable(budget: float, first: float, then: float = 0.0, also: int = 0) -> int:
    """Steps of a training that `budget` seconds pay for, at `first` seconds each; with a second training behind it of
    as many steps, but `also` at most, at `then` seconds each (the mapping behind the Y-network). At least 1.
    """
    both = budget / (first + then)
    return max(1, int(both if both <= also else (budget - also * then) / first))


def phase_seconds(training: TrainingPlan, worker: Worker) -> list[float]:
    """Seconds of a step of each phase of a plan, on the worker's device: the mean of some that are spread over it.

    On a CPU the process's own time divided by its threads, which other work on the machine does not lengthen.
    """
    tasks: list[Any] = []
    seconds = []
    for phase in training.phases:
        tasks.append(phase.build(tasks, worker))
        seconds.append(_step_seconds(phase.config, tasks[-1], worker))
    return seconds


def _step_seconds(config: TrainingConfig, task: TrainingTask, worker: Worker) -> float:
    import numpy as np
    import torch

    from lavatar.cluster.plans import open_engine
    from lavatar.training.batch import split, to_device
    from lavatar.training.optimizer import build_optimizer

    engine = open_engine(task.module, build_optimizer(task.param_groups(), task.module, config), config, worker)
    threads = torch.get_num_threads()

    def clock() -> float:
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
            return time.monotonic()
        return time.process_time() / threads

    began = 0.0
    steps = np.linspace(0, config.steps - 1, TIMED_STEPS).astype(int)
    engine.module.train()
    for i, step in enumerate(map(int, [*steps[:WARM_STEPS], *steps])):
        if i == WARM_STEPS:
            began = clock()
        engine.optimizer.activate(task.active_groups(step))
        parts = split(to_device(task.batches(step), engine.device), config.accumulation)
        engine.step(partial(_losses, task, parts, step))
        task.after_step(step)
    spent = clock() - began
    engine.close()
    return spent / TIMED_STEPS


def _losses(task: TrainingTask, parts: Sequence[Any], step: int, part: int) -> dict[str, Any]:
    """The losses of one part of a batch, as an engine asks for them."""
    return task.losses(parts[part], step)

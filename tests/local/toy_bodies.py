"""Stages around the toy task, for what the real ones cannot be made to do: die, err and dawdle at a chosen step."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
import toy_task
import train_toy
from toy_task import ToyTask

from lavatar.cluster.bodies import Context
from lavatar.cluster.plans import Phase, TrainingPlan, Worker
from lavatar.configs.training import TrainingConfig
from lavatar.contracts import EventSink, StageKind, StageResult, StageSpec
from lavatar.training.tasks import TrainingTask

CONFIG = TrainingConfig(steps=20, batch_size=4, log_every=1, checkpoint_every=5, picture_every=3, seed=5)


class Dawdling(ToyTask):
    """Takes `seconds` a step from step 7 on, so that there is time to kill it; or fails there."""

    def __init__(self, rank: int, world: int, name: str) -> None:
        super().__init__(5, rank, world, bad_step=7 if "nan" in name else -1)
        self.name, self.rank = name, rank

    def losses(self, batch: Any, step: int) -> Any:
        if step >= 7 and "slow" in self.name:
            time.sleep(0.3)
        if step == 7 and "heard" in self.name:
            Path(self.name.partition(" ")[2]).with_suffix(f".{self.rank}").write_text(json.dumps(listening()))
        if step == 7 and "broken" in self.name:
            raise KeyError("no such thing")
        return super().losses(batch, step)


def listening() -> list[str]:
    """Where this process listens."""
    found = psutil.Process().net_connections("inet")
    return [connection.laddr.ip for connection in found if connection.status == psutil.CONN_LISTEN]


def plan(spec: StageSpec, events: EventSink) -> TrainingPlan:
    def build(before: Sequence[TrainingTask], worker: Worker) -> TrainingTask:
        return Dawdling(worker.rank, worker.world, spec.name)

    def write(folder: Path, tasks: Sequence[TrainingTask]) -> None:
        (folder / "config.json").write_text(f'{{"tasks": {len(tasks)}}}')

    return TrainingPlan((Phase("ynet", CONFIG, build), Phase("mapping", CONFIG, build)), write)


def train_body(spec: StageSpec, context: Context) -> StageResult:
    return StageResult({"release": spec.out_dir / "release"}, context.train(plan))


BODIES = {StageKind.PAIR: train_body}


class SinkFactory:
    """Opens a curve file; picklable."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, node: str = "") -> train_toy.CurveFile:
        return train_toy.CurveFile(self.path)

    def beside(self, node: str) -> train_toy.CurveFile:
        raise AssertionError("there is one node")


def ship() -> None:
    """Test modules are not importable in Ray's workers: send them by value."""
    import sys

    for module in (toy_task, train_toy, sys.modules[__name__]):
        ray.cloudpickle.register_pickle_by_value(module)

"""One trial of a sweep: the phases of a stage, trained in this process, measured on held-out frames as they go.

The plan and the loop are the stage's own; the engine is plain torch, whose steps are those of a stage on one worker. A
trial is stored where it is measured. It begins at nothing, goes on from its own stored state bit for bit, or takes over
another trial's (population based training), as far as the two models have the same shapes.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavatar.cluster.bodies import avatar_plan, pair_plan
from lavatar.cluster.plans import Phase, PlanFactory, TrainingPlan, Worker, open_engine
from lavatar.configs.recipe import Recipe
from lavatar.configs.space import Point
from lavatar.configs.sweep import Curve, trial_recipe
from lavatar.contracts import NullSink, StageKind, StageSpec, measures_time
from lavatar.training.files import write_json

if TYPE_CHECKING:
    from lavatar.inference.heldout import HeldOut
    from lavatar.training.engine import Engine
    from lavatar.training.tasks import TrainingTask
    from lavatar.training.ynet import YNetTask

STEP, SECONDS = "step", "training_seconds"
"""Of every report: steps done over all phases, and seconds of training, without what was measured between."""
ABOUT = "trial.json"
PLANS: Mapping[StageKind, PlanFactory] = {StageKind.AVATAR: avatar_plan, StageKind.PAIR: pair_plan}

Report = Callable[[dict[str, float], Path, Curve], None]
"""Takes figures, the folder of the state that they were measured at, which it may not keep, and the curves since."""


@dataclass(frozen=True)
class Trials:
    """What the trials of a sweep have in common. `spec` is the stage's by the recipe, `folder` their workplace."""

    spec: StageSpec
    every: int
    folder: Path

    def spec_of(self, trial: str, point: Point) -> StageSpec:
        """The stage as this trial trains it. Raises ConfigError for what no recipe can be."""
        recipe = trial_recipe(Recipe.model_validate(self.spec.recipe), point, self.spec.kind, self.every)
        return replace(self.spec, name="training", out_dir=self.folder / trial, recipe=recipe.model_dump(mode="json"))


def run_trial(
    trials: Trials, trial: str, point: Point, report: Report, start: Path | None = None, device: str = "cpu"
) -> None:
    """Trains the trial to its end. `start` is a folder that an earlier report gave, of this trial or of another."""
    from lavatar.inference.heldout import open_held_out

    spec = trials.spec_of(trial, point)
    shutil.rmtree(spec.out_dir, ignore_errors=True)  # of an attempt that died: what counts of it is in `start`
    spec.out_dir.mkdir(parents=True)
    try:
        with open_held_out(spec.kind, spec.inputs, Recipe.model_validate(trials.spec.recipe), device) as held_out:
            _Trial(spec, trial, held_out, report, start, Worker(device=device)).run(PLANS[spec.kind](spec, NullSink()))
    finally:
        shutil.rmtree(spec.out_dir, ignore_errors=True)


def goes_on_from(state: Path) -> str:
    """Whose a stored state is, for the log: " from the state of trial 3f2a_00001 at avatar/step-20"."""
    about = json.loads((state / ABOUT).read_text())
    phases = ", ".join(f"{label}/{name}" for label, name in about["phases"].items())
    return f" from the state of trial {about['trial']} at {phases}"


class _Losses(NullSink):
    """Remembers the losses of the last step that was logged, and the curves since they were taken: losses, and by the
    names that a stage's run has, learning rates and pace. Steps of a phase count from `offset`."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.curve: Curve = []
        self.offset = 0

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        beside = {name: value for name, value in metrics.items() if "rate/" in name or measures_time(name)}
        losses = {f"loss/{name}": value for name, value in metrics.items() if name not in beside}
        self.values |= losses
        self.curve.append((self.offset + step, {**losses, **beside}))

    def taken(self, before: int) -> Curve:
        """The curves up to a step, of that one without what its figures have; they begin anew."""
        found, self.curve = self.curve, []
        kept = [
            (step, {name: value for name, value in values.items() if step < before or name not in self.values})
            for step, values in found
        ]
        return [point for point in kept if point[0] <= before and point[1]]


class _Trial:
    """One call of `run_trial`."""

    def __init__(
        self, spec: StageSpec, trial: str, held_out: HeldOut, report: Report, start: Path | None, worker: Worker
    ) -> None:
        self.spec, self.trial, self.held_out, self.report = spec, trial, held_out, report
        self.start, self.worker, self.losses = start, worker, _Losses()
        self.about: dict[str, Any] = json.loads((start / ABOUT).read_text()) if start else {}
        self.seconds = float(self.about.get(SECONDS, 0.0))
        self.clock = time.monotonic()

    def run(self, plan: TrainingPlan) -> None:
        from lavatar.training.loop import Span, train
        from lavatar.training.optimizer import build_optimizer

        tasks: list[TrainingTask] = []
        offset = 0
        for phase in plan.phases:
            task = phase.build(tasks, self.worker)
            optimizer = build_optimizer(task.param_groups(), task.module, phase.config)
            engine = open_engine(task.module, optimizer, phase.config, self.worker)
            folder = self.spec.out_dir / phase.label
            self._begin(phase, folder, task, engine)
            tasks.append(task)
            self.losses.values.clear()
            self.losses.offset = offset
            measured = self._measure(plan, phase, tasks, offset, engine)
            self.clock = time.monotonic()
            train(
                task, phase.config, engine, folder, self.losses, NullSink(), self.spec.name,
                span=Span(phase.label), saved=measured,
            )  # fmt: skip
            engine.close()
            offset += phase.config.steps

    def _begin(self, phase: Phase, folder: Path, task: TrainingTask, engine: Engine) -> None:
        """Puts the checkpoint that this phase goes on from where the loop looks for one."""
        name = self.about.get("phases", {}).get(phase.label)
        if self.start is None or name is None:
            return
        found = self.start / phase.label / name
        if self.about["trial"] == self.trial:
            shutil.copytree(found, folder / name)
            return
        from lavatar.training.transplant import transplant

        transplant(found, folder, task, engine)

    def _measure(
        self, plan: TrainingPlan, phase: Phase, tasks: Sequence[TrainingTask], offset: int, engine: Engine
    ) -> Callable[[Path], None]:
        """What is done with each checkpoint: the models as they are now are measured, and both are reported."""
        from lavatar.training.rng import untouched_rng

        def measured(checkpoint: Path) -> None:
            self.seconds += time.monotonic() - self.clock
            step = offset + int(checkpoint.name.removeprefix("step-"))
            with untouched_rng(engine.device), tempfile.TemporaryDirectory(dir=self.spec.out_dir) as scratch:
                _write_release(plan, Path(scratch), tasks, self.spec)
                figures = self.held_out.measure(Path(scratch))
            with tempfile.TemporaryDirectory(dir=self.spec.out_dir) as scratch:
                self._store(Path(scratch), checkpoint, phase)
                whole = {**figures, **self.losses.values, STEP: step, SECONDS: round(self.seconds, 3)}
                self.report(whole, Path(scratch), self.losses.taken(step))
            engine.module.train()
            self.clock = time.monotonic()

        return measured

    def _store(self, folder: Path, checkpoint: Path, phase: Phase) -> None:
        """The newest checkpoint of every phase so far, and whose they are."""
        phases = {**self.about.get("phases", {}), phase.label: checkpoint.name}
        self.about = {"trial": self.trial, "phases": phases, SECONDS: self.seconds}
        for label, name in phases.items():
            shutil.copytree(self.spec.out_dir / label / name, folder / label / name, copy_function=os.link)
        write_json(folder / ABOUT, self.about)


def _write_release(plan: TrainingPlan, folder: Path, tasks: Sequence[TrainingTask], spec: StageSpec) -> None:
    """The models as a stage would release them now; of a pair whose mapping is not trained yet, with a linear one."""
    from lavatar.training.ynet import YNetTask

    last = tasks[-1]
    if isinstance(last, YNetTask) and not last.recipe.mapping.joint:
        _write_pair_with_regression(folder, last, spec.inputs["avatar"])
    else:
        plan.write_release(folder, tasks)


def _write_pair_with_regression(folder: Path, ynet: YNetTask, avatar: Path) -> None:
    """The Y-network with the regression of θ on γ in place of the mapping MLP, both copies: training sees nothing."""
    from lavatar.training.mapping import MappingTask
    from lavatar.training.release import read_frozen_avatar, write_pair_release

    probe = copy.copy(ynet)
    probe.module = copy.deepcopy(ynet.module).cpu()
    recipe = ynet.recipe
    probe.recipe = recipe.model_copy(
        update={
            "mapping": recipe.mapping.model_copy(update={"hidden": ()}),
            "pair_learning": recipe.pair_learning.model_copy(update={"regression": True}),
        }
    )
    write_pair_release(folder, probe, MappingTask(probe.recipe, probe, read_frozen_avatar(avatar)))

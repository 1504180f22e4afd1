"""`lavatar benchmark method`: the methods of Sec. 5.2 trained and measured side by side, with seeds and budget given.

Each training is an ordinary stage under its ordinary key: what a job or an earlier benchmark has trained is taken from
there, and one that was stopped goes on from its checkpoint. What was measured lies in FOLDER/runs, one file a row, so a
repeated command does what is missing. An equal time is turned into steps by timing each method's own first steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavatar.configs.methods import Method
from lavatar.configs.recipe import Recipe
from lavatar.contracts import EventSink, NullSink, StageKind
from lavatar.errors import DataError
from lavatar.platform.benchmark_budget import Budget, affordable, phase_seconds, with_steps
from lavatar.platform.execution import STOPS
from lavatar.platform.home import Home
from lavatar.platform.inputs import inputs_of
from lavatar.platform.onestage import run_stage
from lavatar.platform.planning import (
    METHOD_VERSION,
    SECTIONS,
    Person,
    Plan,
    PlannedStage,
    digest,
    plan,
    release_dir,
    require_weights,
)
from lavatar.platform.progress import Display, DisplaySink
from lavatar.platform.registry import Registry
from lavatar.platform.states import State
from lavatar.platform.tracking import Tracker
from lavatar.training.files import write_json

if TYPE_CHECKING:
    from lavatar.cluster.plans import PlanFactory
    from lavatar.cluster.stages import StageRunner

EXPERIMENT = "lavatar/benchmark"
FORMAT = 2


@dataclass(frozen=True)
class Row:
    """One training of one method: what identifies it."""

    method: Method
    avatar: Person
    actor: Person
    seed: int
    budget: Budget
    max_frames: int

    @property
    def key(self) -> str:
        dump = self.method.recipe.model_dump(mode="json", exclude={"name", "resources"})
        people = (self.avatar.digest, self.actor.digest)
        versions = {kind.value: version for kind, version in METHOD_VERSION.items()}
        budget = asdict(self.budget)
        return digest("benchmark", FORMAT, versions, self.method.name, dump, people, self.seed, budget, self.max_frames)

    @property
    def title(self) -> str:
        return f"{self.method.name}, {self.avatar.name}<-{self.actor.name}, {self.budget.name}, seed {self.seed}"


@dataclass(frozen=True)
class Bench:
    """Where a benchmark runs."""

    home: Home
    folder: Path
    display: Display
    runner: StageRunner
    tracker: Tracker
    registry: Registry


def measured(bench: Bench, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Each row's result, in order: read if it is there, else trained and measured and written down."""
    for number, row in enumerate(rows):
        path = bench.folder / "runs" / f"{row.key[:16]}.json"
        if path.exists():
            bench.display.message(f"{number + 1} of {len(rows)}: {row.title}: measured before")
        else:
            bench.display.message(f"{number + 1} of {len(rows)}: {row.title}")
            result = _measure(bench, row)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
            part.replace(path)
            path.with_suffix(".mlflow").unlink(missing_ok=True)
        yield read_row(path)


def read_row(path: Path) -> dict[str, Any]:
    """A row's result. Raises DataError for a damaged file."""
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        return result
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}", "Delete it: it is measured again.") from None


def _measure(bench: Bench, row: Row) -> dict[str, Any]:
    """Train what is missing, measure, log."""
    from lavatar.cluster.bodies import avatar_plan, pair_plan

    recipe = seeded(row.method.recipe, row.seed, row.max_frames)
    if row.method.paired and row.budget.kind == "steps":
        recipe = with_steps(recipe, "ynet", int(row.budget.pair))
    stages = _plan(bench, row, recipe)
    for stage in stages.stages:
        if stage.spec.kind is StageKind.PREPROCESS:
            _run(bench, stage, None)
    head = stages.stage(StageKind.AVATAR)
    recipe = _budgeted(bench, row, recipe, "avatar", head, avatar_plan)
    stages = _plan(bench, row, recipe)
    head = stages.stage(StageKind.AVATAR)
    with ExitStack() as stack:
        run_id = _open_run(bench, row, recipe, stack)
        _log_origin(bench, run_id, recipe, stages, head)
        training = {"avatar": _run(bench, head, run_id)}
        pair = None
        if row.method.paired:
            pair = stages.stage(StageKind.PAIR)
            recipe = _budgeted(bench, row, recipe, "ynet", pair, pair_plan)
            stages = _plan(bench, row, recipe)
            pair = stages.stage(StageKind.PAIR)
            _log_origin(bench, run_id, recipe, stages, pair)
            training["pair"] = _run(bench, pair, run_id)
        metrics, notes = _evaluate(row, recipe, head, pair, stages, DisplaySink(bench.display))
        bench.tracker.log_result(run_id, metrics, {})
    return {
        "method": row.method.name,
        "avatar": row.avatar.name,
        "actor": row.actor.name,
        "seed": row.seed,
        "budget": asdict(row.budget),
        "training": training,
        "release": str(release_dir(head.spec.out_dir).relative_to(bench.home.root)),
        "dataset": str(head.spec.inputs["dataset"].relative_to(bench.home.root)),
        "metrics": metrics,
        "notes": list(notes),
    }


def seeded(recipe: Recipe, seed: int, max_frames: int) -> Recipe:
    """The recipe with another seed everywhere, and at most so many held-out frames measured."""
    sections = ("avatar_training", "ynet_training", "mapping_training")
    changed = {name: getattr(recipe, name).model_copy(update={"seed": seed}) for name in sections}
    evaluation = recipe.evaluation.model_copy(update={"max_frames": max_frames})
    return recipe.model_copy(update={**changed, "evaluation": evaluation})


def _plan(bench: Bench, row: Row, recipe: Recipe) -> Plan:
    return plan(bench.home.root, bench.home.out_dir, [(row.avatar, row.actor)], recipe)


def _budgeted(bench: Bench, row: Row, recipe: Recipe, which: str, stage: PlannedStage, build: PlanFactory) -> Recipe:
    """The recipe with the training as long as the budget says, its schedule stretched or shrunk to that length.

    Steps found by timing are kept in FOLDER/steps under the stage as it was before: a repeated command must come to the
    same stage, and methods that share an avatar must come to one length.
    """
    from lavatar.cluster.inline import device_of
    from lavatar.cluster.plans import Worker

    amount = row.budget.avatar if which == "avatar" else row.budget.pair
    if row.budget.kind == "steps":
        return with_steps(recipe, which, int(amount))
    kept = bench.folder / "steps" / f"{digest(stage.key, amount)[:16]}.json"
    if not kept.exists():
        bench.display.message(f"timing a step of {row.method.name}")
        seconds = phase_seconds(build(stage.spec, NullSink()), Worker(device=device_of(stage.spec)))
        steps = affordable(60 * amount, seconds[0], sum(seconds[1:]), recipe.mapping_training.steps)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, {"steps": steps, "seconds_a_step": seconds})
    return with_steps(recipe, which, int(read_row(kept)["steps"]))


def _open_run(bench: Bench, row: Row, recipe: Recipe, stack: ExitStack) -> str | None:
    """An MLflow run of the row, ended however the row ends. What of the recipe the budget of the Y-network decides is
    not known yet."""
    people = {"avatar": row.avatar.name, "actor": row.actor.name}  # "avatar" is a section of the recipe
    params = {"method": row.method.name, "people": people, "seed": row.seed, "budget": row.budget.name}
    kept = recipe.model_dump(mode="json")
    params |= {name: values for name, values in kept.items() if name not in SECTIONS[StageKind.PAIR]}
    known = bench.folder / "runs" / f"{row.key[:16]}.mlflow"  # of an attempt that was stopped: its curves go on
    earlier = known.read_text().strip() if known.exists() else None
    tracker, run_id = bench.tracker, bench.tracker.open_job(EXPERIMENT, row.title, earlier, params)
    if run_id:
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(run_id)

    def end(kind: type[BaseException] | None, *_: object) -> None:
        stopped = kind is not None and issubclass(kind, STOPS)
        tracker.end(run_id, State.FINISHED if kind is None else State.INTERRUPTED if stopped else State.FAILED)

    stack.push(end)
    return run_id


def _log_origin(bench: Bench, run_id: str | None, recipe: Recipe, stages: Plan, stage: PlannedStage) -> None:
    """What a job's runs say too, before that stage begins: code, packages, machine, command, recipe, datasets."""
    dump = recipe.model_dump(mode="json")
    bench.tracker.log_origin(run_id, dump)
    bench.tracker.log_params(run_id, {name: dump[name] for name in SECTIONS[stage.spec.kind]})
    bench.tracker.log_params(run_id, {"stage": {stage.spec.kind.value: stage.key}})
    bench.tracker.log_inputs(run_id, inputs_of(bench.registry, stages, stage.spec))


def _run(bench: Bench, stage: PlannedStage, run_id: str | None) -> dict[str, Any]:
    """One stage to its end, shown; its figures. A stage whose result is there is not run."""
    require_weights([stage])
    factory = bench.tracker.sink_factory(run_id) if run_id else None
    return dict(run_stage(bench.runner, bench.display, stage.spec, factory).metrics)


def _evaluate(
    row: Row, recipe: Recipe, head: PlannedStage, pair: PlannedStage | None, stages: Plan, events: EventSink
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Self and cross figures, as `lavatar evaluate` measures them."""
    from lavatar.inference.evaluate import evaluate_both
    from lavatar.inference.loading import best_device, load_avatar, load_pair

    inputs = stages.stage(StageKind.PAIR).spec.inputs
    models = [release_dir(stage.spec.out_dir) for stage in (head, pair) if stage]
    Home(head.spec.home).fetch(*models, inputs["avatar_dataset"], inputs["actor_dataset"])
    avatar = load_avatar(models[0], best_device())
    bridge = load_pair(models[1], avatar.device) if pair else None
    both = evaluate_both(
        avatar, inputs["avatar_dataset"], recipe, bridge, inputs["actor_dataset"], events=events, stage=row.method.name
    )
    return both.metrics, both.notes

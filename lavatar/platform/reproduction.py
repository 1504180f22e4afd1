"""A finished job or stage done again from what was recorded of it, and held against what it came to then.

Stages are found by what their results depend on, so in their own home they would be found finished. A reproduction
computes in a folder of its own, HOME/reproductions/ID, laid out as a home and without a registry, a store or models:
nothing of the job is touched. A job's stages are all made again, each from those made before it; of one stage the
inputs are the recorded ones, which have to be what they were (the checksums of datasets and models are looked at).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavatar.cluster.objects import STORE_VARIABLE
from lavatar.cluster.results import whole
from lavatar.contracts import StageKind, StageSpec, measures_time
from lavatar.errors import JobError, LavatarError, StorageError
from lavatar.platform import lookup, provenance
from lavatar.platform.execution import STOPS
from lavatar.platform.home import Home
from lavatar.platform.inputs import inputs_of, stage_params
from lavatar.platform.jsonable import plain
from lavatar.platform.onestage import run_stage
from lavatar.platform.planning import SECTIONS, Plan, PlannedStage, require_weights, space_needed
from lavatar.platform.progress import Display
from lavatar.platform.recorded import Named, as_of_now, differences, recorded
from lavatar.platform.registry import Registry
from lavatar.platform.replanned import plan_again
from lavatar.platform.states import State
from lavatar.platform.subjects import require_unchanged
from lavatar.platform.tables import Job, Stage
from lavatar.platform.tracking import Tracker, connect, flatten
from lavatar.training.files import file_digest, write_json

if TYPE_CHECKING:
    from lavatar.cluster.stages import StageRunner

EXPERIMENT = "lavatar/reproductions"
FOLDER = "reproductions"
REPRODUCES_TAG = "lavatar.reproduces"
COMPARISON = "comparison.json"


@dataclass(frozen=True)
class Original:
    """What is to be done again: stages in order, with what they came to. `elsewhere`: what is not as it was, of code,
    packages, machine and environment."""

    named: Named
    job: Job
    plan: Plan
    stages: tuple[PlannedStage, ...]
    rows: Mapping[str, Stage]
    elsewhere: Mapping[str, Mapping[str, list[Any]]]


@dataclass(frozen=True)
class Comparison:
    """Of one stage: how many figures were compared, those that differ ([then, now]), and files that are not the same.
    Figures decide; a file may hold a time."""

    stage: str
    figures: int
    differ: Mapping[str, list[Any]]
    files: int
    files_differ: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        return plain(vars(self))


def original(home: Home, registry: Registry, named: Named) -> Original:
    """What was recorded of a run. Raises JobError where it cannot be done again, saying why and what to do."""
    job = named.job
    if job is None:
        raise JobError(f"{named.title} is no job and no stage of one", _another_way(home, named.run_id))
    then = recorded(home, registry, named)
    try:
        plan, people = plan_again(home, registry, job)
        for subject in people:
            require_unchanged(subject)
    except LavatarError as error:
        commit, today = then.code.get("commit"), provenance.find_code().commit
        way_out = f"It was made with commit {commit}: check that out and try again. " if commit != today else ""
        raise JobError(f"{named.title} cannot be reproduced: {error.message}", f"{way_out}{error.hint}") from error
    chosen = [stage for stage in plan.stages if named.stage is None or stage.key == named.stage.key]
    rows = {row.key: row for row in lookup.get_stages(registry, [stage.key for stage in chosen])}
    for stage in chosen:
        if stage.key not in rows or rows[stage.key].state != State.FINISHED:
            raise JobError(f"{stage.name} of job {job.id} is not finished", f"Finish it: lavatar jobs resume {job.id}")
    now = as_of_now(plan.recipe.model_dump(mode="json"))
    found = {what: differences(getattr(then, what), values) for what, values in now.items()}
    elsewhere = {what: differing for what, differing in found.items() if differing}
    return Original(named, job, plan, tuple(chosen), rows, elsewhere)


def _another_way(home: Home, run_id: str) -> str:
    """What to do with a run that is neither a job's nor a stage's: of a benchmark, a trial, a reproduction."""
    tags = connect(home).get_run(run_id).data.tags
    if tags.get(REPRODUCES_TAG):
        return f"It is a reproduction itself: lavatar reproduce {tags[REPRODUCES_TAG]}"
    command = tags.get(provenance.COMMAND_TAG)
    if command:
        return f"It was made by `{command}`: repeat that in another home (LAVATAR_HOME), where nothing of it is done."
    return "Name a job, or JOB/STAGE."


@contextmanager
def scratch(home: Home, found: Original) -> Iterator[Home]:
    """A home to compute in. It goes, however this ends, unless it was given its lasting name by `keep`."""
    name = f"{found.job.id}-{time.strftime('%Y%m%dT%H%M%S')}"
    root = home.root / FOLDER / f".{name}.{os.getpid()}.part"
    try:
        yield Home(root).ensure()
    finally:
        shutil.rmtree(root, ignore_errors=True)


def keep(place: Home) -> Path:
    """Under its lasting name: somebody wants to look into it."""
    lasting = place.root.with_name(place.root.name[1:].rpartition(".")[0].rpartition(".")[0])
    os.replace(place.root, lasting)
    return lasting


@contextmanager
def without_store() -> Iterator[None]:
    """A store would have the stages' results already. Processes that are started meanwhile do not know of it either."""
    kept = os.environ.pop(STORE_VARIABLE, None)
    try:
        yield
    finally:
        if kept is not None:
            os.environ[STORE_VARIABLE] = kept


@dataclass(frozen=True)
class Again:
    """Where a reproduction computes and is tracked."""

    home: Home
    place: Home
    registry: Registry
    display: Display
    tracker: Tracker

    def run(self, found: Original, runner: StageRunner, tolerance: float) -> list[Comparison]:
        """Each stage done again and compared, in order."""
        recipe = found.plan.recipe.model_dump(mode="json")
        parent = self.tracker.open_stage(EXPERIMENT, f"{found.named.title} again", None, None, recipe)
        state, results = State.FAILED, list[Comparison]()
        try:
            self.tracker.log_origin(parent, recipe)
            self.tracker.tag(parent, {REPRODUCES_TAG: found.named.run_id})
            made = {stage.key for stage in found.stages}
            for stage in found.stages:
                results.append(self._stage(found, runner, self.moved(stage.spec, made), parent, tolerance))
            path = self.place.root / COMPARISON
            write_json(path, {"elsewhere": plain(found.elsewhere), "stages": [r.to_json() for r in results]})
            wrong = sum(len(result.differ) for result in results)
            self.tracker.log_result(parent, {"figures_that_differ": wrong}, {"comparison": path})
            state = State.FINISHED
        except STOPS:
            state = State.INTERRUPTED
            raise
        finally:
            self.tracker.end(parent, state)
        return results

    def moved(self, spec: StageSpec, made: set[str]) -> StageSpec:
        """The stage with its result here, and of its inputs those that are `made` here."""

        def here(path: Path) -> Path:
            inside = path.is_relative_to(self.home.root) and made.intersection(path.parts)
            return self.place.root / path.relative_to(self.home.root) if inside else path

        inputs = {role: here(path) for role, path in spec.inputs.items()}
        return replace(spec, home=self.place.root, out_dir=here(spec.out_dir), inputs=inputs)

    def _stage(
        self, found: Original, runner: StageRunner, spec: StageSpec, parent: str | None, tolerance: float
    ) -> Comparison:
        row = found.rows[spec.key]
        params = stage_params(spec, SECTIONS[spec.kind])
        run_id = self.tracker.open_stage(EXPERIMENT, spec.name, None, parent, params)
        state = State.FAILED
        try:
            self.tracker.tag(run_id, {REPRODUCES_TAG: row.mlflow_run_id or ""})
            self.tracker.log_inputs(run_id, inputs_of(self.registry, found.plan, spec))
            result = run_stage(runner, self.display, spec, self.tracker.sink_factory(run_id))
            self.tracker.log_result(run_id, result.metrics, {})
            state = State.FINISHED
        except STOPS:
            state = State.INTERRUPTED
            raise
        finally:
            self.tracker.end(run_id, state)
        then, now = timeless(row.metrics), timeless(plain(result.metrics))
        differ = {n: [a, b] for n, (a, b) in differences(then, now).items() if not near(a, b, tolerance)}
        files, files_differ = compare_files(self.home.absolute(row.out_dir), spec.out_dir, spec.kind)
        return Comparison(spec.name, len({*then, *now}), differ, files, files_differ)


def timeless(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures by a.b.c, without those that measure time."""
    return {name: value for name, value in flatten(figures).items() if not measures_time(name)}


def near(then: Any, now: Any, tolerance: float) -> bool:
    """Whether two figures are the same, as a part of the larger one."""
    numbers = isinstance(then, (int, float)) and isinstance(now, (int, float))
    return bool(numbers and abs(then - now) <= tolerance * max(abs(then), abs(now))) or then == now


def compare_files(then: Path, now: Path, kind: StageKind) -> tuple[int, list[str]]:
    """How many files of a result were compared, and those that are not the same to the byte."""
    patterns = ("*.tar",) if kind is StageKind.PREPROCESS else ("*.safetensors", "*.mp4", "*.png")
    part = "" if kind in (StageKind.PREPROCESS, StageKind.PREVIEW) else "release"
    found = (path.relative_to(top) for top in (then, now) for one in patterns for path in (top / part).rglob(one))
    names = sorted({str(path) for path in found})

    def same(name: str) -> bool:
        files = (then / name, now / name)
        return all(file.exists() for file in files) and len({file_digest(file) for file in files}) == 1

    return len(names), [name for name in names if not same(name)]


def require_inputs(home: Home, found: Original) -> None:
    """What is needed is there and whole. Raises WeightsError, StorageError, ShardError."""
    require_weights(list(found.stages))
    home.require_space(space_needed(list(found.stages), found.plan.people))
    made = {stage.key for stage in found.stages}
    folders = {path for stage in found.stages for path in stage.spec.inputs.values() if not made & set(path.parts)}
    results = (home.absolute(row.out_dir) for row in found.rows.values())
    home.fetch(*folders, *(folder for folder in results if not folder.exists()))  # what is compared with, too
    for folder in sorted(folders):
        if not whole(folder):
            raise StorageError(f"{folder} is not what it was", "Make it again: submit the job again, then try again.")

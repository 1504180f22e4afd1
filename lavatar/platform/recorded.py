"""What MLflow remembers of a run, by what a reader asks of it; and runs by the names that people give them."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavatar.contracts import measures_time
from lavatar.errors import JobError, UsageError
from lavatar.platform import lookup, provenance
from lavatar.platform.home import Home
from lavatar.platform.ids import by_id
from lavatar.platform.imported import is_imported
from lavatar.platform.jsonable import mapping
from lavatar.platform.lookup import StageView
from lavatar.platform.machine import MACHINE_TAG
from lavatar.platform.registry import Registry
from lavatar.platform.runs import runs_of
from lavatar.platform.tables import Job, Stage
from lavatar.platform.tracking import PROVENANCE_TAG, connect

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

NAMES = (
    "RUN is a job's id, JOB/STAGE such as 3c5a/avatar:anna, or the id of an MLflow run; of ids a beginning is enough."
)
_UNTOLD = ("key", "job", "inputs.")
"""Parameters that follow from the others, by the beginnings of their names."""


@dataclass(frozen=True)
class Named:
    """A run that somebody named: of a job, or of a stage as that job has it. Both None: of something else."""

    title: str
    run_id: str
    job: Job | None = None
    stage: Stage | None = None


@dataclass(frozen=True)
class Recorded:
    """Values by name. `data` are digests, `figures` what no other run of the same has otherwise."""

    title: str
    run_id: str
    recipe: Mapping[str, Any]
    seeds: Mapping[str, Any]
    code: Mapping[str, Any]
    packages: Mapping[str, Any]
    machine: Mapping[str, Any]
    environment: Mapping[str, Any]
    data: Mapping[str, Any]
    figures: Mapping[str, Any]


_CODE = {"commit": provenance.COMMIT_TAG, "state": provenance.CODE_TAG, "version": provenance.VERSION_TAG}
ASKED = ("recipe", "seeds", "code", "packages", "machine", "environment", "data", "figures")
"""What is recorded, in the order in which it is shown."""


def find(home: Home, registry: Registry, text: str) -> Named:
    """The run of that name. Raises UsageError, UnknownJobError where there is none, or more than one, JobError where it
    has no run in MLflow."""
    job_id, slash, stage_name = text.partition("/")
    if slash:
        return _of_stage(registry, lookup.get_job(registry, job_id), stage_name)
    things: list[tuple[str, Job | Run]] = [*lookup.jobs_beginning(registry, text), *_runs(home, text)]
    found = by_id(text, things, "job or run", f"{NAMES} Look up jobs with: lavatar jobs list", _title)
    if isinstance(found, Job):
        return Named(f"job {found.id}", _tracked(found.mlflow_run_id, f"job {found.id}", found), found)
    return _named(registry, found)


def _title(own: str, thing: Job | Run) -> str:
    return f"job {own}" if isinstance(thing, Job) else f"{thing.info.run_name} ({own[:8]})"


def _of_stage(registry: Registry, job: Job, name: str) -> Named:
    views = lookup.job_stages(registry, job.id)
    for view in views:
        if view.name == name:
            return _view(job, view)
    names = ", ".join(view.name for view in views)
    raise UsageError(f"job {job.id} has no stage {name!r}", f"Its stages are: {names}.")


def _view(job: Job, view: StageView) -> Named:
    title = f"{view.name} of job {job.id}"
    return Named(title, _tracked(view.stage.mlflow_run_id, title, job), job, view.stage)


def _tracked(run_id: str | None, title: str, job: Job) -> str:
    if run_id is None and is_imported(job):
        raise JobError(f"{title} was imported: what was recorded of it is where it was trained", "Ask there.")
    if run_id is None:
        raise JobError(f"{title} has no MLflow run: it did not begin yet", f"Run it: lavatar jobs resume {job.id}")
    return run_id


def _runs(home: Home, text: str) -> list[tuple[str, Run]]:
    """By their MLflow ids those of this home that may begin so."""
    if not re.fullmatch(r"[0-9a-f]{4,32}", text):
        return []
    return [(run.info.run_id, run) for run in runs_of(home) if run.info.run_id.startswith(text)]


def _named(registry: Registry, run: Run) -> Named:
    run_id = run.info.run_id
    for job in lookup.list_jobs(registry):
        if job.mlflow_run_id == run_id:
            return Named(f"job {job.id}", run_id, job)
    for job in lookup.list_jobs(registry):
        for view in lookup.job_stages(registry, job.id):
            if view.stage.mlflow_run_id == run_id:
                return _view(job, view)
    return Named(str(run.info.run_name), run_id)


def recorded(home: Home, registry: Registry, named: Named) -> Recorded:
    """What MLflow has of it; a job's figures, machine and data are those of its stages. Raises JobError."""
    from mlflow.exceptions import MlflowException

    client = connect(home)
    try:
        own = _recorded(client, named)
        if named.job is None or named.stage is not None:
            return own
        views = [view for view in lookup.job_stages(registry, named.job.id) if view.stage.mlflow_run_id]
        parts = [(_label(view, views), _recorded(client, _view(named.job, view))) for view in views]
    except MlflowException as error:
        raise JobError(f"MLflow does not have {named.title} ({named.run_id}): {error}", "Was it deleted?") from error
    return replace(
        own,
        machine=_together([part.machine for _, part in parts]) or own.machine,
        data={f"{label}: {name}": value for label, part in parts for name, value in part.data.items()},
        figures={f"{label}/{name}": value for label, part in parts for name, value in part.figures.items()},
    )


def _label(view: StageView, views: Sequence[StageView]) -> str:
    """A stage in the words in which two jobs can be compared: its kind alone, where the job has one of it."""
    kinds = [other.stage.kind for other in views]
    return view.stage.kind if kinds.count(view.stage.kind) == 1 else view.name


def _together(machines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of several machines what they have, each value once."""
    names = dict.fromkeys(name for machine in machines for name in machine)
    return {name: "; ".join(sorted({m[name] for m in machines if name in m})) for name in names}


def _recorded(client: MlflowClient, named: Named) -> Recorded:
    run = client.get_run(named.run_id)
    tags, params = run.data.tags, {k: v for k, v in run.data.params.items() if not k.startswith(_UNTOLD)}
    is_seed = re.compile(r"(^|[._])seed$").search
    inputs = {k.removeprefix("inputs."): v for k, v in run.data.params.items() if k.startswith("inputs.") and v}
    read = {i.dataset.name: _digest(i.dataset) for i in (run.inputs.dataset_inputs if run.inputs else ())}
    files = _files(client, named.run_id, tags)
    return Recorded(
        named.title,
        named.run_id,
        recipe={k: v for k, v in params.items() if not is_seed(k)},
        seeds={k: v for k, v in params.items() if is_seed(k)},
        code={name: tags[tag] for name, tag in _CODE.items() if tag in tags},
        packages=provenance.parse_packages(files.get(provenance.PACKAGES, "")),
        machine={k.removeprefix(MACHINE_TAG): v for k, v in tags.items() if k.startswith(MACHINE_TAG)},
        environment=mapping(mapping(files.get(provenance.ENVIRONMENT)).get("variables")),
        data={**read, **inputs},
        figures={k: v for k, v in run.data.metrics.items() if not measures_time(k)},
    )


def _digest(dataset: Any) -> str:
    """Of a dataset; MLflow's own field holds the beginning of it alone."""
    profile = mapping(dataset.profile)
    return str(profile.get("digest") or profile.get("sha256") or dataset.digest)


def _files(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> dict[str, str]:
    """What stands in the provenance of the job's run, by name; nothing where it is gone."""
    where = tags.get(PROVENANCE_TAG, "")
    if where.startswith("runs:/"):
        run_id, _, folder = where.removeprefix("runs:/").partition("/")
    else:
        folder = f"{provenance.FOLDER}/{where.partition(' ')[0]}"
    try:
        with tempfile.TemporaryDirectory() as into:
            found = Path(client.download_artifacts(run_id, folder, into))
            return {path.name: path.read_text() for path in found.iterdir()}
    except Exception:  # MLflow, its store, the disk: no common root
        return {}


def as_of_now(recipe: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The code, packages, machine and environment of this process, under the names that `recorded` gives them."""
    from lavatar.platform import machine

    found = provenance.gather(recipe)
    return {
        "code": {name: found.tags[tag] for name, tag in _CODE.items() if tag in found.tags},
        "packages": provenance.parse_packages(found.files[provenance.PACKAGES]),
        "machine": machine.describe(),
        "environment": provenance.variables(),
    }


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What is not the same in both, by name: [in the first, in the second]; None where one has it not."""
    names = [*first, *(name for name in second if name not in first)]
    pairs = {name: [first.get(name), second.get(name)] for name in names}
    return {name: [a, b] for name, (a, b) in pairs.items() if a != b and not (a != a and b != b)}  # not-a-number twice


def compare(first: Recorded, second: Recorded) -> dict[str, dict[str, list[Any]]]:
    """What differs between two runs, by what is asked."""
    found = {what: differences(getattr(first, what), getattr(second, what)) for what in ASKED}
    return {what: differing for what, differing in found.items() if differing}

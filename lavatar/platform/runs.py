"""MLflow runs that nobody will end, and those that no job refers to. Only those of this home: their tag says so."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from sqlalchemy import select

from lavatar.errors import JobError, LavatarError
from lavatar.platform import ledger, lookup
from lavatar.platform.findings import Finding, mended
from lavatar.platform.home import Home
from lavatar.platform.leases import marked_alive, owner_alive
from lavatar.platform.registry import Registry, open_registry
from lavatar.platform.states import State
from lavatar.platform.tables import Job, Stage
from lavatar.platform.tracking import GONE, HOME_TAG, OWNER_TAG, PARENT_TAG, Tracker, connect, first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PAGE = 1000
FAR_SECONDS = 600.0
"""How long after its stage or job a run of another machine may end."""


def unended(home: Home, registry: Registry) -> Iterator[Finding]:
    """Runs that are shown as running although the process that opened them is gone."""
    from lavatar.platform import sweeps

    if not tracked(home):
        return
    try:
        client = connect(home)
    except JobError as error:
        yield Finding(error.message, home.tracking_uri, error.hint)
        return
    rows = by_run(registry)
    now, swept = lookup.time_of(registry), sweeps.run_ids(home) or {}
    for run in _search(client, home, "attributes.status = 'RUNNING'"):
        row = rows.get(run.info.run_id)
        if _abandoned(run, row, swept.get(run.info.run_id), now):
            yield _finding(home, registry, run, row)


def end_abandoned(home: Home, say: Callable[[str], None]) -> None:
    """End what `unended` finds, before somebody looks at it. A registry that is away keeps nobody from looking."""
    try:
        registry = open_registry(home)
        for finding in unended(home, registry):
            outcome = mended(finding)
            say(f"{finding.what}: {finding.mending if outcome.mended else outcome.reason}")
        registry.close()
    except LavatarError as error:
        say(f"runs whose process is gone are not ended: {error.message}")


def _abandoned(run: Run, row: Stage | Job | None, sweep: Path | None, now: float) -> bool:
    """Whether nobody will end a run. Its stage ends first, and the model is registered in it after that. `sweep`: the
    folder of the one that it is of, whose lock tells on every machine whether it is run.

    `now` is told by the clock that told when the stage ended, and of the leases.
    """
    if row is not None and row.state == State.RUNNING:
        return not owner_alive(row, now)
    alive = marked_alive(run.data.tags.get(OWNER_TAG, ""))
    if alive is None and sweep is not None:
        from lavatar.platform import sweeps

        return not sweeps.running(sweep)
    if alive is None:
        return row is not None and (row.ended or 0.0) < now - FAR_SECONDS
    return not alive


def _finding(home: Home, registry: Registry, run: Run, row: Stage | Job | None) -> Finding:
    name, run_id = run.info.run_name, run.info.run_id

    def mend() -> None:
        ledger.release_dead(registry)
        left = by_run(registry).get(run_id)
        if left is not None and left.state == State.RUNNING:  # taken up meanwhile
            return
        failures: list[str] = []
        state = State(left.state) if left is not None and left.state != State.PENDING else State.INTERRUPTED
        if not Tracker(home, failures.append).end(run_id, state):
            raise JobError("; ".join(failures), "Try again when MLflow answers.")
        if left is not None:
            ledger.set_run(registry, left, run_id, open_=False)

    whose = repr(row) if row is not None else "no stage or job"
    text = f"the MLflow run {name!r} ({run_id[:8]}) of {whose} is shown as running, and the process behind it is gone"
    return Finding(text, home.tracking_uri, "it is ended, as its stage or job ended", mend)


def runs_of(home: Home) -> Iterator[Run]:
    """All of this home that are not deleted. Raises JobError."""
    if tracked(home):
        yield from _search(connect(home), home)


def unreferenced(home: Home, registry: Registry, going: Collection[str] = ()) -> list[Run]:
    """Runs of jobs, stages and sweeps that were deleted, or will be (`going`: keys of stages).

    One whose model is registered is kept, so are runs of benchmarks and reproductions.
    """
    from lavatar.platform import benchmark, reproduction, sweeps

    if not tracked(home):
        return []
    client, rows = connect(home), by_run(registry)
    rows = {run_id: row for run_id, row in rows.items() if not (isinstance(row, Stage) and row.key in going)}
    swept = sweeps.run_ids(home)
    names = (benchmark.EXPERIMENT, reproduction.EXPERIMENT, *((sweeps.EXPERIMENT,) if swept is None else ()))
    kept = {one.experiment_id for name in names if (one := client.get_experiment_by_name(name)) is not None}
    found = [
        run
        for run in _search(client, home)
        if run.info.run_id not in rows and not (swept or {}).keys() & {run.info.run_id, run.data.tags.get(PARENT_TAG)}
    ]
    return [
        run
        for run in found
        if run.info.experiment_id not in kept
        and (run.info.status != "RUNNING" or marked_alive(run.data.tags.get(OWNER_TAG, "")) is False)
        and not client.search_model_versions(f"run_id='{run.info.run_id}'", max_results=1)
    ]


def referenced(registry: Registry, run: Run) -> bool:
    """Whether a stage or a job shows this run."""
    return run.info.run_id in by_run(registry)


def get(client: MlflowClient, run_id: str) -> Run | None:
    """The run; None where it is deleted, or unknown. Raises JobError where MLflow does not answer."""
    try:
        run = client.get_run(run_id)
    except Exception as error:  # MLflow, SQLAlchemy, requests: no common root
        if getattr(error, "error_code", None) in GONE:
            return None
        raise JobError(f"MLflow does not answer: {first_line(error)}", "Try again when it does.") from error
    return run if run.info.lifecycle_stage == "active" else None


def folders_of(home: Home, run: Run) -> list[Path]:
    """What of a run lies in the home: its artefacts and its models'. Nothing where a server keeps them."""
    client = connect(home)
    places = [run.info.artifact_uri, *(model.artifact_location for model in _models(client, run))]
    paths = [Path(unquote(urlparse(place).path)) for place in places if urlparse(place).scheme == "file"]
    own = [path.parent if path.name == "artifacts" else path for path in paths]
    return [path for path in own if home.keeps_artifacts and home.mlartifacts in path.parents]


def delete_run(home: Home, run: Run) -> None:
    """Mark the run and its models as deleted, as MLflow's own interface does; what waited to be sent to it goes too."""
    client = connect(home)
    for model in _models(client, run):
        client.delete_logged_model(model.model_id)
    client.delete_run(run.info.run_id)
    home.unsent(run.info.run_id).unlink(missing_ok=True)


def _models(client: MlflowClient, run: Run) -> list[Any]:
    wanted = f"source_run_id = '{run.info.run_id}'"
    return list(client.search_logged_models([run.info.experiment_id], filter_string=wanted))


def _search(client: MlflowClient, home: Home, condition: str = "") -> Iterator[Run]:
    """This home's runs, in all experiments."""
    own = f"tags.`{HOME_TAG}` = '{home.identity()}'"
    condition = f"{condition} and {own}" if condition else own
    for experiment in pages(client.search_experiments, max_results=PAGE):
        yield from pages(client.search_runs, [experiment.experiment_id], filter_string=condition, max_results=PAGE)


def pages(search: Any, *args: Any, **options: Any) -> Iterator[Any]:
    """All that a search of MLflow's finds."""
    token = None
    while True:
        page = search(*args, **options, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def by_run(registry: Registry) -> dict[str, Stage | Job]:
    """Stages and jobs by their run."""
    with registry.read() as session:
        rows: list[Stage | Job] = []
        for table in (Stage, Job):
            rows.extend(session.scalars(select(table).where(table.mlflow_run_id.is_not(None))))
    return {str(row.mlflow_run_id): row for row in rows}


def tracked(home: Home) -> bool:
    """False where looking would make the database: nobody has tracked anything yet."""
    kind, _, path = home.tracking_uri.partition(":///")
    return kind != "sqlite" or Path(path).exists()

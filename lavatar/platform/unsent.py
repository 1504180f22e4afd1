"""Values that wait in files for an MLflow that was away (sink.py), of runs that nobody will write into or end again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lavatar.errors import JobError
from lavatar.platform import runs
from lavatar.platform.findings import Finding, Place
from lavatar.platform.home import Home
from lavatar.platform.registry import Registry
from lavatar.platform.sink import MlflowSink, read_values
from lavatar.platform.tables import Job, Stage
from lavatar.platform.tracking import connect
from lavatar.platform.usage import Usage

if TYPE_CHECKING:
    from mlflow.entities import Run


@dataclass(frozen=True)
class Waiting:
    """A file of values. `row`: the stage or job whose run it is, None if it is gone; `run`: None where MLflow has it no
    more."""

    path: Path
    run_id: str
    row: Stage | Job | None
    run: Run | None

    @property
    def key(self) -> str | None:
        """Of the stage."""
        return self.row.key if isinstance(self.row, Stage) else None


def waiting(home: Home, registry: Registry, usage: Usage) -> list[Waiting]:
    """Those that no living process may add to. Raises JobError where MLflow does not answer."""
    files, rows = home.unsent_files(), runs.by_run(registry) if home.unsent_files() else {}
    free = {run_id: path for run_id, path in files.items() if not _used(rows.get(run_id), usage)}
    if not free:
        return []
    client = connect(home) if runs.tracked(home) else None
    return [
        Waiting(path, run_id, rows.get(run_id), runs.get(client, run_id) if client else None)
        for run_id, path in free.items()
    ]


def _used(row: Stage | Job | None, usage: Usage) -> bool:
    return usage.user_of(row.key if isinstance(row, Stage) else None) is not None


def unsent(place: Place) -> Iterator[Finding]:
    """Values of runs that ended without them are sent; those of runs that are gone are removed. Of a run that is shown
    as running its end sees to it (runs.unended)."""
    try:
        found = waiting(place.home, place.registry, place.usage)
    except JobError as error:
        yield Finding("values wait for MLflow, which does not answer", str(place.home.root / "logs"), error.hint)
        return
    for one in found:
        values = len(read_values(one.path))
        if one.run is None:
            text = f"{values} values wait for an MLflow run that is gone ({one.run_id[:8]})"
            yield place.finding(one.key, text, one.path, "they are removed", one.path.unlink)
        elif not values:
            text = f"the values that wait for the MLflow run {one.run.info.run_name!r} are not readable"
            yield place.finding(one.key, text, one.path, "they are removed", one.path.unlink)
        elif one.run.info.status != "RUNNING":
            text = f"{values} values of the MLflow run {one.run.info.run_name!r} ({one.run_id[:8]}) were not sent"
            yield place.finding(one.key, text, one.path, "they are sent", partial(_send, place.home, one))


def _send(home: Home, one: Waiting) -> None:
    MlflowSink(home.tracking_uri, one.run_id, one.path).close()
    if one.path.exists():
        raise JobError("MLflow did not take all of them", "Try again when it answers.")


def forgotten(home: Home, registry: Registry, usage: Usage) -> list[Waiting]:
    """Those of runs that are gone and that no stage and no job has. None where MLflow does not answer."""
    try:
        return [one for one in waiting(home, registry, usage) if one.row is None and one.run is None]
    except JobError:
        return []

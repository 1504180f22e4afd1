"""MLflow: an experiment for each pair, a parent run for each job, a nested run for each stage.

The driver opens and ends runs (`Tracker`); workers only log into the run they were given (sink.py). A stage that is
taken up again goes on in the same run. MLflow shows what happened and decides nothing: once the first contact has
succeeded, its failures are reported and never stop a job. A server that goes away is waited for, for a while; what
trains meanwhile trains on, and its values arrive later.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavatar.cluster.environment import UNREPORTED
from lavatar.errors import JobError
from lavatar.inference.figures import flat
from lavatar.masking import masked
from lavatar.platform.home import TRACKING_VARIABLE, Home
from lavatar.platform.inputs import Input, as_datasets
from lavatar.platform.jsonable import plain
from lavatar.platform.leases import process_mark
from lavatar.platform.machine import machine_tags
from lavatar.platform.provenance import FOLDER, Provenance, gather
from lavatar.platform.sink import BATCH, MlflowSink, MlflowSinkFactory
from lavatar.platform.states import State
from lavatar.platform.titles import short_title
from lavatar.training.files import exclusive

if TYPE_CHECKING:
    from mlflow import MlflowClient

PATIENCE_SECONDS = 180.0
"""How long a server that went away is waited for, once."""
PARENT_TAG = "mlflow.parentRunId"
HOME_TAG, OWNER_TAG = "lavatar.home", "lavatar.owner"
"""Of every run: the home that it belongs to, and the process that opened it last."""
OPENED_TAG = "lavatar.opened"  # by it a run is found whose making was not answered
TABLES_TAG = "mlflow.loggedArtifacts"  # by it MLflow finds tables
EVALUATION = "evaluation"
GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""How MLflow says that there is no such run, or a deleted one."""
PROVENANCE_TAG = "lavatar.provenance"  # of a job's run: "N DIGEST", the newest; of a stage's: where its files are
_LONGEST_PARAM = 6000  # MLflow takes no more
_STATUS = {State.FINISHED: "FINISHED", State.FAILED: "FAILED", State.INTERRUPTED: "KILLED", State.CANCELLED: "KILLED"}

Warn = Callable[[str], None]


def quiet() -> None:
    """No telemetry, no chatter, no minutes of retries against a server that is away. Before the import of mlflow."""
    for name, value in UNREPORTED.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name in ("mlflow", "alembic", "sqlalchemy", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"mlflow(\..*)?")


def experiment_name(avatar: str, actor: str) -> str:
    """Of a pair's jobs, or of an avatar's where it has no actor."""
    return f"lavatar/{short_title(avatar, actor, '<-')}"


def connect(home: Home) -> MlflowClient:
    """A client of the tracking server, its tables made by one process at a time. Raises JobError if it is away."""
    quiet()
    from mlflow import MlflowClient

    uri = home.tracking_uri
    try:
        home.ensure()
        with exclusive(home.root / "mlflow.lock"):  # the first contact migrates, and two at once break each other
            _write_ahead(uri)
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_experiments(max_results=1)
    except Exception as error:  # MLflow, SQLAlchemy, requests: no common root
        raise JobError(
            f"MLflow at {uri} does not answer: {first_line(error)}",
            "Let it take this name: mlflow server … --allowed-hosts HOST:PORT"
            if "host header" in str(error).lower()
            else f"Start it, or correct or unset {TRACKING_VARIABLE}.",
        ) from error
    return client


def _write_ahead(uri: str) -> None:
    """SQLite: readers and writers do not wait for each other, and a commit is one flush instead of three. The file
    remembers it."""
    if uri.startswith("sqlite:///"):
        with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///").partition("?")[0])) as connection:
            connection.execute("PRAGMA journal_mode = WAL")


class Tracker:
    """What the driver of a job does with MLflow. Made once a job, when the first stage has to run."""

    def __init__(self, home: Home, warn: Warn) -> None:
        self._home, self._warn = home, warn
        self.client = connect(home)
        self.uri = home.tracking_uri
        self._gone = False  # it was waited for in vain
        self._experiments: dict[str, str] = {}
        self._new: set[str] = set()  # runs made here that have no results yet
        self._origin: dict[str, str] = {}  # tags of every run that is opened: code, packages, command

    def open_job(self, experiment: str, job_id: str, run_id: str | None, params: Mapping[str, Any]) -> str | None:
        """The job's parent run: `run_id` again if it still exists, else a new one. Where an earlier job of this tracker
        comes from is nothing that it says."""
        self._origin = {}
        return self._open("the job's run", experiment, f"job {job_id}", run_id, None, params)

    def open_stage(
        self, experiment: str, name: str, run_id: str | None, parent: str | None, params: Mapping[str, Any]
    ) -> str | None:
        """A stage's run, nested below `parent`."""
        return self._open(f"the run of {name}", experiment, name, run_id, parent, params)

    def log_origin(self, run_id: str | None, recipe: Mapping[str, Any]) -> None:
        """Where the figures of a job come from: code, packages, machine, command. Files in the job's run, once for
        every way it was run; tags in its run and, from here on, in those of its stages."""
        if run_id is None:
            return
        found = gather(recipe)
        self._origin = dict(found.tags)
        where = self._try("log where the job comes from", lambda _: self._log_origin(run_id, found))
        if where is not None:
            self._origin[PROVENANCE_TAG] = where

    def tag(self, run_id: str | None, tags: Mapping[str, str]) -> None:
        """Say more of a run. Tags may change, parameters cannot."""
        from mlflow.entities import RunTag

        if run_id is not None:
            rows = [RunTag(key, value) for key, value in tags.items()]
            self._try("tag a run", lambda _: self.client.log_batch(run_id, tags=rows))

    def log_params(self, run_id: str | None, params: Mapping[str, Any]) -> None:
        """More parameters of a run; those that it has already have to have the same value."""
        if run_id is not None:
            self._try("log parameters", lambda _: self._log_params(run_id, params))

    def log_inputs(self, run_id: str | None, inputs: Sequence[Input]) -> None:
        """What a stage reads, as MLflow's datasets. Those that the run has already are not doubled."""
        if run_id is None or not inputs:
            return
        rows = as_datasets(inputs)
        self._try("log what a stage reads", lambda _: self.client.log_inputs(run_id, rows))

    def end(self, run_id: str | None, state: State) -> bool:
        """End a run as the stage or job ended. True if it is ended (or does not exist)."""
        if run_id is None:
            return True
        patient = state in (State.FINISHED, State.FAILED)  # who stops a job waits for nobody: the next submit ends it
        return self._try("end a run", lambda _: self._end(run_id, _STATUS[state]), patient=patient) is True

    def sink_factory(self, run_id: str | None) -> MlflowSinkFactory | None:
        """What a worker logs through; it travels pickled."""
        return MlflowSinkFactory(self.uri, run_id, self._home.unsent(run_id)) if run_id else None

    def log_result(self, run_id: str | None, metrics: Mapping[str, Any], files: Mapping[str, Path]) -> None:
        """A finished stage's figures (flattened to a.b.c) and its files."""
        if run_id is None:
            return
        self._try("log results", lambda again: self._log_result(run_id, metrics, files, again=again))

    def log_evaluation(self, run_id: str | None, metrics: Mapping[str, Any], files: Mapping[str, Path]) -> None:
        """An evaluation in the run of its job: figures as evaluation/self/psnr, files below evaluation/."""
        if run_id is None:
            return
        figures = {f"{EVALUATION}/{name}": value for name, value in flat(dict(metrics)).items()}
        self._try("log the evaluation", lambda _: self._log_result(run_id, figures, files, EVALUATION, again=True))

    def log_steps(self, run_id: str | None, curve: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Figures of a run at some steps."""
        if run_id is None:
            return
        from mlflow.entities import Metric

        stamp = int(time.time() * 1000)
        rows = [Metric(metric_name(name), value, stamp, step) for step, each in curve for name, value in each.items()]

        def log(_: bool) -> None:
            for at in range(0, len(rows), BATCH):
                self.client.log_batch(run_id, metrics=rows[at : at + BATCH])

        self._try("log steps", log)

    def log_table(self, run_id: str | None, name: str, columns: Mapping[str, Sequence[Any]], text: str) -> None:
        """A table as it is now, in place of what it was: NAME.json, which `mlflow.load_table` reads, and NAME.txt."""
        if run_id is None:
            return
        rows = plain([list(row) for row in zip(*columns.values(), strict=True)])
        table = {"columns": list(columns), "data": rows}
        listed = json.dumps([{"path": f"{name}.json", "type": "table"}])

        def log(_: bool) -> None:
            self.client.log_dict(run_id, table, f"{name}.json")
            self.client.log_text(run_id, text + "\n", f"{name}.txt")
            self.client.set_tag(run_id, TABLES_TAG, listed)

        self._try("log a table", log, patient=False)

    def _open(
        self,
        what: str,
        experiment: str,
        name: str,
        run_id: str | None,
        parent: str | None,
        params: Mapping[str, Any],
    ) -> str | None:
        """`run_id` again if it exists, or while MLflow does not answer; else a new run."""
        from mlflow.entities import RunTag

        own = {HOME_TAG: self._home.identity(), OWNER_TAG: process_mark(), **self._origin}
        tags = {**own, OPENED_TAG: uuid.uuid4().hex, **({PARENT_TAG: parent} if parent else {})}

        def open_(again: bool) -> str:
            if run_id is not None and self._exists(run_id):
                self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in own.items()])
                self.client.update_run(run_id, status="RUNNING")
                self._new.discard(run_id)
                return run_id
            where = self._experiment(experiment, again)
            wanted = f"tags.`{OPENED_TAG}` = '{tags[OPENED_TAG]}'"  # the answer to its making may have been lost
            made = self.client.search_runs([where], wanted) if again else []
            run = made[0] if made else self.client.create_run(where, tags=tags, run_name=name)
            self._log_params(run.info.run_id, params)
            if not again:
                self._new.add(run.info.run_id)
            return str(run.info.run_id)

        opened: str | None = self._try(f"open {what}", open_)
        return opened or run_id

    def _exists(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code in GONE:  # not: no answer
                return False
            raise

    def _experiment(self, name: str, again: bool) -> str:
        """Its id; what is remembered of it counts the first time. Two drivers may make it at once, and a deleted one
        is brought back."""
        from mlflow.exceptions import MlflowException

        if name in self._experiments and not again:
            return self._experiments[name]
        location = self._home.mlartifacts.as_uri() if self._home.keeps_artifacts else None
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                self._experiments[name] = str(self.client.create_experiment(name, artifact_location=location))
                return self._experiments[name]
            except MlflowException:
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        self._experiments[name] = str(found.experiment_id)
        return self._experiments[name]

    def _log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        flat = [Param(key, str(value)[:_LONGEST_PARAM]) for key, value in flatten(params).items()]
        for i in range(0, len(flat), 100):
            self.client.log_batch(run_id, params=flat[i : i + 100])

    def _log_origin(self, run_id: str, found: Provenance) -> str:
        """Where the files are: provenance/N, N from 1 on, a new one where the last attempt's were others."""
        from mlflow.entities import RunTag

        number, _, digest = self.client.get_run(run_id).data.tags.get(PROVENANCE_TAG, "0 ").partition(" ")
        count = int(number)
        if digest != found.digest:
            count += 1
            for name, text in found.files.items():
                self.client.log_text(run_id, text, f"{FOLDER}/{count}/{name}")
        tags = {**found.tags, **machine_tags(), PROVENANCE_TAG: f"{count} {found.digest}"}
        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        return f"runs:/{run_id}/{FOLDER}/{count}"

    def _end(self, run_id: str, status: str) -> bool:
        from mlflow.exceptions import MlflowException

        unsent = self._home.unsent(run_id)
        if unsent.exists() and self._exists(run_id):
            MlflowSink(self.uri, run_id, unsent).close()
            if unsent.exists():
                raise JobError("some of its values were not taken")
        try:
            self.client.set_terminated(run_id, status=status)
        except MlflowException as error:
            if error.error_code not in GONE:
                raise
        unsent.unlink(missing_ok=True)
        return True

    def _log_result(
        self,
        run_id: str,
        metrics: Mapping[str, Any],
        files: Mapping[str, Path],
        folder: str | None = None,
        *,
        again: bool,
    ) -> None:
        """What a run that may have results has already (of an attempt that died after this) is not logged twice."""
        from mlflow.entities import Metric

        stamp = int(time.time() * 1000)
        numbers = {metric_name(k): float(v) for k, v in flatten(metrics).items() if isinstance(v, (int, float))}
        new = run_id in self._new and not again
        self._new.discard(run_id)
        there = {} if new else self.client.get_run(run_id).data.metrics
        rows = [Metric(name, value, stamp, 0) for name, value in numbers.items() if there.get(name) != value]
        for i in range(0, len(rows), 500):
            self.client.log_batch(run_id, metrics=rows[i : i + 500])
        for path in files.values():
            if path.is_file():
                self.client.log_artifact(run_id, str(path), folder)

    def wait(self) -> bool:
        """Whether MLflow answers; one that went away is waited for, but in vain only once."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        said = False
        while not self._answers():
            if self._gone or time.monotonic() > deadline:
                self._gone = True
                return False
            if not said:
                self._warn("MLflow does not answer: it is waited for; what trains trains on")
            said = True
            time.sleep(1.0)
        self._gone = False
        return True

    def _answers(self) -> bool:
        try:
            self.client.search_experiments(max_results=1)
        except Exception:  # MLflow, SQLAlchemy, requests: no common root
            return False
        return True

    def _try(self, what: str, action: Callable[[bool], Any], *, patient: bool = True) -> Any:
        """`action(False)` and, where MLflow answers (again) after it failed, `action(True)`."""
        for again in (False, True):
            try:
                return action(again)
            except Exception as error:  # whatever MLflow raises, the job goes on
                failure = error
            if not (patient and self.wait()):
                break
        self._warn(f"MLflow could not {what}: {first_line(failure)}")
        return None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def metric_name(name: str) -> str:
    """A name as MLflow takes it."""
    return "".join(c if c.isalnum() or c in "_-. /:" else "_" for c in name)[:250]


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return masked(f"{type(error).__name__}: {text[0] if text else ''}")

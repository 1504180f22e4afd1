"""The driver of a job: runs what of it is not done yet, in order, and leaves the registry true whatever happens.

A job that is submitted again goes on where it stopped; a stage that another job is running is waited for; a finished
one is never run again while its files are there.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from lavatar.errors import Cancelled, Interrupted, JobError, LavatarError
from lavatar.platform import leases, ledger, lookup
from lavatar.platform.execution import STOPS, Execution, Office, keep_run
from lavatar.platform.inputs import data_of
from lavatar.platform.leases import HEARTBEAT_SECONDS, Owner, heartbeat, taken_over
from lavatar.platform.planning import Plan, PlannedStage
from lavatar.platform.registering import Registrar, models_of, outstanding
from lavatar.platform.registry import Registry
from lavatar.platform.signals import terminate_as_interrupt
from lavatar.platform.states import State
from lavatar.platform.storejob import store_job
from lavatar.platform.tables import Job
from lavatar.platform.titles import actor_or_none
from lavatar.platform.tracking import Tracker

SILENT_SHARE = 2 / 3
"""Of a lease: how long the registry may be silent before what runs is stopped. The rest is for stopping."""


def run_job(office: Office, plan: Plan, priority: int | None = None, *, but_cancelled: bool = False) -> None:
    """Bring the job to its end. Raises StageBusyError while another process runs it, StageFailedError, Interrupted;
    Cancelled, and nothing is started, where `but_cancelled` and it was cancelled before it is claimed.

    What is missing (WeightsError, StorageError) is told before the job is written down: nobody would ever run it.
    """
    registry = office.registry
    todo = store_job(registry, office.home, plan, lambda text: office.display.message(text, "warning"), priority)
    job = lookup.get_job(registry, plan.job_id)
    if not todo and job.state == State.FINISHED and not outstanding(office, models_of(plan)):
        ledger.begin_attempt(registry, plan.job_id, ())
        for stage in plan.stages:
            office.display.state(stage.name, "cached")
        _bring_previews(office, plan)
        return
    job = ledger.claim_job(registry, plan.job_id, office.owner, but_cancelled=but_cancelled)
    with _ending(office, plan.job_id), _Heartbeat(registry, office.owner, plan.job_id) as pulse:
        _run_claimed(office, plan, job, todo, pulse)


def _run_claimed(office: Office, plan: Plan, job: Job, todo: list[PlannedStage], pulse: _Heartbeat) -> None:
    """The job is ours: its runs, its stages, its models."""
    registry = office.registry

    def warn(text: str) -> None:
        office.display.message(text, "warning")
        with contextlib.suppress(LavatarError):
            ledger.record(registry, plan.job_id, text, level="warning")

    ledger.record(registry, plan.job_id, f"submitted with recipe {plan.recipe.name}; {len(todo)} stages to do")
    tracker = _open_tracker(office, bool(todo), warn)
    if tracker:
        _end_stale_runs(registry, tracker)
        run_id = tracker.open_job(job.experiment, job.id, job.mlflow_run_id, _job_params(plan))
        keep_run(registry, tracker, job, run_id, "this job")
        tracker.log_origin(run_id, plan.recipe.model_dump(mode="json"))
    state = State.FAILED
    try:
        execution = Execution(office, plan, job, tracker, pulse.check)
        pulse.when_silent(execution.suspend)
        execution.mark_cached({stage.key for stage in todo})
        with Registrar(office, plan, tracker, warn) as registrar:
            if todo:
                ray = plan.recipe.resources.backend == "ray"
                office.display.message("starting the cluster" if ray else "starting")
                with office.open_runner() as runner:
                    execution.run(runner, todo, registrar.finished)
        _bring_previews(office, plan)
        state = State.FINISHED
    except STOPS:
        state = State.INTERRUPTED
        raise
    finally:
        with contextlib.suppress(LavatarError):  # the first error is the one to show; a later submit ends the run
            ours = lookup.get_job(registry, job.id).owner == office.owner.id  # else its run is another process's now
            if ours and tracker and state is not State.INTERRUPTED:  # who stops a job waits for nobody
                tracker.log_inputs(job.mlflow_run_id, data_of(registry, plan, office.home))
            if ours and tracker and tracker.end(job.mlflow_run_id, state):
                ledger.set_run(registry, job, job.mlflow_run_id, open_=False)


def _bring_previews(office: Office, plan: Plan) -> None:
    """What the report names, onto this disk."""
    office.home.fetch(*(pair.preview.spec.out_dir for pair in plan.pairs))


def _open_tracker(office: Office, required: bool, warn: Callable[[str], None]) -> Tracker | None:
    """MLflow has to answer before hours of training begin; for a finished job it is only asked to catch up."""
    try:
        return Tracker(office.home, warn)
    except JobError as error:
        if required:
            raise
        warn(error.message)
        return None


def _end_stale_runs(registry: Registry, tracker: Tracker) -> None:
    """MLflow shows a run that nobody ended as running for ever: end those whose process died."""
    for row in ledger.unended_runs(registry):
        state = State(row.state)
        if tracker.end(row.mlflow_run_id, state if state is not State.PENDING else State.INTERRUPTED):
            ledger.set_run(registry, row, row.mlflow_run_id, open_=False)


def _job_params(plan: Plan) -> dict[str, object]:
    return {
        "people": {"avatar": plan.avatar, "actor": actor_or_none(plan.actor) or ""},  # "avatar" is a section, too
        "job": plan.job_id,
        **plan.recipe.model_dump(mode="json"),
    }


@contextlib.contextmanager
def _ending(office: Office, job_id: str) -> Iterator[None]:
    """However the job ends, the registry says so. Ctrl-C and SIGTERM both end it as interrupted."""
    registry, owner = office.registry, office.owner
    try:
        with terminate_as_interrupt():
            yield
    except STOPS as error:
        state = State.CANCELLED if isinstance(error, Cancelled) else State.INTERRUPTED
        text, way_out = f"{state.value}; what is done is kept", f"Take it up again: lavatar jobs resume {job_id}"
        ledger.record(registry, job_id, text, level="warning")
        ledger.end_job(registry, job_id, owner, state, text, way_out)
        if isinstance(error, Interrupted):
            raise
        raise Interrupted(f"job {job_id} interrupted; what is done is kept", f"{way_out}, or submit again.") from None
    except BaseException as error:
        message, hint = ledger.failure(error)
        with contextlib.suppress(LavatarError):  # the first error is the one to show
            ledger.record(registry, job_id, message, level="error")
            ledger.end_job(registry, job_id, owner, State.FAILED, message, hint)
        raise
    else:
        ledger.record(registry, job_id, "finished")
        ledger.end_job(registry, job_id, owner, State.FINISHED)


class _Heartbeat:
    """Renews this process's leases while a job runs.

    Where the registry has not answered for so long that they may run out soon, the callback of `when_silent` is called:
    another process may take over then, and two must not work on one stage. `check` raises JobError when the leases were
    lost (the process was thought dead), Cancelled when the job was cancelled.
    """

    def __init__(self, registry: Registry, owner: Owner, job_id: str) -> None:
        self._registry, self._owner, self._job_id = registry, owner, job_id
        self._stop, self._lost, self._cancelled = threading.Event(), threading.Event(), threading.Event()
        self._renewed, self._suspend = time.monotonic(), _nothing
        beats = (self._beat, self._watch)  # a thread each: a database that does not answer holds up the first one
        self._threads = [threading.Thread(target=beat, name="heartbeat", daemon=True) for beat in beats]

    def __enter__(self) -> _Heartbeat:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def when_silent(self, suspend: Callable[[], None]) -> None:
        """Who is told, once in each silence, from another thread."""
        self._suspend = suspend

    def check(self) -> None:
        if self._lost.is_set():
            raise taken_over("this job")
        if self._cancelled.is_set():
            raise Cancelled(
                f"job {self._job_id} was cancelled; what is done is kept",
                f"Take it up again: lavatar jobs resume {self._job_id}",
            )

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            began = time.monotonic()
            with contextlib.suppress(LavatarError):
                with self._registry.write() as session:
                    if heartbeat(session, self._owner) == 0:
                        self._lost.set()
                        return
                    if ledger.cancel_asked(session, self._owner):
                        self._cancelled.set()
                self._renewed = began  # no later than the lease does

    def _watch(self) -> None:
        silences = 0  # looks in a row: a process that was frozen itself renews its leases before the second one
        while not self._stop.wait(HEARTBEAT_SECONDS / 5):
            silent = time.monotonic() - self._renewed > leases.LEASE_SECONDS * SILENT_SHARE
            silences = silences + 1 if silent else 0
            if silences == 2:
                self._suspend()


def _nothing() -> None: ...

"""One submit's stages on a runner: started in order, watched, and their ends written down."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from lavatar.cluster.copies import take_away_damaged
from lavatar.contracts import Event, MetricSinkFactory, StageKind, StageResult, StageSpec
from lavatar.errors import Interrupted, LavatarError, ObjectError, ShardError, StageBusyError, StageFailedError
from lavatar.platform import ledger, lookup
from lavatar.platform.home import Home
from lavatar.platform.inputs import inputs_of, stage_params
from lavatar.platform.leases import Owner, owner_alive, taken_over
from lavatar.platform.planning import SECTIONS, Plan, PlannedStage, listed
from lavatar.platform.progress import Display, duration
from lavatar.platform.registry import Registry
from lavatar.platform.states import State
from lavatar.platform.tables import Job, Stage
from lavatar.platform.tracking import Tracker

STOPS = (KeyboardInterrupt, SystemExit, Interrupted)
"""How a stop arrives: Ctrl-C, SIGTERM (Ray turns it into SystemExit), a cluster that goes down."""

LET_THROUGH = (StageKind.PREPROCESS, StageKind.PREVIEW)
"""Kinds of stages that run on although nothing needs them any more: they have no checkpoint to go on from."""

FIRST = (StageKind.PREVIEW, StageKind.PREPROCESS, StageKind.AVATAR)
"""What is started before all else: results that somebody waits for, then what most others wait for."""

POLL_SECONDS = 0.2
STORE_SECONDS = 2.0
"""Least time between two writes of a stage's progress to the registry."""
BUSY_POLL_SECONDS = 1.0
IDLE_SECONDS = 30.0
"""After so long without anything to run it is said that the cluster has no room."""
CANCEL_SECONDS = 60.0
"""How long a cancelled stage may take to store what it has."""


class StageHandle(Protocol):
    """A stage that was started (lavatar.cluster.stages)."""

    def poll(self) -> Sequence[Event]: ...

    def done(self) -> bool: ...

    def result(self) -> StageResult: ...

    def cancel(self) -> None: ...

    def abandon(self) -> None: ...


class StageRunner(Protocol):
    """What starts stages (lavatar.cluster.stages)."""

    def preflight(self, specs: Sequence[StageSpec]) -> Sequence[str]: ...

    def admit(self, priority: int, ready: Sequence[StageSpec], running: Sequence[StageSpec]) -> Sequence[str]: ...

    def start(self, spec: StageSpec, metric_sink_factory: MetricSinkFactory | None) -> StageHandle: ...


RunnerFactory = Callable[[], AbstractContextManager[StageRunner]]


@dataclass(frozen=True)
class Office:
    """What a job needs around it."""

    home: Home
    registry: Registry
    display: Display
    open_runner: RunnerFactory
    owner: Owner


@dataclass
class Active:
    """A stage that runs now."""

    planned: PlannedStage
    handle: StageHandle
    run_id: str | None
    began: float = field(default_factory=time.monotonic)
    stored: float = 0.0
    latest: Event | None = None
    suspended: bool = False  # its lease could not be renewed: it was asked to stop, and begins again

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


def keep_run(registry: Registry, tracker: Tracker, row: Stage | Job, run_id: str | None, what: str) -> None:
    """Write down the run that was opened for a row of ours. If it was taken over while MLflow answered, its run is the
    next owner's; one of our own is ended, for nobody else knows it. Raises JobError then."""
    known = row.mlflow_run_id
    if not ledger.set_run(registry, row, run_id, open_=run_id is not None):
        if run_id != known:
            tracker.end(run_id, State.INTERRUPTED)
        raise taken_over(what)


class Execution:
    """Runs the stages of one submit. Every end of a stage goes to the registry, MLflow and the display.

    A failure ends the pairs that need the failed stage, and no others.
    """

    def __init__(
        self,
        office: Office,
        plan: Plan,
        job: Job,
        tracker: Tracker | None,
        check: Callable[[], None],
    ) -> None:
        self._home, self._registry, self._display = office.home, office.registry, office.display
        self._owner, self._plan, self._job, self._tracker, self._check = office.owner, plan, job, tracker, check
        self._active: dict[str, Active] = {}
        self._waiting: dict[str, PlannedStage] = {}
        self._busy: set[str] = set()  # stages that another job runs
        self._look_again = self._idle_since = time.monotonic()
        self._failures: dict[str, StageFailedError] = {}  # by the failed stage's key, the first one first
        self._remade: set[str] = set()  # what was damaged
        self._fetched_again: set[str] = set()  # what read a damaged copy of something that is whole in the store

    def mark_cached(self, todo: set[str]) -> None:
        """Those that are done already."""
        ledger.begin_attempt(self._registry, self._job.id, list(todo))
        for planned in self._plan.stages:
            self._display.state(planned.name, "pending" if planned.key in todo else "cached")

    def run(self, runner: StageRunner, todo: list[PlannedStage], after_finish: Callable[[str], None]) -> None:
        """All of `todo`. Raises StageFailedError, once all that can be done is done, if a stage failed;
        KeyboardInterrupt or Interrupted if stopped."""
        for text in runner.preflight([planned.spec for planned in todo]):
            self._display.message(text, "warning")
            ledger.record(self._registry, self._job.id, text, level="warning")
        self._waiting = {planned.key: planned for planned in sorted(todo, key=_rank)}
        try:
            while self._waiting or self._active:
                self._check()
                self._look_at_busy()
                self._start_ready(runner)
                ended = self._watch()
                if ended:
                    self._start_ready(runner)
                for planned in ended:
                    after_finish(planned.key)
                time.sleep(POLL_SECONDS)
        except BaseException:
            self._stop(list(self._active.values()))
            raise
        if self._failures:
            raise self._failure()

    def suspend(self) -> None:
        """What runs stops, with a checkpoint where it makes any, and begins again when the registry answers: until then
        its lease cannot be renewed, and another process may take it over. May be called from another thread."""
        running = list(self._active.values())
        for active in running:
            active.suspended = True
            active.handle.cancel()
        names = listed([active.planned.name for active in running])
        self._display.message(f"the registry does not answer: {names or 'the job'} waits until it does", "warning")

    def _failure(self) -> StageFailedError:
        """The first failure; of a job of more than one pair also what else became of it."""
        first = next(iter(self._failures.values()))
        pairs, lost = len(self._plan.pairs), len(self._plan.pairs) - len(self._plan.without(self._failures))
        if pairs < 2:
            return first
        others = f" and {len(self._failures) - 1} more" if len(self._failures) > 1 else ""
        return StageFailedError(f"{lost} of {pairs} pairs failed: {first.message}{others}", first.hint)

    def _start_ready(self, runner: StageRunner) -> None:
        """Start what nothing stands before, as far as it is this job's turn."""
        unfinished = {*self._waiting, *self._active}
        ready = [
            planned
            for key, planned in self._waiting.items()
            if key not in self._busy and unfinished.isdisjoint(planned.needs)
        ]
        running = [active.planned.spec for active in self._active.values()]
        for key in runner.admit(self._job.priority, [planned.spec for planned in ready], running):
            if key in self._waiting:  # a failure met on the way may have taken it out
                self._start(runner, self._waiting[key])
        self._notice_idling(bool(ready))

    def _notice_idling(self, ready: bool) -> None:
        """Say it once when nothing runs although something could."""
        if self._active or not ready:
            self._idle_since = time.monotonic()
        elif time.monotonic() - self._idle_since > IDLE_SECONDS:
            self._idle_since = float("inf")
            self._display.message("waiting: other jobs hold the cluster, or a node of it is gone", "warning")

    def _look_at_busy(self) -> None:
        """Now and then, whether the stages that other jobs run are still being run."""
        if not self._busy or time.monotonic() < self._look_again:
            return
        self._look_again = time.monotonic() + BUSY_POLL_SECONDS
        rows, now = lookup.get_stages(self._registry, self._busy), lookup.time_of(self._registry)
        for row in rows:
            if row.state == State.RUNNING and owner_alive(row, now):
                continue
            self._busy.discard(row.key)
            planned = self._waiting.get(row.key)
            if planned and row.state == State.FINISHED:
                del self._waiting[row.key]
                self._cached(planned)
            elif planned and row.state == State.FAILED:  # so does this job, with the same message
                del self._waiting[row.key]
                self._display.state(planned.name, "failed")
                self._fail(planned, StageFailedError(f"{planned.name} failed: {row.message}", row.hint))

    def _start(self, runner: StageRunner, planned: PlannedStage) -> None:
        """Claim the stage and start it, unless another job has finished it or is at it."""
        key = planned.key
        try:
            row = ledger.claim_stage(self._registry, key, self._owner, self._job.id)
        except StageBusyError as error:
            self._busy.add(key)
            self._display.state(planned.name, "waiting")
            self._say(planned, f"waiting: {error.message}")
            return
        del self._waiting[key]
        if row.state == State.FINISHED:
            self._cached(planned)
            return
        run_id = None
        if self._tracker:
            params = stage_params(planned.spec, SECTIONS[planned.spec.kind])
            parent = self._job.mlflow_run_id
            run_id = self._tracker.open_stage(self._job.experiment, planned.name, row.mlflow_run_id, parent, params)
            keep_run(self._registry, self._tracker, row, run_id, planned.name)
            self._tracker.log_inputs(run_id, inputs_of(self._registry, self._plan, planned.spec))
        factory = self._tracker.sink_factory(run_id) if self._tracker else None
        try:
            handle = runner.start(planned.spec, factory)
        except BaseException as error:
            state = State.INTERRUPTED if isinstance(error, STOPS) else State.FAILED
            self._end(planned, run_id, state, *ledger.failure(error))
            raise
        self._active[key] = Active(planned, handle, run_id)
        self._display.state(planned.name, "running")
        self._say(planned, f"started (attempt {row.attempts})", show=False)

    def _watch(self) -> list[PlannedStage]:
        """One look at everything that runs; the stages that finished."""
        finished = []
        for active in list(self._active.values()):
            if active.planned.key not in self._active:  # stopped because of another one's failure, in this very round
                continue
            over = active.handle.done()  # before the events: those that came before the end are not lost
            self._relay(active)
            if over and self._settle(active):
                finished.append(active.planned)
        return finished

    def _relay(self, active: Active) -> None:
        """Events of a stage to the display and, progress now and then, to the registry."""
        planned = active.planned
        for event in active.handle.poll():
            if event.done is not None:
                active.latest = event
                self._display.progress(planned.name, event)
            elif event.text:
                self._say(planned, event.text, event.level)
        latest = active.latest
        if latest and not active.suspended and time.monotonic() - active.stored > STORE_SECONDS:
            active.stored, active.latest = time.monotonic(), None
            where = (self._registry, planned.key, self._owner)
            held = ledger.set_progress(*where, latest.done, latest.total, latest.unit)
            if not (held or active.suspended):  # as it may be by now
                raise taken_over(planned.name)

    def _settle(self, active: Active) -> bool:
        """The stage ended: write down how. True if it finished."""
        planned = active.planned
        del self._active[planned.key]
        try:
            result = active.handle.result()
        except Interrupted as error:
            if active.suspended:
                self._again(active, "the registry did not answer for too long", "It goes on when the registry answers.")
                return False
            self._end_ours(planned, active.run_id, State.INTERRUPTED, error.message, error.hint)
            raise
        except Exception as error:  # a stage may fail in any way; the others and the registry go on
            if isinstance(error, ShardError | ObjectError) and self._make_again(active, error):
                return False
            message, hint = ledger.failure(error)
            self._end_ours(planned, active.run_id, State.FAILED, message, hint)
            failure = StageFailedError(f"{planned.name} failed: {message}", hint)
            failure.__cause__ = error
            self._fail(planned, failure)
            return False
        self._finish(active, result)
        return True

    def _make_again(self, active: Active, error: ShardError | ObjectError) -> bool:
        """The stage met something damaged that others left: it waits until that is made again, each once. Where the
        store has it whole the stage only begins again, once, and fetches it. False if nothing is to be done."""
        planned = active.planned
        needs = [stage for stage in self._plan.stages if stage.key in planned.needs and stage.key not in self._remade]
        keys = [stage.key for stage in needs]
        store = self._home.store()
        if store is None:
            datasets = [stage.key for stage in needs if stage.spec.kind is StageKind.PREPROCESS]
            ledger.reopen_damaged(self._registry, self._home, datasets, take_away_damaged)
        else:  # who met it has told the store
            store.ask_again(keys)
            ledger.reopen_lost(self._registry, self._home, keys)
        there = ledger.finished(self._registry, self._home, keys)
        again = {stage.key: stage for stage in needs if stage.key not in there}
        if again:
            names = " and ".join(stage.name for stage in again.values())
            self._say(planned, f"{error.message}: {names} is made again", "warning")
            self._remade.update(again)
            self._waiting.update(again)
            self._again(active, error.message, f"It waits until {names} is made again.")
        elif store is not None and isinstance(error, ShardError) and planned.needs:
            return self._fetch_again(active, error)
        return bool(again)

    def _fetch_again(self, active: Active, error: ShardError) -> bool:
        """The copy of a dataset that the stage reads was damaged while it ran: when it begins again it is fetched."""
        planned = active.planned
        if planned.key in self._fetched_again:
            return False
        self._fetched_again.add(planned.key)
        self._say(planned, f"{error.message}: it begins again with the store's copy", "warning")
        self._again(active, error.message, "It begins again with the store's copy.")
        return True

    def _again(self, active: Active, message: str, hint: str) -> None:
        """The stage ended without a result, and is started again by and by."""
        self._end_ours(active.planned, active.run_id, State.INTERRUPTED, message, hint)
        self._waiting[active.planned.key] = active.planned

    def _finish(self, active: Active, result: StageResult) -> None:
        planned = active.planned
        if self._tracker:
            files = result.artefacts if planned.spec.kind is StageKind.PREVIEW else {}
            self._tracker.log_result(active.run_id, result.metrics, files)
            if planned.spec.kind is StageKind.PREVIEW and len(self._plan.pairs) == 1:  # of more each has its own run
                self._tracker.log_evaluation(self._job.mlflow_run_id, result.metrics, files)
        where = (self._registry, self._home, planned.spec, self._owner)
        if not ledger.finish_stage(*where, result, active.seconds):
            raise taken_over(planned.name)
        self._end_run(planned.key, active.run_id, State.FINISHED)
        self._display.state(planned.name, f"finished in {duration(active.seconds)}")
        self._say(planned, f"finished in {duration(active.seconds)}", show=False)
        for note in result.notes:
            self._say(planned, note)

    def _fail(self, planned: PlannedStage, failure: StageFailedError) -> None:
        """What only the pairs of the failed stage need is not started. What trains for them stops (it can go on later);
        what else runs for them is let through."""
        self._failures[planned.key] = failure
        wanted = {key for pair in self._plan.without(self._failures) for key in self._plan.needed(pair)}
        for key in [key for key in self._waiting if key not in wanted]:
            del self._waiting[key]
        if wanted:
            self._say(planned, failure.message, "error")
        unwanted = [active for key, active in self._active.items() if key not in wanted]
        self._stop([active for active in unwanted if active.planned.spec.kind not in LET_THROUGH])
        for active in unwanted:
            if active.planned.key in self._active:
                self._display.message(f"{active.planned.name} runs on to its end, so that it is kept")

    def _stop(self, chosen: list[Active]) -> None:
        """Cancel stages and wait until they have stored what they have."""
        for active in chosen:
            self._display.state(active.planned.name, "stopping")
            active.handle.cancel()
        deadline = time.monotonic() + CANCEL_SECONDS
        for active in chosen:
            while not active.handle.done() and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            if not active.handle.done():
                active.handle.abandon()
            self._active.pop(active.planned.key, None)
            try:
                if active.handle.done():
                    self._finish(active, active.handle.result())
                    continue
                text = "did not stop in time"
            except Interrupted as error:
                text = error.message
            except Exception as error:  # what a stage says while it is being stopped is not a failure of its own
                text = ledger.failure(error)[0]
            self._end(active.planned, active.run_id, State.INTERRUPTED, text, "Submit again: it goes on from there.")

    def _end_ours(self, planned: PlannedStage, run_id: str | None, state: State, message: str, hint: str) -> None:
        """The same while the job goes on. Raises JobError if another process has the stage by now."""
        if not self._end(planned, run_id, state, message, hint):
            raise taken_over(planned.name)

    def _end(self, planned: PlannedStage, run_id: str | None, state: State, message: str, hint: str) -> bool:
        """A stage ended without a result. False if it was taken over."""
        ours = ledger.end_stage(self._registry, planned.key, self._owner, state, message, hint)
        if ours:
            self._end_run(planned.key, run_id, state)
        self._display.state(planned.name, state.value)
        level = "error" if state is State.FAILED else "warning"
        self._say(planned, f"{state.value}: {message}", level, show=False)
        return ours

    def _end_run(self, key: str, run_id: str | None, state: State) -> None:
        row = lookup.get_stage(self._registry, key)
        ours = row is not None and row.owner in (None, self._owner.id)  # else the next owner goes on with the run
        if self._tracker and run_id and row and ours and self._tracker.end(run_id, state):
            ledger.set_run(self._registry, row, run_id, open_=False)

    def _cached(self, planned: PlannedStage) -> None:
        ledger.set_cached(self._registry, self._job.id, planned.key)
        self._display.state(planned.name, "cached")

    def _say(self, planned: PlannedStage, text: str, level: str = "info", *, show: bool = True) -> None:
        """A line for the log and, if `show`, for the eyes."""
        if show:
            self._display.message(f"{planned.name}: {text}", level)
        try:
            ledger.record(self._registry, self._job.id, text, key=planned.key, stage=planned.name, level=level)
        except LavatarError as error:
            self._display.message(f"the log could not be written: {error.message}", "warning")


def _rank(planned: PlannedStage) -> int:
    """Where the stage stands in the order of starts; those of equal rank keep the plan's."""
    return FIRST.index(planned.spec.kind) if planned.spec.kind in FIRST else len(FIRST)

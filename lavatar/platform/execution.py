"""One submit's stages on a runner: started in order, watched, and their ends written down."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from lavatar.contracts import Event, MetricSinkFactory, StageKind, StageResult, StageSpec
from lavatar.errors import Interrupted, LavatarError, StageBusyError, StageFailedError
from lavatar.platform import ledger
from lavatar.platform.home import Home
from lavatar.platform.leases import Owner, taken_over
from lavatar.platform.planning import SECTIONS, Plan, PlannedStage
from lavatar.platform.progress import Display, duration
from lavatar.platform.registry import Registry
from lavatar.platform.states import State
from lavatar.platform.tables import Job
from lavatar.platform.tracking import Tracker

STOPS = (KeyboardInterrupt, SystemExit, Interrupted)
"""How a stop arrives: Ctrl-C, SIGTERM (Ray turns it into SystemExit), a cluster that goes down."""

LET_THROUGH = (StageKind.PREPROCESS, StageKind.PREVIEW)
"""Kinds of stages that run on although nothing needs them any more: they have no checkpoint to go on from."""

POLL_SECONDS = 0.2
STORE_SECONDS = 2.0
"""Least time between two writes of a stage's progress to the registry."""
BUSY_POLL_SECONDS = 1.0
CANCEL_SECONDS = 60.0
"""How long a cancelled stage may take to store what it has."""


class StageHandle(Protocol):
    """A stage that was started (lavatar.cluster.stages)."""

    def poll(self) -> Sequence[Event]: ...

    def done(self) -> bool: ...

    def result(self) -> StageResult: ...

    def cancel(self) -> None: ...


class StageRunner(Protocol):
    """What starts stages (lavatar.cluster.stages)."""

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

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


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
        self._busy: dict[str, float] = {}  # stages that another job runs: when to look again
        self._failures: dict[str, StageFailedError] = {}  # by the failed stage's key, the first one first
        self._most = 1 if plan.recipe.resources.backend == "inline" else len(plan.stages)

    def mark_cached(self, todo: set[str]) -> None:
        """Those that are done already."""
        for planned in self._plan.stages:
            if planned.key not in todo:
                self._cached(planned)
            else:
                ledger.set_cached(self._registry, self._job.id, planned.key, False, 0.0)
                self._display.state(planned.name, "pending")

    def run(self, runner: StageRunner, todo: list[PlannedStage], after_finish: Callable[[PlannedStage], None]) -> None:
        """All of `todo`. Raises StageFailedError, once all that can be done is done, if a stage failed;
        KeyboardInterrupt or Interrupted if stopped."""
        self._waiting = {planned.key: planned for planned in todo}
        try:
            while self._waiting or self._active:
                self._check()
                self._start_ready(runner)
                ended = self._watch()
                self._start_ready(runner)
                for planned in ended:
                    after_finish(planned)
                time.sleep(POLL_SECONDS)
        except BaseException:
            self._stop(list(self._active.values()))
            raise
        if self._failures:
            raise self._failure()

    def _failure(self) -> StageFailedError:
        """The first failure; of a job of more than one pair also what else became of it."""
        first = next(iter(self._failures.values()))
        pairs, lost = len(self._plan.pairs), len(self._plan.pairs) - len(self._plan.without(self._failures))
        if pairs == 1:
            return first
        others = f" and {len(self._failures) - 1} more" if len(self._failures) > 1 else ""
        return StageFailedError(f"{lost} of {pairs} pairs failed: {first.message}{others}", first.hint)

    def _start_ready(self, runner: StageRunner) -> None:
        unfinished = {*self._waiting, *self._active}
        for planned in list(self._waiting.values()):
            if len(self._active) >= self._most:
                return
            if planned.key not in self._waiting:  # a failure met on the way took it out
                continue
            if unfinished.isdisjoint(planned.needs) and time.monotonic() >= self._busy.get(planned.key, 0.0):
                self._start(runner, planned)

    def _start(self, runner: StageRunner, planned: PlannedStage) -> None:
        """Claim the stage and start it, unless another job has finished it or is at it."""
        key = planned.key
        if key in self._busy and self._failed_elsewhere(planned):
            return
        try:
            row = ledger.claim_stage(self._registry, key, self._owner, self._job.id)
        except StageBusyError as error:
            if key not in self._busy:
                self._display.state(planned.name, "waiting")
                self._say(planned, f"waiting: {error.message}")
            self._busy[key] = time.monotonic() + BUSY_POLL_SECONDS
            return
        del self._waiting[key]
        if row.state == State.FINISHED:
            self._cached(planned)
            return
        run_id = None
        if self._tracker:
            params = {"key": key, **{name: planned.spec.recipe[name] for name in SECTIONS[planned.spec.kind]}}
            parent = self._job.mlflow_run_id
            run_id = self._tracker.open_stage(self._job.experiment, planned.name, row.mlflow_run_id, parent, params)
            ledger.set_run(self._registry, row, run_id, open_=run_id is not None)
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

    def _failed_elsewhere(self, planned: PlannedStage) -> bool:
        """The job that we waited for failed at the stage: so does this one, with the same message."""
        row = ledger.get_stage(self._registry, planned.key)
        if row is None or row.state != State.FAILED:
            return False
        del self._waiting[planned.key]
        self._display.state(planned.name, "failed")
        self._fail(planned, StageFailedError(f"{planned.name} failed: {row.message}", row.hint))
        return True

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
        if latest and time.monotonic() - active.stored > STORE_SECONDS:
            active.stored, active.latest = time.monotonic(), None
            where = (self._registry, planned.key, self._owner)
            if not ledger.set_progress(*where, latest.done, latest.total, latest.unit):
                raise taken_over(planned.name)

    def _settle(self, active: Active) -> bool:
        """The stage ended: write down how. True if it finished."""
        planned = active.planned
        del self._active[planned.key]
        try:
            result = active.handle.result()
        except Interrupted as error:
            self._end(planned, active.run_id, State.INTERRUPTED, error.message, error.hint)
            raise
        except Exception as error:  # a stage may fail in any way; the others and the registry go on
            message, hint = ledger.failure(error)
            self._end(planned, active.run_id, State.FAILED, message, hint)
            failure = StageFailedError(f"{planned.name} failed: {message}", hint)
            failure.__cause__ = error
            self._fail(planned, failure)
            return False
        self._finish(active, result)
        return True

    def _finish(self, active: Active, result: StageResult) -> None:
        planned = active.planned
        if self._tracker:
            files = result.artefacts if planned.spec.kind is StageKind.PREVIEW else {}
            self._tracker.log_result(active.run_id, result.metrics, files)
            if planned.spec.kind is StageKind.PREVIEW and len(self._plan.pairs) == 1:  # of more each has its own run
                self._tracker.log_evaluation(self._job.mlflow_run_id, result.metrics, files)
        if not ledger.finish_stage(self._registry, self._home, planned.spec, self._owner, result):
            raise taken_over(planned.name)
        self._end_run(planned.key, active.run_id, State.FINISHED)
        ledger.set_cached(self._registry, self._job.id, planned.key, False, active.seconds)
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

    def _end(self, planned: PlannedStage, run_id: str | None, state: State, message: str, hint: str) -> None:
        """A stage ended without a result."""
        ledger.end_stage(self._registry, planned.key, self._owner, state, message, hint)
        self._end_run(planned.key, run_id, state)
        self._display.state(planned.name, state.value)
        level = "error" if state is State.FAILED else "warning"
        self._say(planned, f"{state.value}: {message}", level, show=False)

    def _end_run(self, key: str, run_id: str | None, state: State) -> None:
        row = ledger.get_stage(self._registry, key)
        if self._tracker and run_id and row and self._tracker.end(run_id, state):
            ledger.set_run(self._registry, row, run_id, open_=False)

    def _cached(self, planned: PlannedStage) -> None:
        ledger.set_cached(self._registry, self._job.id, planned.key, True, 0.0)
        self._display.state(planned.name, "cached")

    def _say(self, planned: PlannedStage, text: str, level: str = "info", *, show: bool = True) -> None:
        """A line for the log and, if `show`, for the eyes."""
        if show:
            self._display.message(f"{planned.name}: {text}", level)
        try:
            ledger.record(self._registry, self._job.id, text, key=planned.key, stage=planned.name, level=level)
        except LavatarError as error:
            self._display.message(f"the log could not be written: {error.message}", "warning")

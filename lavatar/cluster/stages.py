"""Starts stages, watches them, brings back results and errors. `StageRunner` is all that the platform sees of Ray."""

from __future__ import annotations

import contextlib
import functools
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from lavatar.cluster.logs import log_path, noted, redirected
from lavatar.cluster.results import read_result
from lavatar.cluster.store import TRAINED, brought, open_store
from lavatar.configs.recipe import Recipe
from lavatar.contracts import Event, MetricSinkFactory, StageKind, StageResult, StageSpec
from lavatar.errors import ConfigError, StageFailedError

if TYPE_CHECKING:
    from lavatar.cluster.bodies import Body
    from lavatar.cluster.resources import Share

FETCH_SECONDS = 0.15


class StageHandle(Protocol):
    """A stage that was started."""

    def poll(self) -> Sequence[Event]:
        """What it said since the last call. Cheap; call it often."""
        ...

    def done(self) -> bool:
        """Whether `result` would return or raise at once."""
        ...

    def result(self) -> StageResult:
        """Waits; raises the stage's own LavatarError, Interrupted after a cancel."""
        ...

    def cancel(self) -> None:
        """Asks it to stop: training makes a checkpoint first. Returns at once."""
        ...

    def abandon(self) -> None:
        """Ends it at once, where asking did not help: what it did since its last checkpoint is lost."""
        ...


@dataclass(frozen=True)
class FinishedHandle:
    """A stage whose result was on disk already."""

    kept: StageResult

    def poll(self) -> list[Event]:
        return []

    def done(self) -> bool:
        return True

    def result(self) -> StageResult:
        return self.kept

    def cancel(self) -> None: ...

    def abandon(self) -> None: ...


class StageRunner:
    """Runs stages on this machine's Ray ("ray", or at `address`) or in threads of this process ("inline").

    A context manager: entering starts Ray, leaving stops what was started, whatever happened in between.
    `dashboard` None: Ray's page is served where it does not weigh (half a gigabyte), on machines of four CPUs or more.
    """

    def __init__(
        self,
        home: Path,
        address: str | None = None,
        backend: str = "ray",
        *,
        dashboard: bool | None = None,
        bodies: Mapping[StageKind, Body] | None = None,
    ) -> None:
        if backend not in ("ray", "inline"):
            raise ConfigError(f"there is no backend {backend!r}", "Choose ray or inline.")
        self.home, self.address, self.backend, self._dashboard = Path(home), address, backend, dashboard
        self._bodies = bodies  # None: the real ones
        self.dashboard: str | None = None
        self._session: Any = None
        self._mailbox: Any = None
        self._queue: Any = None
        self._pulse: Any = None
        self._inbox: dict[str, list[Event]] = {}
        self._fetched = 0.0
        self._running: dict[str, RayHandle] = {}
        self._shares: dict[tuple[int, StageKind], tuple[Mapping[str, Any], Share]] = {}

    def __enter__(self) -> Self:
        if self.backend == "ray":
            from lavatar.cluster import session
            from lavatar.cluster.mailbox import Pulse, open_mailbox
            from lavatar.cluster.queues import ClusterQueue, LocalQueue

            self._session = (
                session.attach(self.home, self.address)
                if self.address
                else session.start(self.home, dashboard=self._dashboard)
            )
            try:
                self.dashboard = self._session.dashboard
                self._mailbox = open_mailbox()
                self._pulse = Pulse(self._mailbox)
                self._queue = ClusterQueue() if self.address else LocalQueue()
            except BaseException:
                self._session.stop()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is None:
            return
        try:
            import ray

            with contextlib.suppress(Exception):
                self._pulse.stop()
                for handle in self._running.values():
                    handle.abandon()
                self._queue.leave()
                ray.kill(self._mailbox)
        finally:
            self._session.stop()
            self._session = None

    def preflight(self, specs: Sequence[StageSpec]) -> list[str]:
        """Notes on what was lowered. Raises PlacementError for stages that this cluster could never run."""
        if self.backend == "inline":
            return []
        return [f"{kind.value}: {note}" for kind, share in self._by_kind(specs).items() for note in share.notes]

    def admit(self, priority: int, ready: Sequence[StageSpec], running: Sequence[StageSpec]) -> list[str]:
        """Of the stages that are `ready`, in the order of their wishes, the keys of those whose turn it is."""
        if self.backend == "inline":
            return [spec.key for spec in ready[:1]] if not running else []
        from lavatar.cluster.admission import counted

        wanted = counted([self._share(spec).demand for spec in ready])
        granted = self._queue.ask(priority, counted([self._share(spec).demand for spec in running]), wanted)
        keys, at = [], 0
        for (_, count), number in zip(wanted, granted, strict=True):
            keys += [spec.key for spec in ready[at : at + number]]
            at += count
        return keys

    def start(self, spec: StageSpec, metric_sink_factory: MetricSinkFactory | None = None) -> StageHandle:
        """Starts a stage and returns at once; one that is complete on disk is not run again."""
        kept = read_result(spec)
        if kept is not None and open_store(spec.home) is None:  # else the stage itself sees to it that it is stored
            return FinishedHandle(kept)
        if self.backend == "inline":
            from lavatar.cluster.inline import InlineHandle

            return InlineHandle(spec, metric_sink_factory, self._bodies)
        if self._session is None:
            raise StageFailedError("the runner is not open", "Use it as a context manager.")
        handle = RayHandle(self, spec, self._share(spec), metric_sink_factory, self._mailbox, self._bodies)
        self._running = {key: other for key, other in self._running.items() if not other.ended} | {spec.key: handle}
        return handle

    def events(self, key: str, fresh: bool) -> list[Event]:
        """What a stage said since the last call; `fresh`: up to now. One message brings in what all stages said."""
        import ray

        if fresh or time.monotonic() - self._fetched > FETCH_SECONDS:
            self._fetched = time.monotonic()
            with contextlib.suppress(ray.exceptions.RayError):
                for other, events in ray.get(self._mailbox.take.remote(), timeout=10).items():
                    self._inbox.setdefault(other, []).extend(events)
        return self._inbox.pop(key, [])

    def _by_kind(self, specs: Sequence[StageSpec]) -> dict[StageKind, Share]:
        return {spec.kind: self._share(spec) for spec in specs}

    def _share(self, spec: StageSpec) -> Share:
        """What its recipe gets here. Looked up once for all stages of a kind: those of a job have one recipe."""
        from lavatar.cluster.resources import ray_machine, share_of

        found = self._shares.get((id(spec.recipe), spec.kind))
        if found is None:
            wanted = getattr(Recipe.model_validate(spec.recipe).resources, spec.kind.value)
            found = spec.recipe, share_of(wanted, ray_machine(), spec.kind.value)
            self._shares[id(spec.recipe), spec.kind] = found  # with the recipe: its number is not used again meanwhile
        return found[1]


class RayHandle:
    """A stage as a Ray task."""

    def __init__(
        self,
        runner: StageRunner,
        spec: StageSpec,
        share: Share,
        metrics: MetricSinkFactory | None,
        mailbox: Any,
        bodies: Mapping[StageKind, Body] | None,
    ) -> None:
        import ray

        self._ray, self._spec, self._mailbox, self._runner = ray, spec, mailbox, runner
        self.ended, self._ran_out = False, False
        ray.get(mailbox.begin.remote(spec.key))
        self._task = _stage_task().options(**_options(spec, share))
        self._arguments = (spec, metrics, mailbox, share, bodies)
        self._reference = self._task.remote(*self._arguments)

    def poll(self) -> list[Event]:
        return self._runner.events(self._spec.key, fresh=self.ended)

    def done(self) -> bool:
        if not self.ended and self._ray.wait([self._reference], timeout=0)[0]:
            self.ended = not self._begins_again()
        return self.ended

    def _begins_again(self) -> bool:
        """Once, after Ray killed a process of it for want of memory: a training then takes smaller parts."""
        from lavatar.cluster.memory import killed_by_ray

        try:
            self._ray.get(self._reference)
            return False
        except self._ray.exceptions.RayError as error:
            if not killed_by_ray(error):
                return False
        for left in (self._spec.home / "ray" / "train").glob(f"{self._spec.key[:16]}-*"):  # it could not clean up
            shutil.rmtree(left, ignore_errors=True)
        if self._ran_out:
            return False
        self._ran_out = True
        self._ray.get(self._mailbox.forgive.remote(self._spec.key))
        self._reference = self._task.remote(*self._arguments, ran_out=True)
        return True

    def result(self) -> StageResult:
        from lavatar.cluster.unwrap import cause_of

        while not self.done():
            self._ray.wait([self._reference])
        try:
            result = self._ray.get(self._reference)
        except self._ray.exceptions.RayError as error:
            raise cause_of(error, log_path(self._spec)) from error
        return brought(self._spec, result)

    def cancel(self) -> None:
        # Never an exception thrown into a process that works: one that is hit in the middle of an import is used again.
        if not self._ray.get(self._mailbox.cancel.remote(self._spec.key)):
            self.abandon()

    def abandon(self) -> None:
        if not self.done():
            self._ray.cancel(self._reference, force=True, recursive=True)


def _options(spec: StageSpec, share: Share) -> dict[str, Any]:
    """Ray's options for the stage's own task."""
    from lavatar.cluster.resources import node_for

    own = spec.kind is StageKind.PREVIEW  # the others only coordinate: their workers hold the CPUs
    options = {
        "name": spec.name,
        "num_cpus": share.cpus if own else 0,
        "num_gpus": share.gpus if own else 0,
        "memory": share.memory_gb * 2**30 if own and share.memory_gb else None,
        "max_retries": Recipe.model_validate(spec.recipe).resources.max_failures,
        "retry_exceptions": False,
    }
    if spec.kind is StageKind.PREPROCESS and open_store(spec.home) is not None:
        options["scheduling_strategy"] = node_for(spec.key, share)
    return options


@functools.cache
def _stage_task() -> Any:
    """`_run_stage` as Ray takes it. Made once: Ray brings each one that is made to every process anew."""
    import ray

    return ray.remote(_run_stage)


def _run_stage(
    spec: StageSpec,
    metrics: MetricSinkFactory | None,
    mailbox: Any,
    share: Any,
    bodies: Mapping[StageKind, Body] | None,
    ran_out: bool = False,
) -> StageResult:
    """The stage's own Ray task. `ran_out`: the one before was killed for want of memory."""
    import ray

    from lavatar.cluster.bodies import Context, run_body, stopped
    from lavatar.cluster.mailbox import Post
    from lavatar.cluster.parallel import RayMap, limit_threads

    if ray.get(mailbox.started.remote(spec.key, heeds=spec.kind not in TRAINED)):
        raise stopped(spec)
    recipe, log = Recipe.model_validate(spec.recipe), log_path(spec)

    def train(plan: Any) -> dict[str, Any]:
        from lavatar.cluster.trainer import train_on_workers

        return train_on_workers(plan, spec, share, recipe.resources.max_failures, metrics, mailbox, ran_out)

    with redirected(log), noted(log, spec.name), Post(mailbox, spec.key) as post:
        if spec.kind not in TRAINED:
            limit_threads(share.cpus)
        ahead, alone = 2 * _slots(share.cpus), open_store(spec.home) is not None
        parallel = RayMap(share.cpus, log, post.cancelled, ahead, here=alone, memory_gb=share.memory_gb)
        device = "cuda" if share.gpus and spec.kind is StageKind.PREVIEW else "cpu"
        return run_body(spec, Context(post, post.cancelled, metrics, parallel, train, device), bodies)


def _slots(cpus: float) -> int:
    """How many tasks of `cpus` run at once."""
    from lavatar.cluster.resources import ray_machine

    return max(1, int(ray_machine().total.cpus // cpus))

"""Stages in a thread of this process, without Ray: for debugging, and where Ray cannot run."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from lavatar.cluster.bodies import Body, Context, run_body, stopped
from lavatar.cluster.logs import log_path, noted
from lavatar.cluster.memory import batch_too_large, out_of_memory, train_within_memory
from lavatar.cluster.plans import PlanFactory, Worker, run_plan
from lavatar.cluster.store import brought
from lavatar.configs.recipe import Recipe
from lavatar.contracts import Event, MetricSinkFactory, NullSink, StageKind, StageResult, StageSpec
from lavatar.errors import LavatarError, StageFailedError

T = TypeVar("T")
R = TypeVar("R")


class InlineHandle:
    """A stage in a thread."""

    def __init__(
        self, spec: StageSpec, metrics: MetricSinkFactory | None, bodies: Mapping[StageKind, Body] | None = None
    ) -> None:
        self._spec, self._metrics, self._bodies = spec, metrics, bodies
        self._events: deque[Event] = deque()
        self._cancelled = threading.Event()
        self._result: StageResult | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=spec.name, daemon=True)
        self._thread.start()

    def poll(self) -> list[Event]:
        return [self._events.popleft() for _ in range(len(self._events))]

    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> StageResult:
        while self._thread.is_alive():
            self._thread.join(0.2)  # short, so that Ctrl-C is heard
        if self._result is not None:
            return brought(self._spec, self._result)
        if isinstance(self._error, LavatarError):
            raise self._error
        error = self._error
        raise StageFailedError(f"{type(error).__name__}: {error}", f"See {log_path(self._spec)}.") from error

    def cancel(self) -> None:
        self._cancelled.set()

    def abandon(self) -> None:
        """A thread cannot be ended from outside; it ends with the process."""

    def emit(self, event: Event) -> None:
        self._events.append(event)

    def _run(self) -> None:
        context = Context(self, self._cancelled.is_set, self._metrics, self._map, self._train, device_of(self._spec))
        try:
            with noted(log_path(self._spec), self._spec.name):
                self._result = run_body(self._spec, context, self._bodies)
        except BaseException as error:  # handed to whoever asks for the result
            self._error = error

    def _map(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        for item in items:
            if self._cancelled.is_set():
                raise stopped(self._spec)
            yield function(item)

    def _train(self, plan: PlanFactory) -> dict[str, Any]:
        def say(text: str) -> None:
            self.emit(Event(self._spec.name, text, level="warning"))

        return train_within_memory(self._spec, 1, partial(self._train_once, plan), say)

    def _train_once(self, plan: PlanFactory, spec: StageSpec) -> dict[str, Any]:
        metrics = self._metrics() if self._metrics else NullSink()
        try:
            worker = Worker(device=device_of(spec))
            return run_plan(plan(spec, self), spec, worker, metrics, self, self._cancelled.is_set)
        except Exception as error:
            if out_of_memory(error) and not isinstance(error, LavatarError):
                raise batch_too_large(error) from error
            raise
        finally:
            metrics.close()


def device_of(spec: StageSpec) -> str:
    """The GPU where the recipe asks for one and there is one."""
    import torch

    resources = getattr(Recipe.model_validate(spec.recipe).resources, spec.kind.value)
    return "cuda" if resources.gpus and torch.cuda.is_available() else "cpu"

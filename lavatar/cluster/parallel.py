"""`ParallelMap` over Ray tasks: independent work items, results in the order of the items whatever runs them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.util.scheduling_strategies

from lavatar.cluster.logs import redirected
from lavatar.cluster.memory import killed_by_ray
from lavatar.cluster.session import OPENMP
from lavatar.cluster.unwrap import cause_of
from lavatar.errors import Interrupted

T = TypeVar("T")
R = TypeVar("R")

POLL_SECONDS = 0.3
MEMORY_TRIES = 5
"""How often an item is tried again whose process Ray killed for want of memory, after 1, 2, 4… seconds."""


class RayMap:
    """map() whose calls are Ray tasks of `cpus` and `memory_gb` each; at most `ahead` are submitted beyond the one
    that is waited for.

    `here`: on this node alone, for it shares no disk with others.
    """

    def __init__(
        self,
        cpus: float,
        log: Path,
        cancelled: Callable[[], bool],
        ahead: int,
        *,
        here: bool = False,
        memory_gb: float = 0.0,
    ) -> None:
        self._cpus, self._log, self._cancelled, self._ahead = cpus, log, cancelled, max(1, ahead)
        self._memory = memory_gb * 2**30 or None
        self._where: Any = "DEFAULT"
        if here:
            node = ray.get_runtime_context().get_node_id()
            self._where = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)

    def __call__(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        remote = ray.remote(num_cpus=self._cpus, max_retries=2, retry_exceptions=False)(_call)
        remote = remote.options(memory=self._memory, name=name, scheduling_strategy=self._where)
        pending: deque[tuple[Any, Any, int]] = deque()  # item, its task, times it was tried again
        todo = iter(items)
        try:
            while True:
                while len(pending) <= self._ahead and (item := next(todo, _END)) is not _END:
                    pending.append((item, remote.remote(function, item, self._log, self._cpus), 0))
                if not pending:
                    return
                self._wait(pending[0][1])
                item, reference, again = pending.popleft()
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayError as error:
                    if not killed_by_ray(error) or again == MEMORY_TRIES:
                        raise cause_of(error, self._log) from error
                    self._rest(2.0**again)
                    pending.appendleft((item, remote.remote(function, item, self._log, self._cpus), again + 1))
                    continue
                yield result
        finally:
            for _, reference, _ in pending:
                ray.cancel(reference, force=True)  # a process stopped in the middle of an import must not be used again

    def _rest(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            self._heed()

    def _wait(self, reference: Any) -> None:
        while not ray.wait([reference], timeout=POLL_SECONDS)[0]:
            self._heed()

    def _heed(self) -> None:
        if self._cancelled():
            raise Interrupted("preprocessing was stopped", "Repeat the command to start it again.")


_END = object()


def _call(function: Callable[[Any], Any], item: Any, log: Path, cpus: float) -> Any:
    """One item, in a worker process: no more threads than the CPUs it was given."""
    limit_threads(cpus)
    with redirected(log):
        return function(item)


def limit_threads(cpus: float) -> int:
    """torch and OpenCV use as many threads as this process has CPUs; later imports read OMP_NUM_THREADS."""
    import os
    import sys

    threads = max(1, int(cpus))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    for name, value in OPENMP.items():
        os.environ.setdefault(name, value)
    _keep_freed_memory()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    import cv2

    cv2.setNumThreads(threads)
    return threads


def _keep_freed_memory() -> None:
    """glibc hands large tensors back to the kernel and faults them in again page by page at every step: keep them."""
    import ctypes
    import sys

    if sys.platform != "linux":
        return
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)

"""A few batches ahead, in a background thread, without changing what is seen."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Computes `function(step)` for the next few steps in a thread. What comes out is function(step) whatever the
    timing; asking for a step out of turn starts again from there. An error is raised where its step is asked for."""

    def __init__(self, function: Callable[[int], T], depth: int = 3) -> None:
        self._function, self._depth = function, depth
        self._next = -1
        self._stop = threading.Event()
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._thread: threading.Thread | None = None

    def get(self, step: int) -> T:
        """function(step)."""
        if step != self._next or self._thread is None:
            self._restart(step)
        value, error = self._queue.get()
        self._next = step + 1
        if error is not None:
            self.close()
            raise error
        return value  # type: ignore[return-value]

    def _restart(self, step: int) -> None:
        self.close()
        self._stop, self._queue, self._next = threading.Event(), queue.Queue(self._depth), step
        self._thread = threading.Thread(
            target=self._work, args=(step, self._stop, self._queue), name="prefetch", daemon=True
        )
        self._thread.start()

    def _work(self, step: int, stop: threading.Event, out: queue.Queue[Any]) -> None:
        while not stop.is_set():
            try:
                item: tuple[Any, BaseException | None] = (self._function(step), None)
            except BaseException as error:  # handed to whoever asks for this step
                item = (None, error)
            while not stop.is_set():
                try:
                    out.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if item[1] is not None:
                return
            step += 1

    def close(self) -> None:
        """Stop the thread; waits for the batch it is at."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

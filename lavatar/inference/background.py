"""One thread beside the drawing: pictures are measured while the next ones are drawn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

WAITING = 4  # pieces of work held back at most, so that pictures do not pile up


class Background:
    """Runs pieces of work one after the other, in order. An error in one is raised here, on exit at the latest."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="measure")
        self._pending: deque[Future[Any]] = deque()

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown(cancel_futures=True)

    def run(self, work: Callable[..., None], *arguments: Any) -> None:
        """Queue `work(*arguments)`; waits while too much is queued."""
        self._pending.append(self._thread.submit(work, *arguments))
        while self._pending and (len(self._pending) > WAITING or self._pending[0].done()):
            self._pending.popleft().result()

    def wait(self) -> None:
        """Until everything queued is done."""
        while self._pending:
            self._pending.popleft().result()

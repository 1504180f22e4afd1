"""What is made in one thread while what came before is used in another: pictures are drawn while others are encoded."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

_END = object()


def ahead(items: Iterable[T], most: int) -> Generator[T]:
    """The items in their order, up to `most` of them made before they are asked for.

    An error of making one is raised where that one would have come. Whoever stops early closes the iterator: nothing
    more is made then.
    """
    ready: queue.Queue[Any] = queue.Queue(most)
    stopped = threading.Event()

    def make() -> None:
        last: Any = _END
        try:
            for item in items:
                if not _put(ready, (item,), stopped):
                    return
        except BaseException as error:  # raised in the other thread
            last = error
        _put(ready, last, stopped)

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while (found := ready.get()) is not _END:
            if isinstance(found, BaseException):
                raise found
            yield found[0]
    finally:
        stopped.set()
        thread.join()


def _put(ready: queue.Queue[Any], item: Any, stopped: threading.Event) -> bool:
    """False where nobody wants it any more."""
    while not stopped.is_set():
        with suppress(queue.Full):
            ready.put(item, timeout=0.1)
            return True
    return False

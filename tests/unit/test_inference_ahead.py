"""Items made ahead in a thread: all of them, in order, with their errors, and no more once nobody wants them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from lavatar.inference.ahead import ahead


def test_all_items_come_in_order_and_are_made_elsewhere() -> None:
    threads: set[int] = set()

    def items() -> Iterator[int]:
        for i in range(20):
            threads.add(threading.get_ident())
            yield i

    assert list(ahead(items(), 3)) == list(range(20))
    assert threading.get_ident() not in threads


def test_only_so_many_are_made_before_they_are_asked_for() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(20):
            made.append(i)
            yield i

    waiting = ahead(items(), 2)
    assert next(waiting) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3], "one is used, two are ready, one waits for room"
    waiting.close()
    assert len(made) == 4
    assert not any(thread.name == "ahead" for thread in threading.enumerate())


def test_an_error_comes_where_its_item_would_have() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError("second")

    waiting = ahead(items(), 5)
    assert next(waiting) == 1
    with pytest.raises(ZeroDivisionError, match="second"):
        next(waiting)

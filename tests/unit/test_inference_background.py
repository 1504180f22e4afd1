"""Work beside the drawing: in order, bounded, and its errors come out."""

from __future__ import annotations

import threading

import pytest

from lavatar.inference.background import WAITING, Background


def test_in_order_and_complete() -> None:
    done: list[int] = []
    with Background() as background:
        for i in range(50):
            background.run(done.append, i)
    assert done == list(range(50))


def test_the_queue_is_bounded() -> None:
    gate, queued = threading.Event(), []

    def fill() -> None:
        with Background() as background:
            for i in range(20):
                background.run(gate.wait)
                queued.append(i)

    filler = threading.Thread(target=fill)
    filler.start()
    filler.join(0.3)
    assert len(queued) <= WAITING + 1
    gate.set()
    filler.join(5)
    assert len(queued) == 20


def _fail() -> None:
    raise ValueError("meter")


def _draw_badly() -> None:
    with Background() as background:
        background.run(threading.Event().wait, 0.05)
        background.run(_fail)
        raise KeyError("drawing")


def test_errors_come_out() -> None:
    with pytest.raises(ValueError, match="meter"), Background() as background:
        background.run(_fail)
    with pytest.raises(KeyError, match="drawing"):  # not hidden by what the queue has to say
        _draw_badly()

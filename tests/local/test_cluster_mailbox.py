"""Who trains stops where the driver is silent, and where the mailbox is, which may be on the driver's machine."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import psutil
import pytest

from lavatar.cluster import mailbox
from lavatar.cluster.mailbox import Mailbox, Post, Pulse, open_mailbox
from lavatar.contracts import Event

SILENCE = 4.0


def until(true: Callable[[], bool], seconds: float = 60.0) -> float:
    """How long it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds
        time.sleep(0.05)
    return time.monotonic() - began


def test_a_mailbox_that_does_not_answer_counts_as_a_cancel(
    ray_session: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(mailbox, "SILENCE_SECONDS", SILENCE)
    handle = open_mailbox()
    pulse = Pulse(handle)
    process = psutil.Process(ray.get(handle.__ray_call__.remote(lambda self: os.getpid())))
    try:
        with Post(handle, "k") as post:
            time.sleep(1)
            assert not post.cancelled()
            process.send_signal(signal.SIGSTOP)
            post.emit(Event("k", "while it is frozen"))
            assert until(post.cancelled) > SILENCE / 2
            process.send_signal(signal.SIGCONT)
            until(lambda: not post.cancelled())  # its driver had only been asleep
        assert [event.text for event in ray.get(handle.take.remote())["k"]] == ["while it is frozen"]
    finally:
        process.send_signal(signal.SIGCONT)
        pulse.stop()
        ray.kill(handle)


def test_a_mailbox_that_begins_again_grants_a_dead_driver_no_second_silence() -> None:
    box = Mailbox(0.6)
    assert box.post("k", []) is False
    time.sleep(0.35)
    assert box.post("k", []) is True
    box.hear()
    assert box.post("k", []) is False

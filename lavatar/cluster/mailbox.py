"""How a stage's processes talk with the driver: events one way, "please stop" the other, errors as themselves.

One small Ray actor for all stages of a runner. A process posts its events in batches from a thread of its own and
learns with each post whether the stage was cancelled, so the training itself never waits for a message.

The driver gives a sign of life now and then. Without one its stages stop, with a checkpoint, before its leases run out:
another driver may go on then, and two must not train at once. So they do where the mailbox itself does not answer, for
it may be on the driver's machine.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict, deque
from types import TracebackType
from typing import Any, Self

import ray

from lavatar.contracts import Event
from lavatar.errors import LavatarError

POST_SECONDS = 0.3
MOST_WAITING = 10_000
SILENCE_SECONDS = 40.0
"""How long a driver may say nothing; less than a lease (a test compares the two)."""


class Mailbox:
    """Events, cancels and failures by stage key, and when the driver was last heard. Runs as an actor."""

    def __init__(self, silence: float = SILENCE_SECONDS) -> None:
        self._silence = silence
        self._heard = time.monotonic() - silence / 2  # it may be the second mailbox of a driver that is dead
        self._events: defaultdict[str, deque[Event]] = defaultdict(lambda: deque(maxlen=MOST_WAITING))
        self._cancelled: set[str] = set()
        self._started: set[str] = set()
        self._failures: dict[str, LavatarError] = {}
        self._figures: dict[str, dict[str, Any]] = {}
        self._kills: dict[tuple[str, str], int] = {}
        self._starved: set[str] = set()

    def begin(self, key: str) -> None:
        """A new attempt at the stage: what an earlier one left is forgotten."""
        self._cancelled.discard(key)
        self._started.discard(key)
        self._failures.pop(key, None)
        self._figures.pop(key, None)
        self._starved.discard(key)
        self._kills = {place: kills for place, kills in self._kills.items() if place[0] != key}
        self._events[key].clear()

    def hear(self) -> None:
        """The driver is alive."""
        self._heard = time.monotonic()

    def post(self, key: str, events: list[Event]) -> bool:
        """Takes events in; True if the stage is to stop."""
        self._events[key].extend(events)
        return key in self._cancelled or time.monotonic() - self._heard > self._silence

    def take(self) -> dict[str, list[Event]]:
        """What came in since the last call, by stage."""
        taken = {key: list(events) for key, events in self._events.items() if events}
        for key in taken:
            self._events[key].clear()
        return taken

    def started(self, key: str, heeds: bool) -> bool:
        """A process is at the stage, which `heeds` a cancel from here on or not; True if it is to stop at once."""
        if heeds:
            self._started.add(key)
        return key in self._cancelled

    def cancel(self, key: str) -> bool:
        """Whether there is a process that will hear of it."""
        self._cancelled.add(key)
        return key in self._started

    def fail(self, key: str, error: LavatarError) -> None:
        """The first error counts; what follows it on other workers is its consequence."""
        self._failures.setdefault(key, error)

    def failure(self, key: str) -> LavatarError | None:
        return self._failures.get(key)

    def forgive(self, key: str) -> None:
        """The stage is tried again in another way."""
        self._failures.pop(key, None)

    def killed(self, key: str, node: str, kills: int) -> bool:
        """A training worker begins on a node whose kernel has killed `kills` processes for memory; whether it has
        killed one since the stage's last worker began there."""
        before = self._kills.get((key, node), kills)
        self._kills[key, node] = kills
        return kills > before

    def starve(self, key: str) -> None:
        """Ray has killed a training worker of the stage for want of memory."""
        self._starved.add(key)

    def starved(self, key: str) -> bool:
        """Whether it has since this was last asked."""
        found = key in self._starved
        self._starved.discard(key)
        return found

    def finish(self, key: str, figures: dict[str, Any]) -> None:
        """What the first training worker measured."""
        self._figures[key] = figures

    def figures(self, key: str) -> dict[str, Any] | None:
        """What it measured; None where this mailbox began after it did."""
        return self._figures.get(key)


def open_mailbox() -> Any:
    """A handle on a new mailbox.

    Where memory runs out Ray kills what can begin again first: then it is empty, and whoever calls waits for it.
    """
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Mailbox).remote(SILENCE_SECONDS)


class Pulse:
    """The driver's sign of life, from a thread of its own until `stop`."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox, self._ended = mailbox, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="mailbox-pulse", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(10)

    def _beat(self) -> None:
        while not self._ended.wait(SILENCE_SECONDS / 10):
            with contextlib.suppress(Exception):
                self._mailbox.hear.remote()


class Post:
    """One process's end: an `EventSink`, and `cancelled()`. A context manager; leaving it sends what is left."""

    def __init__(self, mailbox: Any, key: str) -> None:
        self._mailbox, self._key = mailbox, key
        self._waiting: deque[Event] = deque(maxlen=MOST_WAITING)
        self._cancelled = False
        self._looked, self._waited = time.monotonic(), 0.0  # for an answer
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mailbox-post", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(10)

    def emit(self, event: Event) -> None:
        self._waiting.append(event)

    def cancelled(self) -> bool:
        return self._cancelled

    def _run(self) -> None:
        while not self._ended.wait(POST_SECONDS):
            self._send()
        self._send()

    def _send(self) -> None:
        events = []
        with contextlib.suppress(IndexError):
            while True:
                events.append(self._waiting.popleft())
        answer, each = None, SILENCE_SECONDS / 8
        while True:
            try:
                answer = answer or self._mailbox.post.remote(self._key, events)
                self._cancelled, self._waited, self._looked = ray.get(answer, timeout=each), 0.0, time.monotonic()
                return
            except Exception as error:  # no message is worth a training
                now = time.monotonic()
                self._waited += min(now - self._looked, each + POST_SECONDS)  # not while this process itself was frozen
                self._looked = now
                self._cancelled |= self._waited > SILENCE_SECONDS
                if self._ended.is_set() or not isinstance(error, TimeoutError):
                    return

"""Where a runner asks whose turn it is: in its own process, or at the one queue of a cluster that several share."""

from __future__ import annotations

import contextlib
import uuid
from typing import Any

from lavatar.cluster.admission import Queue, Turn
from lavatar.cluster.resources import Demand, ray_machine

NAME, NAMESPACE = "lavatar-queue-1", "lavatar"
"""The number is that of the protocol: drivers of another version have a queue of their own."""

Counts = tuple[tuple[Demand, int], ...]


class LocalQueue:
    """For a Ray that nobody else uses."""

    def __init__(self) -> None:
        self._queue = Queue(ray_machine)

    def ask(self, priority: int, running: Counts, ready: Counts) -> list[int]:
        """How many stages of each entry of `ready` may start."""
        return self._queue.ask(Turn("here", priority, running, ready))

    def leave(self) -> None: ...


class ClusterQueue:
    """For a cluster of several drivers: an actor that lives as long as the cluster, made by whoever comes first."""

    def __init__(self) -> None:
        self._driver = uuid.uuid4().hex
        self._actor: Any = _actor()

    def ask(self, priority: int, running: Counts, ready: Counts) -> list[int]:
        """How many stages of each entry of `ready` may start; none while the queue is not to be reached."""
        import ray

        try:
            turn = Turn(self._driver, priority, running, ready)
            granted: list[int] = ray.get(self._actor.ask.remote(turn), timeout=10)
            return granted
        except ray.exceptions.RayError:  # its node is gone: it starts again on another one
            with contextlib.suppress(ray.exceptions.RayError, ValueError):
                self._actor = _actor()
            return [0 for _ in ready]

    def leave(self) -> None:
        self._actor.leave.remote(self._driver)


def _actor() -> Any:
    import ray

    options = {"name": NAME, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Queue).options(**options).remote(ray_machine)

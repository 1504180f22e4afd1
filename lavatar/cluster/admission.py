"""Whose turn it is: which stages of which jobs may start now, when more are ready than the cluster has room for.

Ray places what is started and is the one that enforces resources; this only keeps the queue, so that a job of 1,600
pairs does not start 1,600 processes, and one of two pairs is not behind it. Drivers say with each call what runs and
what is ready. Nothing else is kept: a queue that was lost fills again with the next calls, and a driver that is gone
drops out.

The order: higher priority first; among equals the job with the least dominant share (Ghodsi et al., Dominant Resource
Fairness, NSDI 2011); then whoever waits longest. What does not fit lets others pass, for PATIENCE_SECONDS: then the
resources that it lacks are kept free for it.

A GPU that becomes free must not wait for a driver to notice, nor for processes to start: of the stages that take one
GPU or less some are started AHEAD of their turn, and wait in Ray for the next GPU. While a stage of more GPUs is ready
none are, for they would take what it waits for.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lavatar.cluster.resources import Demand, Machine

PATIENCE_SECONDS = 60.0
AHEAD = 8
"""One GPU more in so many may be given away, with its part of the cluster's CPUs and memory."""
FORGET_SECONDS = 20.0
"""After so long without a word a driver is gone."""
MACHINE_SECONDS = 1.0
"""How often the cluster is looked at anew."""


@dataclass(frozen=True)
class Turn:
    """What a driver says. `ready` in the order in which it wants to start; both as (demand, how many)."""

    driver: str
    priority: int
    running: tuple[tuple[Demand, int], ...]
    ready: tuple[tuple[Demand, int], ...]


@dataclass
class _Driver:
    """What is known of one."""

    priority: int = 0
    seen: float = 0.0
    held: Demand = field(default_factory=Demand)
    ready: list[tuple[Demand, int]] = field(default_factory=list)
    waits_since: dict[Demand, float] = field(default_factory=dict)

    def say(self, turn: Turn, now: float) -> None:
        self.priority, self.seen, self.ready = turn.priority, now, list(turn.ready)
        self.held = sum((_times(demand, count) for demand, count in turn.running), Demand())
        self.waits_since = {demand: self.waits_since.get(demand, now) for demand, _ in turn.ready}

    def take(self, entry: int, count: int, now: float) -> None:
        """It may start so many of an entry: what is left of them waits from now on."""
        demand, ready = self.ready[entry]
        self.ready[entry] = demand, ready - count
        self.held += _times(demand, count)
        self.waits_since[demand] = now


class Queue:
    """The order of starts on one cluster. `look` says what the cluster has."""

    def __init__(self, look: Callable[[], Machine], clock: Callable[[], float] = time.monotonic) -> None:
        self._look, self._clock = look, clock
        self._drivers: dict[str, _Driver] = {}
        self._machine: tuple[float, Machine] | None = None

    def ask(self, turn: Turn) -> list[int]:
        """How many stages of each entry of `turn.ready` may start now."""
        now = self._clock()
        for name in [name for name, driver in self._drivers.items() if now - driver.seen > FORGET_SECONDS]:
            del self._drivers[name]
        asker = self._drivers.setdefault(turn.driver, _Driver())
        asker.say(turn, now)
        granted = self._deal(now)[turn.driver]
        for entry, count in granted.items():
            asker.take(entry, count, now)
        return [granted[i] for i in range(len(turn.ready))]

    def leave(self, driver: str) -> None:
        """It asks no more."""
        self._drivers.pop(driver, None)

    def _deal(self, now: float) -> dict[str, Counter[int]]:
        """What everybody would get if all asked at this moment: by driver, how many of each entry."""
        total = self._total(now)
        free = total - sum((driver.held for driver in self._drivers.values()), Demand())
        held = {name: driver.held for name, driver in self._drivers.items()}
        ahead = self._ahead(total)
        granted: dict[str, Counter[int]] = {name: Counter() for name in self._drivers}
        open_entries = {name: list(range(len(driver.ready))) for name, driver in self._drivers.items()}
        while names := [name for name, entries in open_entries.items() if entries]:
            name = min(names, key=lambda name: self._rank(name, held[name], total, now))
            driver, entry = self._drivers[name], open_entries[name][0]
            demand, count = driver.ready[entry]
            if granted[name][entry] >= count:
                open_entries[name].pop(0)
            elif demand.within(free) or (demand.gpus and demand.gpus <= 1 and demand.within(free + ahead)):
                granted[name][entry] += 1
                free, held[name] = free - demand, held[name] + demand
            else:
                open_entries[name].pop(0)
                if now - driver.waits_since[demand] > PATIENCE_SECONDS and demand.within(total):
                    free -= demand
        return granted

    def _ahead(self, total: Demand) -> Demand:
        """What may be given beyond `total` to stages of one GPU or less."""
        ready = [demand for driver in self._drivers.values() for demand, _ in driver.ready]
        gpus = total.gpus // AHEAD
        if not gpus or any(demand.gpus > 1 and demand.within(total) for demand in ready):
            return Demand()
        part = gpus / total.gpus
        return Demand(part * total.cpus, gpus, part * total.memory_gb)

    def _rank(self, name: str, held: Demand, total: Demand, now: float) -> tuple[float, float, float]:
        driver = self._drivers[name]
        return -driver.priority, held.share(total), min(driver.waits_since.values(), default=now)

    def _total(self, now: float) -> Demand:
        if self._machine is None or now - self._machine[0] > MACHINE_SECONDS:
            self._machine = (now, self._look())
        return self._machine[1].total


def counted(demands: Sequence[Demand]) -> tuple[tuple[Demand, int], ...]:
    """Runs of equal demands as (demand, how many), in order."""
    found: list[tuple[Demand, int]] = []
    for demand in demands:
        if found and found[-1][0] == demand:
            found[-1] = (demand, found[-1][1] + 1)
        else:
            found.append((demand, 1))
    return tuple(found)


def _times(demand: Demand, count: int) -> Demand:
    return Demand(demand.cpus * count, demand.gpus * count, demand.memory_gb * count)

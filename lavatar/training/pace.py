"""How fast a training goes, and how much of its time it waits for batches; measured from one look to the next."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from lavatar.contracts import TIMING

T = TypeVar("T")

SAMPLES, WAITING = f"{TIMING}samples_per_second", f"{TIMING}data_wait_share"
"""Names of curves."""


class Pace:
    """Two readings of the clock a step. Where a GPU makes batches ahead, what is waited for is what it was late."""

    def __init__(self, samples: int) -> None:
        self._samples = samples  # a step, of all workers
        self.anew()

    def anew(self) -> None:
        """What was before does not count."""
        self._began, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def step(self, make: Callable[[int], T], step: int) -> T:
        """The batch of a step, waited for."""
        began = time.perf_counter()
        batch = make(step)
        self._waited += time.perf_counter() - began
        self._steps += 1
        return batch

    def look(self) -> dict[str, float]:
        """Since the last look, pictures and checkpoints included; nothing without a step since."""
        seconds, steps, waited = time.perf_counter() - self._began, self._steps, self._waited
        self.anew()
        return {SAMPLES: steps * self._samples / seconds, WAITING: waited / seconds} if steps and seconds > 0 else {}

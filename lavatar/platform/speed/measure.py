"""How a row is measured: runs of this code and of the reference in turn, in one process, and what they needed.

Seconds are wall time. A machine that others use moves both sides alike: trust the ratio there, not the seconds.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lavatar.contracts import Event, EventSink
from lavatar.platform.speed.material import Material

PRODUCT = {"cpu": 1024, "cuda": 8192}
"""Side of the matrices whose product gives a machine's peak."""
LEAST, MOST = 3, 15
"""Pairs of runs of a row."""

Run = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One line of the result; None where the row has no such figure.

    `median_s`: seconds a unit (of what `what` says). `ratio`: reference ÷ own, more is better. `spread`: quartile
    range of the own runs ÷ their median. `peak_mb`: most memory while it ran, of the process or of its GPU. `of_peak`:
    operations of the reference ÷ own time ÷ what the machine does in a product of matrices.
    """

    row: str
    what: str
    median_s: float | None = None
    reference_s: float | None = None
    ratio: float | None = None
    spread: float | None = None
    peak_mb: float | None = None
    of_peak: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything but `what`."""
        return {name: value for name, value in vars(self).items() if name != "what"}


@dataclass
class Session:
    """One call of `lavatar bench`: where it computes, at which shapes, how long a row may take, whom it tells."""

    material: Material
    device: torch.device
    full: bool
    seconds: float
    events: EventSink

    @cached_property
    def peak(self) -> float:
        """Operations a second in a product of square matrices, the best of some: fp32, on a GPU bf16."""
        side, kind = PRODUCT[self.device.type], torch.bfloat16 if self.device.type == "cuda" else torch.float32
        a, b = (torch.randn(side, side, device=self.device, dtype=kind) for _ in range(2))
        return 2 * side**3 / min(self.timed(lambda: a @ b) for _ in range(8))

    def timed(self, run: Run) -> float:
        """Seconds of one run, to the end of what it left to a GPU."""
        self._wait()
        began = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - began

    def row(self, row: Row, own: Run, reference: Run | None = None, units: int = 1, work: float | None = None) -> Row:
        """`row` with the figures of these runs, each of so many units; `work`: operations of one run."""
        times = self.alternate(row.row, own, reference)
        return self.filled(row, times, units, work)

    def alternate(self, name: str, own: Run, reference: Run | None, least: int = LEAST) -> Times:
        """Both once unmeasured, then in turn, each as often first, until the row's time is up."""
        self.say(name, "first run, not counted")
        own()
        if reference is not None:
            reference()
        times, began = Times([], [], []), time.perf_counter()
        while len(times.own) < MOST and (len(times.own) < least or time.perf_counter() - began < self.seconds):
            self.say(name, f"pair {len(times.own) + 1}" if reference else f"run {len(times.own) + 1}")
            if reference is not None and len(times.own) % 2:
                times.reference.append(self.timed(reference))
            forget_peak(self.device)
            times.own.append(self.timed(own))
            times.peaks_mb.append(peak_mb(self.device))
            if reference is not None and len(times.own) % 2:
                times.reference.append(self.timed(reference))
        return times

    def filled(self, row: Row, times: Times, units: int, work: float | None = None) -> Row:
        """The figures of the runs."""
        median = float(np.median(times.own))
        reference = float(np.median(times.reference)) if times.reference else None
        low, high = np.percentile(times.own, (25, 75))
        known = [peak for peak in times.peaks_mb if peak is not None]
        return replace(
            row,
            median_s=median / units,
            reference_s=reference / units if reference is not None else None,
            ratio=reference / median if reference is not None else None,
            spread=float(high - low) / median if len(times.own) > 1 else None,
            peak_mb=max(known) if known else None,
            of_peak=work / median / self.peak if work else None,
        )

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def say(self, name: str, text: str) -> None:
        self.events.emit(Event(name, text))


@dataclass(frozen=True)
class Times:
    """Seconds of the own runs and the reference's, peak memory of the own ones."""

    own: list[float]
    reference: list[float]
    peaks_mb: list[float | None]


def operations(run: Run) -> float:
    """Multiplications and additions of the products and convolutions of a run."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def forget_peak(device: torch.device) -> None:
    """The peak of memory is counted from here on, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: torch.device, processes: Sequence[int | str] = ("self",)) -> float | None:
    """Most memory in use since `forget_peak`: allocated on the GPU, else of the processes together, each at its own
    peak; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        texts = [Path(f"/proc/{process}/status").read_text() for process in processes]
        found = [re.search(r"VmHWM:\s+(\d+) kB", text) for text in texts]
    except OSError:
        return None
    return sum(int(each[1]) for each in found if each) * 1024 / 1e6 if all(found) else None

"""How a job shows what it does, on standard error: live lines in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Protocol

from lavatar.contracts import Event
from lavatar.platform.output import printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PLAIN_SECONDS = 10.0
"""Least time between two plain lines of one stage's progress."""


class Display(Protocol):
    """One line a stage: name, state, done/total, rate, time left."""

    def state(self, stage: str, state: str) -> None: ...

    def progress(self, stage: str, event: Event) -> None: ...

    def message(self, text: str, level: str = "info") -> None: ...

    def close(self) -> None: ...


class Meter:
    """Rate and time left, from the last half minute. Work done before it was first looked at does not count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, window: float = 30.0) -> None:
        self._clock, self._window = clock, window
        self._samples: deque[tuple[float, int]] = deque()
        self._what: tuple[int | None, str] = (None, "")
        self.done, self.total, self.unit, self.detail = 0, 0, "", ""

    def update(self, event: Event) -> None:
        if event.done is None:
            return
        now, what = self._clock(), (event.total, event.unit)
        if what != self._what or (self._samples and event.done < self._samples[-1][1]):
            self._samples.clear()
            self._what = what
        self.done, self.total, self.unit = event.done, event.total or 0, event.unit
        self.detail = event.text.split(",")[0]  # rate and time left, which may follow, are measured here
        self._samples.append((now, event.done))
        while len(self._samples) > 2 and now - self._samples[0][0] > self._window:
            self._samples.popleft()

    @property
    def rate(self) -> float | None:
        """Units a second."""
        if len(self._samples) < 2:
            return None
        (t0, d0), (t1, d1) = self._samples[0], self._samples[-1]
        return (d1 - d0) / (t1 - t0) if t1 - t0 > 0.5 and d1 > d0 else None

    @property
    def left(self) -> float | None:
        """Seconds."""
        return (self.total - self.done) / self.rate if self.rate and self.total else None

    def text(self) -> str:
        """'1200/3000 steps, 8.1/s, 3m 42s left, loss 0.031'."""
        count = f"{self.done}/{self.total}" if self.total else f"{self.done}"
        parts = [f"{count} {self.unit}".strip()]
        if self.rate:
            parts.append(f"{self.rate:.3g}/s")
        if self.left is not None and self.done < self.total:
            parts.append(f"{duration(self.left)} left")
        if self.detail:
            parts.append(self.detail)
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """'8s', '3m 42s', '1h 05m'."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


class PlainDisplay:
    """A line where something changed, and every ten seconds where a stage goes on."""

    def __init__(self, stream: IO[str] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream or sys.stderr, clock
        self._meters: dict[str, Meter] = {}
        self._shown: dict[str, float] = {}

    def state(self, stage: str, state: str) -> None:
        self._print(f"{stage}: {state}")
        self._shown[stage] = self._clock()

    def progress(self, stage: str, event: Event) -> None:
        meter = self._meters.setdefault(stage, Meter(self._clock))
        meter.update(event)
        if event.done is not None and self._clock() - self._shown.get(stage, -PLAIN_SECONDS) >= PLAIN_SECONDS:
            self._print(f"{stage}: {meter.text()}")
            self._shown[stage] = self._clock()

    def message(self, text: str, level: str = "info") -> None:
        self._print(f"{level}: {text}" if level != "info" else text)

    def close(self) -> None: ...

    def _print(self, text: str) -> None:
        print(time.strftime("%H:%M:%S"), printable(text), file=self._stream, flush=True)


class QuietDisplay:
    """Nothing but what went wrong."""

    def state(self, stage: str, state: str) -> None: ...

    def progress(self, stage: str, event: Event) -> None: ...

    def message(self, text: str, level: str = "info") -> None:
        if level != "info":
            print(f"{level}: {printable(text)}", file=sys.stderr, flush=True)

    def close(self) -> None: ...


class RichDisplay:
    """One live line a stage; messages scroll above."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress: Progress = Progress(
            TextColumn("{task.description}", markup=False),
            TextColumn("[{task.fields[colour]}]{task.fields[state]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}", markup=False),
            console=Console(stderr=True),
            redirect_stdout=False,
        )
        self._tasks: dict[str, TaskID] = {}
        self._meters: dict[str, Meter] = {}
        self._progress.start()

    def state(self, stage: str, state: str) -> None:
        words = state.split()
        colour = {"finished": "green", "cached": "green", "failed": "red", "running": "cyan"}.get(words[0], "yellow")
        task = self._task(stage)
        self._progress.update(task, state=state, colour=colour)
        if words[0] in ("finished", "cached"):
            self._progress.update(task, total=1, completed=1)

    def progress(self, stage: str, event: Event) -> None:
        if event.done is None:
            return
        meter = self._meters.setdefault(stage, Meter())
        meter.update(event)
        self._progress.update(self._task(stage), total=meter.total or None, completed=meter.done, text=meter.text())

    def message(self, text: str, level: str = "info") -> None:
        style = {"warning": "yellow", "error": "red"}.get(level, "")
        self._progress.console.print(printable(text), style=style or None, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()

    def _task(self, stage: str) -> TaskID:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(
                stage, total=None, state="", colour="white", text="", start=False
            )
        return self._tasks[stage]


class DisplaySink:
    """An `EventSink` for work that this process does itself."""

    def __init__(self, display: Display) -> None:
        self._display = display

    def emit(self, event: Event) -> None:
        if event.done is not None:
            self._display.progress(event.stage, event)
        elif event.text:
            self._display.message(f"{event.stage}: {event.text}", event.level)


def open_display() -> Display:
    """Live lines if standard error is a terminal."""
    return RichDisplay() if sys.stderr.isatty() else PlainDisplay()

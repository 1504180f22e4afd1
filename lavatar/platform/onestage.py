"""One stage, run to its end by a command that is no job: shown, and stopped with the command."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lavatar.contracts import MetricSinkFactory, StageResult, StageSpec
from lavatar.platform.progress import Display, DisplaySink

if TYPE_CHECKING:
    from lavatar.cluster.stages import StageRunner

POLL_SECONDS = 0.2


def run_stage(runner: StageRunner, display: Display, spec: StageSpec, factory: MetricSinkFactory | None) -> StageResult:
    """Its result. A stage whose result is there is not run."""
    display.state(spec.name, "running")
    sink, handle = DisplaySink(display), runner.start(spec, factory)
    try:
        while True:
            over = handle.done()
            for event in handle.poll():
                sink.emit(event)
            if over:
                break
            time.sleep(POLL_SECONDS)
    except BaseException:
        handle.cancel()
        while not handle.done():
            time.sleep(POLL_SECONDS)
        raise
    result = handle.result()
    display.state(spec.name, "finished")
    return result

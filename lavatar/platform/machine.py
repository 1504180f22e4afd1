"""The machine that this process runs on, and what it does at this moment."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import psutil

from lavatar.contracts import SYSTEM
from lavatar.platform.gpus import Gpus

SAMPLE_SECONDS = 10.0
"""Time between two samples: what a machine does changes slowly, and a day of them is 9,000 values a curve."""
FIRST_SECONDS = 2.0
"""A stage of seconds has a sample too."""
MACHINE_TAG = "lavatar.machine."
"""Beginning of a run's tags that say where it was worked on last."""
MEGABYTE = 1e6


def describe() -> dict[str, str]:
    """What the figures of a run may depend on, for people."""
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}",
        "memory": f"{psutil.virtual_memory().total / 1e9:.1f} GB",
        "gpus": Gpus().describe(),
    }


def machine_tags(node: str = "") -> dict[str, str]:
    """This machine, as tags of a run; `node`: what it is called beside the first one of that run."""
    beginning = f"{MACHINE_TAG}{node}." if node else MACHINE_TAG
    return {f"{beginning}{name}": value for name, value in describe().items()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


class SystemMetrics:
    """Samples of processor, memory and GPUs, now and then. Made in one thread, used in another, which begins it.

    Names and units are those of MLflow's page. Its SystemMetricsMonitor is not used: that is a thread of its own which
    asks the server for the run at every sample, ends for good when the server does not answer once, numbers its samples
    anew in another process, and sees GPUs with one more package only. The metric sink's thread samples instead. It ends
    with the sink, and what it samples while the server is away is kept as every other value is.

    `node`: what this machine is called in a run that is worked on by several at once: its curves are system/NODE/… as
    with MLflow's set_system_metrics_node_id. `beside`: another one is the first of them.
    """

    def __init__(self, node: str = "", *, beside: bool = False) -> None:
        self._beginning = f"{SYSTEM}{node}/" if node else SYSTEM
        self._tagged = node if beside else ""
        self._due = float("inf")
        self._gpus: Gpus | None = None

    def begin(self) -> None:
        """From here on the processor's load is measured; psutil keeps that for each thread."""
        self._due = time.monotonic() + FIRST_SECONDS
        self._gpus = Gpus()
        psutil.cpu_percent()

    def sample(self) -> dict[str, float]:
        """By name; nothing where it is not time yet."""
        if self._gpus is None or time.monotonic() < self._due:
            return {}
        self._due = time.monotonic() + SAMPLE_SECONDS
        memory = psutil.virtual_memory()
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "process_memory_megabytes": psutil.Process().memory_info().rss / MEGABYTE,
            **self._gpus.sample(),
        }
        return {f"{self._beginning}{name}": value for name, value in found.items()}

    def tags(self) -> dict[str, str]:
        """Of the run: what this machine is."""
        return machine_tags(self._tagged)

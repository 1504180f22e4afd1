"""Several jobs on one cluster: parts of a GPU are shared, a small job is not behind a large one, priority first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from submit_files import Lavatar

QUARTERS = 4  # of the one GPU: so many pairs hold it at once


@dataclass(frozen=True)
class Span:
    """Of a pair: when all that it needs was there, its driver started it, it began to hold its part of the GPU, and
    ended. Unix seconds."""

    ready: float
    started: float
    began: float
    ended: float


Spans = dict[str, Span]


@pytest.fixture
def lavatar(tmp_path: Path) -> Iterator[Lavatar]:
    """A home whose cluster is up: a GPU, pretended, and CPUs enough."""
    found = Lavatar(tmp_path / "home")
    code, out = found("cluster", "up", "--cpus", "4", "--gpus", "1", "--json")
    assert code == 0, out
    try:
        yield found
    finally:
        found("cluster", "down")


def start(lavatar: Lavatar, avatars: str, actors: str, priority: int = 0) -> subprocess.Popen[str]:
    """A driver of a job of sleeping stages."""
    script = Path(__file__).with_name("run_sleepers.py")
    command = [sys.executable, str(script), str(lavatar.home), avatars, actors, str(priority)]
    environment = {**os.environ, "LAVATAR_HOME": str(lavatar.home)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def spans(driver: subprocess.Popen[str]) -> Spans:
    """Of each pair of a driver's job."""
    out, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0
    return {name: Span(**times) for name, times in json.loads(out.splitlines()[-1]).items()}


def at_once(found: Spans) -> int:
    """The most that were at work at the same time."""
    return max(sum(one.began <= span.began < one.ended for one in found.values()) for span in found.values())


def passed_by(span: Span, others: Spans) -> int:
    """How many of `others` were started while a pair could have been."""
    return sum(span.ready < other.started < span.started for other in others.values())


def until_a_pair_ran(lavatar: Lavatar) -> None:
    deadline = time.monotonic() + 300
    while not any(lavatar.home.glob("outputs/*/metrics.json")):
        assert time.monotonic() < deadline, "no preview was made"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_jobs_share_a_cluster(lavatar: Lavatar) -> None:
    large = start(lavatar, "abcd", "efghijklmn")
    until_a_pair_ran(lavatar)
    small, urgent = start(lavatar, "o", "p"), start(lavatar, "qr", "stuv", priority=1)
    of_small, of_urgent, of_large = spans(small), spans(urgent), spans(large)
    assert (len(of_large), len(of_small), len(of_urgent)) == (40, 1, 8)

    assert at_once({**of_large, **of_small, **of_urgent}) == QUARTERS
    for name, span in {**of_small, **of_urgent}.items():
        # a job that holds less, or has a higher priority, is next: only what was the large one's turn before it asked,
        # a GPU's worth of it at most, may still be started
        assert passed_by(span, of_large) <= QUARTERS, name
    assert at_once(of_urgent) >= 3, "more than its fair share, which is half"

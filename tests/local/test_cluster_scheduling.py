"""Several jobs on one cluster: parts of a GPU are shared, a small job is not behind a large one, priority first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from submit_files import Lavatar

Spans = dict[str, tuple[float, float]]


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
    """When each pair of a driver's job held its part of the GPU."""
    out, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0
    found: Spans = {name: (began, ended) for name, (began, ended) in json.loads(out.splitlines()[-1]).items()}
    return found


def at_once(found: Spans) -> int:
    """The most that were at work at the same time."""
    return max(sum(began <= moment < ended for began, ended in found.values()) for moment, _ in found.values())


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

    assert at_once({**of_large, **of_small, **of_urgent}) == 4, "four quarters of a GPU"
    begins = sorted(began for began, _ in of_large.values())
    ((of_o, _),) = of_small.values()
    assert of_o < begins[-4], "not behind the large job"
    assert at_once(of_urgent) >= 3, "more than its fair share, which is half"

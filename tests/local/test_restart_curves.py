"""What MLflow has of a training whose worker was killed: every curve on one axis, and the machine's after it too.

Nothing is replaced: Ray Train, DeepSpeed, MLflow, SQLite, a synthetic subject, toy sizes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fault_files import new_home, small_job, until
from submit_files import Lavatar, training_worker

from lavatar.contracts import SYSTEM
from lavatar.platform.home import Home
from lavatar.platform.tracking import connect
from lavatar.training.pace import SAMPLES, WAITING

STEPS, LOGGED = 600, 5
BUSY = f"{SYSTEM}cpu_utilization_percentage"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a whole job, and a worker that is started twice


@pytest.fixture
def lavatar(tmp_path: Path) -> Iterator[Lavatar]:
    tool = new_home(tmp_path)
    yield tool
    tool.kill_what_runs()


def test_every_curve_goes_on_after_a_killed_worker(lavatar: Lavatar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    lengths = {"avatar_training__steps": STEPS, "avatar_training__log_every": LOGGED}
    process = lavatar.start(*small_job(lavatar, **lengths))
    lavatar.wait_for(process, "avatar:ann", 20)
    run_id = lavatar.stage("avatar:ann").mlflow_run_id  # type: ignore[union-attr]
    client = connect(Home(lavatar.home))

    def history(name: str) -> list[Any]:
        return list(client.get_metric_history(run_id, name))

    until(lambda: history(BUSY) and len(history("avatar/total")) > 2, lavatar)
    worker = training_worker(process.pid)
    assert (lavatar.stage("avatar:ann").done or 0) < STEPS - 100, "it must not be done before it is killed"  # type: ignore[union-attr]
    worker.kill()
    killed = time.time() * 1000
    process.communicate(timeout=600)
    assert process.returncode == 0, lavatar.errors()
    row = lavatar.stage("avatar:ann")
    assert row is not None
    assert (row.mlflow_run_id, row.attempts) == (run_id, 1), "Ray Train started another worker by itself"
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    curves = {name: history(name) for name in run.data.metrics}
    for name, points in curves.items():
        steps = [point.step for point in sorted(points, key=lambda point: (point.timestamp, point.step))]
        assert steps == sorted(set(steps)), f"{name} goes back, or has a step twice"
    losses, wanted = {point.step for point in curves["avatar/total"]}, {1, *range(LOGGED, STEPS + 1, LOGGED)}
    assert wanted <= losses, f"steps {sorted(wanted - losses)[:9]} … were lost"
    assert len(losses - wanted) <= 1, "besides, where the second worker began"
    trained = {name for name, points in curves.items() if len(points) > 10 and not name.startswith(SYSTEM)}
    for kind in ("avatar/total", "rate/", SAMPLES, WAITING):
        assert any(kind in name for name in trained), f"no curve of {kind} in {sorted(trained)}"
    machine = {name for name in curves if name.startswith(SYSTEM)}
    assert {BUSY, f"{SYSTEM}system_memory_usage_percentage", f"{SYSTEM}process_memory_megabytes"} <= machine
    for name in trained | machine:
        stamps = [point.timestamp for point in curves[name]]
        assert min(stamps) < killed < max(stamps), f"{name} has nothing of one of the two workers"
    for name in machine:
        for point in curves[name]:
            assert abs(point.step - (point.timestamp - run.info.start_time) / 1000) <= 1, "its axis is seconds"

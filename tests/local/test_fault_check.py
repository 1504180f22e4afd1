"""The check that follows every fault sees what a fault could leave."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fault_files import (
    INTERVAL,
    STEPS,
    Moment,
    Near,
    Story,
    little_repeated,
    nothing_left,
    same_as_undisturbed,
    same_curves,
    story,
)
from submit_files import Lavatar

from lavatar.cluster.memory import PARTS
from lavatar.platform import ledger, lookup
from lavatar.platform.home import Home
from lavatar.platform.leases import Owner
from lavatar.platform.registry import open_registry
from lavatar.platform.tables import Job
from lavatar.platform.tracking import connect

pytestmark = pytest.mark.slow  # a whole job


@pytest.fixture
def lavatar(tmp_path: Path, undisturbed_home: Lavatar) -> Lavatar:
    shutil.copytree(undisturbed_home.home, tmp_path / "home")
    return Lavatar(tmp_path / "home", undisturbed_home.environment)


def temporary_file(home: Home) -> None:
    (home.root / "outputs" / ".x.12.part").mkdir()


def another_picture(home: Home) -> None:
    (next(home.root.glob("outputs/*/still.png"))).write_bytes(b"x")


def one_file_more(home: Home) -> None:
    (next(home.root.glob("shards/*/00000.tar"))).with_name("9.tar").touch()


def unfinished_checkpoint(home: Home) -> None:
    (next(home.root.glob("checkpoints/*/avatar/*/COMPLETE.json"))).unlink()


def _avatar_run(home: Home) -> str:
    registry = open_registry(home)
    (job,) = lookup.list_jobs(registry)
    (run,) = (v.stage.mlflow_run_id for v in lookup.job_stages(registry, job.id) if v.name == "avatar:ann")
    assert run is not None
    return run


def a_step_twice(home: Home) -> None:
    connect(home).log_metric(_avatar_run(home), "avatar/total", 0.5, step=INTERVAL)


def a_run_without_an_end(home: Home) -> None:
    connect(home).update_run(_avatar_run(home), status="RUNNING")


def a_run_too_many(home: Home) -> None:
    client = connect(home)
    client.set_terminated(client.create_run(client.get_run(_avatar_run(home)).info.experiment_id).info.run_id)


def a_job_without_an_end(home: Home) -> None:
    registry = open_registry(home)
    (job,) = lookup.list_jobs(registry)
    ledger.claim_job(registry, job.id, Owner.current())


def a_run_to_be_ended(home: Home) -> None:
    with open_registry(home).write() as session:
        session.execute(ledger.update(Job).values(mlflow_open=True))


FAULTS = (
    temporary_file, another_picture, one_file_more, unfinished_checkpoint, a_step_twice, a_run_without_an_end,
    a_run_too_many, a_job_without_an_end, a_run_to_be_ended,
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_fault_could_leave_is_seen(lavatar: Lavatar, undisturbed: Story, fault: Callable[[Home], None]) -> None:
    assert story(lavatar) == undisturbed
    fault(Home(lavatar.home))
    with pytest.raises(AssertionError):
        same_as_undisturbed(lavatar, undisturbed)


def test_what_was_not_taken_up_or_runs_on_is_seen(lavatar: Lavatar, undisturbed: Story) -> None:
    same_as_undisturbed(lavatar, undisturbed)
    with pytest.raises(AssertionError, match="nothing was taken up"):
        same_as_undisturbed(lavatar, undisturbed, Moment(STEPS, time.time()))
    orphan = subprocess.Popen(["sleep", "60"], env={**os.environ, "LAVATAR_HOME": str(lavatar.home)})
    try:
        with pytest.raises(AssertionError, match="sleep"):
            nothing_left(lavatar.home, seconds=1)
    finally:
        orphan.kill()
        orphan.wait()


@pytest.mark.parametrize(
    ("resumed", "reached", "newest", "seen"),
    [
        (60, 65, 60, None),
        (60, 70, 60, None),
        (50, 65, 60, "taken up at step 50: the checkpoint of step 60 was whole"),
        (60, 75, 60, "steps 60 to 75 were repeated"),
        (0, 15, 0, "steps 0 to 15 were repeated"),
        (0, 5, 10, "taken up at step 0"),
    ],
)
def test_more_than_an_interval_that_was_trained_again_is_seen(
    lavatar: Lavatar, resumed: int, reached: int, newest: int, seen: str | None
) -> None:
    """A training that broke when it had logged step `reached`, with the checkpoint of `newest`, and goes on from
    `resumed`."""
    home = Home(lavatar.home)
    points = {p.step: p.timestamp / 1000 for p in connect(home).get_metric_history(_avatar_run(home), "avatar/total")}
    assert points[reached] < points[reached + 5]
    registry = open_registry(home)
    (job,) = lookup.list_jobs(registry)
    ledger.record(registry, job.id, f"resumed at step {resumed} from step-{resumed:08d}", stage="avatar:ann")
    registry.close()
    with pytest.raises(AssertionError, match=seen) if seen else contextlib.nullcontext():
        little_repeated(lavatar, Moment(newest, points[reached]))


def test_what_is_only_near_is_told_from_what_is_not() -> None:
    near = Near(("a/", "p/x/"), {"a/": 20, "p/x": 0}, relative=0.01, absolute=0.001)
    curve = {10: 1.0, 20: 0.5, 30: 0.25}
    same_curves("a", {"x": {**curve, 30: 0.2501}, f"{PARTS}.a.after": {0: 1.0}}, {"x": curve}, near)
    for wrong in ({**curve, 20: 0.50001}, {**curve, 30: 0.26}, {10: 1.0, 20: 0.5}):
        with pytest.raises(AssertionError):
            same_curves("a", {"x": wrong}, {"x": curve}, near)
    for stage, more in (("a", "y"), ("b", f"{PARTS}.a.after")):
        with pytest.raises(AssertionError):
            same_curves(stage, {"x": curve, more: curve}, {"x": curve}, near)
    with pytest.raises(AssertionError):
        same_curves("p", {"y": {**curve, 30: 0.2501}}, {"y": curve}, near)
    same_curves("p", {"x": {**curve, 20: 0.5001}}, {"x": curve}, near)
    figures = {"n": 3, "psnr": 20.0, "of": [0.5, None], "name": "x"}
    assert near.stages == {"a", "p"}
    assert near.same({**figures, "psnr": 20.1, "of": [0.5009, None], PARTS: {}}, figures)
    for wrong in ({"psnr": 20.3}, {"n": 4}, {"of": [0.5]}, {"of": [0.5, 0.1]}, {"name": "y"}, {"more": 1}):
        assert not near.same({**figures, **wrong}, figures)

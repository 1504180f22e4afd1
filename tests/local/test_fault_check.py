"""The check that follows every fault sees what a fault could leave."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import sessions
from fault_files import (
    INTERVAL,
    STEPS,
    Moment,
    Near,
    Story,
    little_repeated,
    nothing_left,
    processes_of,
    same_as_undisturbed,
    same_curves,
    story,
    until,
)
from sessions import living
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


UNNAMED = """
import ctypes, os, subprocess, sys, time
if os.fork():
    sys.exit()
fields = open("/proc/self/stat").read().rpartition(")")[2].split()
start, end = int(fields[47]), int(fields[48])  # where the environment lies, over which Ray writes titles
ctypes.memset(start, 0, end - start)
time.sleep(60)
"""


def test_a_process_that_wrote_over_its_environment_is_seen_where_it_is_the_home_s(tmp_path: Path) -> None:
    """By its session; a process of another session is another's, whatever its number was before."""
    mine, other = (Lavatar(tmp_path / name / "home", script=("-c", UNNAMED)) for name in ("mine", "other"))
    ends = []
    try:
        for lavatar in (mine, other):
            lavatar.home.mkdir(parents=True)
            command = lavatar.start()
            ends.append(command.pid)
            assert command.wait(60) == 0, "what it left goes on in its session"
        until(lambda: [len(_overwritten(number)) for number in ends] == [1, 1], mine, 60)
        (left,), (others,) = map(_overwritten, ends)
        assert [process.pid for process in processes_of(mine.home)] == [left.pid]
        assert [process.pid for process in processes_of(other.home)] == [others.pid]
        with pytest.raises(AssertionError, match="-c"):
            nothing_left(mine.home, seconds=1)
        left.kill()
        until(lambda: not left.is_running() or left.status() == psutil.STATUS_ZOMBIE, mine, 60)
        nothing_left(mine.home, seconds=1)
    finally:
        for process in (found for number in ends for found in _overwritten(number)):
            process.kill()


def _overwritten(session: int) -> list[psutil.Process]:
    """What runs in a session and has no environment any more."""
    return [one.process for one in living() if one.session == session and not any(one.environment.values())]


def test_a_session_that_is_another_s_is_nobody_s(tmp_path: Path) -> None:
    """One in which something names another home, one whose number was given anew, and that of this process."""
    for named in ({"LAVATAR_HOME": "/elsewhere"}, {}):
        found = subprocess.Popen(["sleep", "60"], env=named, start_new_session=True)
        try:
            until(lambda number=found.pid: any(one.session == number for one in living()), Lavatar(tmp_path), 60)
            if named:
                sessions.began(tmp_path, found.pid)
            else:
                sessions._begun[tmp_path][found.pid] = 1  # it was that of a process that began with the machine
            assert processes_of(tmp_path) == []
        finally:
            found.kill()
            found.wait()
    sessions.began(tmp_path, os.getsid(0))
    assert processes_of(tmp_path) == []


HOUR = 3600.0


@pytest.mark.parametrize(
    ("stage", "training", "resumed", "reached", "newest", "ahead", "seen"),
    [
        ("avatar:ann", "avatar", 60, 65, 60, 0.0, None),
        ("avatar:ann", "avatar", 60, 70, 60, 0.0, None),
        ("avatar:ann", "avatar", 50, 65, 60, 0.0, "taken up at step 50: the checkpoint of step 60 was whole"),
        ("avatar:ann", "avatar", 60, 75, 60, 0.0, "steps 60 to 75 were repeated"),
        ("avatar:ann", "avatar", 0, 15, 0, 0.0, "steps 0 to 15 were repeated"),
        ("avatar:ann", "avatar", 0, 5, 10, 0.0, "taken up at step 0"),
        ("avatar:ann", "avatar", 60, 70, 60, HOUR, None),
        ("avatar:ann", "avatar", 60, 75, 60, HOUR, "steps 60 to 75 were repeated"),
        ("avatar:ann", "avatar", 60, 65, 60, -HOUR, "had a checkpoint of step 60 and had logged 0 steps"),
        ("pair:ann<-bob", "ynet", 6, 12, 6, 0.0, None),
        ("pair:ann<-bob", "ynet", 0, 8, 0, 0.0, "ynet: steps 0 to 8 were repeated"),
        ("pair:ann<-bob", "ynet", 0, 8, 6, 0.0, "ynet: taken up at step 0: the checkpoint of step 6 was whole"),
        ("pair:ann<-bob", "mapping", 0, 6, 0, 0.0, None),
        ("pair:ann<-bob", "mapping", 0, 10, 0, 0.0, "mapping: steps 0 to 10 were repeated"),
    ],
)
def test_more_than_an_interval_that_was_trained_again_is_seen(
    lavatar: Lavatar, stage: str, training: str, resumed: int, reached: int, newest: int, ahead: float, seen: str | None
) -> None:
    """A training that broke when it had logged step `reached`, with the checkpoint of `newest`, and goes on from
    `resumed`. Where its clock was ahead, what took it up has the right one; where it is thought to have been late, the
    comparison has nothing to compare, and says so."""
    home, row = Home(lavatar.home), lavatar.stage(stage)
    assert row is not None
    run, curve = str(row.mlflow_run_id), f"{training}/total"
    points = {p.step: p.timestamp / 1000 for p in connect(home).get_metric_history(run, curve)}
    assert points[reached] < min((time for step, time in points.items() if step > reached), default=math.inf)
    if ahead > 0:
        _stamp_earlier(home, run, reached, ahead)
    registry = open_registry(home)
    (job,) = lookup.list_jobs(registry)
    ledger.record(registry, job.id, f"{training}: resumed at step {resumed} from step-{resumed:08d}", stage=stage)
    registry.close()
    moment = Moment(newest, points[reached] - max(ahead, 0.0), {f"{row.key}/{training}": newest})
    with pytest.raises(AssertionError, match=seen) if seen else contextlib.nullcontext():
        little_repeated(lavatar, moment, ahead)


def _stamp_earlier(home: Home, run: str, since: int, seconds: float) -> None:
    """All that MLflow has of a run's steps after `since`, by a clock that is so much later."""
    with contextlib.closing(sqlite3.connect(home.root / "mlflow.db")) as database:
        stamps = "UPDATE metrics SET timestamp = timestamp - ? WHERE run_uuid = ? AND step > ?"
        assert database.execute(stamps, (int(seconds * 1000), run, since)).rowcount > 0
        database.commit()


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
    read, others = {"expression": {"jaw": {"r": 0.5}}}, ({"r": 0.53}, {"r": float("nan")}, {})
    assert near.same({"expression": {"jaw": {"r": 0.515}}}, read)
    assert not [jaw for jaw in others if near.same({"expression": {"jaw": jaw}}, read)]

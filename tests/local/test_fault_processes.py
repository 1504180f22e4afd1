"""A process of a running job is killed: what trains, what coordinates a stage, what drives the job."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fault_files import (
    Story,
    at_checkpoint,
    broken,
    new_home,
    nothing_left,
    process_of,
    same_as_undisturbed,
    small_job,
    small_job_of,
    until,
)
from submit_files import LIMIT, Lavatar, descendants

pytestmark = pytest.mark.slow  # a whole job each


@pytest.fixture
def lavatar(tmp_path: Path) -> Iterator[Lavatar]:
    tool = new_home(tmp_path)
    yield tool
    tool.kill_what_runs()


@pytest.mark.parametrize("victim", ["training worker", "coordinator"])
def test_a_killed_process_of_a_stage_is_replaced(lavatar: Lavatar, undisturbed: Story, victim: str) -> None:
    driver = lavatar.start(*small_job(lavatar))
    at_checkpoint(lavatar, 3)
    killed = process_of(lavatar, "avatar:ann", "training worker" if victim == "training worker" else "avatar:ann")
    assert killed in [process.pid for process in descendants(driver.pid)]
    os.kill(killed, signal.SIGKILL)
    moment = broken(lavatar)
    out, _ = driver.communicate(timeout=LIMIT)
    assert driver.returncode == 0, lavatar.errors()
    assert json.loads(out)["state"] == "finished"
    row = lavatar.stage("avatar:ann")
    assert row is not None
    assert row.attempts == 1, "the same submit went on"
    same_as_undisturbed(lavatar, undisturbed, moment)


def test_a_killed_driver_takes_all_with_it_and_resume_goes_on(lavatar: Lavatar, undisturbed: Story) -> None:
    driver = lavatar.start(*small_job(lavatar))
    at_checkpoint(lavatar, 3)
    family = descendants(driver.pid)
    driver.kill()
    driver.communicate()
    _, alive = psutil.wait_procs(family, timeout=120)  # Ray's agents look for their parent once in a while
    assert alive == []
    moment = broken(lavatar)
    (job,) = json.loads(lavatar("jobs", "list", "--json")[1])["jobs"]
    assert job["state"] == "interrupted"
    code, _ = lavatar("jobs", "resume", job["id"], "--json")
    assert code == 0, lavatar.errors()
    nothing_left(lavatar.home)
    same_as_undisturbed(lavatar, undisturbed, moment)


def test_a_pair_that_fails_leaves_the_others_finished(tmp_path: Path, undisturbed: Story) -> None:
    """Of a file of pairs: its training worker is killed, and no restart is allowed; a retry makes what is missing."""
    lavatar = new_home(tmp_path, "ann", "bob", "cyd")
    driver = lavatar.start(*small_job_of(lavatar, ("ann", "bob"), ("ann", "cyd"), resources__max_failures=0))
    try:
        until(lambda: process_of(lavatar, "pair:ann<-bob", "training worker"), lavatar)
        os.kill(process_of(lavatar, "pair:ann<-bob", "training worker") or 0, signal.SIGKILL)
        out, _ = driver.communicate(timeout=LIMIT)
    finally:
        lavatar.kill_what_runs()
    assert driver.returncode == 1
    report = json.loads(out)
    assert report["error"]["message"].startswith("1 of 2 pairs failed: pair:ann<-bob failed: ")
    states = {stage["name"]: stage["state"] for stage in report["stages"]}
    assert (states.pop("pair:ann<-bob"), states.pop("preview:ann<-bob")) == ("failed", "pending")
    assert set(states.values()) == {"finished"}
    nothing_left(lavatar.home)
    assert lavatar("jobs", "retry", report["job"])[0] == 0, lavatar.errors()
    same_as_undisturbed(lavatar, undisturbed)

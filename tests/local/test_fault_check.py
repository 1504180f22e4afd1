"""The check that follows every fault sees what a fault could leave."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fault_files import INTERVAL, STEPS, Moment, Story, nothing_left, same_as_undisturbed, story
from submit_files import Lavatar

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

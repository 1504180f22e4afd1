"""What a running job leans on goes away: its registry's PostgreSQL, MLflow, room on the disk."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from fault_files import INTERVAL, STEPS, Story, at_checkpoint, broken, new_home, same_as_undisturbed, small_job, until
from mlflow_files import MlflowServer
from postgres_files import Server
from submit_files import LIMIT, Lavatar

from lavatar.platform import lookup
from lavatar.platform.home import Home
from lavatar.platform.registry import open_registry
from lavatar.platform.tracking import connect
from lavatar.training.checkpoint import latest

pytestmark = pytest.mark.slow  # a whole job each
AWAY_SECONDS = 60.0


def finished(lavatar: Lavatar, driver: subprocess.Popen[str]) -> None:
    """The job came to its end in the process that began it, and nothing in it was begun twice."""
    out, _ = driver.communicate(timeout=LIMIT)
    assert driver.returncode == 0, lavatar.errors()
    assert json.loads(out)["state"] == "finished"
    registry = open_registry(Home(lavatar.home))
    (job,) = lookup.list_jobs(registry)
    assert {view.stage.attempts for view in lookup.job_stages(registry, job.id)} == {1}
    assert not [event for event in lookup.events(registry, job.id) if "resumed at" in event.text]
    registry.close()


def test_postgresql_is_restarted_in_the_middle(
    tmp_path: Path, undisturbed: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crashed and away for some seconds in the avatar's training, restarted in order again and again in the pair's."""
    with Server.at(tmp_path / "postgres") as server:
        lavatar = new_home(tmp_path, LAVATAR_REGISTRY=server.uri)
        monkeypatch.setenv("LAVATAR_REGISTRY", server.uri)
        try:
            driver = lavatar.start(*small_job(lavatar))
            at_checkpoint(lavatar, 3)
            server.stop("immediate")
            time.sleep(8)
            assert driver.poll() is None
            server.start()
            until(lambda: list(lavatar.home.glob("checkpoints/*/ynet/step-*")), lavatar)
            for _ in range(3):
                server.stop("fast")
                server.start()
            finished(lavatar, driver)
            same_as_undisturbed(lavatar, undisturbed)
        finally:
            lavatar.kill_what_runs()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowServer]:
    own = MlflowServer(Home(tmp_path / "server"))
    own.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", own.uri)
    yield own
    own.stop()


def test_mlflow_is_away_for_a_minute(tmp_path: Path, undisturbed: Story, server: MlflowServer) -> None:
    """The avatar's training goes on to its end meanwhile."""
    lavatar = new_home(tmp_path, MLFLOW_TRACKING_URI=server.uri)
    try:
        driver = lavatar.start(*small_job(lavatar))
        moment = at_checkpoint(lavatar, 3)
        server.kill()
        until(lambda: list(lavatar.home.glob(f"checkpoints/*/avatar/step-{STEPS:08d}/COMPLETE.json")), lavatar)
        assert time.time() - moment.time < 60, "the training waited"
        time.sleep(max(0.0, moment.time + AWAY_SECONDS - time.time()))
        assert driver.poll() is None
        server.start()
        finished(lavatar, driver)
        same_as_undisturbed(lavatar, undisturbed)
        assert not list(lavatar.home.glob("logs/*unsent*"))
    finally:
        lavatar.kill_what_runs()


@pytest.fixture
def lavatar(tmp_path: Path) -> Iterator[Lavatar]:
    tool = new_home(tmp_path)
    yield tool
    tool.kill_what_runs()


@pytest.fixture
def small_disk(lavatar: Lavatar) -> Iterator[Path]:
    """The folder of checkpoints, on a file system of 32 MB."""
    folder = lavatar.home / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs the right to mount; test_training_checkpoint.py covers the writer")
    yield folder
    lavatar.kill_what_runs()
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    """Until the file system has no room for another page."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)


def test_the_disk_is_full_while_a_checkpoint_is_written(lavatar: Lavatar, undisturbed: Story, small_disk: Path) -> None:
    driver = lavatar.start(*small_job(lavatar))
    at_checkpoint(lavatar, 3)
    filler = small_disk / "filler"
    fill(filler)
    out, _ = driver.communicate(timeout=LIMIT)
    moment = broken(lavatar)
    assert (driver.returncode, json.loads(out)["state"]) == (1, "failed")
    assert "No space left on device" in lavatar.errors()
    assert "Free some space" in lavatar.errors()
    row = lavatar.stage("avatar:ann")
    assert row is not None
    assert (row.state, row.owner, row.mlflow_open) == ("failed", None, False)
    assert connect(Home(lavatar.home)).get_run(row.mlflow_run_id).info.status == "FAILED"
    (training,) = small_disk.glob("*/avatar")
    kept, damaged = latest(training)
    assert kept is not None
    assert int(kept.name.removeprefix("step-")) == moment.step >= 3 * INTERVAL
    assert damaged == []
    assert {path.name for path in training.iterdir()} == {path.parent.name for path in training.glob("*/COMPLETE.json")}

    filler.unlink()
    code, _ = lavatar("jobs", "resume", row.job_id or "", "--json")
    assert code == 0, lavatar.errors()
    same_as_undisturbed(lavatar, undisturbed, moment)

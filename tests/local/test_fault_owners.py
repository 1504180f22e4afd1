"""Who owns a job and its stages: two submits at once, owners that freeze, machines whose clocks differ."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import elsewhere
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fault_files import (
    INLINE,
    Story,
    at_checkpoint,
    broken,
    new_home,
    process_of,
    same_as_undisturbed,
    small_job,
    until,
)
from platform_fakes import (
    FORK,
    FakeHandle,
    FakeRunner,
    finish,
    make_plan_of,
    no_models,
    office,
    use_plain_digest,
)
from postgres_files import Server
from submit_files import LIMIT, Lavatar, stopped
from test_platform_registry import add_stage

from lavatar.cluster import mailbox
from lavatar.contracts import StageResult
from lavatar.errors import StageBusyError
from lavatar.platform import jobs, ledger, lookup, tracking
from lavatar.platform.home import Home
from lavatar.platform.leases import LEASE_SECONDS, Owner, heartbeat
from lavatar.platform.provenance import Provenance
from lavatar.platform.registry import open_registry
from lavatar.platform.tables import Job, Stage
from lavatar.platform.tracking import HOME_TAG, PARENT_TAG, connect

TIMES = 20
HOUR = 3600.0
SCRIPT = str(Path(__file__).parent / "elsewhere.py")
LEASE = 4.0  # seconds, for the tests that wait until one has run out


@pytest.fixture
def lavatar(tmp_path: Path) -> Iterator[Lavatar]:
    tool = new_home(tmp_path)
    yield tool
    tool.kill_what_runs()


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[str]:
    with Server.at(tmp_path / "pg") as server:
        yield server.uri


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The registry of this process and of those it starts."""
    if request.param == "postgresql":
        monkeypatch.setenv("LAVATAR_REGISTRY", request.getfixturevalue("postgres"))
    return str(request.param)


def _submit_again_and_again(
    root: Path, host: str, origin: Provenance, pairs: list[str], barrier: Any, results: Any
) -> None:
    """A driver on a machine of its own, with stages that leave a mark each: `pairs` are jobs, submitted when the other
    process does so too. MLflow is the real one; that all come from `origin` saves reading the packages each time."""
    elsewhere.move(host, HOUR if host == "far" else 0.0, LEASE_SECONDS)
    with pytest.MonkeyPatch.context() as patch:
        use_plain_digest(patch)
        patch.setattr(tracking, "gather", lambda recipe: origin)
        no_models(patch)
        patch.setattr("lavatar.platform.execution.BUSY_POLL_SECONDS", 0.05)
        home = Home(root)
        registry, told = open_registry(home), []
        for chosen in pairs:
            plan = make_plan_of(home, chosen)
            barrier.wait(120)
            try:
                jobs.run_job(office(home, registry, FakeRunner(dict.fromkeys(_KINDS, _once))), plan)
                told.append("done")
            except StageBusyError as error:
                told.append(error.message)
            barrier.wait(120)
        results.put(told)
        barrier.wait(120)


_KINDS = ("preprocess", "avatar", "pair", "preview")


def _once(handle: FakeHandle) -> StageResult:
    """Fails where the stage was run before."""
    handle.spec.home.joinpath("marks").mkdir(exist_ok=True)
    os.close(os.open(handle.spec.home / "marks" / handle.spec.key, os.O_CREAT | os.O_EXCL))
    time.sleep(0.02)
    return finish(handle)


def _at_once(root: Path, first: list[str], second: list[str]) -> tuple[list[str], list[str]]:
    """What each of two machines was told, one of which has a clock an hour ahead."""
    importlib.import_module("mlflow")  # once, for both
    origin = tracking.gather({})
    barrier, results = FORK.Barrier(2), FORK.Queue()
    drivers = [
        FORK.Process(target=_submit_again_and_again, args=(root, host, origin, pairs, barrier, results))
        for host, pairs in (("near", first), ("far", second))
    ]
    for driver in drivers:
        driver.start()
    told = [results.get(timeout=240) for _ in drivers]
    for driver in drivers:
        driver.join(60)
    return told[0], told[1]


def _all_is_told_alike(root: Path, jobs_made: int) -> None:
    """Registry and MLflow know each job and each stage once, finished in one attempt; a stage's run lies below that of
    the job that ran it."""
    home = Home(root)
    registry, client = open_registry(home), connect(home)
    found = lookup.list_jobs(registry)
    assert len(found) == jobs_made
    views = [view for job in found for view in lookup.job_stages(registry, job.id)]
    stages = {view.stage.key: view.stage for view in views}
    assert {row.attempts for row in stages.values()} == {1}
    assert set(stages) == {path.name for path in (root / "marks").iterdir()}
    rows: list[Job | Stage] = [*found, *stages.values()]
    assert {(row.state, row.owner, row.mlflow_open) for row in rows} == {("finished", None, False)}
    experiments = [one.experiment_id for one in client.search_experiments()]
    runs = {run.info.run_id: run for run in client.search_runs(experiments, max_results=1000)}
    assert sorted(runs) == sorted(str(row.mlflow_run_id) for row in rows), "a run each, and no other"
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert {run.data.tags[HOME_TAG] for run in runs.values()} == {home.identity()}
    parents = {job.id: job.mlflow_run_id for job in found}
    for row in stages.values():
        assert runs[row.mlflow_run_id].data.tags[PARENT_TAG] == parents[row.job_id]
    registry.close()


@pytest.mark.slow
def test_one_pair_submitted_twice_at_the_same_instant(tmp_path: Path, database: str) -> None:
    """Twenty times, on two machines: one runs the job, the other is told so or finds it finished; each stage runs
    once."""
    names = [f"{avatar}{actor}" for avatar in "ABCDE" for actor in "VWXY"]
    told = _at_once(tmp_path, names, names)
    for pair in zip(*told, strict=True):
        assert "done" in pair
        assert all(answer == "done" or "is being run by process" in answer for answer in pair)
    _all_is_told_alike(tmp_path, TIMES)


@pytest.mark.slow
def test_two_jobs_at_the_same_instant_share_what_both_need(tmp_path: Path, database: str) -> None:
    mine, theirs = [[f"{avatar}{actor}" for avatar in "KLMNO"] for actor in "PQ"]
    assert _at_once(tmp_path, mine, theirs) == (["done"] * 5, ["done"] * 5)
    _all_is_told_alike(tmp_path, len(mine) + len(theirs))


def _hold(root: Path, key: str, ahead: float, ready: Any) -> None:
    """An owner on another machine, healthy until it is killed."""
    elsewhere.move("far", ahead, LEASE)
    registry, owner = open_registry(Home(root)), Owner.current()
    ledger.claim_stage(registry, key, owner, "job1")
    ready.set()
    while True:
        with registry.write() as session:
            assert heartbeat(session, owner) == 1
        time.sleep(LEASE / 10)


def _want(root: Path, keys: list[str], killed: Any, results: Any) -> None:
    """A third machine that wants those stages: longer than a lease while their owners live, then until it has them."""
    elsewhere.move("near", 0.0, LEASE)
    registry, owner = open_registry(Home(root)), Owner.current()

    def taken() -> list[str]:
        ledger.release_dead(registry)
        found = []
        for key in keys:
            with contextlib.suppress(StageBusyError):
                found.append(ledger.claim_stage(registry, key, owner, "job2").key)
        return found

    began, early = time.monotonic(), []
    while time.monotonic() - began < LEASE + 1:
        early += taken()
        time.sleep(0.2)
    results.put(early)
    killed.wait(60)
    began = time.monotonic()
    while taken() != keys:
        time.sleep(0.2)
    results.put(time.monotonic() - began)


def test_a_clock_that_is_an_hour_off_moves_no_lease(tmp_path: Path, database: str) -> None:
    """A healthy owner keeps its stage; a dead one loses it when its lease has run out, and no hour later."""
    registry, keys = open_registry(Home(tmp_path)), ["behind", "ahead"]
    for key in keys:
        add_stage(registry, key)
    registry.close()
    ready, killed, results = [FORK.Event(), FORK.Event()], FORK.Event(), FORK.Queue()
    owners = [
        FORK.Process(target=_hold, args=(tmp_path, key, ahead, event))
        for key, ahead, event in zip(keys, (-HOUR, HOUR), ready, strict=True)
    ]
    for owner in owners:
        owner.start()
    assert all(event.wait(60) for event in ready)
    third = FORK.Process(target=_want, args=(tmp_path, keys, killed, results))
    third.start()
    early = results.get(timeout=60)
    for owner in owners:
        owner.kill()
        owner.join()
    killed.set()
    assert early == []
    assert results.get(timeout=60) < 2 * LEASE + 5
    third.join(60)


@pytest.mark.slow
def test_what_trains_for_a_frozen_driver_stops_before_another_may_take_over(tmp_path: Path) -> None:
    """Only the driver is stopped, its workers are not; they keep a checkpoint and end."""
    assert mailbox.SILENCE_SECONDS + mailbox.SILENCE_SECONDS / 10 < LEASE_SECONDS
    command = [sys.executable, str(Path(__file__).parent / "run_stage.py"), str(tmp_path), "slow", "3"]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "running\n"
        (log,) = tmp_path.glob("logs/*.log")
        assert "ended" not in log.read_text()
        with stopped(psutil.Process(driver.pid)):
            deadline = time.monotonic() + 30
            while "Interrupted" not in log.read_text() and time.monotonic() < deadline:
                time.sleep(0.1)
            assert "a checkpoint was written" in log.read_text()
            assert list(tmp_path.glob("checkpoints/*/ynet/step-*/COMPLETE.json"))
        driver.communicate(timeout=60)
    finally:
        if driver.poll() is None:
            driver.kill()
            driver.wait()


@pytest.mark.slow
def test_a_pair_submitted_twice_at_the_same_instant_is_made_once(lavatar: Lavatar, undisturbed: Story) -> None:
    both = [lavatar.start(*small_job(lavatar, *INLINE)) for _ in range(2)]
    answers = [json.loads(process.communicate(timeout=LIMIT)[0]) for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], lavatar.errors()
    (refused,) = (answer["error"]["message"] for answer in answers if "error" in answer)
    assert "is being run by process" in refused
    same_as_undisturbed(lavatar, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("database", "ahead"),
    [("sqlite", (0.0, HOUR)), ("postgresql", (0.0, HOUR)), ("postgresql", (HOUR, 0.0))],
    indirect=["database"],
)
def test_an_owner_that_froze_is_replaced_and_stops_when_it_wakes(
    tmp_path: Path, undisturbed: Story, database: str, ahead: tuple[float, float]
) -> None:
    """Two machines, the clock of the first or of the second an hour ahead. While both are awake only one works."""
    shared = {"LAVATAR_REGISTRY": os.environ["LAVATAR_REGISTRY"]} if database == "postgresql" else {}
    late = new_home(tmp_path, **shared)
    late.script = (SCRIPT, "near", f"{ahead[0]}", f"{LEASE}")
    other = Lavatar(late.home, late.environment, (SCRIPT, "far", f"{ahead[1]}", f"{LEASE}"))
    try:
        frozen = late.start(*small_job(late, *INLINE))
        at_checkpoint(late, 3)
        os.kill(frozen.pid, signal.SIGSTOP)
        moment = broken(late)
        owner = late.stage("avatar:ann").owner
        time.sleep(LEASE + 1)
        heir = other.start(*small_job(late, *INLINE))
        at_checkpoint(late, 6)
        os.kill(frozen.pid, signal.SIGCONT)
        out, _ = frozen.communicate(timeout=60)
        assert frozen.returncode == 1
        assert "has taken" in json.loads(out)["error"]["message"]
        row = late.stage("avatar:ann")
        assert row.attempts == 2
        assert row.owner != owner
        heir.communicate(timeout=LIMIT)
        assert heir.returncode == 0, late.errors()
    finally:
        late.kill_what_runs()
        other.kill_what_runs()
    same_as_undisturbed(late, undisturbed, moment, ahead=ahead[0])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_driver_that_froze_is_replaced_while_its_ray_workers_live(
    tmp_path: Path, undisturbed: Story, database: str
) -> None:
    """On Ray: what trains for the frozen driver stops by itself, with a checkpoint. The other machine's clock, its
    workers' too, is an hour ahead."""
    lease, paths = 6.0, (str(Path(__file__).parent / "wrong_clock"), os.environ.get("PYTHONPATH", ""))
    late = new_home(tmp_path, LAVATAR_REGISTRY=os.environ["LAVATAR_REGISTRY"], PYTHONPATH=os.pathsep.join(paths))
    late.script = (SCRIPT, "near", "0", f"{lease}")
    other = Lavatar(late.home, late.environment, (SCRIPT, "far", f"{HOUR}", f"{lease}"))
    try:
        frozen = late.start(*small_job(late))
        until(lambda: process_of(late, "avatar:ann", "training worker"), late)
        os.kill(frozen.pid, signal.SIGSTOP)
        froze, row = time.monotonic(), late.stage("avatar:ann")
        log = late.home / "logs" / f"{row.key}.log"
        until(lambda: "Interrupted" in log.read_text(), late)
        moment = broken(late)
        time.sleep(max(0.0, froze + lease + 1 - time.monotonic()))
        assert broken(late).step == moment.step, "nothing trains any more"
        heir = other.start(*small_job(late))
        until(lambda: late.stage("avatar:ann").owner not in (row.owner, None), late)
        os.kill(frozen.pid, signal.SIGCONT)
        out, _ = frozen.communicate(timeout=120)
        assert frozen.returncode == 1
        assert "has taken" in json.loads(out)["error"]["message"]
        now = late.stage("avatar:ann")
        assert (now.attempts, now.owner != row.owner) == (2, True)
        heir.communicate(timeout=LIMIT)
        assert heir.returncode == 0, late.errors()
    finally:
        late.kill_what_runs()
        other.kill_what_runs()
    same_as_undisturbed(late, undisturbed, moment)

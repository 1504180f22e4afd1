"""The registry is away from a job's driver for longer than a lease: what it runs stops before another may take it over,
and goes on afterwards, here or there. Real PostgreSQL, drivers in processes that take themselves for two machines."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from platform_fakes import (
    FORK,
    FakeHandle,
    FakeRunner,
    NoTracker,
    finish,
    make_plan,
    no_models,
    office,
    use_plain_digest,
)
from postgres_files import Link, Server

from lavatar.contracts import Event, StageResult
from lavatar.errors import Interrupted, LavatarError, StageBusyError
from lavatar.platform import jobs, leases, lookup, registry
from lavatar.platform.home import Home
from lavatar.platform.jobs import run_job
from lavatar.platform.registry import open_registry
from lavatar.platform.tables import Base

LEASE = 6.0
LIMIT = 120.0
pytestmark = pytest.mark.slow  # each waits until a lease has run out


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server.at(tmp_path_factory.mktemp("pg")) as own:
        yield own


def train(handle: FakeHandle) -> StageResult:
    """Until it is told to stop, or the test says that it is enough; when it began and ended stands in a file."""
    root = handle.spec.home

    def note(what: str) -> None:
        with (root / "spans").open("a") as spans:
            spans.write(f"{os.getpid()} {what} {time.monotonic()}\n")

    note("began")
    while not (handle.cancelled.wait(0.05) or (root / "enough").exists()):
        handle.emit(Event(handle.spec.name, done=1, total=2, unit="steps"))
    note("ended")
    if handle.cancelled.is_set():
        raise Interrupted("stopped, with a checkpoint")
    return finish(handle)


def drive(root: Path, uri: str, host: str, patience: float, told: Any) -> None:
    """A machine that submits the job, again and again while another one runs it; tells what it came to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.gethostname", lambda: host)
        patch.setattr(leases, "LEASE_SECONDS", LEASE)
        patch.setattr(jobs, "HEARTBEAT_SECONDS", LEASE / 10)
        patch.setenv("LAVATAR_REGISTRY", uri)
        patch.setattr(registry, "PATIENCE_SECONDS", patience)
        patch.setattr("lavatar.platform.execution.STORE_SECONDS", 0.2)
        patch.setattr(jobs, "Tracker", NoTracker)
        use_plain_digest(patch)
        no_models(patch)
        home = Home(root)
        own, runner = open_registry(home), FakeRunner({"avatar": train})
        while True:
            try:
                run_job(office(home, own, runner), make_plan(home))
                told.put("finished")
            except StageBusyError:
                time.sleep(0.05)
                continue
            except LavatarError as error:
                told.put(error.message)
            break
        own.close()


class Machines:
    """Drivers of one job, and the times between which each trained."""

    def __init__(self, root: Path) -> None:
        self.root, self._processes = root, []

    def start(self, uri: str, host: str, patience: float = LIMIT) -> Any:
        """A queue that gets one word, when the driver has ended."""
        told = FORK.Queue()
        process = FORK.Process(target=drive, args=(self.root, uri, host, patience, told))
        process.start()
        self._processes.append(process)
        return told

    def trained(self) -> list[tuple[str, float, float]]:
        """Process, beginning and end (infinite while it lasts) of each training, by the beginning."""
        file, found = self.root / "spans", []
        for line in file.read_text().splitlines() if file.exists() else []:
            process, what, moment = line.split()
            if what == "ended":
                (last,) = [span for span in found if span[0] == process and span[2] == float("inf")]
                found[found.index(last)] = (process, last[1], float(moment))
            else:
                found.append((process, float(moment), float("inf")))
        return found

    def until(self, condition: Callable[[list[tuple[str, float, float]]], bool]) -> None:
        deadline = time.monotonic() + LIMIT
        while not condition(self.trained()):
            assert time.monotonic() < deadline, self.trained()
            time.sleep(0.05)

    def enough(self) -> None:
        (self.root / "enough").touch()

    def stop(self) -> None:
        for process in self._processes:
            process.join(10)
            process.kill()
            process.join()


@pytest.fixture
def machines(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    monkeypatch.setenv("LAVATAR_REGISTRY", server.uri)
    found = Machines(Home(tmp_path / "home").ensure().root)
    own = open_registry(Home(found.root))
    with own.write() as session:
        for table in reversed(Base.metadata.sorted_tables):
            session.execute(table.delete())
    own.close()
    yield found
    found.stop()


def finished_at_once(root: Path) -> int:
    """How often the avatar's stage of the one job was begun; all of it is finished and nobody's, the rest at once."""
    own = open_registry(Home(root))
    (job,) = lookup.list_jobs(own)
    stages = {view.name: view.stage for view in lookup.job_stages(own, job.id)}
    own.close()
    assert {job.state, *(stage.state for stage in stages.values())} == {"finished"}
    assert {job.owner, *(stage.owner for stage in stages.values())} == {None}
    began = stages.pop("avatar:A").attempts
    assert {stage.attempts for stage in stages.values()} == {1}
    return began


def one_at_a_time(trained: list[tuple[str, float, float]]) -> bool:
    return all(ended < began for (_, _, ended), (_, began, _) in pairwise(trained))


def test_a_driver_that_cannot_renew_its_lease_stops_before_another_one_takes_over(
    machines: Machines, server: Server
) -> None:
    """The way of one machine to the server is cut. The other one waits for the job all the time."""
    with Link(server) as link:
        first = machines.start(link.uri, "near")
        machines.until(lambda trained: len(trained) == 1)
        ((near, _, _),) = machines.trained()
        second = machines.start(server.uri, "far")
        time.sleep(LEASE + 1)
        assert {process for process, _, _ in machines.trained()} == {near}, "while it renews its lease it keeps the job"
        link.cut()
        machines.until(lambda trained: {process for process, _, _ in trained} > {near})
        assert one_at_a_time(machines.trained())
        link.mend()
        assert re.search("another process has taken (this job|avatar:A) over", first.get(timeout=LIMIT))
    machines.enough()
    assert second.get(timeout=LIMIT) == "finished"
    assert one_at_a_time(machines.trained())
    assert finished_at_once(machines.root) == len(machines.trained())


def test_a_job_goes_on_by_itself_when_the_server_is_back(machines: Machines, server: Server) -> None:
    told = machines.start(server.uri, "near")
    machines.until(lambda trained: len(trained) == 1)
    server.stop("immediate")
    gone = time.monotonic()
    time.sleep(2 * LEASE)
    before = machines.trained()
    assert max(ended for _, _, ended in before) < gone + LEASE, "it may have been anybody's since"
    server.start()
    machines.until(lambda trained: len(trained) > len(before))
    machines.enough()
    assert told.get(timeout=LIMIT) == "finished"
    assert one_at_a_time(machines.trained())
    assert finished_at_once(machines.root) == len(machines.trained())
    own = open_registry(Home(machines.root))
    (job,) = lookup.list_jobs(own)
    lines = [event.text for event in lookup.events(own, job.id) if event.stage == "avatar:A"]
    own.close()
    assert any("interrupted: the registry did not answer for too long" in line for line in lines)


def test_a_server_that_stays_away_ends_the_job_and_says_why(machines: Machines, server: Server) -> None:
    told = machines.start(server.uri, "near", patience=LEASE)
    machines.until(lambda trained: len(trained) == 1)
    server.stop("fast")
    try:
        assert "the registry postgresql+psycopg://" in (said := told.get(timeout=LIMIT))
        assert "cannot be used" in said
        assert max(ended for _, _, ended in machines.trained()) < float("inf"), "nothing runs on without its driver"
    finally:
        server.start()
    machines.enough()
    assert machines.start(server.uri, "far").get(timeout=LIMIT) == "finished"
    assert finished_at_once(machines.root) == len(machines.trained())

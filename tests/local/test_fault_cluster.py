"""Faults of detached jobs: the client dies, a node with and without another in its place, the head.

A cluster of one home: a head that is too small to train, and nodes that join it.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fault_files import (
    INTERVAL,
    Moment,
    Story,
    at_checkpoint,
    broken,
    little_repeated,
    new_home,
    process_of,
    processes_of,
    processes_that_said,
    same_as_undisturbed,
    small_job,
    story,
    until,
)
from submit_files import Lavatar

from lavatar.cluster import head
from lavatar.platform import lookup
from lavatar.platform.detached import HANDED
from lavatar.platform.home import Home
from lavatar.platform.leases import LEASE_SECONDS
from lavatar.platform.registry import open_registry

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
KEPT = ("_AutoscalingCoordinatorActor", "Queue")
GOING = ("RUNNING", "PENDING", "SUBMITTED")
"""How the states of a task begin that waits or runs."""
TRAINER = ("avatar:ann", "training worker")
TOO_BIG = {"resources__avatar__cpus": 1.5}  # for the head of one CPU; it is one thread all the same


@pytest.fixture
def lavatar(tmp_path: Path) -> Iterator[Lavatar]:
    tool = new_home(tmp_path)
    yield tool
    head.down(tool.home)
    tool.kill_what_runs()


@pytest.fixture
def cluster(lavatar: Lavatar, request: pytest.FixtureRequest) -> head.Head:
    """Its head, at the address of the parameter; without one on loopback, where no node can join."""
    where = ("--host", request.param) if hasattr(request, "param") else ()
    assert lavatar("cluster", "up", "--cpus", "1", *where)[0] == 0, lavatar.errors()
    found = head.current(lavatar.home)
    assert found is not None
    return found


@pytest.fixture
def join(lavatar: Lavatar, cluster: head.Head, tmp_path: Path) -> Iterator[Any]:
    """Starts a node of two CPUs; gives its home, by which it is found."""
    homes: list[Path] = []

    def start() -> Path:
        homes.append(tmp_path / f"node{len(homes)}")
        token = {"RAY_AUTH_TOKEN_PATH": str(head.token_file(lavatar.home))}
        node = Lavatar(homes[-1], {**lavatar.environment, **token})
        assert node("cluster", "join", cluster.address, "--cpus", "2")[0] == 0, node.errors()
        return homes[-1]

    yield start
    for home in homes:
        kill_all(home)


def end(lavatar: Lavatar, job: str, undisturbed: Story, moment: Moment | None) -> None:
    """Waits for the job, asks Ray what it thinks of it, takes the cluster down and looks at what is left."""
    lavatar("jobs", "logs", "-f", job)
    report = json.loads(lavatar("jobs", "show", job, "--json")[1])
    assert report["state"] == "finished", lavatar.errors()
    cluster = head.current(lavatar.home)
    assert cluster is not None
    until(lambda: not _busy(lavatar, cluster), lavatar, 90)
    *earlier, newest = head.submissions(lavatar.home, cluster, job)
    assert newest.status == "SUCCEEDED", "the one that brought the job to its end"
    assert {one.status for one in earlier} <= {"SUCCEEDED", "FAILED"}, "Ray says that one is still running"
    assert lavatar("cluster", "down")[0] == 0
    same_as_undisturbed(lavatar, undisturbed, moment)


def _busy(lavatar: Lavatar, cluster: head.Head) -> list[str]:
    """Actors that Ray still has and tasks that it has not ended, but for those that a cluster keeps as long as it is
    up: Ray's own, and our queue. Ray notices up to 15 seconds after a driver was killed that its tasks wait in vain."""
    actors, tasks = _rows(lavatar, cluster, "actors"), _rows(lavatar, cluster, "tasks", "FINISHED", "FAILED")
    kept = {row["actor_id"] for row in actors if row["class_name"] in KEPT}
    busy = [row["class_name"] for row in actors if row["state"] != "DEAD" and row["actor_id"] not in kept]
    return busy + [row["name"] for row in tasks if row["state"].startswith(GOING) and row["actor_id"] not in kept]


def _rows(lavatar: Lavatar, cluster: head.Head, kind: str, *ended: str) -> list[dict[str, Any]]:
    """What Ray's dashboard knows of one kind of thing, but for those in the states `ended`."""
    but = "".join(f"&filter_keys=state&filter_predicates=!%3D&filter_values={state}" for state in ended)
    answer = head.request(lavatar.home, cluster, f"/api/v0/{kind}?limit=1000{but}")["data"]["result"]
    assert answer["num_filtered"] <= 1000, f"there are more {kind} than it tells"
    return list(answer["result"])


def family(home: Path) -> dict[int, psutil.Process]:
    """All that runs for the home, and what that started."""
    found: dict[int, psutil.Process] = {}
    for process in processes_of(home):
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {each.pid: each for each in (process, *process.children(recursive=True))}
    return found


def command_of(process: psutil.Process) -> list[str]:
    """Its command line; empty for one that has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def kill_all(home: Path) -> None:
    """As a machine that loses its power: all that runs for the home, and what that started, at once."""
    members = family(home)
    for process in members.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(list(members.values()), timeout=30)


def node_of(pid: int | None, homes: list[Path]) -> Path:
    """On which node a process runs: below which raylet."""
    above = {parent.pid for parent in psutil.Process(pid).parents()}
    (home,) = (home for home in homes if any(found.pid in above for found in processes_of(home)))
    return home


def taken_up_elsewhere(lavatar: Lavatar, cluster: head.Head, job: str, folder: Path) -> None:
    """`jobs resume --detach` on a machine of another name, without the home's record of its cluster."""
    (folder / "token").write_text(head.token_file(lavatar.home).read_text())
    named = {"RAY_API_SERVER_ADDRESS": cluster.dashboard, "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    script = (str(Path(__file__).parent / "elsewhere.py"), "far", "0", f"{LEASE_SECONDS}")
    third, record = Lavatar(lavatar.home, {**lavatar.environment, **named}, script), lavatar.home / "ray" / head.RECORD
    aside = record.rename(folder / head.RECORD)
    code, out = third("jobs", "resume", job, "--detach", "--json")
    aside.rename(record)
    assert code == 0, lavatar.errors()
    answer = json.loads(out)
    assert (answer["job"], answer["dashboard"], answer["address"]) == (job, cluster.dashboard, "")
    assert len(handed(lavatar)) == 3, "by the first, the second and the third"


def handed(lavatar: Lavatar) -> list[str]:
    """What the events of the home's only job say of its having been handed to a cluster."""
    registry = open_registry(Home(lavatar.home))
    (job,) = lookup.list_jobs(registry)
    found = [event.text for event in lookup.events(registry, job.id) if event.text.startswith(HANDED)]
    registry.close()
    return found


def own_address() -> str:
    """An address of this machine that is not loopback's; that too where it has no other."""
    found = (address for each in psutil.net_if_addrs().values() for address in each)
    names = [a.address for a in found if a.family == socket.AF_INET and not a.address.startswith("127.")]
    return names[0] if names else "127.0.0.1"


def test_a_killed_client_loses_nothing(lavatar: Lavatar, cluster: head.Head, undisturbed: Story) -> None:
    """Killed while it hands the job over, and again while it follows it."""
    client = lavatar.start(*small_job(lavatar, "--detach"))
    until(lambda: lavatar.stage("avatar:ann") is not None, lavatar)
    client.kill()
    client.communicate()
    assert client.returncode == -signal.SIGKILL
    assert not handed(lavatar), "it was killed too late: the job had been handed over"
    code, out = lavatar(*small_job(lavatar, "--detach"))
    assert code == 0, lavatar.errors()
    job = json.loads(out)["job"]
    follower = lavatar.start("jobs", "logs", "-f", job)
    at_checkpoint(lavatar, 2)
    follower.kill()
    follower.communicate()
    assert follower.returncode == -signal.SIGKILL
    assert lavatar.stage("avatar:ann").state == "running"
    end(lavatar, job, undisturbed, None)
    assert lavatar.stage("avatar:ann").attempts == 1


@pytest.mark.skipif(own_address().startswith("127."), reason="nodes join only where a machine has a network address")
@pytest.mark.parametrize("cluster", [own_address()], indirect=True)
def test_a_node_that_dies_is_replaced_by_another(lavatar: Lavatar, join: Any, undisturbed: Story) -> None:
    """First by one that was there already, then by one that joins when none is left that the training fits on."""
    nodes = [join(), join()]
    job = json.loads(lavatar(*small_job(lavatar, "--detach", **TOO_BIG))[1])["job"]
    at_checkpoint(lavatar, 2)
    trainer = process_of(lavatar, *TRAINER)
    kill_all(node_of(trainer, nodes))
    first = broken(lavatar)
    until(lambda: process_of(lavatar, *TRAINER) != trainer, lavatar)
    at_checkpoint(lavatar, first.step // INTERVAL + 2)
    kill_all(node_of(process_of(lavatar, *TRAINER), nodes))
    second = broken(lavatar)
    time.sleep(5)
    assert lavatar.stage("avatar:ann").state == "running", "it waits for a node"
    nodes.append(join())
    end(lavatar, job, undisturbed, first)
    little_repeated(lavatar, second)


@pytest.mark.skipif(own_address().startswith("127."), reason="nodes join only where a machine has a network address")
@pytest.mark.parametrize("cluster", [own_address()], indirect=True)
def test_an_avatar_that_trains_over_two_nodes_outlives_one_of_them(lavatar: Lavatar, join: Any, tmp_path: Path) -> None:
    """Two workers, for each of which one node has room; what they make is what two on one machine make."""
    (tmp_path / "together").mkdir()
    together = new_home(tmp_path / "together")
    assert together(*small_job(together, resources__avatar__workers=2))[0] == 0, together.errors()
    undisturbed = story(together)
    nodes = [join(), join()]
    over_two = {**TOO_BIG, "resources__avatar__workers": 2}
    job = json.loads(lavatar(*small_job(lavatar, "--detach", **over_two))[1])["job"]
    at_checkpoint(lavatar, 2)
    workers = processes_that_said(lavatar, *TRAINER)
    assert len(workers) == 2
    assert {node_of(pid, nodes) for pid in workers} == set(nodes)
    kill_all(nodes[0])
    moment = broken(lavatar)
    time.sleep(5)
    assert lavatar.stage("avatar:ann").state == "running", "it waits for a node"
    nodes.append(join())
    end(lavatar, job, undisturbed, moment)


def test_a_detached_driver_that_dies_leaves_a_job_that_can_be_resumed(
    lavatar: Lavatar, cluster: head.Head, undisturbed: Story, tmp_path: Path
) -> None:
    """Seen from another machine too, which has a home of its own and the same registry; and taken up from a third one,
    which shares the home, and knows of the cluster by what Ray's own variables name alone."""
    other = Lavatar(tmp_path / "other" / "home", {"LAVATAR_REGISTRY": f"sqlite:///{lavatar.home}/registry.db"})
    other.home.mkdir(parents=True)
    job = json.loads(lavatar(*small_job(lavatar, "--detach"))[1])["job"]
    at_checkpoint(lavatar, 3)
    follower = other.start("jobs", "logs", "-f", job)
    psutil.Process(lavatar.stage("avatar:ann").owner_pid).kill()
    until(lambda: json.loads(other("jobs", "show", job, "--json")[1])["state"] == "interrupted", lavatar)
    moment = broken(lavatar)
    assert "avatar:ann" in follower.communicate(timeout=60)[0]
    assert lavatar("jobs", "resume", job, "--detach")[0] == 0, lavatar.errors()
    until(lambda: lavatar.stage("avatar:ann").state == "running", lavatar)
    assert other("jobs", "cancel", job)[0] == 0
    assert "cancelled; what is done is kept" in other("jobs", "logs", "-f", job)[1]
    taken_up_elsewhere(lavatar, cluster, job, tmp_path)
    end(lavatar, job, undisturbed, moment)


def test_a_head_that_dies_leaves_a_job_that_can_be_resumed(
    lavatar: Lavatar, cluster: head.Head, undisturbed: Story
) -> None:
    job = json.loads(lavatar(*small_job(lavatar, "--detach"))[1])["job"]
    at_checkpoint(lavatar, 3)
    members = family(lavatar.home)
    words = {pid: command_of(process) for pid, process in members.items()}
    (server,) = (members[pid] for pid, line in words.items() if line and "gcs_server" in line[0])
    work = [members[pid] for pid, line in words.items() if not any("monitor.py" in word for word in line)]
    server.kill()
    _, alive = psutil.wait_procs(work, timeout=180)
    assert alive == [], "the job and its workers end without their head"
    moment = broken(lavatar)
    assert json.loads(lavatar("jobs", "show", job, "--json")[1])["state"] == "interrupted"
    assert lavatar("cluster", "down")[0] == 0, "two monitors of Ray's stay until then"
    assert processes_of(lavatar.home) == []
    assert lavatar("cluster", "up", "--cpus", "1")[0] == 0, lavatar.errors()
    code, _ = lavatar("jobs", "resume", job, "--detach")
    assert code == 0, lavatar.errors()
    end(lavatar, job, undisturbed, moment)

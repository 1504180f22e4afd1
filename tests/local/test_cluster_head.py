"""A cluster that outlives its commands, nothing replaced: up, a detached job, cancelled, resumed, down."""

from __future__ import annotations

import json
import os
import resource
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from submit_files import LIMIT, Lavatar

from lavatar.cluster import head
from lavatar.platform import ledger
from lavatar.platform.detached import HANDED, stranded, waiting
from lavatar.platform.home import Home
from lavatar.platform.registry import now, open_registry
from lavatar.platform.tables import Job

SLOW_AVATAR = 600  # steps: long enough to be cancelled in the middle


@pytest.fixture(scope="module")
def lavatar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lavatar]:
    tool = Lavatar(tmp_path_factory.mktemp("up") / "home")
    yield tool
    head.down(tool.home)
    tool.kill_what_runs()


@pytest.fixture(scope="module")
def cluster(lavatar: Lavatar) -> dict[str, Any]:
    code, out = lavatar("cluster", "up", "--json")
    assert code == 0, lavatar.errors()
    answer: dict[str, Any] = json.loads(out)
    return answer


def test_a_second_up_finds_the_first_and_status_shows_its_nodes(lavatar: Lavatar, cluster: dict[str, Any]) -> None:
    assert cluster["started"]
    again = json.loads(lavatar("cluster", "up", "--json")[1])
    assert again == {**cluster, "started": False}
    (node,) = cluster["nodes"]
    assert node["alive"]
    assert node["resources"]["CPU"] == psutil.cpu_count()
    assert "127.0.0.1  head  alive" in lavatar("cluster", "status")[1]


def test_ui_leads_to_its_dashboard(lavatar: Lavatar, cluster: dict[str, Any]) -> None:
    elsewhere = Lavatar(lavatar.home, {"MLFLOW_TRACKING_URI": "http://mlflow.example:5000"})
    ray = json.loads(elsewhere("ui", "--json")[1])["ray"]
    assert (ray["running"], ray["dashboard"]) == (True, cluster["dashboard"])
    assert ray["token_file"] == cluster["token_file"]


def test_it_listens_on_loopback_and_asks_for_the_token(lavatar: Lavatar, cluster: dict[str, Any]) -> None:
    token = Path(cluster["token_file"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(cluster["dashboard"] + "/api/jobs/", timeout=30)
    listening = [
        connection.laddr.ip
        for found in head._processes(lavatar.home)
        for process in (found, *found.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}


SECRETS = {"MLFLOW_TRACKING_PASSWORD": "s3cr3t-tracking", "LAVATAR_REGISTRY": "postgresql://u:s3cr3t-registry@h/d"}
ATTACH = """
import json, os, pathlib, sys
from lavatar.cluster import session
own = session.attach(pathlib.Path(sys.argv[1]), sys.argv[2])
import ray
@ray.remote(num_cpus=1)
def look(names):
    return {name: os.environ.get(name) for name in names}
print(json.dumps(ray.get(look.remote(sys.argv[3:]))), flush=True)
sys.stdin.readline()
own.stop()
"""


def test_secrets_reach_the_workers_and_nothing_that_ray_shows_or_writes(
    lavatar: Lavatar, cluster: dict[str, Any]
) -> None:
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": cluster["token_file"], **SECRETS}
    command = [sys.executable, "-c", ATTACH, str(lavatar.home), cluster["address"], *SECRETS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as driver:  # type: ignore[call-overload]
        try:
            assert json.loads(driver.stdout.readline()) == SECRETS
            (handed,) = (lavatar.home / "handed").iterdir()
            assert stat.S_IMODE(handed.stat().st_mode) == 0o600
            assert stat.S_IMODE(handed.parent.stat().st_mode) == 0o700
            shown = [head.request(lavatar.home, head.current(lavatar.home), path) for path in SHOWN]  # type: ignore[arg-type]
            assert "LAVATAR_HANDED" in json.dumps(shown), "Ray shows what it was told"
            assert "s3cr3t" not in json.dumps(shown)
            family = [psutil.Process(), *psutil.Process(driver.pid).children(recursive=True)]
            family += [p for found in head._processes(lavatar.home) for p in (found, *found.children(recursive=True))]
            assert not any("s3cr3t" in part for process in family for part in process.cmdline())
        finally:
            driver.communicate("\n", timeout=60)
    assert not handed.exists()
    assert [path for path in lavatar.home.rglob("*") if path.is_file() and b"s3cr3t" in path.read_bytes()] == []


@pytest.mark.parametrize("how", [("--detach",), ()], ids=["detached", "foreground"])
def test_a_job_that_the_cluster_could_never_run_is_refused_before_anything_runs(
    lavatar: Lavatar, cluster: dict[str, Any], how: tuple[str, ...]
) -> None:
    for seed, name in enumerate(("eve", "fay")):
        lavatar("subjects", "add", "--synthetic", str(seed + 7), name)
    submit = lavatar.submit("eve", "fay", *how, resources__pair__memory_gb=10000)
    code, _ = lavatar(*submit)
    assert code == 2
    assert "10000" in lavatar.errors()
    assert "resources.pair.memory_gb" in lavatar.errors()
    jobs = json.loads(lavatar("jobs", "list", "--json")[1])["jobs"]
    if how:
        assert jobs == []
    else:
        (job,) = jobs
        assert job["state"] == "failed"
        stages = json.loads(lavatar("jobs", "show", job["id"], "--json")[1])["stages"]
        assert {(stage["state"], stage["attempts"]) for stage in stages} == {("pending", 0)}
        assert lavatar("jobs", "delete", job["id"])[0] == 0
    assert list(lavatar.home.glob("shards/*")) == []


SHOWN = (
    "/api/jobs/", "/api/v0/jobs?detail=true", "/api/v0/runtime_envs?detail=true", "/api/v0/workers?detail=true",
    "/api/v0/tasks?detail=true",
)  # fmt: skip


def yardstick() -> float:
    """Seconds of processor time in which a process of this machine imports what such a command needs most."""
    before = processor_seconds()
    subprocess.run([sys.executable, "-c", "import sqlalchemy.orm"], check=True, timeout=LIMIT)
    return processor_seconds() - before


def processor_seconds() -> float:
    """Of all commands that have ended: a busy machine lengthens their time, this hardly."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.timeout(1200)
def test_a_detached_job_outlives_its_commands(lavatar: Lavatar, cluster: dict[str, Any]) -> None:
    for seed, name in enumerate(("ann", "bob")):
        assert lavatar("subjects", "add", "--synthetic", str(seed), name)[0] == 0
    submit = lavatar.submit("ann", "bob", "--detach", "--json", avatar_training__steps=SLOW_AVATAR)
    usual = 0.8
    slower = max(1.0, yardstick() / usual)
    before = processor_seconds()
    code, out = lavatar(*submit)
    assert code == 0, lavatar.errors()
    took = processor_seconds() - before
    assert took < 3 * slower, f"three seconds where it has a processor to itself; this one is {slower:.1f} times slower"
    answer = json.loads(out)
    job = answer["job"]
    assert answer["ray_job"] == job
    listed = head.request(lavatar.home, head.current(lavatar.home), f"/api/jobs/{job}")  # type: ignore[arg-type]
    assert listed["submission_id"] == job, "Ray's dashboard shows it under its id"

    until(lambda: (lavatar.stage("avatar:ann").done or 0) >= 20 if lavatar.stage("avatar:ann") else False)
    assert json.loads(lavatar("jobs", "cancel", job, "--json")[1])["cancel_asked"]
    assert lavatar("jobs", "cancel", job)[0] == 0
    assert "cancelled; what is done is kept" in lavatar("jobs", "logs", "-f", job)[1]
    done = lavatar.stage("avatar:ann").done
    assert json.loads(lavatar("jobs", "cancel", job, "--json")[1]) == {
        "job": job, "state": "cancelled", "cancel_asked": False,
    }  # fmt: skip

    both = [lavatar.start("jobs", "resume", job, "--detach", "--json") for _ in range(2)]  # at the same instant
    names = [json.loads(process.communicate(timeout=LIMIT)[0]).get("ray_job") for process in both]
    assert set(names) - {None} == {f"{job}-2"}, "None: it ran already when the second one looked"
    until(lambda: lavatar.stage("avatar:ann").state == "running")
    assert json.loads(lavatar(*submit)[1])["ray_job"] is None, "it is running"
    code, err = lavatar("cluster", "down")[0], lavatar.errors()
    assert code == 1
    assert f"jobs are running or about to: {job}" in err
    followed = lavatar("jobs", "logs", "-f", job)[1].splitlines()
    assert followed[-1].endswith(" finished"), followed[-5:]
    report = json.loads(lavatar("jobs", "show", job, "--json")[1])
    assert report["state"] == "finished"
    assert Path(report["video"]).is_file()
    assert lavatar.stage("avatar:ann").attempts == 2
    assert done is not None
    assert any(f"step {step} of {SLOW_AVATAR}" in line for line in followed for step in range(20, SLOW_AVATAR))
    again = json.loads(lavatar("jobs", "resume", job, "--detach", "--json")[1])
    assert again["state"] == "finished", "nothing is left to do"
    assert json.loads(lavatar(*submit)[1])["ray_job"] is None
    current = head.current(lavatar.home)
    assert current is not None
    assert [one.name for one in head.submissions(lavatar.home, current, job)] == [job, f"{job}-2"]


def test_a_job_that_the_cluster_does_not_begin_is_told(lavatar: Lavatar, cluster: dict[str, Any]) -> None:
    """Its driver dies before it says anything."""
    home, current = Home(lavatar.home), head.current(lavatar.home)
    assert current is not None
    registry = open_registry(home)
    with registry.write() as session:
        session.add(Job(id="lost", avatar="ann", actor="bob", recipe_name="tiny", recipe={}, created=now()))
    assert stranded(home, registry, "lost") is None, "it was not handed over"
    ledger.record(registry, "lost", f"{HANDED} at nowhere")
    assert head.submit(lavatar.home, current, "lost", "sleep 15; exit 3", {}) == "lost"
    assert head.submissions(lavatar.home, current, "lost")[-1].going
    assert stranded(home, registry, "lost") is None, "it may still begin"
    assert "lost" in waiting(home, registry)
    assert lavatar("cluster", "down")[0] == 1
    assert "jobs are running or about to: lost" in lavatar.errors()
    assert lavatar("jobs", "logs", "-f", "lost")[0] == 1
    assert "job lost was never begun: Ray says of lost: FAILED" in lavatar.errors()
    assert json.loads(lavatar("jobs", "show", "lost", "--json")[1])["state"] == "interrupted"
    registry.close()


def test_down_ends_all_that_was_started_and_nothing_else(lavatar: Lavatar, cluster: dict[str, Any]) -> None:
    family = {p.pid: p for found in head._processes(lavatar.home) for p in (found, *found.children(recursive=True))}
    code, out = lavatar("cluster", "down")
    assert (code, out) == (0, "the cluster is down\n")
    _, alive = psutil.wait_procs(list(family.values()), timeout=30)
    assert alive == []
    assert lavatar("cluster", "down")[1] == "no cluster was up\n"
    assert lavatar("cluster", "status")[1] == "no cluster is up: lavatar cluster up\n"
    code, _ = lavatar("submit", "--avatar", "ann", "--actor", "bob", "--detach")
    assert code == 2
    assert "lavatar cluster up" in lavatar.errors()


def until(condition: Any, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)

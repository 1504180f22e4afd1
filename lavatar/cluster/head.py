"""A Ray cluster that outlives the command that started it: a head on this machine, nodes of other machines that join.

Ray's files, its token and the record of what runs lie in HOME/ray. Head and dashboard listen on loopback alone unless
they are given another address. Imports no ray: what is asked of a running cluster goes over its dashboard's REST API.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lavatar.cluster import session
from lavatar.errors import JobError, UsageError

LOOPBACK = "127.0.0.1"
DASHBOARD_PORT = 8265
START_SECONDS = 180.0
STOP_SECONDS = 15.0
RECORD, FOLDER = "cluster.json", "c"


@dataclass(frozen=True)
class Head:
    """A running head: where Ray's drivers and nodes connect, and where its dashboard and Jobs API answer."""

    address: str
    dashboard: str
    host: str


def up(
    home: Path,
    *,
    host: str = LOOPBACK,
    cpus: int | None = None,
    gpus: int | None = None,
    dashboard_port: int = DASHBOARD_PORT,
) -> tuple[Head, bool]:
    """The head of this home, started if none runs; True where it was. Returns when it takes jobs. Raises JobError."""
    present = current(home)
    if present:
        return present, False
    port = _free_port(host, dashboard_port)
    options = ["--head", "--port=0", "--include-dashboard=true", f"--dashboard-host={host}", f"--dashboard-port={port}"]
    if host != LOOPBACK:
        options.append(f"--node-ip-address={host}")
    _start(home, options, cpus, gpus, loopback=host == LOOPBACK)
    folder = session.private_folder(home)
    address = (folder / FOLDER / "ray_current_cluster").read_text().strip()
    head = Head(address, f"http://{host}:{port}", host)
    (folder / RECORD).write_text(json.dumps(asdict(head)))
    _wait_for_jobs_api(home, head)
    return head, True


def join(home: Path, address: str, *, cpus: int | None = None, gpus: int | None = None) -> None:
    """Makes this machine a node of the cluster at `address`, whose token is in RAY_AUTH_TOKEN_PATH."""
    if _processes(home):
        raise UsageError("a head or a node of this home runs already", "End it first: lavatar cluster down")
    if "RAY_AUTH_TOKEN" not in os.environ and not Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "")).is_file():
        raise UsageError(
            "the token of the cluster is not known here",
            "Copy the file that `lavatar cluster status` names there to here, and: export RAY_AUTH_TOKEN_PATH=FILE",
        )
    _start(home, [f"--address={address}"], cpus, gpus, loopback=address.startswith(LOOPBACK))


def down(home: Path) -> int:
    """Ends what `up` and `join` started on this machine, and nothing else; how many processes that were."""
    import psutil

    family = {process.pid: process for found in _processes(home) for process in (found, *_children(found))}
    for stop in ("terminate", "kill"):
        for process in family.values():
            with contextlib.suppress(psutil.Error):
                getattr(process, stop)()
        psutil.wait_procs(list(family.values()), timeout=STOP_SECONDS)
    (session.private_folder(home) / RECORD).unlink(missing_ok=True)
    session.remove_ended(session.private_folder(home) / FOLDER)
    return len(family)


def current(home: Path) -> Head | None:
    """The head of this home that runs now."""
    try:
        head = Head(**json.loads((session.root_of(home) / RECORD).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return head if any("gcs_server" in " ".join(found.info["cmdline"]) for found in _processes(home)) else None


def address_for(home: Path) -> str | None:
    """Where jobs of this home run: RAY_ADDRESS, as for Ray's own tools, else its head; None: on a Ray of their own."""
    given = os.environ.get("RAY_ADDRESS")
    if given:
        return given
    head = current(home)
    if head is None:
        return None
    session.prepare_environment(home, session.token_of(home))
    return head.address


def nodes(home: Path, head: Head) -> list[dict[str, Any]]:
    """What the cluster consists of: address, whether it is alive, and its resources, a node each."""
    found = request(home, head, "/api/v0/nodes?detail=true")["data"]["result"]["result"]
    return [
        {"address": node["node_ip"], "alive": node["state"] == "ALIVE", "resources": node.get("resources_total") or {}}
        for node in found
    ]


def submit(home: Path, head: Head, submission_id: str, entrypoint: str, environment: Mapping[str, str]) -> str:
    """Hands a command to Ray's Jobs API, under `submission_id`, or that and a number if it was used before."""
    number, name = 1, submission_id
    while _known(home, head, name):
        number += 1
        name = f"{submission_id}-{number}"
    body = {"entrypoint": entrypoint, "submission_id": name, "runtime_env": {"env_vars": dict(environment)}}
    return str(request(home, head, "/api/jobs/", body)["submission_id"])


def request(home: Path, head: Head, path: str, body: Any = None) -> Any:
    """One call of the dashboard's REST API, with this home's token. Raises JobError."""
    token = os.environ.get("RAY_AUTH_TOKEN") or token_file(home).read_text().strip()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    try:
        with _DIRECT.open(urllib.request.Request(head.dashboard + path, data, headers), timeout=30) as answer:
            return json.loads(answer.read())
    except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError) as error:
        detail = error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else str(error)
        refused = _Refused if isinstance(error, urllib.error.HTTPError) and error.code == 404 else JobError
        raise refused(
            f"Ray's dashboard at {head.dashboard} did not take {path}: {detail.strip()[:300]}",
            "See whether the cluster is up: lavatar cluster status",
        ) from None


def token_file(home: Path) -> Path:
    """The file that holds the cluster's token."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or session.root_of(home) / "token")


class _NotFollowed(urllib.request.HTTPRedirectHandler):
    """The token is for the head: it goes to no other address that an answer names."""

    def redirect_request(self, *answer: Any) -> None:
        return None


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NotFollowed)
"""Nor to a proxy of the environment."""


class _Refused(JobError):
    """There is no such thing."""


def _known(home: Path, head: Head, submission_id: str) -> bool:
    try:
        request(home, head, f"/api/jobs/{submission_id}")
    except _Refused:
        return False
    return True


def _start(home: Path, options: list[str], cpus: int | None, gpus: int | None, *, loopback: bool) -> None:
    """`ray start` with our folder, token and limits."""
    folder = session.private_folder(home)
    session.prepare_environment(home, session.token_of(home))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options, f"--temp-dir={folder / FOLDER}"]
    command += ["--disable-usage-stats", "--dashboard-agent-listen-port=0", f"--num-cpus={cpus or os.cpu_count()}"]
    command += [f"--object-store-memory={session.OBJECT_STORE_BYTES}"]
    command += [f"--num-gpus={gpus}"] if gpus is not None else []
    environment = {**os.environ, **({"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"} if loopback else {})}
    log = folder / "cluster.log"
    with log.open("wb") as stream:
        try:
            code = subprocess.run(
                command, stdout=stream, stderr=stream, env=environment, timeout=START_SECONDS, start_new_session=True
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    if code != 0:
        down(home)
        how = "did not start in time" if code is None else "could not be started"
        raise JobError(f"Ray {how}: {_last_line(log)}", f"What it said is in {log}.")


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _wait_for_jobs_api(home: Path, head: Head) -> None:
    """Until an agent takes jobs: the head answers before it."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            if any(node["alive"] for node in nodes(home, head)):
                request(home, head, "/api/jobs/")
                return
        except (JobError, KeyError):
            pass
        if time.monotonic() > deadline:
            raise JobError("Ray's dashboard does not answer", f"Its logs are in {session.root_of(home) / FOLDER}.")
        time.sleep(0.5)


def _free_port(host: str, port: int) -> int:
    for candidate in range(port, port + 50):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, candidate))
            return candidate
    raise JobError(f"no port from {port} to {port + 49} is free at {host}", "Give another: --dashboard-port N")


def _processes(home: Path) -> list[Any]:
    """Ray's processes on this machine whose files lie in this home's folder."""
    import psutil

    mark, own = str(session.root_of(home) / FOLDER), os.getuid()
    return [
        process
        for process in psutil.process_iter(["cmdline", "uids"])
        if process.info["uids"] and process.info["uids"].real == own and process.pid != os.getpid()
        and any(mark in part for part in process.info["cmdline"] or ())
    ]  # fmt: skip


def _children(process: Any) -> list[Any]:
    import psutil

    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []

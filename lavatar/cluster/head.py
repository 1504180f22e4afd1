"""A Ray cluster that outlives the command that started it: a head on this machine, nodes of other machines that join.

Its token and the record of where it runs lie in HOME/ray, which machines that share the home all read. Head and
dashboard listen on loopback alone unless they are given another address. Imports no ray: what is asked of a running
cluster goes over its dashboard's REST API. A cluster that something else started (KubeRay, Ray's cluster launcher) is
named by Ray's own variables RAY_ADDRESS and RAY_API_SERVER_ADDRESS.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lavatar.cluster import node, session
from lavatar.cluster.node import processes as _processes
from lavatar.cluster.session import LOOPBACK
from lavatar.errors import UNREADABLE, JobError, UsageError

PORT, DASHBOARD_PORT = 6379, 8265
ANSWER_SECONDS = 5.0
MOST_BYTES = 64 * 2**20
"""Of an answer: what listens at the dashboard's address may be something else."""
MOST_SUBMISSIONS = 1000
RECORD = "cluster.json"
_TOKEN_HINT = "Copy the file that `lavatar cluster status` names there to here, and: export RAY_AUTH_TOKEN_PATH=FILE"


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
    if _processes(home):
        raise UsageError("a node of this home runs here, or what is left of a head", "End it: lavatar cluster down")
    port = node.free_port(host, dashboard_port)
    options = ["--head", "--include-dashboard=true", f"--dashboard-host={host}", f"--dashboard-port={port}"]
    options += ["--port=0" if host == LOOPBACK else f"--port={node.free_port('', PORT)}"]
    session.prepare_environment(home, session.token_of(home))
    folder = node.start(home, options, host, cpus, gpus)
    address = (folder / "ray_current_cluster").read_text().strip()
    head = Head(address, f"http://{host}:{port}", host)
    _record(home).write_text(json.dumps(asdict(head)))
    _wait_for_jobs_api(home, head)
    return head, True


def join(
    home: Path, address: str | None = None, *, host: str | None = None, cpus: int | None = None, gpus: int | None = None
) -> str:
    """Makes this machine a node of the cluster at `address` (default: this home's), which is returned.

    `host` is the address of this machine that the others reach; default: the one that looks at the head. The token
    is that of the home, or in RAY_AUTH_TOKEN_PATH. Raises UsageError, JobError.
    """
    if running_here(home):
        raise UsageError("a head or a node of this home runs here already", "End it first: lavatar cluster down")
    if address is None:
        head = current(home)
        if head is None or not head.address:
            raise UsageError(
                "no cluster of this home answers, and no address was given",
                "Start one (lavatar cluster up --host ADDRESS), or name it: lavatar cluster join HOST:PORT",
            )
        address = head.address
    if "RAY_AUTH_TOKEN" not in os.environ and not token_file(home).is_file():
        raise UsageError("the token of the cluster is not known here", _TOKEN_HINT)
    own = host or node.way_to(address)
    node.reach(address)
    session.prepare_environment(home, token_file(home))
    node.start(home, [f"--address={address}"], own, cpus, gpus)
    return address


def down(home: Path) -> int:
    """Ends what `up` and `join` started on this machine, and nothing else; how many processes that were."""
    led = node.has_head(home)
    ended = node.end(home)
    if led or current(home) is None:  # not the record of a head elsewhere, whose node this was
        _record(home).unlink(missing_ok=True)
    return ended


def current(home: Path) -> Head | None:
    """The cluster that RAY_API_SERVER_ADDRESS names, else the head of this home that runs now, here or elsewhere."""
    named = os.environ.get("RAY_API_SERVER_ADDRESS", "").rstrip("/")
    if named:
        return Head(os.environ.get("RAY_ADDRESS", ""), named, urllib.parse.urlsplit(named).hostname or "")
    try:
        head = Head(**json.loads(_record(home).read_text()))
        if not all(isinstance(text, str) for text in (head.address, head.dashboard, head.host)):
            return None
    except UNREADABLE:
        return None
    return head if node.has_head(home) or (head.host != LOOPBACK and _answers(head)) else None


def address_for(home: Path) -> str | None:
    """Where jobs of this home run: RAY_ADDRESS, as for Ray's own tools, else its head; None: on a Ray of their own."""
    given = os.environ.get("RAY_ADDRESS")
    if given:
        return given
    head = current(home)
    if head is None:
        return None
    if not head.address:
        raise UsageError(
            f"RAY_API_SERVER_ADDRESS names the cluster at {head.dashboard}, but not where its drivers connect",
            "Add --detach, or say it too: export RAY_ADDRESS=HOST:PORT",
        )
    session.prepare_environment(home, token_file(home))
    return head.address


def running_here(home: Path) -> bool:
    """Whether a head or a node of this home runs on this machine."""
    return bool(_processes(home))


def nodes(home: Path, head: Head) -> list[dict[str, Any]]:
    """What the cluster consists of: each node's address, whether it is the head, whether it is alive, its resources."""
    found = _part(request(home, head, "/api/v0/nodes?detail=true"), "data", "result", "result")
    return [
        {
            "address": str(_part(one, "node_ip")),
            "head": bool(one.get("is_head_node")),
            "alive": _part(one, "state") == "ALIVE",
            "resources": _numbers(one.get("resources_total")),
        }
        for one in (found if isinstance(found, list) else [])
    ]


def _numbers(answer: Any) -> dict[str, float]:
    """Those of an object's values that are numbers."""
    found = answer if isinstance(answer, dict) else {}
    return {str(name): value for name, value in found.items() if isinstance(value, int | float)}


def wait_for(home: Path, head: Head, count: int, seconds: float = node.START_SECONDS) -> None:
    """Until `count` nodes are alive. Raises JobError: they are not after so many seconds."""
    deadline = time.monotonic() + seconds
    while (alive := sum(one["alive"] for one in nodes(home, head))) < count:
        if time.monotonic() > deadline:
            raise JobError(
                f"{alive} of {count} nodes are alive after {seconds:g} s",
                "See what `lavatar cluster join` said on the machines that are missing.",
            )
        time.sleep(0.5)


def submit(home: Path, head: Head, submission_id: str, entrypoint: str, environment: Mapping[str, str]) -> str:
    """Hands a command to Ray's Jobs API, under `submission_id`, or that and a number if it was used before."""
    name = _name(submission_id, len(submissions(home, head, submission_id)) + 1)
    body = {"entrypoint": entrypoint, "submission_id": name, "runtime_env": {"env_vars": dict(environment)}}
    try:
        return str(_part(request(home, head, "/api/jobs/", body), "submission_id"))
    except JobError:
        if any(one.going for one in submissions(home, head, submission_id)):  # another command was quicker
            return name
        raise


@dataclass(frozen=True)
class Submission:
    """What Ray's Jobs API knows of a command that was handed to it."""

    name: str
    status: str
    message: str

    @property
    def going(self) -> bool:
        """Whether Ray still begins or runs it."""
        return self.status in ("PENDING", "RUNNING")


def submissions(home: Path, head: Head, submission_id: str) -> list[Submission]:
    """All under that id, the newest last. Raises JobError, also where there is no end of them."""
    found: list[Submission] = []
    for number in range(1, MOST_SUBMISSIONS + 1):
        name = _name(submission_id, number)
        try:
            answer = request(home, head, f"/api/jobs/{name}")
        except _Refused:
            return found
        message = answer.get("message") if isinstance(answer, dict) else ""
        found.append(Submission(name, str(_part(answer, "status")), str(message or "").strip()))
    raise JobError(
        f"Ray's dashboard at {head.dashboard} knows more than {MOST_SUBMISSIONS} jobs of the name {submission_id}",
        "See what listens at its address.",
    )


def _name(submission_id: str, number: int) -> str:
    return submission_id if number == 1 else f"{submission_id}-{number}"


def _part(answer: Any, *names: str) -> Any:
    """What an answer has under these names, one below the other. Raises JobError where it has not."""
    for name in names:
        if not isinstance(answer, dict) or name not in answer:
            raise JobError(f"Ray's dashboard gave an answer without {name!r}", "See what listens at its address.")
        answer = answer[name]
    return answer


def request(home: Path, head: Head, path: str, body: Any = None) -> Any:
    """One call of the dashboard's REST API, with this home's token. Raises JobError, UsageError without a token."""
    token = _token(home)
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    try:
        with _DIRECT.open(urllib.request.Request(head.dashboard + path, data, headers), timeout=30) as answer:
            text = answer.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError(f"its answer is longer than {MOST_BYTES // 2**20} MB")
        return json.loads(text)
    except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError, RecursionError) as error:
        detail = error.read(1000).decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else str(error)
        refused = _Refused if isinstance(error, urllib.error.HTTPError) and error.code == 404 else JobError
        raise refused(
            f"Ray's dashboard at {head.dashboard} did not take {path}: {detail.strip()[:300]}",
            "See whether the cluster is up: lavatar cluster status",
        ) from None


def token_file(home: Path) -> Path:
    """The file that holds the cluster's token."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or session.shared_of(home) / "token")


def _token(home: Path) -> str:
    given = os.environ.get("RAY_AUTH_TOKEN")
    try:
        return given or token_file(home).read_text().strip()
    except OSError as error:
        raise UsageError(
            f"the cluster's token cannot be read from {token_file(home)}: {error.strerror}", _TOKEN_HINT
        ) from None


class _NotFollowed(urllib.request.HTTPRedirectHandler):
    """The token is for the head: it goes to no other address that an answer names."""

    def redirect_request(self, *answer: Any) -> None:
        return None


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NotFollowed)
"""Nor to a proxy of the environment."""


class _Refused(JobError):
    """There is no such thing."""


def _wait_for_jobs_api(home: Path, head: Head) -> None:
    """Until an agent takes jobs: the head answers before it."""
    deadline = time.monotonic() + node.START_SECONDS
    while True:
        with contextlib.suppress(JobError, KeyError):
            if any(one["alive"] for one in nodes(home, head)):
                request(home, head, "/api/jobs/")
                return
        if time.monotonic() > deadline:
            raise JobError("Ray's dashboard does not answer", "End what is there: lavatar cluster down")
        time.sleep(0.5)


def _record(home: Path) -> Path:
    return session.shared_of(home) / RECORD


def _answers(head: Head) -> bool:
    """Whether something speaks HTTP there; the token is not shown to it yet."""
    try:
        _DIRECT.open(head.dashboard, timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True

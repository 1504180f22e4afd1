"""Who works on a stage or a job: leases with heartbeats, and take-over from the dead. Never two owners.

An owner is one process. On its own machine it is alive as long as that process is (a stopped or sleeping process keeps
what it holds: its workers may still be running); seen from another machine it is alive until its lease runs out. One
that cannot renew its leases stops what it runs before that (jobs.py), and waits until the database answers.
Every function here is called inside a write transaction of the registry, which is what makes claiming exclusive. Times
are the database's: the clocks of two machines may be hours apart.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import update
from sqlalchemy.orm import Session, object_session

from lavatar.cluster.environment import this_host
from lavatar.errors import JobError, StageBusyError
from lavatar.platform.registry import database_now
from lavatar.platform.states import State, move
from lavatar.platform.tables import Job, Leased, Stage

LEASE_SECONDS = 60.0
HEARTBEAT_SECONDS = 5.0


@dataclass(frozen=True)
class Owner:
    """A process that works on stages."""

    id: str
    host: str
    pid: int
    started: float

    @classmethod
    def current(cls) -> Owner:
        """This process, under a name of its own."""
        pid = os.getpid()
        return cls(uuid.uuid4().hex, this_host(), pid, process_start(pid) or 0.0)


def owner_alive(row: Leased, now: float | None = None) -> bool:
    """Whether the process that holds `row` is still there. `now`: the database's time, for a row whose transaction has
    ended."""
    if row.owner is None or row.owner_pid is None:
        return False
    if row.owner_host != this_host():
        return (row.lease_until or 0.0) > (_now(row) if now is None else now)
    started = process_start(row.owner_pid)
    return started is not None and started == (row.owner_started or started)


def process_mark() -> str:
    """This process in a line, for places that hold no row of ours: host, number and start."""
    owner = Owner.current()
    return f"{owner.host}|{owner.pid}|{owner.started}"


def marked_alive(mark: str) -> bool | None:
    """Whether the process of a `process_mark` is still there; None if it is not one of this host: nobody here knows."""
    host, _, rest = mark.partition("|")
    pid, _, started = rest.partition("|")
    if host != this_host() or not (pid.isascii() and pid.isdigit()):
        return None
    return str(process_start(int(pid)) or 0.0) == started


def process_start(pid: int) -> float | None:
    """When process `pid` of this machine started, in ticks since boot (unmoved by clock changes); None if it is gone.

    Numbers are used again, so number and start together name a process. A zombie is gone: it works on nothing.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None if Path("/proc/self/stat").exists() else _start_without_proc(pid)
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else float(fields[19])


def _start_without_proc(pid: int) -> float | None:
    """Systems without /proc: only whether the number is in use."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0.0


def claim(row: Stage | Job, owner: Owner, job_id: str) -> None:
    """Make `owner` the one that works on `row`. Raises StageBusyError while another living owner has it."""
    if row.state == State.RUNNING:
        if row.owner == owner.id:
            return
        if owner_alive(row):
            raise busy(row)
        abandon(row)
    move(row, State.RUNNING)
    row.owner, row.owner_host, row.owner_pid, row.owner_started = owner.id, owner.host, owner.pid, owner.started
    row.started, row.ended, row.message, row.hint = _now(row), None, "", ""
    row.lease_until = row.started + LEASE_SECONDS
    if isinstance(row, Stage):
        row.job_id = job_id
        row.attempts += 1


def release(row: Stage | Job, to: State, message: str = "", hint: str = "") -> None:
    """End this attempt at `row`."""
    move(row, to)
    row.ended = _now(row)
    row.seconds += max(0.0, row.ended - (row.started or row.ended))
    row.owner = row.lease_until = None
    row.message, row.hint = message, hint


def abandon(row: Stage | Job) -> None:
    """The owner died: the row is interrupted, as of its last sign of life."""
    now = _now(row)
    last_sign = min(now, (row.lease_until or now) - LEASE_SECONDS)
    release(row, State.INTERRUPTED, "the process that ran it has died", "Submit again: it goes on from its checkpoint.")
    row.seconds += min(0.0, last_sign - (row.ended or last_sign))
    row.seconds, row.ended = max(0.0, row.seconds), last_sign


def busy(row: Stage | Job) -> StageBusyError:
    """The error for a row that another living process holds; names it."""
    job = row.id if isinstance(row, Job) else row.job_id
    host = (row.owner_host or "").split(" ")[0]
    by = (
        f"process {row.owner_pid} on {host}"
        if isinstance(row, Job)
        else f"job {job}, process {row.owner_pid} on {host}"
    )
    return StageBusyError(
        f"{row!r} is being run by {by}",
        f"Wait for it (lavatar jobs show {job}), or end it (kill {row.owner_pid}) and submit again: "
        "what is done is kept.",
    )


def taken_over(what: str) -> JobError:
    """The error of an owner that finds another one in its place."""
    return JobError(
        f"another process has taken {what} over: this one gave no sign of life for too long",
        "Look at it with: lavatar jobs list",
    )


def heartbeat(session: Session, owner: Owner) -> int:
    """Renew every lease of `owner`; how many rows it still holds."""
    held, until = 0, database_now(session) + LEASE_SECONDS
    for table in (Stage, Job):
        statement = update(table).where(table.owner == owner.id, table.state == State.RUNNING.value)
        held += session.execute(statement.values(lease_until=until)).rowcount  # type: ignore[attr-defined]
    return held


def _now(row: Leased) -> float:
    session = object_session(row)
    assert session is not None, "leases are looked at inside a transaction"
    return database_now(session)

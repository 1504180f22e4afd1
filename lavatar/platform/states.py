"""The states of stages and jobs and the moves between them: one enum, one table.

pending ──► running ──► finished ──► pending   (its files were deleted: it has to be done again)
              │  ▲
              │  └──── failed, interrupted      (a submit tries again; training goes on from its checkpoint)
              └─────►  failed, interrupted      (interrupted: Ctrl-C, or the owner died)

A job may also be cancelled, from any state but finished, and taken up again; its stages are then interrupted. One that
ended without a result and was handed to a cluster is pending until the cluster begins with it, or interrupted where
that is gone.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

from lavatar.errors import JobError


class State(StrEnum):
    """Of a stage or a job."""

    PENDING = "pending"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    CANCELLED = "cancelled"


ALLOWED: dict[State, frozenset[State]] = {
    State.PENDING: frozenset({State.RUNNING, State.CANCELLED, State.INTERRUPTED}),
    State.RUNNING: frozenset({State.FINISHED, State.FAILED, State.INTERRUPTED, State.CANCELLED}),
    State.FINISHED: frozenset({State.PENDING}),
    State.FAILED: frozenset({State.RUNNING, State.CANCELLED, State.PENDING}),
    State.INTERRUPTED: frozenset({State.RUNNING, State.CANCELLED, State.PENDING}),
    State.CANCELLED: frozenset({State.RUNNING, State.PENDING}),
}


class HasState(Protocol):
    state: str


def move(row: HasState, to: State) -> None:
    """Put `row` into state `to`. The caller holds the row in a write transaction. Raises JobError if not allowed."""
    now = State(row.state)
    if to not in ALLOWED[now]:
        allowed = ", ".join(sorted(ALLOWED[now]))
        raise JobError(
            f"{row!r} is {now} and cannot become {to} (from here: {allowed})",
            "Another process has changed it in the meantime; look at it with: lavatar jobs list",
        )
    row.state = to.value

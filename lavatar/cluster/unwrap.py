"""From Ray's wrappers of errors back to ours."""

from __future__ import annotations

from pathlib import Path

import ray

from lavatar.cluster.memory import killed, killed_by_ray
from lavatar.errors import Interrupted, LavatarError, StageFailedError


def cause_of(error: BaseException, log: Path) -> LavatarError:
    """The LavatarError that a worker raised, as it was; anything else as an error that names the log."""
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        while isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause
        if isinstance(cause, LavatarError):
            return cause
        if isinstance(cause, ray.exceptions.TaskCancelledError | KeyboardInterrupt):
            return _stopped()
        if killed_by_ray(cause):
            return killed("Ray killed a process of this stage")
        return StageFailedError(f"{type(cause).__name__}: {_first_line(cause)}", _hint(log))
    if isinstance(error, ray.exceptions.TaskCancelledError):
        return _stopped()
    if killed_by_ray(error):
        return killed("Ray killed a process of this stage")
    if isinstance(error, ray.exceptions.WorkerCrashedError | ray.exceptions.RayActorError):
        return StageFailedError("a worker process died", _hint(log))
    return StageFailedError(f"{type(error).__name__}: {_first_line(error)}", _hint(log))


def _stopped() -> Interrupted:
    return Interrupted("the stage was stopped", "Repeat the command to go on.")


def _hint(log: Path) -> str:
    return f"What its processes printed is in {log}."


def _first_line(error: BaseException | None) -> str:
    text = str(error).strip()
    return text.splitlines()[-1] if text else "no message"

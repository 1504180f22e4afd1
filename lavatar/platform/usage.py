"""What of a home is in use and what is needed: mending leaves the one alone, freeing the other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import exists, select
from sqlalchemy.orm import Session, aliased

from lavatar.errors import StageBusyError
from lavatar.platform.home import Home, alone_in
from lavatar.platform.leases import owner_alive
from lavatar.platform.registry import Registry
from lavatar.platform.states import State
from lavatar.platform.tables import Job, JobStage, Stage


@dataclass(frozen=True)
class Usage:
    """`busy`: stages that living processes make or read, and by whom. `others`: a command that is no job works in the
    home (evaluate, benchmark, …), on any of it."""

    busy: Mapping[str, str]
    others: bool

    def user_of(self, key: str | None) -> str | None:
        """Who makes or reads the stage now; None for `key`: who works in the home."""
        if self.others:
            return "another command of this home"
        return self.busy.get(key) if key else next(iter(self.busy.values()), None)

    def require_free(self, key: str | None) -> None:
        """Raises StageBusyError while somebody uses the stage."""
        user = self.user_of(key)
        if user:
            raise StageBusyError(f"{user} uses it", "Try again when that has ended.")


def usage_of(home: Home, registry: Registry) -> Usage:
    """Who uses what at this moment."""
    with undisturbed(home, registry) as usage:
        return usage


@contextmanager
def undisturbed(home: Home, registry: Registry) -> Iterator[Usage]:
    """Who uses what. While this lasts no command begins to work in the home that is no job."""
    with alone_in(home) as alone:
        with registry.read() as session:
            busy = busy_stages(session)
        yield Usage(busy, not alone)


def busy_stages(session: Session) -> dict[str, str]:
    """Keys of the stages that living processes make or read, and who that is."""
    running = State.RUNNING.value
    jobs = [job.id for job in session.scalars(select(Job).where(Job.state == running)) if owner_alive(job)]
    links = session.execute(select(JobStage.stage_key, JobStage.job_id).where(JobStage.job_id.in_(jobs)))
    busy = {key: f"job {job}" for key, job in links}
    for stage in session.scalars(select(Stage).where(Stage.state == running)):
        if owner_alive(stage):
            busy.setdefault(stage.key, f"job {stage.job_id}")
    begun = select(Stage.key, Stage.warm).where(Stage.key.in_(list(busy)), Stage.warm.is_not(None))
    return busy | {warm: busy[key] for key, warm in session.execute(begun).all() if warm}


def needed(session: Session, key: str) -> bool:
    """Whether a job consists of the stage, or a pair of a job began at it (its key cannot be told without)."""
    begun = aliased(Stage)
    linked = exists().where(JobStage.stage_key == key)
    start = exists().where(begun.warm == key, JobStage.stage_key == begun.key)
    return bool(session.scalar(select(linked | start)))


def unneeded(session: Session) -> list[Stage]:
    """Stages that no job needs and no living process works on."""
    begun = aliased(Stage)
    linked = select(JobStage.stage_key)
    starts = select(begun.warm).where(begun.warm.is_not(None), begun.key.in_(linked))
    rows = session.scalars(select(Stage).where(Stage.key.not_in(linked), Stage.key.not_in(starts)).order_by(Stage.name))
    return [row for row in rows if row.state != State.RUNNING.value or not owner_alive(row)]


def benchmarked(home: Home) -> set[str]:
    """Keys of the stages whose results the benchmarks in the home show."""
    keys: set[str] = set()
    for path in (home.root / "outputs").glob("*/runs/*.json"):
        keys |= _named(path)
    return keys


def _named(path: Path) -> set[str]:
    """The stages in a row of a benchmark."""
    try:
        row = json.loads(path.read_text())
        parts = [part for name in ("release", "dataset") for part in Path(row[name]).parts]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return set(parts)

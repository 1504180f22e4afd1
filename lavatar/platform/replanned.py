"""The plan of a job that was stored, of whatever kind: of pairs, or what the trials of a sweep need."""

from __future__ import annotations

from lavatar.errors import JobError
from lavatar.platform import lookup, sweeps
from lavatar.platform.home import Home
from lavatar.platform.planned import person, stored_plan
from lavatar.platform.planning import Plan
from lavatar.platform.preparing import prepare
from lavatar.platform.registry import Registry
from lavatar.platform.subjects import get_subject
from lavatar.platform.tables import Job, Subject


def plan_again(home: Home, registry: Registry, job: Job) -> tuple[Plan, list[Subject]]:
    """The job's plan, and its people. Raises JobError where it would be another today, DataError for a sweep that is
    damaged."""
    if lookup.job_pairs(registry, job.id):
        return stored_plan(home, registry, job)
    folder = sweeps.folder_of(home, job.id)
    if not (folder / sweeps.DEFINITION).exists():
        raise JobError(
            f"job {job.id} is what the trials of a sweep needed, and that sweep is gone", "Sweep again: lavatar sweep"
        )
    sweep = sweeps.read(folder)
    people = [get_subject(registry, name) for name in (sweep.avatar, sweep.actor) if name]
    if tuple(each.digest for each in people) != sweep.digests:
        raise JobError(f"a subject of sweep {job.id} is another video now", "Sweep again with the new one.")
    if sweep.id != job.id:
        raise JobError(f"sweep {job.id} was made by another lavatar: today it is another", "Sweep again.")
    avatar, actor = person(people[0]), person(people[1]) if sweep.actor else None
    return prepare(home, sweep.id, avatar, actor, sweep.base()), people

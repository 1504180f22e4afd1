"""From registered subjects to a plan: of what a command line names, and of a job that was stored."""

from __future__ import annotations

from collections.abc import Sequence

from lavatar.configs.recipe import Recipe
from lavatar.contracts import StageKind
from lavatar.errors import JobError
from lavatar.platform import lookup
from lavatar.platform.finished import command_of, recipe_of
from lavatar.platform.home import Home
from lavatar.platform.planning import Person, Plan, plan
from lavatar.platform.registry import Registry
from lavatar.platform.sharing import plan_shared
from lavatar.platform.subjects import get_subject, source_of
from lavatar.platform.tables import Job, Subject
from lavatar.platform.warm import WarmChoice


def make_plan(
    home: Home, registry: Registry, pairs: Sequence[tuple[Subject, Subject]], recipe: Recipe, shared: bool
) -> Plan:
    """The stages of a job of these (avatar, actor); `shared`: of one network for all of their avatars and actors."""
    planned = [(person(avatar), person(actor)) for avatar, actor in pairs]
    if shared:
        avatars, actors = ([pair[side] for pair in planned] for side in (0, 1))
        return plan_shared(home.root, home.out_dir, avatars, actors, recipe)
    return plan(home.root, home.out_dir, planned, recipe, WarmChoice(registry, home, recipe))


def stored_plan(home: Home, registry: Registry, job: Job) -> tuple[Plan, list[Subject]]:
    """The plan of a job that was submitted before, and its people. Raises JobError where it would be another today."""
    pairs = lookup.job_pairs(registry, job.id)
    if not pairs:
        raise JobError(f"job {job.id} is what a sweep needs first", f"Take up the sweep: lavatar sweep resume {job.id}")
    digests = {name: digest for p in pairs for name, digest in ((p.avatar, p.avatar_digest), (p.actor, p.actor_digest))}
    people = {name: get_subject(registry, name) for name in digests}
    anew = f"Submit it anew: {command_of(registry, job)}"
    for name, subject in people.items():
        if subject.digest != digests[name]:
            raise JobError(f"{name!r} is another video than when job {job.id} was submitted", anew)
    shared = any(view.stage.kind == StageKind.SHARED for view in lookup.job_stages(registry, job.id))
    named = [(people[pair.avatar], people[pair.actor]) for pair in pairs]
    found = make_plan(home, registry, named, recipe_of(registry, job), shared)
    if found.job_id != job.id:
        raise JobError(f"job {job.id} was made by another lavatar, or with other weights: today it is another", anew)
    return found, list(people.values())


def person(subject: Subject) -> Person:
    """A registered subject as planning wants it."""
    video = subject.video or {}
    frames = video.get("frames") or round((video.get("duration") or 0) * (video.get("fps") or 0))  # WebM has no count
    return Person(subject.name, subject.digest, source_of(subject), frames or None)

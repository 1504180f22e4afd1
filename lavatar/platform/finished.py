"""What finished jobs left: the newest models and datasets of an avatar or a pair, for reenact and evaluate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lavatar.configs.recipe import Recipe
from lavatar.contracts import StageKind
from lavatar.errors import JobError
from lavatar.platform import lookup
from lavatar.platform.home import Home
from lavatar.platform.planning import pair_release, release_dir
from lavatar.platform.registry import Registry
from lavatar.platform.subjects import find_subject, get_subject
from lavatar.platform.tables import Job, Stage


@dataclass(frozen=True)
class Finished:
    """Folders of one job's results; `pair` and `actor_data` are None when only the avatar was asked for."""

    job: str
    recipe: Recipe
    avatar: Path
    avatar_data: Path
    pair: Path | None = None
    actor_data: Path | None = None


def find_avatar(registry: Registry, home: Home, avatar: str) -> Finished:
    """The avatar's newest model. Raises JobError, saying what to submit, when there is none."""
    stage, job = _newest(registry, home, (StageKind.AVATAR,), avatar, None)
    data = home.absolute(_data(registry, job, avatar).out_dir)
    return Finished(job.id, recipe_of(registry, job), release_dir(home.absolute(stage.out_dir)), data)


def find_pair(registry: Registry, home: Home, avatar: str, actor: str) -> Finished:
    """The pair's newest model with the avatar it was trained for."""
    stage, job = _newest(registry, home, (StageKind.PAIR, StageKind.SHARED), avatar, actor)
    views = lookup.job_stages(registry, job.id)
    head = next(v.stage for v in views if v.name == f"{StageKind.AVATAR.value}:{avatar}")
    data_a, data_b = _data(registry, job, avatar), _data(registry, job, actor)
    return Finished(
        job.id,
        recipe_of(registry, job),
        release_dir(home.absolute(head.out_dir)),
        home.absolute(data_a.out_dir),
        pair_release(StageKind(stage.kind), home.absolute(stage.out_dir), data_a.key, data_b.key),
        home.absolute(data_b.out_dir),
    )


def _newest(
    registry: Registry, home: Home, kinds: tuple[StageKind, ...], avatar: str, actor: str | None
) -> tuple[Stage, Job]:
    digests: dict[str, str | None] = {}
    for name in (avatar, actor):
        subject = find_subject(registry, name) if name else None
        digests[name or ""] = subject.digest if subject else None
    for stage in lookup.latest_stages(registry, kinds, avatar, actor, digests):
        job = lookup.job_of(registry, stage.key, avatar, actor)
        if job is not None and released(home, stage):
            return stage, job
    for name in (avatar, actor):
        if name and not lookup.names_known(registry, name):
            get_subject(registry, name)  # raises, naming the nearest
    what = f"avatar {avatar!r}" if actor is None else f"avatar {avatar!r} driven by {actor!r}"
    raise JobError(
        f"there is no finished model of {what}", f"Make it: lavatar submit --avatar {avatar} --actor {actor or 'ACTOR'}"
    )


def released(home: Home, stage: Stage) -> bool:
    """Whether the model of a finished stage is still there: in the store, else in the home."""
    store = home.store()
    return bool(store.finished([stage.key])) if store else release_dir(home.absolute(stage.out_dir)).is_dir()


def _data(registry: Registry, job: Job, subject: str) -> Stage:
    """The stage of the subject's dataset in this job; two names of one video share it."""
    views = [v for v in lookup.job_stages(registry, job.id) if v.stage.kind == StageKind.PREPROCESS]
    return next((v for v in views if v.name == f"preprocess:{subject}"), views[0]).stage


def recipe_of(registry: Registry, job: Job) -> Recipe:
    """The job's recipe as it was stored; sections and keys that this lavatar no longer knows are left out.

    JobError where what is left no longer means anything to it.
    """
    try:
        return Recipe.model_validate(_known(job.recipe, Recipe))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "recipe"
        raise JobError(
            f"job {job.id} was made by another lavatar: {where} of its recipe does not fit ({first['msg']})",
            f"Make it again: {command_of(registry, job)}",
        ) from error


def command_of(registry: Registry, job: Job) -> str:
    """What submits these people again."""
    pairs = lookup.job_pairs(registry, job.id)
    avatars, actors = (list(dict.fromkeys(getattr(pair, role) for pair in pairs)) for role in ("avatar", "actor"))
    shared = any(view.stage.kind == StageKind.SHARED for view in lookup.job_stages(registry, job.id))
    every = {(avatar, actor) for avatar in avatars for actor in actors if avatar != actor}
    if every != {(pair.avatar, pair.actor) for pair in pairs}:
        return "lavatar submit --pairs FILE.yaml"
    words = [*(f"--avatar {name}" for name in avatars), *(f"--actor {name}" for name in actors)]
    return " ".join(["lavatar submit", *(["--shared"] if shared else []), *words])


def _known(values: Mapping[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    """What of `values` the section has keys for, and the same in the sections below it."""
    kept: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if name not in values:
            continue
        value, below = values[name], field.annotation
        if isinstance(value, Mapping) and isinstance(below, type) and issubclass(below, BaseModel):
            value = _known(value, below)
        kept[name] = value
    return kept

"""What finished jobs left: the models and datasets of an avatar or a pair, for reenact and evaluate (choosing.py)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    """Folders of one job's results, and the key of the stage that trained the model; `pair` and `actor_data` are None
    when only the avatar was asked for. An imported model has no datasets: nothing but `evaluate` needs them."""

    job: str
    recipe: Recipe
    avatar: Path
    avatar_data: Path | None
    pair: Path | None = None
    actor_data: Path | None = None
    stage: str = ""


@dataclass(frozen=True)
class Only:
    """Of the models of an avatar or a pair: the one that this stage trained, those of this job."""

    stage: str | None = None
    job: Job | None = None


ANY = Only()


def find_avatar(registry: Registry, home: Home, avatar: str, *, frames: bool = False, only: Only = ANY) -> Finished:
    """The avatar's newest model; with `frames` one that was trained here comes before one that was imported. Raises
    JobError, saying what to submit, when there is none."""
    stage, job = _newest(registry, home, (StageKind.AVATAR,), avatar, None, frames, only)
    data = stage_in(registry, job, StageKind.PREPROCESS, avatar)
    return Finished(
        job.id,
        recipe_of(registry, job),
        release_dir(home.absolute(stage.out_dir)),
        _folder(home, data),
        stage=stage.key,
    )


def find_pair(
    registry: Registry, home: Home, avatar: str, actor: str, *, frames: bool = False, only: Only = ANY
) -> Finished:
    """The pair's newest model with the avatar it was trained for; `frames` as above."""
    stage, job = _newest(registry, home, (StageKind.PAIR, StageKind.SHARED), avatar, actor, frames, only)
    head = stage_in(registry, job, StageKind.AVATAR, avatar)
    assert head is not None, f"job {job.id} has no avatar {avatar}"
    data_a, data_b = (stage_in(registry, job, StageKind.PREPROCESS, name) for name in (avatar, actor))
    keys = (data_a.key, data_b.key) if data_a and data_b else ("", "")
    return Finished(
        job.id,
        recipe_of(registry, job),
        release_dir(home.absolute(head.out_dir)),
        _folder(home, data_a),
        pair_release(StageKind(stage.kind), home.absolute(stage.out_dir), *keys),
        _folder(home, data_b),
        stage.key,
    )


def _newest(
    registry: Registry,
    home: Home,
    kinds: tuple[StageKind, ...],
    avatar: str,
    actor: str | None,
    frames: bool,
    only: Only,
) -> tuple[Stage, Job]:
    imported: tuple[Stage, Job] | None = None
    for stage, job in _trained(registry, kinds, avatar, actor, only):
        if released(home, stage):
            if not frames or stage_in(registry, job, StageKind.PREPROCESS, avatar):
                return stage, job
            imported = imported or (stage, job)
    if imported:
        return imported
    for name in (avatar, actor):
        if name and not lookup.names_known(registry, name):
            get_subject(registry, name)  # raises, naming the nearest
    what = f"avatar {avatar!r}" if actor is None else f"avatar {avatar!r} driven by {actor!r}"
    raise JobError(
        f"there is no finished model of {what}", f"Make it: lavatar submit --avatar {avatar} --actor {actor or 'ACTOR'}"
    )


def _trained(
    registry: Registry, kinds: tuple[StageKind, ...], avatar: str, actor: str | None, only: Only
) -> Iterator[tuple[Stage, Job]]:
    """The finished stages that trained such models, the newest first, each with a job that has it under these names."""
    digests: dict[str, str | None] = {}
    for name in (avatar, actor):
        subject = find_subject(registry, name) if name else None
        digests[name or ""] = subject.digest if subject else None
    for stage in lookup.latest_stages(registry, kinds, avatar, actor, digests):
        if only.stage in (None, stage.key):
            job = lookup.job_of(registry, stage.key, avatar, actor, only.job.id if only.job else None)
            if job is not None:
                yield stage, job


def released(home: Home, stage: Stage) -> bool:
    """Whether the model of a finished stage is still there: in the store, else in the home."""
    store = home.store()
    return bool(store.finished([stage.key])) if store else release_dir(home.absolute(stage.out_dir)).is_dir()


def stage_in(registry: Registry, job: Job, kind: StageKind, avatar: str, actor: str | None = None) -> Stage | None:
    """The stage of that kind of a subject, or of a pair, of this job: it may have the names of others with the same
    videos."""
    digests: dict[str, str] = {}
    for pair in lookup.job_pairs(registry, job.id):
        digests |= {pair.avatar: pair.avatar_digest, pair.actor: pair.actor_digest}
    same = {name: [other for other in digests if digests[other] == digests.get(name)] for name in (avatar, actor or "")}
    ends = same[avatar] if actor is None else [f"{a}<-{b}" for a in same[avatar] for b in same[actor]]
    names = {f"{kind.value}:{end}" for end in ends}
    return next((view.stage for view in lookup.job_stages(registry, job.id) if view.name in names), None)


def _folder(home: Home, stage: Stage | None) -> Path | None:
    return home.absolute(stage.out_dir) if stage else None


def recipe_of(registry: Registry, job: Job) -> Recipe:
    """The job's recipe as it was stored; sections and keys that this lavatar no longer knows are left out.

    JobError where what is left no longer means anything to it.
    """
    return known_recipe(job.recipe, f"job {job.id}", f"Make it again: {command_of(registry, job)}")


def known_recipe(values: Mapping[str, Any], whose: str, hint: str) -> Recipe:
    """A recipe that was kept, without the keys that this lavatar no longer knows. JobError where that means nothing."""
    try:
        return read_recipe(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "recipe"
        raise JobError(
            f"{whose} was made by another lavatar: {where} of its recipe does not fit ({first['msg']})", hint
        ) from error


def read_recipe(values: Mapping[str, Any]) -> Recipe:
    """The recipe that was stored so, perhaps by another lavatar: what this one does not know is left out.

    Raises ValidationError where what is left means nothing to it.
    """
    return Recipe.model_validate(_known(values, Recipe))


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

"""A job that makes what all trials of a sweep need first: datasets, and for the pair's trials the avatar."""

from __future__ import annotations

from dataclasses import dataclass

from lavatar.configs.recipe import Recipe
from lavatar.contracts import StageKind
from lavatar.platform.home import Home
from lavatar.platform.planning import Builder, Person, Plan, PlannedStage, require_two
from lavatar.platform.titles import NOBODY


@dataclass(frozen=True)
class Preparation(Plan):
    """A plan without pairs. `swept` is the stage that the trials vary, which is no part of it."""

    owner: Person
    driver: Person | None
    swept: PlannedStage

    @property
    def avatar(self) -> str:
        return self.owner.name

    @property
    def actor(self) -> str:
        return self.driver.name if self.driver else NOBODY

    @property
    def people(self) -> dict[str, Person]:
        return {f"preprocess:{person.name}": person for person in (self.owner, self.driver) if person}


def prepare(home: Home, job_id: str, avatar: Person, actor: Person | None, recipe: Recipe) -> Preparation:
    """For a sweep of the avatar, or with an actor of the pair. Raises UsageError, ConfigError."""
    builder = Builder(home.root, home.out_dir, recipe)
    data = builder.preprocess(avatar)
    head = builder.avatar(avatar, data)
    if actor is None:
        return Preparation(job_id, (), recipe, (data,), avatar, None, head)
    require_two(avatar, actor)
    other = builder.preprocess(actor)
    pair = builder.pair(avatar, actor, data, other, head, None)
    stages = {stage.key: stage for stage in (data, other, head)}  # two names of one video share a stage
    return Preparation(job_id, (), recipe, tuple(stages.values()), avatar, actor, pair)


def kind_of(actor: object) -> StageKind:
    """Of the stage that a sweep varies."""
    return StageKind.AVATAR if actor is None else StageKind.PAIR

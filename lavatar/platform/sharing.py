"""From many subjects and a recipe to the stages of a job whose pairs share one Y-network (Sec. 7).

Instead of a Y-network a pair there is one, with a decoder for each subject, and one mapping MLP for each avatar. Every
avatar is driven by every actor but itself. The order in which people are named changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavatar.configs.recipe import Recipe
from lavatar.contracts import StageKind
from lavatar.errors import ConfigError, UsageError
from lavatar.platform.planning import (
    Builder,
    Person,
    Plan,
    PlannedPair,
    PlannedStage,
    by_name,
    digest,
    label,
    listed,
    release_dir,
)


def plan_shared(
    home_root: Path, out_dir: Any, avatars: Sequence[Person], actors: Sequence[Person], recipe: Recipe
) -> Plan:
    """The stages of `avatars` driven by `actors`. Raises UsageError, ConfigError."""
    heads_of, drivers = by_name(avatars), by_name(actors)
    people = by_name([*avatars, *actors])
    pairs = [(a, b) for a in heads_of.values() for b in drivers.values() if a.name != b.name]
    if not pairs:
        raise UsageError(f"avatar and actor are both {listed(list(people))!r}", "Name at least two subjects.")
    if recipe.mapping.joint:
        raise ConfigError(
            f"recipe {recipe.name} trains the mapping with the Y-network of one pair (mapping.joint=true)",
            "A shared network has one mapping an avatar, trained after it: --set mapping.joint=false",
        )
    builder = Builder(home_root, out_dir, recipe)
    data = {name: builder.preprocess(person) for name, person in people.items()}
    require_one_name_each(data)
    heads = {name: builder.avatar(avatar, data[name]) for name, avatar in heads_of.items()}
    shared = _shared(builder, data, heads, drivers, people)
    planned = tuple(
        PlannedPair(a, b, heads[a.name], shared, _preview(builder, a, b, data, heads, shared)) for a, b in pairs
    )
    stages = (*data.values(), *heads.values(), shared, *(pair.preview for pair in planned))
    job_id = digest("job", list(heads_of), list(drivers), [pair.preview.key for pair in planned])[:10]
    return Plan(job_id, planned, recipe, stages)


def require_one_name_each(data: Mapping[str, PlannedStage]) -> None:
    """Raises UsageError for two names of one video: the network has one decoder for both."""
    names: dict[str, str] = {}
    for name, stage in data.items():
        first = names.setdefault(stage.key, name)
        if first != name:
            raise UsageError(f"{first!r} and {name!r} are the same video", f"Leave {name!r} out.")


def _shared(
    builder: Builder,
    data: Mapping[str, PlannedStage],
    heads: Mapping[str, PlannedStage],
    actors: Mapping[str, Person],
    people: Mapping[str, Person],
) -> PlannedStage:
    """The one network of all. Subjects are told apart by their data's keys, as these are in the stage's key."""
    needs = {f"avatar_dataset/{label(data[name].key)}": data[name] for name in heads}
    needs |= {f"avatar/{label(data[name].key)}": head for name, head in heads.items()}
    needs |= {f"actor_dataset/{label(data[name].key)}": data[name] for name in actors}
    key = builder.key(StageKind.SHARED, {role: stage.key for role, stage in needs.items()}, ())
    inputs = {
        role: release_dir(stage.spec.out_dir) if stage.spec.kind is StageKind.AVATAR else stage.spec.out_dir
        for role, stage in sorted(needs.items())
    }
    sources = {label(data[name].key): person.source for name, person in people.items()}
    return builder.stage(
        StageKind.SHARED, f"shared:{listed(list(people))}", key, inputs, (*data.values(), *heads.values()), sources, ()
    )


def _preview(
    builder: Builder,
    avatar: Person,
    actor: Person,
    data: Mapping[str, PlannedStage],
    heads: Mapping[str, PlannedStage],
    shared: PlannedStage,
) -> PlannedStage:
    return builder.preview(avatar, actor, data[avatar.name], data[actor.name], heads[avatar.name], shared)

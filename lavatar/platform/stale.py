"""Pairs whose avatar was retrained, and the jobs that bring them up to date.

Such a job trains the pair for the champion of its avatar: what a pair's stage depends on is of the recipe of the pair's
newest version, what an avatar's depends on is of the champion's, so that the avatar itself is found finished. Pairs of
one such recipe are one job. A shared network is trained again as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lavatar.configs.recipe import Recipe
from lavatar.contracts import StageKind
from lavatar.errors import JobError, LavatarError
from lavatar.platform import lookup
from lavatar.platform.catalogue import Catalogue, Registered, Version
from lavatar.platform.finished import known_recipe
from lavatar.platform.home import Home
from lavatar.platform.jsonable import mapping
from lavatar.platform.lineage import SECTIONS_TAG, SHARED_TAG
from lavatar.platform.modelregistry import CHAMPION, STAGE_TAG, avatar_model_name
from lavatar.platform.planned import make_plan
from lavatar.platform.planning import SECTIONS, Plan
from lavatar.platform.registry import Registry
from lavatar.platform.subjects import get_subject
from lavatar.platform.tables import Subject

Names = tuple[str, str]


@dataclass(frozen=True)
class Renewal:
    """A job that brings pairs up to date."""

    plan: Plan
    people: tuple[Subject, ...]


@dataclass
class Renewals:
    """Of all stale pairs: the jobs, and which pairs have none, with the reason."""

    jobs: list[Renewal] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def renewals(home: Home, registry: Registry, catalogue: Catalogue) -> Renewals:
    """What brings every stale pair up to date."""
    found = Renewals()
    groups: dict[tuple[str, str], list[Names]] = {}
    for model in catalogue.models.values():
        if model.stale and model.pair:
            try:
                recipe, job_id = _recipe(catalogue, model), _network(registry, model)
                groups.setdefault((recipe.model_dump_json(), job_id), []).append(model.pair)
            except LavatarError as error:
                found.left[_text(model.pair)] = f"{error.message}. {error.hint}"
    for (text, job_id), pairs in sorted(groups.items()):
        recipe = Recipe.model_validate_json(text)
        if job_id:
            every = [(pair.avatar, pair.actor) for pair in lookup.job_pairs(registry, job_id)]
            _plan_shared(home, registry, catalogue, recipe, every, found)
        else:
            _plan_pairs(home, registry, catalogue, recipe, pairs, found)
    return found


def _plan_pairs(
    home: Home, registry: Registry, catalogue: Catalogue, recipe: Recipe, pairs: Sequence[Names], found: Renewals
) -> None:
    """One job of those of them that would get the avatar that is wanted."""
    good: list[tuple[Subject, Subject]] = []
    for names in pairs:
        try:
            people = _people(registry, names)
            _require_champion(catalogue, make_plan(home, registry, [people], recipe, False))
            good.append(people)
        except LavatarError as error:
            found.left[_text(names)] = f"{error.message}. {error.hint}"
    if good:
        found.jobs.append(Renewal(make_plan(home, registry, good, recipe, False), _each(good)))


def _plan_shared(
    home: Home, registry: Registry, catalogue: Catalogue, recipe: Recipe, pairs: Sequence[Names], found: Renewals
) -> None:
    """The whole network again, if all of its avatars would be the champions."""
    try:
        people = [_people(registry, names) for names in pairs]
        plan = make_plan(home, registry, people, recipe, True)
        _require_champion(catalogue, plan)
        found.jobs.append(Renewal(plan, _each(people)))
    except LavatarError as error:
        found.left.update({_text(names): f"{error.message}. {error.hint}" for names in pairs})


def _recipe(catalogue: Catalogue, model: Registered) -> Recipe:
    """The pair's own, with the avatar's sections of its avatar's champion."""
    assert model.pair is not None
    champion = catalogue.models[avatar_model_name(model.pair[0])].under(CHAMPION)
    assert champion is not None, "a pair is stale beside a champion alone"
    own, avatars = (_kept(version, model.pair) for version in (model.versions[0], champion))
    sections = (*SECTIONS[StageKind.PREPROCESS], *SECTIONS[StageKind.AVATAR])
    return own.model_copy(update={section: getattr(avatars, section) for section in sections})


def _kept(version: Version, pair: Names) -> Recipe:
    """The recipe that a version was made with."""
    anew = f"Submit the pair anew: lavatar submit --avatar {pair[0]} --actor {pair[1]}"
    sections = mapping(version.tags.get(SECTIONS_TAG))
    if not sections:
        raise JobError(f"{version.name} version {version.number} does not say by which recipe it was made", anew)
    return known_recipe(sections, f"{version.name} version {version.number}", anew)


def _network(registry: Registry, model: Registered) -> str:
    """The job whose shared network the pair's newest version is of; "" for a pair of its own."""
    assert model.pair is not None
    newest = model.versions[0]
    if SHARED_TAG not in newest.tags:
        return ""
    job = lookup.job_of(registry, newest.tags[STAGE_TAG], *model.pair)
    if job is None:
        raise JobError(
            "the job of its shared network was deleted, so nothing says who else was in it",
            "Submit it anew: lavatar submit --shared --avatar A … --actor B …",
        )
    return job.id


def _require_champion(catalogue: Catalogue, plan: Plan) -> None:
    """JobError where a job would train another avatar than the champion, and so leave its pairs stale."""
    for pair in plan.pairs:
        model = catalogue.models.get(avatar_model_name(pair.avatar.name))
        champion = model.under(CHAMPION) if model else None
        if champion and champion.tags.get(STAGE_TAG) != pair.head.key:
            raise JobError(
                f"the champion {champion.uri} would be made anew as another avatar: its video, the weights or lavatar "
                "itself are others today",
                f"Submit the avatar anew, or promote another of its versions: lavatar models promote {champion.name}/N",
            )


def _people(registry: Registry, names: Names) -> tuple[Subject, Subject]:
    return get_subject(registry, names[0]), get_subject(registry, names[1])


def _each(pairs: Sequence[tuple[Subject, Subject]]) -> tuple[Subject, ...]:
    return tuple({subject.name: subject for pair in pairs for subject in pair}.values())


def _text(pair: Names) -> str:
    return f"{pair[0]}<-{pair[1]}"

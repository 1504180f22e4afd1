"""The registered models as one picture: versions, aliases, lineage, what is stale and what depends on what.

A pair's version is stale if the champion of its avatar is another stage than the one that it was trained with: it still
shows the old avatar. A pair is stale if all of its versions are; a new version brings it up to date (stale.py).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lavatar.contracts import StageKind
from lavatar.errors import JobError, UsageError
from lavatar.platform.champions import FIGURE_TAG, figure, history
from lavatar.platform.lineage import AVATAR_STAGE_TAG, DECIDED_BY_TAG, PARENT_TAG
from lavatar.platform.modelregistry import (
    ACTOR_TAG,
    AVATAR_TAG,
    CHAMPION,
    STAGE_TAG,
    avatar_model_name,
    pair_model_name,
)
from lavatar.platform.runs import pages

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

LATEST = "latest"
OURS = ("lavatar-avatar-", "lavatar-pair-")
_REFERENCE = re.compile(r"(?:models:/)?(?P<name>[^@/]+)(?:@(?P<alias>[^@/]+)|/(?P<version>[^@/]+))?")


@dataclass(frozen=True)
class Version:
    """One version of a model, with its aliases; `stale` is None where nothing tells: it is no pair's, or is older than
    lineage."""

    name: str
    number: int
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    description: str
    run_id: str
    source: str
    created: float
    stale: bool | None = None

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.number}"

    @property
    def figures(self) -> dict[str, float]:
        paths = sorted(key.removeprefix(FIGURE_TAG) for key in self.tags if key.startswith(FIGURE_TAG))
        return {path: value for path in paths if (value := figure(self.tags, path)) is not None}

    @property
    def deciding(self) -> tuple[str, float | None]:
        """The figure by which it contends for the champion ("" if it was never measured), and its value."""
        path = self.tags.get(DECIDED_BY_TAG, "")
        return path, figure(self.tags, path)


@dataclass(frozen=True)
class Registered:
    """A model with its versions, the newest first."""

    name: str
    tags: Mapping[str, str]
    versions: tuple[Version, ...]

    @property
    def champions(self) -> list[int]:
        """The champions so far that are still there, the newest last."""
        there, champion = {version.number for version in self.versions}, self.under(CHAMPION)
        past = history(self.tags, champion.number if champion else None)
        return [number for number in past if number in there]

    @property
    def pair(self) -> tuple[str, str] | None:
        """Avatar and actor, if it is a pair's."""
        names = self.tags.get(AVATAR_TAG), self.tags.get(ACTOR_TAG)
        return (names[0], names[1]) if names[0] and names[1] else None

    @property
    def stale(self) -> bool:
        """Whether it is a pair of which no version was trained with the champion of its avatar."""
        states = {version.stale for version in self.versions}
        return True in states and False not in states

    @property
    def newest(self) -> Version | None:
        return self.versions[0] if self.versions else None

    def under(self, alias: str) -> Version | None:
        return next((version for version in self.versions if alias in version.aliases), None)


class Catalogue:
    """What the model registry holds of lavatar's models, read once; with `name` of that one alone, and then nothing
    tells whether its versions are stale."""

    def __init__(self, client: MlflowClient, name: str | None = None) -> None:
        self._client = client
        self._wanted = None if name is None else f"name = '{name}'"

    @cached_property
    def models(self) -> dict[str, Registered]:
        """By name."""
        wanted, search = {"filter_string": self._wanted}, self._client
        found = {model.name: model for model in pages(search.search_registered_models, **wanted) if _ours(model.name)}
        versions: dict[str, list[ModelVersion]] = {name: [] for name in found}
        for version in pages(search.search_model_versions, **wanted):
            if version.name in versions:
                versions[version.name].append(version)
        champions = {name: _stage_of_champion(model, versions[name]) for name, model in found.items()}
        return {name: _registered(found[name], versions[name], champions) for name in sorted(found)}

    def model(self, given: str) -> Registered:
        """The model of that name, or of an avatar `A` or a pair `A<-B`. Raises UsageError, naming the nearest."""
        name = full_name(given)
        if name in self.models:
            return self.models[name]
        close = difflib.get_close_matches(name, list(self.models), n=1, cutoff=0.5)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise UsageError(f"there is no registered model {name!r}", f"{hint}See them: lavatar models list")

    def version(self, reference: str) -> Version:
        """What NAME, NAME@ALIAS or NAME/VERSION means; NAME alone the champion, or the newest where none is."""
        name, alias, number = parts(reference)
        model = self.model(name)
        if alias is None and number is None:
            found = model.under(CHAMPION) or model.newest
            if found is None:
                raise JobError(f"{model.name} has no version", "Register one: lavatar submit")
            return found
        found = model.under(alias) if alias else next((v for v in model.versions if v.number == number), None)
        if found is None:
            has = ", ".join(str(version.number) for version in reversed(model.versions)) or "none"
            aliases = ", ".join(f"@{name}" for version in model.versions for name in version.aliases)
            what = f"no alias {alias!r}" if alias else f"no version {number}"
            raise UsageError(f"{model.name} has {what}", f"Its versions are {has}; its aliases {aliases or 'none'}.")
        return found

    def dependents(self, version: Version) -> list[Version]:
        """The pairs' versions that were trained with this version of an avatar."""
        stage = version.tags.get(STAGE_TAG)
        every = [one for model in self.models.values() if model.pair for one in model.versions]
        by_stage = [one for one in every if stage and one.tags.get(AVATAR_STAGE_TAG) == stage]
        return [one for one in by_stage if one.tags.get(PARENT_TAG, "").rpartition("/")[0] in ("", version.name)]


def parts(reference: str) -> tuple[str, str | None, int | None]:
    """Name, alias and version of a reference. Raises UsageError."""
    match = _REFERENCE.fullmatch(reference)
    number = match["version"] if match else None
    if match is None or (number is not None and number != LATEST and not number.isdecimal()):
        raise UsageError(
            f"{reference!r} names no model", "Write NAME, NAME@ALIAS or NAME/VERSION, as lavatar-avatar-anna/2."
        )
    if number == LATEST:
        return match["name"], LATEST, None
    return match["name"], match["alias"], int(number) if number else None


def full_name(given: str) -> str:
    """The registered model's name of an avatar `A`, or of a pair `A<-B`."""
    avatar, arrow, actor = given.partition("<-")
    if arrow:
        return pair_model_name(avatar, actor)
    return given if _ours(given) else avatar_model_name(given)


def to_json(version: Version) -> dict[str, Any]:
    """A version without its card and its tags."""
    path, value = version.deciding
    kind = StageKind.PAIR if version.name.startswith(OURS[1]) else StageKind.AVATAR
    return {
        "name": version.name,
        "version": version.number,
        "kind": kind.value,
        "aliases": list(version.aliases),
        "metric": path or None,
        "value": value,
        "stale": version.stale,
        "created": version.created,
        "uri": version.uri,
    }


def _ours(name: str) -> bool:
    return name.startswith(OURS)


def _stage_of_champion(model: RegisteredModel, versions: list[ModelVersion]) -> str | None:
    number = model.aliases.get(CHAMPION)
    return next((version.tags.get(STAGE_TAG) for version in versions if str(version.version) == str(number)), None)


def _registered(
    model: RegisteredModel, versions: list[ModelVersion], champions: Mapping[str, str | None]
) -> Registered:
    aliases: dict[int, list[str]] = {int(version.version): [] for version in versions}
    if aliases:
        aliases[max(aliases)].append(LATEST)
    for alias, number in sorted(model.aliases.items()):
        aliases.setdefault(int(number), []).append(alias)
    wanted = champions.get(avatar_model_name(model.tags.get(AVATAR_TAG, "")))
    made = [
        Version(
            model.name,
            int(version.version),
            tuple(aliases[int(version.version)]),
            dict(version.tags),
            version.description or "",
            version.run_id or "",
            version.source or "",
            version.creation_timestamp / 1000,
            _stale(version.tags.get(AVATAR_STAGE_TAG), wanted),
        )
        for version in versions
    ]
    return Registered(model.name, dict(model.tags), tuple(sorted(made, key=lambda version: -version.number)))


def _stale(trained_with: str | None, champion: str | None) -> bool | None:
    """None where a version does not say which avatar it was trained with, or the avatar has no champion."""
    return None if not trained_with or not champion else trained_with != champion

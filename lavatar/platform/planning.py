"""From pairs of subjects and a recipe to stages with keys.

A key is the digest of everything the stage's result depends on, and of nothing else: two jobs that need the same stage
have the same key and share one execution. What only says how often or where something is done (logging, checkpoints,
memory, resources) is left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from lavatar.configs.recipe import Recipe
from lavatar.configs.resources import StageResources
from lavatar.contracts import StageKind, StageSpec, VideoSource
from lavatar.datasets.digest import dataset_digest, preprocess_weights
from lavatar.errors import ConfigError, UsageError, WeightsError

METHOD_VERSION: Mapping[StageKind, int] = {
    StageKind.AVATAR: 2,
    StageKind.PAIR: 2,
    StageKind.SHARED: 2,
    StageKind.PREVIEW: 3,
}
"""Raised when the code of a stage comes to give another result from the same configuration. Preprocessing has its
schema version instead (lavatar.datasets.digest.dataset_digest)."""

_PAIR_SECTIONS = ("ynet", "ynet_loss", "ynet_training", "mapping", "mapping_training", "pair_learning")

SECTIONS: Mapping[StageKind, tuple[str, ...]] = {
    StageKind.PREPROCESS: ("preprocess",),
    StageKind.AVATAR: ("avatar", "avatar_loss", "avatar_learning", "avatar_training"),
    StageKind.PAIR: _PAIR_SECTIONS,
    StageKind.SHARED: _PAIR_SECTIONS,
    StageKind.PREVIEW: ("evaluation",),
}
"""The sections of a recipe that each stage depends on beside its inputs."""

KEYLESS_SECTIONS = frozenset({"name", "resources"})
"""What of a recipe changes no result."""

CADENCE = frozenset({"log_every", "picture_every", "checkpoint_every", "cache_mb"})
"""Keys of the training sections that change no result."""

_KEYLESS = {
    "evaluation": frozenset({"batch_size", "champion_avatar", "champion_pair", "promote"}),
    # Where a pair begins is an input; its errors are only measured.
    "pair_learning": frozenset({"warm", "warm_steps", "error_every", "error_frames"}),
}

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Person:
    """A subject as planning needs it."""

    name: str
    digest: str
    source: VideoSource
    frames: int | None = None

    @property
    def synthetic(self) -> bool:
        return self.source.synthetic_seed is not None


@dataclass(frozen=True)
class PlannedStage:
    """A stage, the keys of the stages it waits for, and what it asks for."""

    spec: StageSpec
    needs: tuple[str, ...]
    resources: StageResources
    weights: tuple[str, ...]  # without these it cannot run
    optional_weights: tuple[str, ...] = ()  # without these some of its metrics are null

    @property
    def key(self) -> str:
        return self.spec.key

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True)
class WarmSource:
    """A trained pair of the same avatar that a new pair begins at."""

    key: str
    name: str  # "conversation<-grimaces"
    release: Path


@dataclass(frozen=True)
class Undecided:
    """A pair of which it is not decided where it begins: what its key is for each place to begin at (None: cold)."""

    actor: Person
    avatar_key: str
    key: Callable[[WarmSource | None], str]


PairChoice = Callable[[Sequence[Undecided]], Sequence[WarmSource | None]]
"""From the pairs of a job to where each begins, in their order."""


@dataclass(frozen=True)
class PlannedPair:
    """An avatar driven by an actor: the stages that make it. `bridge` is of kind pair or shared."""

    avatar: Person
    actor: Person
    head: PlannedStage
    bridge: PlannedStage
    preview: PlannedStage
    warm: WarmSource | None = None  # where the bridge begins

    @property
    def release(self) -> Path:
        """Where the pair's model will lie."""
        return self.preview.spec.inputs["pair"]


@dataclass(frozen=True)
class Plan:
    """A job: its stages in an order in which each comes after what it needs, and the pairs that come of them."""

    job_id: str
    pairs: tuple[PlannedPair, ...]
    recipe: Recipe
    stages: tuple[PlannedStage, ...]

    @property
    def avatar(self) -> str:
        """The avatars' names, for people."""
        return listed([pair.avatar.name for pair in self.pairs])

    @property
    def actor(self) -> str:
        """The actors' names, for people."""
        return listed([pair.actor.name for pair in self.pairs])

    @property
    def people(self) -> dict[str, Person]:
        """Everybody, by the name of the stage that preprocesses them."""
        return {f"preprocess:{p.name}": p for pair in self.pairs for p in (pair.avatar, pair.actor)}

    def stage(self, kind: StageKind) -> PlannedStage:
        """The last stage of that kind."""
        return next(s for s in reversed(self.stages) if s.spec.kind is kind)

    def needed(self, pair: PlannedPair) -> set[str]:
        """The keys of the pair's last stage and of all that it needs."""
        found: set[str] = set()
        open_keys = [pair.preview.key]
        while open_keys:
            key = open_keys.pop()
            if key not in found:
                found.add(key)
                open_keys += self._by_key[key].needs
        return found

    @cached_property
    def _by_key(self) -> dict[str, PlannedStage]:
        return {stage.key: stage for stage in self.stages}

    def without(self, failed: Collection[str]) -> list[PlannedPair]:
        """The pairs that need no stage of these keys."""
        return [pair for pair in self.pairs if self.needed(pair).isdisjoint(failed)]


def plan(
    home_root: Path,
    out_dir: Any,
    pairs: Sequence[tuple[Person, Person]],
    recipe: Recipe,
    choose: PairChoice = lambda pairs: [None] * len(pairs),
) -> Plan:
    """The stages of a job: for each of `pairs` an avatar driven by an actor, and what several need made once.

    `out_dir(kind, key)` says where a stage's result goes, `choose` where a pair begins. The order of the pairs, and a
    pair that is named twice, change nothing. Raises UsageError, ConfigError.
    """
    named = {(avatar.name, actor.name): (avatar, actor) for avatar, actor in pairs}
    chosen = [named[names] for names in sorted(named)]
    for avatar, actor in chosen:
        require_two(avatar, actor)
    people = by_name([person for pair in chosen for person in pair])
    builder = Builder(home_root, out_dir, recipe)
    data = {name: builder.preprocess(person) for name, person in people.items()}
    heads = {avatar.name: builder.avatar(avatar, data[avatar.name]) for avatar, _ in chosen}
    parts = [(avatar, actor, data[avatar.name], data[actor.name], heads[avatar.name]) for avatar, actor in chosen]
    starts = choose([Undecided(each[1], each[4].key, partial(builder.pair_key, *each[2:])) for each in parts])
    planned = []
    for each, warm in zip(parts, starts, strict=True):
        bridge = builder.pair(*each, warm)
        planned.append(PlannedPair(each[0], each[1], each[4], bridge, builder.preview(*each, bridge), warm))
    ordered = [*data.values(), *heads.values(), *(pair.bridge for pair in planned), *(pair.preview for pair in planned)]
    unique = {stage.key: stage for stage in ordered}
    names = [part for pair in planned for part in (pair.avatar.name, pair.actor.name, pair.preview.key)]
    return Plan(digest("job", *names)[:10], tuple(planned), recipe, tuple(unique.values()))


def require_two(avatar: Person, actor: Person) -> None:
    """Raises UsageError where avatar and actor have one name."""
    if avatar.name == actor.name:
        same = "Name two subjects: how the avatar follows its own held-out performance is measured in every job."
        other = f"Add one of the two videos under a name of its own: lavatar subjects add {actor.name}2 VIDEO"
        raise UsageError(f"avatar and actor are both {avatar.name!r}", same if avatar.digest == actor.digest else other)


def by_name(people: Sequence[Person]) -> dict[str, Person]:
    """Each person once, in the order of the names. Raises UsageError where one name stands for two videos."""
    found: dict[str, Person] = {}
    for person in sorted(people, key=lambda p: p.name):
        if found.setdefault(person.name, person).digest != person.digest:
            way_out = f"Add one of the two videos under a name of its own: lavatar subjects add {person.name}2 VIDEO"
            raise UsageError(f"two videos are named {person.name!r}", way_out)
    return found


class Builder:
    """Makes the stages of one job."""

    def __init__(self, root: Path, out_dir: Any, recipe: Recipe) -> None:
        self._root, self._out_dir, self._recipe = root, out_dir, recipe
        self._dump = recipe.model_dump(mode="json")
        self._present = cache(weights_present)
        self._sections = cache(lambda kind: {name: _keyed(name, self._dump[name]) for name in SECTIONS[kind]})

    def preprocess(self, person: Person) -> PlannedStage:
        if self._recipe.preprocess.tracker == "synthetic" and not person.synthetic:
            raise ConfigError(
                f"preprocess.tracker is synthetic, but {person.name!r} is a video",
                "Leave it at mediapipe: synthetic subjects need no tracker and take none.",
            )
        key = dataset_digest(person.source, self._recipe.preprocess)
        weights = preprocess_weights(person.source, self._recipe.preprocess)
        name = f"preprocess:{person.name}"
        return self.stage(StageKind.PREPROCESS, name, key, {}, (), {"subject": person.source}, weights)

    def avatar(self, avatar: Person, data: PlannedStage) -> PlannedStage:
        weights = ("lpips_vgg16",) if self._recipe.avatar_loss.lambda_vgg > 0 else ()
        key = self.key(StageKind.AVATAR, {"dataset": data.key}, weights)
        inputs = {"dataset": data.spec.out_dir}
        name = f"avatar:{avatar.name}"
        return self.stage(StageKind.AVATAR, name, key, inputs, (data,), {"avatar": avatar.source}, weights)

    def pair(
        self,
        avatar: Person,
        actor: Person,
        data_a: PlannedStage,
        data_b: PlannedStage,
        head: PlannedStage,
        warm: WarmSource | None,
    ) -> PlannedStage:
        inputs = {
            "avatar_dataset": data_a.spec.out_dir,
            "actor_dataset": data_b.spec.out_dir,
            "avatar": release_dir(head.spec.out_dir),
        }
        if warm is not None:
            inputs["warm"] = warm.release
        key = self.pair_key(data_a, data_b, head, warm)
        sources = {"avatar": avatar.source, "actor": actor.source}
        name = f"pair:{avatar.name}<-{actor.name}"
        return self.stage(StageKind.PAIR, name, key, inputs, (data_a, data_b, head), sources, ())

    def pair_key(self, data_a: PlannedStage, data_b: PlannedStage, head: PlannedStage, warm: WarmSource | None) -> str:
        """The key of the pair that begins there."""
        keys = {"avatar_dataset": data_a.key, "actor_dataset": data_b.key, "avatar": head.key}
        if warm is not None:
            keys |= {"warm": warm.key, "warm_steps": str(self._recipe.pair_learning.warm_steps)}
        return self.key(StageKind.PAIR, keys, ())

    def preview(
        self,
        avatar: Person,
        actor: Person,
        data_a: PlannedStage,
        data_b: PlannedStage,
        head: PlannedStage,
        bridge: PlannedStage,
    ) -> PlannedStage:
        # Names are drawn into the pictures; metrics of weights that were missing are measured once they are there.
        keys = {"avatar_dataset": data_a.key, "actor_dataset": data_b.key, "avatar": head.key, "pair": bridge.key}
        real = () if avatar.synthetic and actor.synthetic else ("face_landmarker",)
        optional = ("lpips_alexnet", "face_recognition", *real)
        present = tuple(name for name in optional if self._present(name))
        key = self.key(StageKind.PREVIEW, {**keys, "names": f"{avatar.name}<-{actor.name}"}, present)
        inputs = {
            "avatar_dataset": data_a.spec.out_dir,
            "actor_dataset": data_b.spec.out_dir,
            "avatar": release_dir(head.spec.out_dir),
            "pair": pair_release(bridge.spec.kind, bridge.spec.out_dir, data_a.key, data_b.key),
        }
        sources = {"avatar": avatar.source, "actor": actor.source}
        name = f"preview:{avatar.name}<-{actor.name}"
        needs = (data_a, data_b, head, bridge)
        return self.stage(StageKind.PREVIEW, name, key, inputs, needs, sources, (), optional)

    def key(self, kind: StageKind, inputs: Mapping[str, str], weights: tuple[str, ...]) -> str:
        """The digest of what a stage of that kind depends on."""
        from lavatar.datasets.weights import digests

        return digest(kind.value, METHOD_VERSION[kind], inputs, self._sections(kind), digests(weights))

    def stage(
        self,
        kind: StageKind,
        name: str,
        key: str,
        inputs: Mapping[str, Path],
        needs: tuple[PlannedStage, ...],
        sources: Mapping[str, VideoSource],
        weights: tuple[str, ...],
        optional: tuple[str, ...] = (),
    ) -> PlannedStage:
        """The stage, complete."""
        spec = StageSpec(
            kind=kind,
            name=name,
            key=key,
            home=self._root,
            out_dir=self._out_dir(kind, key),
            inputs=dict(inputs),
            recipe=self._dump,
            sources=dict(sources),
        )
        resources: StageResources = getattr(self._recipe.resources, kind.value)
        keys = tuple(dict.fromkeys(stage.key for stage in needs))
        return PlannedStage(spec, keys, resources, weights, optional)


def release_dir(out_dir: Path) -> Path:
    """Where a finished training stage leaves its model."""
    return out_dir / "release"


def pair_release(kind: StageKind, out_dir: Path, avatar_data: str, actor_data: str) -> Path:
    """Where a finished stage of kind pair or shared leaves the model of a pair, given the keys of its datasets."""
    folder = release_dir(out_dir)
    return folder / label(avatar_data) / label(actor_data) if kind is StageKind.SHARED else folder


def label(data_key: str) -> str:
    """What a shared network calls a subject. Names are left out: two names of one video are one subject."""
    return data_key[:12]


def listed(names: Sequence[str], most: int = 100) -> str:
    """Each name once, in one line of at most `most` characters."""
    text = ", ".join(dict.fromkeys(names))
    return text if len(text) <= most else f"{text[: most - 3].rpartition(',')[0]}, …"


def weights_present(name: str) -> bool:
    """Whether the file is here and is the right one."""
    from lavatar.datasets.weights import find

    try:
        find(name)
    except WeightsError:
        return False
    return True


def require_weights(stages: list[PlannedStage]) -> None:
    """Raises WeightsError, naming all that is missing, before anything is started."""
    names = dict.fromkeys(name for stage in stages for name in stage.weights)
    missing = [name for name in names if not weights_present(name)]
    if missing:
        from lavatar.datasets.weights import find

        try:
            find(missing[0])
        except WeightsError as error:
            users = ", ".join(stage.name for stage in stages if missing[0] in stage.weights)
            raise WeightsError(
                f"{error.message} (needed by {users})",
                f"Get what is missing with: lavatar weights fetch {' '.join(missing)}",
            ) from error


def space_needed(stages: list[PlannedStage], people: Mapping[str, Person]) -> int:
    """Bytes that these stages are likely to write: frames as JPEG and PNG, two checkpoints and a release."""
    total = 50 * MEGABYTE
    for stage in stages:
        recipe = Recipe.model_validate(stage.spec.recipe)
        if stage.spec.kind is StageKind.PREPROCESS:
            person = people.get(stage.name)
            frames = person.frames if person and person.frames is not None else recipe.preprocess.synthetic_frames
            if recipe.preprocess.max_frames:
                frames = min(frames, recipe.preprocess.max_frames)
            total += int(frames * recipe.preprocess.portrait_size**2 * 0.5)
        elif stage.spec.kind in (StageKind.AVATAR, StageKind.PAIR):
            total += int(900 * MEGABYTE * (recipe.avatar.image_size / 512))
        elif stage.spec.kind is StageKind.SHARED:
            roles = [role.partition("/")[0] for role in stage.spec.inputs]
            pairs = roles.count("avatar") * roles.count("actor_dataset")
            total += int((900 + 200 * pairs) * MEGABYTE * (recipe.avatar.image_size / 512))
        else:
            total += 50 * MEGABYTE
    return total


def digest(*parts: Any) -> str:
    """SHA-256 of the parts as canonical JSON."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _keyed(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A section without the keys that change no result."""
    left_out = CADENCE if section.endswith("training") else _KEYLESS.get(section, frozenset())
    return {key: value for key, value in values.items() if key not in left_out}

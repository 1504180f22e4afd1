"""What a sweep varies: a space file, from recipe keys to what each may be.

    avatar_loss.lambda_lr: {loguniform: [0.05, 2]}   # or uniform: [low, high]
    avatar.samples: {randint: [4, 16]}               # whole numbers, both ends included
    avatar_loss.lambda_mask: {quniform: [0, 2, 0.5]} # low, high, step
    avatar.ray_size: {choice: [16, 32, 64]}          # or grid: [...], which --search grid goes through as well

Everything that a trial could be made of is checked against the typed recipe before anything runs.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from lavatar.configs.recipe import Recipe, check_key, describe, nearest, with_values
from lavatar.configs.yamltext import MOST_CHARACTERS, read_yaml
from lavatar.contracts import StageKind
from lavatar.errors import ConfigError

Point = dict[str, Any]
"""The values of one trial by recipe key."""

KINDS = ("uniform", "loguniform", "quniform", "randint", "choice", "grid")
LISTED = ("choice", "grid")
MOST_VALUES, MOST_TRIALS, MOST_STEPS = 1000, 10_000, 1_000_000
REDRAWS = 100
PROBE = 0.382
"""Where between its ends an interval is tried beside them: no whole number where one would be wrong."""

FIXED = {
    "steps": "every trial has the same: --steps",
    "seed": "trials with other seeds cannot be compared",
    "engine": "a trial trains in its own process, in plain torch",
    "zero_stage": "a trial has one worker",
    "log_every": "it changes no result",
    "picture_every": "it changes no result",
    "checkpoint_every": "a trial stores a checkpoint where it is measured: --every",
    "cache_mb": "it changes no result",
}
"""Keys of the training sections that no sweep varies, and why."""

_SHARED = {
    "preprocess": "all trials train on one dataset",
    "resources": "it changes no result",
    "evaluation": "all trials are measured alike",
}
_POWER = re.compile(r"[-+]?\d+[eE][-+]?\d{1,3}")
"""1e-4 is a word to YAML, which wants 1.0e-4, and a number to everybody else."""
_WHERE = "Write each key as: avatar_loss.lambda_lr: {loguniform: [0.05, 2]}"


@dataclass(frozen=True)
class Domain:
    """What one key may be. `values` are the ends (and the step) of an interval, or the list itself."""

    kind: str
    values: tuple[Any, ...]

    @property
    def listed(self) -> bool:
        return self.kind in LISTED

    @property
    def low(self) -> Any:
        return self.values[0]

    @property
    def high(self) -> Any:
        return self.values[1]

    def draw(self, source: random.Random) -> Any:
        """One value."""
        if self.listed:
            return source.choice(self.values)
        if self.kind == "loguniform":
            return self.inside(math.exp(source.uniform(math.log(self.low), math.log(self.high))))
        if self.kind == "randint":
            return source.randint(self.low, self.high)
        return self.inside(source.uniform(self.low, self.high))

    def inside(self, value: Any) -> Any:
        """The nearest value that the domain has: population based training multiplies as it likes."""
        if self.listed:
            return value
        value = min(max(value, self.low), self.high)
        if self.kind == "randint":
            return round(value)
        if self.kind == "quniform":
            step = self.values[2]
            value = self.low + step * math.floor((value - self.low) / step + 0.5)
            while value > self.high:
                value -= step
            if all(isinstance(v, int) for v in self.values):
                return value
            return min(max(float(f"{value:.12g}"), self.low), self.high)
        return float(value)

    def probes(self) -> tuple[Any, ...]:
        """Values that stand for all: every one of a list; the ends of an interval and one in between."""
        if self.listed:
            return self.values
        return tuple(dict.fromkeys((self.low, self.high, self.inside(self.low + PROBE * (self.high - self.low)))))

    def count(self) -> float:
        """How many values it has."""
        if self.listed:
            return len(self.values)
        if self.kind == "randint":
            return int(self.high - self.low + 1)
        return math.floor((self.high - self.low) / self.values[2] + 1e-9) + 1 if self.kind == "quniform" else math.inf


@dataclass(frozen=True)
class Space:
    """Keys in the order of the file, and what each may be."""

    domains: Mapping[str, Domain]

    def to_json(self) -> dict[str, Any]:
        """As in the file."""
        return {key: {domain.kind: list(domain.values)} for key, domain in self.domains.items()}

    def size(self) -> float:
        """How many points there are."""
        return math.prod(domain.count() for domain in self.domains.values())

    def random(self, count: int, seed: int = 0) -> list[Point]:
        """Points drawn evenly, no two alike: fewer than `count` where the space has no more."""
        source = random.Random(seed)
        if self.size() <= 2 * MOST_TRIALS:
            every = self._all()
            return source.sample(every, min(count, len(every)))
        found: dict[str, Point] = {}
        for _ in range(REDRAWS * count):
            point = {key: domain.draw(source) for key, domain in self.domains.items()}
            found.setdefault(json.dumps(point), point)
            if len(found) == count:
                break
        return list(found.values())

    def grid(self) -> list[Point]:
        """Every combination. Raises ConfigError where a key has no list, or there are too many."""
        for key, domain in self.domains.items():
            if not domain.listed:
                raise ConfigError(f"--search grid: {key} is {domain.kind}, not a list", f"Write {key}: {{grid: [...]}}")
        if self.size() > MOST_TRIALS:
            raise ConfigError(f"--search grid: the space has {self.size():.0f} combinations", "Name fewer values.")
        return list(self._all())

    def _all(self) -> list[Point]:
        values = [domain.probes() if domain.listed else _steps(domain) for domain in self.domains.values()]
        return [dict(zip(self.domains, chosen, strict=True)) for chosen in itertools.product(*values)]

    def inside(self, point: Mapping[str, Any]) -> Point:
        """The point with each value inside its domain."""
        return {key: self.domains[key].inside(value) for key, value in point.items()}


def _steps(domain: Domain) -> list[Any]:
    """Every value of a randint or quniform."""
    step = 1 if domain.kind == "randint" else domain.values[2]
    return [domain.inside(domain.low + i * step) for i in range(int(domain.count()))]


def ready_spaces() -> list[str]:
    """Names of the spaces that come with lavatar."""
    folder = resources.files("lavatar.configs") / "sweeps"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_space(name: str, recipe: Recipe, kind: StageKind, sections: Sequence[str]) -> Space:
    """The space in a file, or one that comes with lavatar, for a sweep of a stage of that kind, which depends on these
    sections. Raises ConfigError, naming the key, for what no recipe can be."""
    ready, path = ready_spaces(), Path(name)
    if name in ready:
        text = (resources.files("lavatar.configs") / "sweeps" / f"{name}.yaml").read_text()
    else:
        if not path.is_file():
            close = nearest(name, ready)
            raise ConfigError(
                f"--space: there is no file {name}", f"{close}Name a YAML file, or one of: {', '.join(ready)}."
            )
        try:
            with path.open() as stream:
                text = stream.read(MOST_CHARACTERS + 1)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}", _WHERE) from None
    try:
        return read_space(text, recipe, kind, sections)
    except ConfigError as error:
        raise ConfigError(f"space {name}: {error.message}", error.hint) from None


def read_space(text: str, recipe: Recipe, kind: StageKind, sections: Sequence[str]) -> Space:
    """The space that a YAML text says. Raises ConfigError."""
    try:
        data = read_yaml(text)
    except ValueError as error:
        raise ConfigError(f"it is no YAML: {error}", _WHERE) from None
    try:
        json.dumps(data, allow_nan=False)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError("it holds more than finite numbers, words and lists of them", _WHERE) from None
    if not isinstance(data, dict) or not data:
        raise ConfigError("it is no list of keys and what each may be", _WHERE)
    domains = {}
    for key, value in data.items():
        if not isinstance(key, str):
            raise ConfigError(f"{key!r:.80} is no key of a recipe", _WHERE)
        check_key(key)
        _check_place(key, kind, sections)
        domains[key] = _domain(key, value)
        _check_values(key, domains[key])
    space = Space(domains)
    for point in space.random(200, seed=1):
        with_values(recipe, point)
    return space


_UNFELT = {f"pair_learning.{name}" for name in ("warm", "warm_steps", "error_every", "error_frames")}
"""Trials of a pair begin cold, and are measured by the sweep."""


def _check_place(key: str, kind: StageKind, sections: Sequence[str]) -> None:
    """Raises ConfigError for a key that a sweep of that stage cannot vary."""
    section, _, name = key.partition(".")
    mine = f"A sweep of the {kind.value} varies keys of: {', '.join(sections)}."
    if section in _SHARED:
        raise ConfigError(f"{key} is not for a sweep: {_SHARED[section]}", f"Use --set {key}=... instead. {mine}")
    if key in _UNFELT:
        raise ConfigError(f"{key} is not for a sweep: no trial would feel it", "Leave it out of the space.")
    if section not in sections:
        way_out = "Leave --actor out to sweep the avatar." if kind is StageKind.PAIR else "Add --actor for the pair's."
        raise ConfigError(f"{key} does not change the {kind.value}", f"{way_out} {mine}")
    if section.endswith("_training") and name in FIXED:
        raise ConfigError(f"{key} is not for a sweep: {FIXED[name]}", "Leave it out of the space.")


def _domain(key: str, value: Any) -> Domain:
    """Raises ConfigError for what is none."""
    if not isinstance(value, dict) or len(value) != 1 or not isinstance(next(iter(value)), str):
        raise ConfigError(f"{key}: got {value!r:.80}, wanted one of {', '.join(KINDS)}", _WHERE)
    ((kind, values),) = value.items()
    if kind not in KINDS:
        raise ConfigError(f"{key}: there is no {kind!r:.40}", f"{nearest(kind, KINDS)}Write one of {', '.join(KINDS)}.")
    if not isinstance(values, list):
        raise ConfigError(f"{key}: {kind} is {values!r:.80}, wanted a list", f"Write {key}: {{{kind}: [...]}}")
    values = [float(v) if isinstance(v, str) and _POWER.fullmatch(v) else v for v in values]
    if kind in LISTED:
        if not 0 < len(values) <= MOST_VALUES or len({repr(v) for v in values}) < len(values):
            raise ConfigError(f"{key}: {kind} wants 1 to {MOST_VALUES} values, no two alike", "Correct the list.")
        return Domain(kind, tuple(values))
    wanted = "low, high, step" if kind == "quniform" else "low, high"
    numbers = [v for v in values if _is_number(v) and (kind != "randint" or isinstance(v, int))]
    if len(values) != len(wanted.split(", ")) or len(numbers) != len(values):
        whole = "whole " if kind == "randint" else ""
        raise ConfigError(
            f"{key}: {kind} is {values!r:.80}, wanted {whole}numbers", f"Write {key}: {{{kind}: [{wanted}]}}"
        )
    if not values[0] < values[1] or (kind == "loguniform" and values[0] <= 0):
        least = " 0 <" if kind == "loguniform" else ""
        raise ConfigError(f"{key}: {kind} is {values!r:.80}", f"It needs{least} low < high.")
    if kind == "quniform" and not 0 < values[2] <= values[1] - values[0] < MOST_STEPS * values[2]:
        raise ConfigError(
            f"{key}: quniform has a step of {values[2]!r}", f"It fits 1 to {MOST_STEPS} times between the ends."
        )
    return Domain(kind, tuple(values))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def _check_values(key: str, domain: Domain) -> None:
    """Raises ConfigError for a value that this key cannot have, whatever the others are."""
    section, name = key.split(".")
    annotation = Recipe.model_fields[section].annotation
    assert annotation is not None
    field = annotation.model_fields[name]
    typed: Any = Annotated[field.annotation, field, *field.metadata]
    adapter: TypeAdapter[Any] = TypeAdapter(typed)
    for value in domain.probes():
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            whole = domain.kind in ("uniform", "loguniform") and isinstance(value, float) and not value.is_integer()
            way_out = "Write randint for whole numbers, or correct" if whole else "Correct"
            raise ConfigError(f"{key}: {describe(error)}", f"{way_out} the values.") from None

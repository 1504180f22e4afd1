"""A recipe: every number of a run, read from recipes/NAME.yaml, changed by `--set section.key=value`."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any, Self

from pydantic import BaseModel, ValidationError, model_validator

from lavatar.configs.avatar import AvatarConfig, AvatarLearningConfig, AvatarLossConfig
from lavatar.configs.evaluation import EvaluationConfig
from lavatar.configs.pair import MappingConfig, PairLearningConfig, YNetConfig, YNetLossConfig
from lavatar.configs.preprocess import PreprocessConfig
from lavatar.configs.resources import ResourcesConfig
from lavatar.configs.section import Section
from lavatar.configs.training import TrainingConfig
from lavatar.configs.yamltext import read_yaml
from lavatar.errors import ConfigError

_SPLIT = (("avatar", "avatar"), ("ynet", "pair"), ("mapping", "pair"), ("ynet", "shared"), ("mapping", "shared"))
"""A training, and the stage whose workers split its batch."""


class Recipe(Section):
    """The whole configuration of a job. Each section belongs to one room."""

    name: str
    preprocess: PreprocessConfig = PreprocessConfig()
    avatar: AvatarConfig = AvatarConfig()
    avatar_loss: AvatarLossConfig = AvatarLossConfig()
    avatar_learning: AvatarLearningConfig = AvatarLearningConfig()
    avatar_training: TrainingConfig = TrainingConfig()
    ynet: YNetConfig = YNetConfig()
    ynet_loss: YNetLossConfig = YNetLossConfig()
    ynet_training: TrainingConfig = TrainingConfig(steps=30_000, batch_size=16)
    mapping: MappingConfig = MappingConfig()
    pair_learning: PairLearningConfig = PairLearningConfig()
    mapping_training: TrainingConfig = TrainingConfig(steps=30_000, batch_size=16)
    evaluation: EvaluationConfig = EvaluationConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        """What one section says of another's data. Raises ValueError, which names both keys."""
        crop, portrait = self.preprocess.face_size, self.preprocess.portrait_size
        checks = (
            (self.avatar.face_size <= crop, f"avatar.face_size {self.avatar.face_size} > preprocess.face_size {crop}"),
            (self.ynet.face_size <= crop, f"ynet.face_size {self.ynet.face_size} > preprocess.face_size {crop}"),
            (
                self.avatar.image_size <= portrait,
                f"avatar.image_size {self.avatar.image_size} > preprocess.portrait_size {portrait}",
            ),
            (
                self.avatar.focal == self.preprocess.focal,
                f"avatar.focal {self.avatar.focal:g} is not preprocess.focal {self.preprocess.focal:g}",
            ),
            (
                self.mapping.reads == "code" or self.ynet.landmarks > 0,
                "mapping.reads is landmarks, but ynet.landmarks is 0",
            ),
            (
                not self.mapping.joint or (self.mapping.reads, self.mapping.align) == ("code", "none"),
                "mapping.joint trains on the code as it is: set mapping.reads to code and mapping.align to none",
            ),
        )
        wrong = [text for fits, text in checks if not fits]
        wrong += filter(None, (self._uneven(phase, stage) for phase, stage in _SPLIT))
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def warm(self) -> Recipe:
        """This recipe for a pair that begins at another one: its Y-network is trained for `warm_steps` of the steps."""
        steps = max(1, round(self.ynet_training.steps * self.pair_learning.warm_steps))
        return self.model_copy(update={"ynet_training": self.ynet_training.model_copy(update={"steps": steps})})

    def _uneven(self, phase: str, stage: str) -> str:
        """What is wrong if the batch of a training does not split evenly over the workers of its stage."""
        training: TrainingConfig = getattr(self, f"{phase}_training")
        workers = getattr(self.resources, stage).workers
        if training.batch_size % (workers * training.accumulation) == 0:
            return ""
        return (
            f"{phase}_training.batch_size {training.batch_size} is not a multiple of resources.{stage}.workers × "
            f"{phase}_training.accumulation = {workers} × {training.accumulation}"
        )


def recipe_names() -> list[str]:
    """Names of the recipes that come with lavatar."""
    folder = resources.files("lavatar.configs") / "recipes"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """Recipe `name` with `section.key=value` overrides applied.

    Raises ConfigError for an unknown recipe, key or value; the hint names the nearest right one.
    """
    known = recipe_names()
    if name not in known:
        raise ConfigError(f"there is no recipe {name!r}", f"{nearest(name, known)}The recipes are: {', '.join(known)}.")
    text = (resources.files("lavatar.configs") / "recipes" / f"{name}.yaml").read_text()
    data = _merged(Recipe(name=name).model_dump(), read_yaml(text) or {})
    for override in overrides:
        _apply(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise ConfigError(
            f"recipe {name!r}: {describe(error)}", "Correct the value and run the command again."
        ) from None


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with other values, by `section.key`. Raises ConfigError for what it cannot have."""
    data = recipe.model_dump()
    for key, value in values.items():
        section, _, name = key.partition(".")
        data[section] = {**data[section], name: value}
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        chosen = ", ".join(f"{key}={value}" for key, value in values.items())
        raise ConfigError(
            f"recipe {recipe.name!r} cannot have {chosen}: {describe(error)}", "Change what these may be."
        ) from None


def check_key(key: str) -> None:
    """Raises ConfigError, naming the nearest right one, for what is no `section.key` of a recipe."""
    _check_path(key.split("."))


def _merged(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` over `defaults`, section by section: a section that is given in part keeps Recipe's own defaults."""
    merged = {**defaults, **given}
    for key, value in given.items():
        if isinstance(value, Mapping) and isinstance(defaults.get(key), Mapping):
            merged[key] = _merged(defaults[key], value)
    return merged


def _apply(data: dict[str, Any], override: str) -> None:
    """Put one `section.key=value` into `data`; the value is read as YAML."""
    path, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override[:200]!r} has no '='", "Write --set section.key=value.")
    keys = path.strip().split(".")
    _check_path(keys)
    node = data
    for key in keys[:-1]:
        child = node.get(key)
        node[key] = dict(child) if isinstance(child, Mapping) else {}
        node = node[key]
    try:
        node[keys[-1]] = read_yaml(text)
    except ValueError as error:
        raise ConfigError(f"--set {override[:200]!r}: the value is not readable: {error}", "Quote it.") from None


def _check_path(keys: list[str]) -> None:
    """Every key of the path exists and the last one is a value, not a section."""
    model: type[BaseModel] | None = Recipe
    for i, key in enumerate(keys):
        if model is None:
            raise ConfigError(f"{'.'.join(keys[:i])} is a value and has no key {key!r}", "Leave the last part away.")
        if key not in model.model_fields or (i == 0 and key == "name"):
            raise ConfigError(f"there is no key {'.'.join(keys)!r}", _suggest(keys, i, model))
        annotation = model.model_fields[key].annotation
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    if model is not None:
        raise ConfigError(f"{'.'.join(keys)} is a section", f"Name one of its keys: {', '.join(model.model_fields)}.")


def _suggest(keys: list[str], i: int, model: type[BaseModel]) -> str:
    prefix = ".".join(keys[:i])
    close = difflib.get_close_matches(".".join(keys), list(all_keys()), n=1, cutoff=0.6)
    here = [f"{prefix}.{k}" if prefix else k for k in model.model_fields if k != "name"]
    return (f"Did you mean {close[0]!r}? " if close else "") + f"Known here: {', '.join(here)}."


def all_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterable[str]:
    """Every `section.key` that --set takes."""
    for key, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from all_keys(info.annotation, f"{prefix}{key}.")
        elif prefix:
            yield f"{prefix}{key}"


def nearest(word: str, known: Iterable[str]) -> str:
    """'Did you mean X? ' or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}? " if close else ""


def describe(error: ValidationError) -> str:
    """A pydantic error in one line: key, what is wrong, the value got. (What is wrong with a whole section says itself
    which of its values it means.)"""
    return "; ".join(_describe(part["loc"], part["msg"], part["input"]) for part in error.errors())


def _describe(path: tuple[int | str, ...], message: str, value: Any) -> str:
    key = f"{'.'.join(map(str, path))}: " if path else ""
    got = "" if isinstance(value, (Mapping, BaseModel)) else f" (got {reprlib.repr(value)})"
    return f"{key}{message.removeprefix('Value error, ')}{got}"

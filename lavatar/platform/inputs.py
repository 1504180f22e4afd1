"""What a stage reads, for MLflow: the video of a preprocessing, the datasets of all others, each with its digest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavatar.contracts import StageKind, StageSpec
from lavatar.platform import ledger, lookup
from lavatar.platform.home import KEY, Home
from lavatar.platform.planning import Plan
from lavatar.platform.registry import Registry

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

_DIGEST = 36  # characters that MLflow keeps of one; the profile has it whole


@dataclass(frozen=True)
class Input:
    """A dataset as MLflow describes one. `digest` is whole, `profile` JSON."""

    name: str
    digest: str
    role: str
    source_type: str
    source: str
    profile: str


def inputs_of(registry: Registry, plan: Plan, spec: StageSpec) -> list[Input]:
    """What the stage reads, by role."""
    if spec.kind is StageKind.PREPROCESS:
        return [_video(plan, spec)]
    folders = {role: path for role, path in spec.inputs.items() if role.partition("/")[0].endswith("dataset")}
    return _datasets(registry, plan, Home(spec.home), folders)


def data_of(registry: Registry, plan: Plan, home: Home) -> list[Input]:
    """The videos that a job begins with, and the datasets made of them as far as they are."""
    stages = [stage.spec for stage in plan.stages if stage.spec.kind is StageKind.PREPROCESS]
    made = {spec.name: spec.out_dir for spec in stages if ledger.manifest_summary(home, spec.out_dir)}
    datasets = [replace(each, role="dataset") for each in _datasets(registry, plan, home, made)]
    return [*(_video(plan, spec) for spec in stages), *datasets]


def _video(plan: Plan, spec: StageSpec) -> Input:
    person = plan.people[spec.name]
    source, seed = person.source, person.source.synthetic_seed
    made = {"tags": {"synthetic_seed": seed}} if source.path is None else {"uri": str(source.path)}
    kind = "code" if source.path is None else "local"
    profile = {"sha256": person.digest, "frames": person.frames}
    return Input(person.name, person.digest, "video", kind, json.dumps(made), json.dumps(profile))


def _datasets(registry: Registry, plan: Plan, home: Home, folders: Mapping[str, Path]) -> list[Input]:
    """Datasets by role, each once; what the registry does not know of them (a benchmark's) their manifests tell."""
    names = {stage.key: stage.name.partition(":")[2] for stage in plan.stages}
    summaries = lookup.dataset_summaries(registry, [path.name for path in folders.values()])
    found: dict[str, Input] = {}
    for role, path in folders.items():
        summary = summaries.get(path.name) or ledger.manifest_summary(home, path)
        profile = {**summary, "digest": path.name}
        name, source_text = names.get(path.name, path.name[:8]), json.dumps({"uri": str(path)})
        found.setdefault(path.name, Input(name, path.name, role, "local", source_text, json.dumps(profile)))
    return list(found.values())


def as_datasets(inputs: Sequence[Input]) -> list[DatasetInput]:
    """The same in MLflow's words."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    return [
        DatasetInput(
            Dataset(each.name, each.digest[:_DIGEST], each.source_type, each.source, profile=each.profile),
            [InputTag("mlflow.data.context", each.role)],
        )
        for each in inputs
    ]


def keys_of(inputs: Mapping[str, Path]) -> dict[str, str]:
    """The stage that made each input, by role."""
    return {role: next((part for part in path.parts if KEY.fullmatch(part)), "") for role, path in inputs.items()}


def stage_params(spec: StageSpec, sections: tuple[str, ...]) -> dict[str, Any]:
    """Parameters of a stage's run: its key, its inputs' keys, and the sections of the recipe that it depends on."""
    return {"key": spec.key, "inputs": keys_of(spec.inputs), **{name: spec.recipe[name] for name in sections}}

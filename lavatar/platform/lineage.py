"""Where a registered model comes from and how good it is, as tags of its version."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lavatar.configs.recipe import Recipe
from lavatar.contracts import StageKind
from lavatar.inference.figures import flat
from lavatar.platform.champions import FIGURE_TAG, HELD_OUT_TAG, Contest
from lavatar.platform.planning import METHOD_VERSION, Person, Plan, PlannedPair, digest

KIND_TAG, JOB_TAG = "lavatar.kind", "lavatar.job"
RECIPE_TAG, SECTIONS_TAG = "lavatar.recipe", "lavatar.recipe.sections"  # its name; all of it, as JSON
DATASET_TAG = "lavatar.dataset."  # + avatar, actor: the digest of what it was trained on
AVATAR_STAGE_TAG = "lavatar.avatar.stage"  # of a pair's version: key of the avatar that it was trained with
PARENT_TAG = "lavatar.avatar.version"  # and its version, as NAME/VERSION
WARM_TAG, SHARED_TAG = "lavatar.begins_at", "lavatar.shared"
PREVIEW_TAG, PREVIEW_RUN_TAG = "lavatar.preview", "lavatar.preview.run"  # the stage that measured it, and its run
DECIDED_BY_TAG = "lavatar.decided_by"  # the figure that tells whether it is better than another
_PART = {StageKind.AVATAR: "self", StageKind.PAIR: "cross"}
_LEFT_OUT = ("spread", "reference", "error", "frames", "no_face")
"""Parts of the figures that are no tags; the card has what else is to be known."""


@dataclass(frozen=True)
class Lineage:
    """What the plan knows of a model: the avatar's person, and of a pair the actor; their datasets' keys."""

    kind: StageKind
    job: str
    recipe: Recipe
    people: tuple[Person, ...]
    datasets: tuple[str, ...]
    avatar_stage: str = ""  # of a pair
    begins_at: str = ""  # of a pair: the one that its training began at
    shared: bool = False

    @classmethod
    def of_avatar(cls, plan: Plan, pair: PlannedPair) -> Lineage:
        data = pair.preview.spec.inputs["avatar_dataset"].name
        return cls(StageKind.AVATAR, plan.job_id, plan.recipe, (pair.avatar,), (data,))

    @classmethod
    def of_pair(cls, plan: Plan, pair: PlannedPair) -> Lineage:
        inputs = pair.preview.spec.inputs
        return cls(
            StageKind.PAIR,
            plan.job_id,
            plan.recipe,
            (pair.avatar, pair.actor),
            (inputs["avatar_dataset"].name, inputs["actor_dataset"].name),
            pair.head.key,
            pair.warm.name if pair.warm else "",
            pair.bridge.spec.kind is StageKind.SHARED,
        )

    def tags(self) -> dict[str, str]:
        """What is known before anything was measured."""
        known = {
            KIND_TAG: self.kind.value,
            JOB_TAG: self.job,
            RECIPE_TAG: self.recipe.name,
            SECTIONS_TAG: json.dumps(self.recipe.model_dump(mode="json")),
            **{DATASET_TAG + role: key for role, key in zip(("avatar", "actor"), self.datasets, strict=False)},
            AVATAR_STAGE_TAG: self.avatar_stage,
            WARM_TAG: self.begins_at,
            SHARED_TAG: "true" if self.shared else "",
        }
        return {key: value for key, value in known.items() if value}

    def measured(self, metrics: Mapping[str, Any]) -> dict[str, str]:
        """The figures of a preview that this model's own are, and on which frames and how they were measured."""
        options = self.recipe.evaluation
        part = _PART[self.kind]
        figures = flat(_without({part: metrics.get(part) or {}}))
        frames = (METHOD_VERSION[StageKind.PREVIEW], self.datasets, self.recipe.avatar.image_size, options.max_frames)
        smoothing = options.self_smoothing if self.kind is StageKind.AVATAR else options.pose_smoothing
        return {
            **{f"{FIGURE_TAG}{path}": f"{value:g}" for path, value in figures.items()},
            HELD_OUT_TAG: digest("held out", *frames, smoothing, options.identity_frames),
            DECIDED_BY_TAG: self.contest().figure,
        }

    def contest(self) -> Contest:
        """How a version becomes champion by this recipe."""
        options = self.recipe.evaluation
        name = options.champion_avatar if self.kind is StageKind.AVATAR else options.champion_pair
        return Contest(options.promote, f"{_PART[self.kind]}/{name}")


def _without(figures: Any) -> Any:
    """Less what is left out."""
    if not isinstance(figures, Mapping):
        return figures
    return {key: _without(value) for key, value in figures.items() if key not in _LEFT_OUT}

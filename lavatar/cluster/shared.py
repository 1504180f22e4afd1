"""The stage of a network that many subjects share: Y-network, then the mapping MLP of each avatar, in one worker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavatar.cluster.plans import Phase, TrainingPlan, Worker
from lavatar.configs.recipe import Recipe
from lavatar.contracts import EventSink, StageSpec

if TYPE_CHECKING:
    from lavatar.training.tasks import TrainingTask


def shared_plan(spec: StageSpec, events: EventSink) -> TrainingPlan:
    """The Y-network of all subjects (Sec. 4.1), then a mapping MLP for each avatar (Sec. 4.2)."""
    from lavatar.datasets.loader import FrameStore
    from lavatar.training.mapping import MappingTask
    from lavatar.training.release import read_frozen_avatar, write_shared_release
    from lavatar.training.ynet import YNetTask

    avatars, actors = labels(spec, "avatar_dataset"), labels(spec, "actor_dataset")
    subjects = sorted({*avatars, *actors})
    recipe = steps_of_all(Recipe.model_validate(spec.recipe), len(subjects))
    cache_mb = 2 * recipe.ynet_training.cache_mb // len(subjects)  # together as much as a pair's two

    def store(subject: str) -> FrameStore:
        role = "avatar_dataset" if subject in avatars else "actor_dataset"
        folder = spec.inputs[f"{role}/{subject}"]
        size = recipe.avatar.image_size
        return FrameStore(folder, size, "train", cache_mb, max_bad=0, events=events, stage=spec.name)

    def ynet(before: Sequence[TrainingTask], worker: Worker) -> TrainingTask:
        stores = {subject: store(subject) for subject in subjects}
        return YNetTask(recipe, stores, None, worker.rank, worker.world, avatars)

    def mapping(avatar: str) -> Any:
        def build(before: Sequence[TrainingTask], worker: Worker) -> TrainingTask:
            first = before[0]
            assert isinstance(first, YNetTask)
            frozen = read_frozen_avatar(spec.inputs[f"avatar/{avatar}"])
            drivers = [actor for actor in actors if actor != avatar]
            return MappingTask(recipe, first, frozen, worker.rank, worker.world, (avatar, *drivers))

        return build

    def write(folder: Path, tasks: Sequence[TrainingTask]) -> None:
        first = tasks[0]
        assert isinstance(first, YNetTask)
        write_shared_release(folder, first, [task for task in tasks if isinstance(task, MappingTask)])

    first = Phase("ynet", recipe.ynet_training, ynet)
    driven = [avatar for avatar in avatars if actors != [avatar]]
    rest = [Phase(f"mapping-{avatar}", recipe.mapping_training, mapping(avatar)) for avatar in driven]
    return TrainingPlan((first, *rest), write)


def labels(spec: StageSpec, role: str) -> list[str]:
    """The subjects that have this role, sorted."""
    return sorted(name.partition("/")[2] for name in spec.inputs if name.startswith(f"{role}/"))


def steps_of_all(recipe: Recipe, subjects: int) -> Recipe:
    """As many steps for each subject as it would get in a pair, where a step draws one of two."""
    if recipe.ynet_loss.subjects == "both":
        return recipe
    steps = round(recipe.ynet_training.steps * subjects / 2)
    return recipe.model_copy(update={"ynet_training": recipe.ynet_training.model_copy(update={"steps": steps})})

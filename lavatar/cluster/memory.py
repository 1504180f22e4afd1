"""A training that runs out of memory is tried once more, its batches in smaller parts. Imports neither torch nor Ray.

Memory ends a training in three ways: torch or Python says so; or the kernel kills the worker and tells nobody, but
counts its kills; or Ray, before the kernel would, kills the worker or the task that coordinates it, and says so to
whoever started that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lavatar.configs.recipe import Recipe
from lavatar.configs.training import TrainingConfig
from lavatar.contracts import StageKind, StageSpec
from lavatar.errors import OutOfMemoryError

PARTS = "parts_of_a_batch"
"""Beside the phases' figures, where memory ran out: samples of a part before and after, by phase."""

TRAININGS: Mapping[StageKind, tuple[str, ...]] = {
    StageKind.AVATAR: ("avatar_training",),
    StageKind.PAIR: ("ynet_training", "mapping_training"),
    StageKind.SHARED: ("ynet_training", "mapping_training"),
}
"""The recipe's sections that the phases of a stage are trained by."""

_SAID = re.compile("can't allocate memory|bad_alloc|CUBLAS_STATUS_ALLOC_FAILED")
_SPEAKERS = ("OutOfMemoryError", "MemoryError")  # torch's, Ray's and Python's, by name: torch is not imported here
_HINT = "Lower its batch_size or the sizes of its model, or give the stage a machine with more memory."


def trainings(kind: StageKind, recipe: Recipe) -> dict[str, TrainingConfig]:
    """How the phases of a stage are trained, by the name of the section."""
    return {name: getattr(recipe, name) for name in TRAININGS.get(kind, ())}


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: of a GPU, torch's CPU allocator, Python or Ray."""
    kind = type(error).__name__
    return kind in _SPEAKERS or (isinstance(error, RuntimeError) and _SAID.search(str(error)) is not None)


def batch_too_large(error: BaseException) -> OutOfMemoryError:
    """The error of a training whose memory ran out."""
    text = (str(error).strip().splitlines() or ["no message"])[0]
    return OutOfMemoryError(f"the batch does not fit into memory ({type(error).__name__}: {text})", _HINT)


def killed_by_ray(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is Ray's of a process that it killed for want of memory."""
    while error is not None:
        if type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("ray."):
            return True
        error = getattr(error, "health_check_failure", None) or getattr(error, "cause", None)
    return False


def killed(whom: str) -> OutOfMemoryError:
    """The error of a process that was killed because the machine's memory ran out."""
    return OutOfMemoryError(f"the machine's memory ran out: {whom}", _HINT)


def kernel_kills() -> int:
    """How many processes the kernel of this machine has killed for want of memory; 0 where it does not tell."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def in_smaller_parts(spec: StageSpec, workers: int) -> tuple[StageSpec, dict[str, dict[str, int]]]:
    """The stage with batches in half the part (or the next one that divides it), and what changed, by phase.

    The batch itself, its samples and the optimizer's steps stay. Nothing changes where the parts are single samples.
    """
    recipe: dict[str, Any] = dict(spec.recipe)
    changed = {}
    for name, training in trainings(spec.kind, Recipe.model_validate(spec.recipe)).items():
        part = training.batch_size // (workers * training.accumulation)
        if part == 1:
            continue
        less = next(size for size in range(part // 2, 0, -1) if part % size == 0)
        recipe[name] = {**recipe[name], "accumulation": training.accumulation * (part // less)}
        changed[name.removesuffix("_training")] = {"before": part, "after": less}
    return StageSpec(**{**vars(spec), "recipe": recipe}), changed


def train_within_memory(
    spec: StageSpec,
    workers: int,
    train: Callable[[StageSpec], dict[str, Any]],
    say: Callable[[str], None],
    *,
    ran_out: bool = False,
) -> dict[str, Any]:
    """The figures of `train(spec)`; where memory runs out, those of one more try with smaller parts, and PARTS.

    `ran_out`: it did already, and took the coordinating task with it. Raises OutOfMemoryError where that is not enough.
    """
    try:
        if ran_out:
            raise killed("Ray killed a process of this stage")
        return train(spec)
    except OutOfMemoryError as error:
        less, changed = in_smaller_parts(spec, workers)
        if not changed:
            raise OutOfMemoryError(f"{error.message}, one sample at a time", _HINT) from error
        say(f"{error.message}: once more from the last checkpoint, {parts_text(changed)}")
    try:
        return {**train(less), PARTS: changed}
    except OutOfMemoryError as error:
        raise OutOfMemoryError(f"{error.message}, also {parts_text(changed)}", _HINT) from error


def parts_text(changed: Mapping[str, Mapping[str, int]]) -> str:
    """What changed, for people."""
    parts = (f"{phase} in parts of {sizes['after']} samples, not {sizes['before']}" for phase, sizes in changed.items())
    return f"each batch of {', '.join(parts)}"


def memory_notes(figures: Mapping[str, Any]) -> tuple[str, ...]:
    """The note of a stage whose figures say that memory ran out."""
    changed = figures.get(PARTS)
    return (f"memory ran out once: the rest was trained with {parts_text(changed)}",) if changed else ()

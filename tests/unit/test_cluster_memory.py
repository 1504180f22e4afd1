"""What counts as a lack of memory, and what a batch in smaller parts is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lavatar.cluster.memory import (
    PARTS,
    in_smaller_parts,
    memory_notes,
    out_of_memory,
    train_within_memory,
)
from lavatar.configs.recipe import Recipe
from lavatar.configs.training import TrainingConfig
from lavatar.contracts import StageKind, StageSpec
from lavatar.errors import OutOfMemoryError


def spec(kind: StageKind, **trainings: tuple[int, int]) -> StageSpec:
    """Batch sizes and accumulation of each training."""
    sections = {f"{n}_training": TrainingConfig(batch_size=b, accumulation=a) for n, (b, a) in trainings.items()}
    dump = Recipe(name="test", **sections).model_dump(mode="json")  # type: ignore[arg-type]
    return StageSpec(kind, "x", "k", Path("home"), Path("home/k"), {}, dump)


def accumulation(one: StageSpec, name: str) -> int:
    return int(one.recipe[f"{name}_training"]["accumulation"])


def test_torch_python_and_ray_say_it_in_their_own_ways() -> None:
    import ray

    with pytest.raises(RuntimeError) as refused:
        torch.ones(2**50, dtype=torch.uint8)
    assert type(refused.value) is RuntimeError, "torch's allocator on the CPU has no class of its own"
    assert out_of_memory(refused.value)
    with pytest.raises(MemoryError) as refused_too:
        bytearray(2**60)
    assert out_of_memory(refused_too.value)
    assert out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert out_of_memory(ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory."))
    for other in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("low on memory"), ValueError()):
        assert not out_of_memory(other)


def test_a_part_is_halved_and_the_batch_stays() -> None:
    less, changed = in_smaller_parts(spec(StageKind.AVATAR, avatar=(24, 2)), workers=2)
    assert changed == {"avatar": {"before": 6, "after": 3}}
    assert (accumulation(less, "avatar"), less.recipe["avatar_training"]["batch_size"]) == (4, 24)
    least, changed = in_smaller_parts(less, workers=2)
    assert changed == {"avatar": {"before": 3, "after": 1}}
    assert accumulation(least, "avatar") == 12
    Recipe.model_validate(least.recipe)
    assert in_smaller_parts(least, workers=2) == (least, {})


def test_both_trainings_of_a_pair_get_smaller_parts_where_they_can() -> None:
    less, changed = in_smaller_parts(spec(StageKind.PAIR, ynet=(16, 1), mapping=(4, 4)), workers=1)
    assert changed == {"ynet": {"before": 16, "after": 8}}
    assert (accumulation(less, "ynet"), accumulation(less, "mapping")) == (2, 4)


def test_single_samples_are_not_tried_again() -> None:
    tried: list[StageSpec] = []

    def train(one: StageSpec) -> dict[str, object]:
        tried.append(one)
        raise OutOfMemoryError("full")

    with pytest.raises(OutOfMemoryError, match="full, one sample at a time") as caught:
        train_within_memory(spec(StageKind.AVATAR, avatar=(2, 2)), 1, train, lambda text: None)
    assert len(tried) == 1
    assert "batch_size" in caught.value.hint


def test_a_training_that_fits_has_no_note() -> None:
    figures = train_within_memory(spec(StageKind.AVATAR), 1, lambda one: {"avatar": {"steps": 1}}, lambda text: None)
    assert figures == {"avatar": {"steps": 1}}
    assert memory_notes(figures) == ()
    assert memory_notes({PARTS: {"ynet": {"before": 4, "after": 2}}}) == (
        "memory ran out once: the rest was trained with each batch of ynet in parts of 2 samples, not 4",
    )

"""A batch that is computed in parts, to need less memory, draws the same random numbers as in one piece.

Each part draws what the whole batch draws, from the same state of the generators, and takes its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Generator, Tensor

_PART: ContextVar[tuple[int, int]] = ContextVar("part", default=(0, 1))
"""This part, and how many equal ones there are."""


@contextmanager
def part_of_batch(index: int, count: int) -> Iterator[None]:
    """What is drawn inside is drawn for the whole batch."""
    token = _PART.set((index, count))
    try:
        yield
    finally:
        _PART.reset(token)


def drawn(draw: Callable[..., Tensor], shape: tuple[int, ...], like: Tensor, generator: Generator | None) -> Tensor:
    """`draw`(shape, …), first dimension the samples of this part, on the device and of the type of `like`. A generator
    of the caller's own knows of no parts."""
    if generator is not None:
        return draw(shape, device=like.device, dtype=like.dtype, generator=generator)
    index, count = _PART.get()
    whole = draw((shape[0] * count, *shape[1:]), device=like.device, dtype=like.dtype)
    return whole[index * shape[0] : (index + 1) * shape[0]]


def of_the_first(frames: int, here: int) -> int:
    """How many of the first `frames` of the whole batch are among the `here` of this part (its own first ones)."""
    index, _ = _PART.get()
    return max(0, min(here, frames - index * here))


def parts() -> int:
    """In how many the batch is computed."""
    return _PART.get()[1]

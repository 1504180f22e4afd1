"""The state of every global random generator of this process, as tensors."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import cast

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """torch, numpy and python generators, and the one of `device` where that is a GPU; uint8 or int64 vectors."""
    legacy = cast(tuple[str, np.ndarray, int, int, float], np.random.get_state())
    _, keys, position, has_gauss, gauss = legacy  # always MT19937
    gauss_bits = int(np.float64(gauss).view(np.int64))
    version, words, spare = random.getstate()
    spare_bits = 0 if spare is None else int(np.float64(spare).view(np.int64))
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss, gauss_bits]),
        "python": torch.tensor([version, *words, spare is not None, spare_bits]),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """The inverse of `rng_state`."""
    torch.set_rng_state(state["torch"])
    *keys, position, has_gauss, gauss_bits = state["numpy"].tolist()
    gauss = float(np.int64(gauss_bits).view(np.float64))
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, *words, has_spare, spare_bits = state["python"].tolist()
    spare = float(np.int64(spare_bits).view(np.float64)) if has_spare else None
    random.setstate((version, tuple(words), spare))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_all(seed: int, step: int, rank: int) -> None:
    """Seeds every generator from (seed, step, rank): a start, or a resume on another number of workers."""
    mixed = np.random.SeedSequence([seed & _MASK, step, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(mixed) >> 1)
    np.random.seed(int(mixed) & 0xFFFFFFFF)
    random.seed(int(mixed))


@contextlib.contextmanager
def untouched_rng(device: torch.device) -> Iterator[None]:
    """What happens inside draws from the generators without the training noticing."""
    state = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(state, device)

"""Batches of any make (dataclasses, mappings, sequences of tensors): moved, split, their samples named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lavatar.errors import ConfigError


def map_leaves(batch: Any, function: Callable[[Any], Any]) -> Any:
    """`batch` with `function` applied to each tensor, array and tuple or list of strings (sample keys)."""
    if isinstance(batch, Tensor | np.ndarray) or _is_keys(batch):
        return function(batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{f.name: map_leaves(getattr(batch, f.name), function) for f in fields(batch) if f.init})
    if isinstance(batch, Mapping):
        return {key: map_leaves(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_leaves(value, function) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_leaves(value, function) for value in batch)
    return batch


def to_device(batch: Any, device: torch.device) -> Any:
    """Every tensor of `batch` on `device`; a batch that is there already comes back as it is."""
    if device.type == "cpu":
        return batch
    return map_leaves(batch, lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf)


def split(batch: Any, parts: int) -> list[Any]:
    """`batch` in `parts` equal runs of samples (gradient accumulation)."""
    return [batch] if parts == 1 else [map_leaves(batch, partial(_share, part, parts)) for part in range(parts)]


def _share(part: int, parts: int, leaf: Any) -> Any:
    """The part-th run of samples of one leaf; a scalar belongs to every part."""
    if isinstance(leaf, Tensor | np.ndarray) and leaf.ndim == 0:
        return leaf
    if len(leaf) % parts:
        raise ConfigError(
            f"a worker's batch of {len(leaf)} cannot be split into {parts} equal parts",
            "Choose batch_size as a multiple of workers × accumulation.",
        )
    size = len(leaf) // parts
    return leaf[part * size : (part + 1) * size]


def sample_keys(batch: Any) -> list[str]:
    """Names of the samples in `batch`, for messages."""
    found: list[str] = []

    def collect(leaf: Any) -> Any:
        if _is_keys(leaf):
            found.extend(leaf)
        return leaf

    map_leaves(batch, collect)
    return found


def _is_keys(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, str) for item in value)

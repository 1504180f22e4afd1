"""A limit on what a module reserves while it is built: its configuration may name any size, its weights have one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

SLACK = 2**22
"""Numbers beyond those of the weights: constants and scratch of the constructors."""
_MAKERS = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})


class TooLargeError(ValueError):
    """The configuration asks for far more numbers than the weights have."""


class Budget(TorchFunctionMode):
    """Inside `with Budget(tensors)` twice as many numbers may be reserved as these hold. Raises TooLargeError before
    the memory is touched."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.left = 2 * sum(tensor.numel() for tensor in tensors.values()) + SLACK

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MAKERS:
            size = kwargs.get("size", args[:1] if func is torch.full else args)
            self.left -= math.prod(n for part in size for n in (part if isinstance(part, Sequence) else (part,)))
            if self.left < 0:
                raise TooLargeError("its configuration asks for far more numbers than its weights have")
        return func(*args, **kwargs)

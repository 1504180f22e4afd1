"""The batch of the next step, made and on its way to the GPU while this step is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from lavatar.training.batch import map_leaves, to_device


class Prefetch:
    """Batches by step, on the device. `make` is a pure function of the step, so who calls it, and when, is no matter.

    On a CPU nothing is made ahead: the cores are busy with the step itself. Close it, or the thread stays.
    """

    def __init__(self, make: Callable[[int], Any], device: torch.device, steps: int) -> None:
        self._make, self._device, self._steps = make, device, steps
        self._ahead: dict[int, Future[Any]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches") if device.type == "cuda" else None

    def batch(self, step: int) -> Any:
        """The batch of `step`. An error of making it is raised here, whichever thread it happened in."""
        if self._thread is None:
            return to_device(self._make(step), self._device)
        ready = self._ahead.pop(step, None) or self._thread.submit(self._send, step)
        if step + 1 < self._steps:
            self._ahead[step + 1] = self._thread.submit(self._send, step + 1)
        return ready.result()

    def close(self) -> None:
        """Waits for what is being made, and forgets it."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._ahead.clear()

    def _send(self, step: int) -> Any:
        """Page-locked memory is copied while the processor goes on; the allocator keeps it until the copy is done."""
        return to_device(map_leaves(self._make(step), _pinned), self._device)


def _pinned(leaf: Any) -> Any:
    return leaf.pin_memory() if isinstance(leaf, Tensor) else leaf

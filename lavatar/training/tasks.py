"""What the training loop asks of a model in training. One task trains one model; the loop knows nothing else of it.

A task is built in the process that trains, with its rank and world size; the loop owns optimizer, schedule,
checkpoints and logging. A step is `losses(batches(step), step)`, then the optimizer moves `active_groups(step)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, Protocol, TypedDict, runtime_checkable

import numpy as np
from torch import Tensor, nn


class ParamGroup(TypedDict):
    """Parameters that share a learning rate. `lr` is the peak: the loop's schedule multiplies it."""

    params: list[nn.Parameter]
    lr: float
    name: str
    betas: NotRequired[tuple[float, float]]
    eps: NotRequired[float]


@runtime_checkable
class TrainingTask(Protocol):
    """One model in training. Everything random is drawn from (seed, step, rank), so a resumed run is the same run."""

    @property
    def module(self) -> nn.Module:
        """Everything trained and everything frozen that the losses need; what a checkpoint saves."""
        ...

    def param_groups(self) -> list[ParamGroup]:
        """Every trainable parameter of `module`, each in exactly one group; the order never changes."""
        ...

    def active_groups(self, step: int) -> set[str]:
        """Names of the groups the optimizer may move at `step`. The others keep values and moments bit for bit."""
        ...

    def batches(self, step: int) -> Any:
        """This rank's share of the global batch of `step`: a pure function of (seed, step, rank)."""
        ...

    def losses(self, batch: Any, step: int) -> dict[str, Tensor]:
        """Scalar terms by name, among them "total", the one to differentiate."""
        ...

    def after_step(self, step: int) -> None:
        """Called once the optimizer has moved: running averages. Must not draw random numbers."""
        ...

    def pictures(self, step: int) -> dict[str, np.ndarray]:
        """What to show now: uint8 HWC RGB by name."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What a resume needs besides module, optimizer and step: tensors only."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` gave."""
        ...


@runtime_checkable
class MeasuredTask(Protocol):
    """A task that also measures itself on frames that stay the same, now and then."""

    def measure(self, done: int) -> dict[str, float]:
        """Figures after `done` steps (0: before the first), empty where none are due. Must not draw random numbers."""
        ...

    def figures(self) -> dict[str, Any]:
        """What the stage reports of it in the end."""
        ...

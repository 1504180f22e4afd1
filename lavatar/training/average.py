"""A running mean of the weights: what the last steps have in common, without the noise of each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """w̄ ← d·w̄ + (1 − d)·w after each step, for the parameters of a module; d grows to `decay` in the first steps.

    With (1 + step) / (10 + step) as its limit the mean forgets the beginning soon (as TensorFlow's average does).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self.decay = module, decay
        self.values: dict[str, Tensor] = {n: p.detach().clone() for n, p in module.named_parameters()}

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """After optimizer step `step` (0 is the first)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self._module.named_parameters():
            mean = self.values[name]
            if mean.device != parameter.device:  # the engine has moved the module
                mean = self.values[name] = mean.to(parameter.device)
            mean.lerp_(parameter.detach(), 1 - decay)

    def take(self, values: Mapping[str, Tensor]) -> None:
        """Go on from stored values."""
        self.values = {name: value.clone() for name, value in values.items()}

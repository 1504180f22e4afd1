"""Adam that moves only the groups of parameters that are active at a step.

Sec. 4.1 trains one randomly chosen subject a step with the other decoder frozen. Zero gradients do not freeze under
Adam (the moments would still move the values), so an inactive group is left out of the step altogether: values,
moments and step counts stay bit-identical.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lavatar.configs.training import TrainingConfig
from lavatar.errors import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""What Adam keeps for each parameter: first and second moment (shape of the parameter), number of its steps."""


class GroupAdam(torch.optim.Adam):
    """Adam over named groups; `active` holds the names of those that the next `step()` moves.

    The moments of every parameter exist from `make_state()` on, not from its first step: a checkpoint then has the
    same tensors whenever it is taken.
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]], fused: bool | None = None) -> None:
        prepared = [dict(group) for group in groups]
        _check_names(prepared)
        for group in prepared:
            group["peak_lr"] = float(group["lr"])
        if fused is None:
            fused = fused_works(p for group in prepared for p in group["params"])
        super().__init__(prepared, lr=prepared[0]["lr"], fused=fused)
        self.active: set[str] = {group["name"] for group in prepared}

    def activate(self, names: Iterable[str]) -> None:
        """Choose the groups that the next steps move."""
        chosen, known = set(names), {group["name"] for group in self.param_groups}
        if not chosen <= known:
            raise ConfigError(
                f"no parameter group is called {', '.join(sorted(chosen - known))}",
                f"active_groups() may name: {', '.join(sorted(known))}.",
            )
        self.active = chosen

    def parameters_by_group(self) -> dict[str, list[nn.Parameter]]:
        """Each group's parameters, in the order of the groups."""
        return {group["name"]: list(group["params"]) for group in self.param_groups}

    def scale_rate(self, factor: float) -> None:
        """Every group's learning rate becomes `factor` times its peak."""
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] * factor

    @torch.no_grad()
    def make_state(self) -> None:
        """Zero moments for every parameter that has none."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    device = parameter.device if group["fused"] else torch.device("cpu")
                    self.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32, device=device),
                        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    }

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One Adam step of the active groups."""
        everything = self.param_groups
        self.param_groups = [group for group in everything if group["name"] in self.active]
        try:
            return super().step(closure)
        finally:
            self.param_groups = everything


def build_optimizer(groups: Sequence[Mapping[str, Any]], module: nn.Module, config: TrainingConfig) -> GroupAdam:
    """GroupAdam over a task's groups. Parameters of `module` in no group are frozen; one in two groups is an error."""
    grouped = [p for group in groups for p in group["params"]]
    if len({id(p) for p in grouped}) != len(grouped):
        raise ConfigError("a parameter is in two groups", "Each trainable parameter belongs to exactly one group.")
    own = {id(p) for p in module.parameters()}
    if not all(id(p) in own for p in grouped):
        raise ConfigError(
            "a parameter group holds a parameter that is not in the task's module",
            "Register it on `module`, or no checkpoint will hold it.",
        )
    trained = {id(p) for p in grouped}
    for parameter in module.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return GroupAdam([{"lr": config.learning_rate, **group} for group in groups])


def fused_works(parameters: Iterable[Tensor]) -> bool:
    """Fused Adam exists for floating-point parameters on CPU and CUDA."""
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)


def _check_names(groups: Sequence[Mapping[str, Any]]) -> None:
    names = [group.get("name", "") for group in groups]
    if not names or not all(names) or len(set(names)) != len(names):
        raise ConfigError(f"parameter groups need names of their own, got {names}", "Name each group once.")
    empty = [group["name"] for group in groups if not list(group["params"])]
    if empty:
        raise ConfigError(f"parameter group {empty[0]!r} is empty", "Leave the group away.")

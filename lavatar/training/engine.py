"""What moves the parameters: backward pass, accumulation, clipping, optimizer step. `TorchEngine` is the reference.

The engine that distributes (DeepSpeed) lives in the cluster's room and is compared with this one step by step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lavatar.configs.training import TrainingConfig
from lavatar.errors import ConfigError
from lavatar.training.optimizer import MOMENTS, GroupAdam

Losses = dict[str, Tensor]
"""Scalar terms by name, among them "total", the one differentiated."""

MicroLosses = Callable[[int], Losses]
"""The losses of the i-th of `accumulation` equal parts of this rank's batch."""


@dataclass(frozen=True)
class EngineState:
    """Everything learnt, on the CPU, by full names and whole tensors: it fits any number of workers."""

    modules: dict[str, Tensor]
    moments: dict[str, Tensor]  # "exp_avg/NAME", "exp_avg_sq/NAME", "step/NAME" for each trained parameter NAME


class Engine(Protocol):
    """One worker's part in training one module. Every method is called by all workers in the same order."""

    module: nn.Module
    optimizer: GroupAdam
    device: torch.device
    rank: int
    world: int

    def step(self, losses: MicroLosses) -> dict[str, Tensor]:
        """One optimizer step of the active groups; returns the mean of each term over parts and workers."""
        ...

    def any(self, flag: bool) -> bool:
        """True on every worker if it is on one."""
        ...

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The same-shaped CPU tensors of all workers, in the order of ranks."""
        ...

    def export_state(self) -> EngineState: ...

    def import_state(self, state: EngineState) -> None: ...

    def close(self) -> None:
        """Let go of hooks and process groups; the module stays usable."""
        ...


class TorchEngine:
    """Plain torch on one worker: the reference, and what `engine: torch` runs for debugging."""

    def __init__(
        self, module: nn.Module, optimizer: GroupAdam, config: TrainingConfig, device: torch.device | None = None
    ) -> None:
        self.module, self.optimizer, self.config = module, optimizer, config
        self.device = device or torch.device("cpu")
        self.rank, self.world = 0, 1
        allow_tf32(config, self.device)
        self.module.to(self.device)
        self.optimizer.make_state()

    def step(self, losses: MicroLosses) -> dict[str, Tensor]:
        trained = choose_trained(self.optimizer.parameters_by_group(), self.optimizer.active)
        parts = self.config.accumulation
        means: dict[str, Tensor] = {}
        for part in range(parts):
            with precision(self.config, self.device):
                terms = losses(part)
            (terms["total"] / parts).backward()
            add_means(means, terms, parts)
        for parameter in trained:  # no gradient counts as zero, as it does under DeepSpeed's reduction
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.config.gradient_clip:
            nn.utils.clip_grad_norm_(trained, self.config.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return means

    def any(self, flag: bool) -> bool:
        return flag

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]

    def export_state(self) -> EngineState:
        return EngineState(module_tensors(self.module), plain_moments(self.module, self.optimizer))

    def import_state(self, state: EngineState) -> None:
        load_module(self.module, state.modules)
        load_plain_moments(self.module, self.optimizer, state.moments)

    def close(self) -> None: ...


def choose_trained(groups: Mapping[str, list[nn.Parameter]], active: set[str]) -> list[nn.Parameter]:
    """The parameters of the active groups; those of the others take no gradient in this step, nor its cost."""
    for name, parameters in groups.items():
        for parameter in parameters:
            parameter.requires_grad_(name in active)
    return [parameter for name in groups if name in active for parameter in groups[name]]


def allow_tf32(config: TrainingConfig, device: torch.device) -> None:
    """Whether a GPU may round the factors of fp32 products to ten bits, in this process; of convolutions torch lets it.

    On a CPU nothing changes.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if config.precision == "fp32" else "high")


def precision(config: TrainingConfig, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bf16 means autocast of the forward pass: convolutions and products in bf16; weights, moments, sums in fp32."""
    if config.precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def add_means(means: dict[str, Tensor], terms: Losses, parts: int) -> None:
    """Adds one part's terms to the running means over all parts."""
    for name, value in terms.items():
        share = value.detach().float() / parts
        means[name] = means[name] + share if name in means else share


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, on the CPU, none sharing memory with another or with the module."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in module.state_dict().items()}


def load_module(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies `tensors` into `module`; a name missing on either side, or another shape, is an error."""
    try:
        module.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        raise ConfigError(
            f"the checkpoint is of another model: {str(error).splitlines()[-1].strip()}",
            "Take the recipe that the checkpoint was made with, or remove the checkpoint's folder.",
        ) from None


def trained_names(module: nn.Module, optimizer: GroupAdam) -> dict[str, nn.Parameter]:
    """The parameters in the optimizer's groups under their names in the module."""
    grouped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name: p for name, p in module.named_parameters() if id(p) in grouped}


def plain_moments(module: nn.Module, optimizer: GroupAdam) -> dict[str, Tensor]:
    """Adam's state where the optimizer holds the module's own parameters."""
    return {
        f"{key}/{name}": optimizer.state[parameter][key].detach().cpu().clone()
        for name, parameter in trained_names(module, optimizer).items()
        for key in MOMENTS
    }


@torch.no_grad()
def load_plain_moments(module: nn.Module, optimizer: GroupAdam, moments: Mapping[str, Tensor]) -> None:
    """The inverse of `plain_moments`."""
    named = trained_names(module, optimizer)
    check_moments(moments, named)
    for name, parameter in named.items():
        for key in MOMENTS:
            optimizer.state[parameter][key].copy_(moments[f"{key}/{name}"])


def check_moments(moments: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> None:
    """Every trained parameter has its moments, and nothing else has."""
    wanted = {f"{key}/{name}" for name in named for key in MOMENTS}
    if wanted != set(moments):
        odd = sorted(wanted ^ set(moments))[0]
        raise ConfigError(
            f"the checkpoint's optimizer does not fit: {odd} is on one side only",
            "Take the recipe that the checkpoint was made with, or remove the checkpoint's folder.",
        )

"""DeepSpeed as an `Engine`: ZeRO 0-2, accumulation, clipping, any number of workers.

The optimizer is our GroupAdam, so that frozen groups stay bit-identical; weights and moments are fp32 at every
precision (bf16 is autocast of the forward pass, as in the reference engine). State leaves and enters per parameter and
whole, so a checkpoint fits any number of workers and any ZeRO stage.
"""

from __future__ import annotations

import atexit
import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from lavatar.configs.training import TrainingConfig
from lavatar.training.engine import (
    EngineState,
    MicroLosses,
    add_means,
    allow_tf32,
    check_moments,
    choose_trained,
    load_module,
    load_plain_moments,
    module_tensors,
    plain_moments,
    precision,
    trained_names,
)
from lavatar.training.optimizer import GroupAdam

FRAGMENTED = ("exp_avg", "exp_avg_sq")  # the moments that ZeRO cuts into one flat piece a worker


def prepare_environment(device: torch.device) -> None:
    """What DeepSpeed reads when it is imported; call before `import deepspeed`."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")


class DeepSpeedEngine:
    """One worker's part in training `module` under DeepSpeed."""

    def __init__(
        self, module: nn.Module, optimizer: GroupAdam, config: TrainingConfig, device: torch.device | None = None
    ) -> None:
        self.device = device or torch.device("cpu")
        prepare_environment(self.device)
        import deepspeed  # 3-5 seconds, so only where it trains

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its warnings tell users nothing they can act on
        self.config, self.module, self.optimizer = config, module, optimizer
        _join_process_group(self.device)
        if self.device.type == "cpu":
            # No op is compiled: the shared-memory all-reduce takes 80 s to build, and asking which would work runs gcc.
            deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        allow_tf32(config, self.device)
        self.module.to(self.device)
        self._groups = optimizer.parameters_by_group()  # before ZeRO puts flat pieces in their place
        self._names = trained_names(module, optimizer)
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=engine_config(config, self.world), dist_init_required=False
        )
        self._engine: Any = engine
        self.optimizer.make_state()
        if config.zero_stage:
            # DeepSpeed links parameters to moments at its first step, and only those that exist by then.
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def step(self, losses: MicroLosses) -> dict[str, Tensor]:
        choose_trained(self._groups, self.optimizer.active)
        parts = self.config.accumulation
        means: dict[str, Tensor] = {}
        for part in range(parts):
            with precision(self.config, self.device):
                terms = losses(part)
            self._engine.backward(terms["total"])
            self._engine.step()
            add_means(means, terms, parts)
        return self._mean(means)

    def any(self, flag: bool) -> bool:
        if self.world == 1:
            return flag
        votes = torch.tensor([float(flag)], device=self.device)
        torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
        return bool(votes.item())

    def gather(self, tensor: Tensor) -> list[Tensor]:
        if self.world == 1:
            return [tensor]
        own = tensor.to(self.device)
        everyone = [torch.empty_like(own) for _ in range(self.world)]
        torch.distributed.all_gather(everyone, own)
        return [one.cpu() for one in everyone]

    def export_state(self) -> EngineState:
        modules = module_tensors(self.module)
        if not self.config.zero_stage:
            return EngineState(modules, plain_moments(self.module, self.optimizer))
        from deepspeed.utils import safe_get_full_optimizer_state

        moments: dict[str, Tensor] = {}
        for name, parameter in self._names.items():
            for key in FRAGMENTED:
                moments[f"{key}/{name}"] = safe_get_full_optimizer_state(parameter, key).detach().cpu().clone()
            moments[f"step/{name}"] = self._flat_state(name)["step"].detach().cpu().clone()
        return EngineState(modules, moments)

    @torch.no_grad()
    def import_state(self, state: EngineState) -> None:
        load_module(self.module, state.modules)
        if not self.config.zero_stage:
            load_plain_moments(self.module, self.optimizer, state.moments)
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        check_moments(state.moments, self._names)
        for name, parameter in self._names.items():
            safe_set_full_fp32_param(parameter, parameter.detach())
            for key in FRAGMENTED:
                value = state.moments[f"{key}/{name}"].to(self.device)
                safe_set_full_optimizer_state(parameter, value, key)
            self._flat_state(name)["step"].copy_(state.moments[f"step/{name}"])

    def close(self) -> None:
        self._engine.destroy()

    def _flat_state(self, name: str) -> dict[str, Tensor]:
        """Adam's state of the flat piece that holds parameter `name`: its step count is the whole group's."""
        parameter = self._names[name]
        index = next(i for i, group in enumerate(self._groups.values()) if any(parameter is p for p in group))
        return self.optimizer.state[self._engine.optimizer.single_partition_of_fp32_groups[index]]

    def _mean(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean over workers of every term, in one message."""
        if self.world == 1:
            return terms
        values = torch.stack(list(terms.values()))
        torch.distributed.all_reduce(values)
        return dict(zip(terms, values / self.world, strict=True))


def engine_config(config: TrainingConfig, world: int) -> dict[str, Any]:
    """DeepSpeed's own configuration. Always fp32 there: bf16 would store the weights in bf16 at stage 0."""
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size // (world * config.accumulation),
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.gradient_clip,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,  # GroupAdam is torch's Adam but for the choice of groups
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def _join_process_group(device: torch.device) -> None:
    """Joins the process group that is there; a process on its own makes a group of one without ports or rendezvous.

    That group lives as long as the process, for DeepSpeed remembers it between engines.
    """
    if torch.distributed.is_initialized():
        return
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    atexit.register(torch.distributed.destroy_process_group)

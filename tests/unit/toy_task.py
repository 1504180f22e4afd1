"""A task small enough to train in a test: two decoders on one encoder, as in Sec. 4.1, one of them frozen each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ToyBatch:
    """x: B4; one name a sample."""

    x_B4: Tensor
    keys: tuple[str, ...]


class ToyTask:
    """Fits y = tanh(x) with noise from the global generator, so that a resume without generators shows."""

    def __init__(self, seed: int = 0, rank: int = 0, world: int = 1, batch: int = 4, bad_step: int = -1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.module = nn.ModuleDict(
            {"encoder": nn.Linear(4, 5), "left": nn.Linear(5, 4), "right": nn.Linear(5, 4), "frozen": nn.Linear(4, 4)}
        )
        for parameter in self.module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        self.seed, self.rank, self.world, self.batch, self.bad_step = seed, rank, world, batch, bad_step
        self.noise = 0.01
        self.seen = torch.zeros(())

    def param_groups(self) -> list[dict[str, Any]]:
        return [
            {"name": name, "params": list(self.module[name].parameters()), "lr": lr}
            for name, lr in (("encoder", 2e-2), ("left", 1e-2), ("right", 1e-2))
        ]

    def active_groups(self, step: int) -> set[str]:
        return {"encoder", self._side(step)}

    def batches(self, step: int) -> ToyBatch:
        generator = np.random.default_rng([self.seed, step])
        x = torch.from_numpy(generator.normal(size=(self.batch, 4)).astype(np.float32))
        size = self.batch // self.world
        own = slice(self.rank * size, (self.rank + 1) * size)
        return ToyBatch(x[own], tuple(f"s{step}-{i}" for i in range(self.batch))[own])

    def losses(self, batch: ToyBatch, step: int) -> dict[str, Tensor]:
        x = batch.x_B4 + self.noise * torch.randn(batch.x_B4.shape)
        y = self.module[self._side(step)](torch.tanh(self.module["encoder"](x)))
        y = y + 0.1 * self.module["frozen"](x)
        image = (y - torch.tanh(batch.x_B4)).square().mean()
        code = y.abs().mean() * (float("nan") if step == self.bad_step else 1.0)
        return {"image": image, "code": code, "total": image + 0.1 * code}

    def after_step(self, step: int) -> None:
        self.seen = self.seen + 1

    def pictures(self, step: int) -> dict[str, np.ndarray]:
        torch.rand(3)  # must not disturb the training
        return {"sample": np.full((2, 2, 3), step % 256, dtype=np.uint8)}

    def state(self) -> dict[str, Tensor]:
        return {"seen": self.seen}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.seen = state["seen"]

    def _side(self, step: int) -> str:
        return ("left", "right")[(step * 7 + 3) // 5 % 2]

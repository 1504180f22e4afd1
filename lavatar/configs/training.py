"""How a model is trained: length, rate, engine. The loss weights live in the sections of the models."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from lavatar.configs.section import Section


class TrainingConfig(Section):
    """One training run. A checkpoint every `checkpoint_every` steps; two are kept."""

    steps: int = Field(200_000, ge=1)
    batch_size: int = Field(2, ge=1, description="global: over all workers and accumulation steps")
    accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    final_rate: float = Field(0.0, ge=0, le=1, description="cosine: where it ends, as a fraction of the peak rate")
    warmup_steps: int = Field(0, ge=0)
    gradient_clip: float = Field(0.0, ge=0, description="0: none")
    precision: Literal["fp32", "tf32", "bf16"] = Field(
        "fp32", description="tf32: products of matrices as a GPU's convolutions; bf16: autocast. Weights stay fp32"
    )
    zero_stage: int = Field(0, ge=0, le=2)
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    seed: int = 0
    log_every: int = Field(10, ge=1)
    picture_every: int = Field(1000, ge=1)
    checkpoint_every: int = Field(1000, ge=1)
    cache_mb: int = Field(4096, ge=0, description="decoded frames kept in memory; 0: decode every time")

    @model_validator(mode="after")
    def _batch_splits(self) -> Self:
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}")
        return self

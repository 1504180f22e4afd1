"""What each stage asks the cluster for."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from lavatar.configs.section import Section


class StageResources(Section):
    """Resources of one worker of a stage. On a smaller machine CPUs are lowered to what there is.

    Stages that take half a GPU share one with others; the workers of one stage may lie on several nodes.
    """

    cpus: float = Field(2, gt=0)
    gpus: float = Field(0, ge=0, description="whole ones, or a part of one: 0.25 packs four workers onto a GPU")
    workers: int = Field(1, ge=1)
    memory_gb: float = Field(0, ge=0)

    @field_validator("gpus")
    @classmethod
    def _whole_or_part(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(f"a worker takes whole GPUs or a part of one, got {gpus:g}")
        return gpus


class ResourcesConfig(Section):
    """`backend: inline` runs every stage in this process, without Ray: for debugging."""

    backend: Literal["ray", "inline"] = "ray"
    preprocess: StageResources = StageResources(cpus=1)
    avatar: StageResources = StageResources()
    pair: StageResources = StageResources()
    shared: StageResources = StageResources()
    preview: StageResources = StageResources()
    dashboard: bool | None = Field(None, description="Ray's page; not given: on machines of four CPUs or more")
    max_failures: int = Field(2, ge=0, description="times a training worker is restarted from its last checkpoint")

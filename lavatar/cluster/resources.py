"""What a stage gets: what its recipe asks for, clipped to what the cluster has."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

from lavatar.configs.resources import StageResources


@dataclass(frozen=True)
class Machine:
    """The largest node (one worker must fit on it) and the sum over all nodes."""

    cpus: float
    gpus: float
    total_cpus: float
    total_gpus: float
    memory_gb: float = 0.0


@dataclass(frozen=True)
class Share:
    """What each worker gets, and how many workers there are. `notes` says what was clipped."""

    cpus: float
    gpus: float = 0.0
    workers: int = 1
    memory_gb: float = 0.0
    notes: tuple[str, ...] = ()


def share_of(wanted: StageResources, machine: Machine, batch_divisor: int = 0) -> Share:
    """As close to `wanted` as `machine` allows. `batch_divisor`: the number of workers must divide it (0: any)."""
    notes = []
    cpus = min(wanted.cpus, machine.cpus)
    gpus = wanted.gpus
    if gpus > machine.gpus:
        notes.append(f"{wanted.gpus:g} GPUs wanted, {machine.gpus:g} there: " + ("less" if machine.gpus else "on CPUs"))
        gpus = machine.gpus
    fit = min(wanted.workers, int(machine.total_cpus // max(cpus, 1e-9)) if cpus else wanted.workers)
    if gpus:
        fit = min(fit, int(machine.total_gpus // gpus))
    workers = max(1, fit)
    while batch_divisor and batch_divisor % workers:
        workers -= 1
    if workers < wanted.workers:
        notes.append(f"{wanted.workers} workers wanted, {workers} run")
    memory = wanted.memory_gb
    if memory > machine.memory_gb:
        notes.append(f"{memory:g} GB wanted, {machine.memory_gb:.1f} GB there")
        memory = machine.memory_gb
    return Share(cpus, gpus, workers, memory, tuple(notes))


def ray_options(share: Share) -> dict[str, float]:
    """A worker's share in Ray's own terms."""
    options = {"CPU": share.cpus, "GPU": share.gpus, "memory": share.memory_gb * 2**30}
    return {name: value for name, value in options.items() if value}


def ray_machine() -> Machine:
    """What the connected Ray cluster has."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = [node.get("CPU", 0.0) for node in nodes], [node.get("GPU", 0.0) for node in nodes]
    memory = max((node.get("memory", 0.0) for node in nodes), default=0.0) / 2**30
    return Machine(max(cpus, default=0.0), max(gpus, default=0.0), sum(cpus), sum(gpus), memory)


def node_for(key: str, share: Share) -> Any:
    """Ray's option for a stage all of whose tasks must share a disk: a node that has the CPUs for them. Which of those,
    the key says, so that many stages spread."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in ray.nodes() if node["Alive"]]
    fit = sorted(node["NodeID"] for node in alive if node["Resources"].get("CPU", 0.0) >= share.cpus)
    chosen = fit[zlib.crc32(key.encode()) % len(fit)]  # the largest node always fits: the share was cut to it
    return NodeAffinitySchedulingStrategy(chosen, soft=True)

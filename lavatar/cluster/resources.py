"""What a stage gets: what its recipe asks for, if the cluster can ever give it.

CPUs are lowered to those of the largest node. Where a cluster has no GPU at all, a stage whose workers ask for one or
a part of one runs on CPUs, which is noted. What else cannot be placed is refused, with the reason.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lavatar.configs.resources import StageResources
from lavatar.errors import PlacementError


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster offers."""

    cpus: float
    gpus: float = 0.0
    memory_gb: float = 0.0

    @classmethod
    def of(cls, resources: Mapping[str, Any]) -> Node:
        """From Ray's own names."""
        memory = float(resources.get("memory", 0.0)) / 2**30
        return cls(float(resources.get("CPU", 0.0)), float(resources.get("GPU", 0.0)), memory)


@dataclass(frozen=True)
class Machine:
    """The nodes of a cluster."""

    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> float:
        """Of the largest node: a worker has to fit on one."""
        return max((node.cpus for node in self.nodes), default=0.0)

    @property
    def gpus(self) -> float:
        return max((node.gpus for node in self.nodes), default=0.0)

    @property
    def memory_gb(self) -> float:
        return max((node.memory_gb for node in self.nodes), default=0.0)

    @property
    def total(self) -> Demand:
        """All nodes together."""
        sums = (sum(node.cpus for node in self.nodes), sum(node.gpus for node in self.nodes))
        return Demand(*sums, sum(node.memory_gb for node in self.nodes))

    def fits(self, cpus: float, gpus: float, memory_gb: float) -> int:
        """How many workers of that size there is room for."""
        return sum(
            min(_times(node.cpus, cpus), _on_gpus(node.gpus, gpus), _times(node.memory_gb, memory_gb))
            for node in self.nodes
        )


@dataclass(frozen=True)
class Demand:
    """Resources of all workers of a stage together."""

    cpus: float = 0.0
    gpus: float = 0.0
    memory_gb: float = 0.0

    def __add__(self, other: Demand) -> Demand:
        return Demand(self.cpus + other.cpus, self.gpus + other.gpus, self.memory_gb + other.memory_gb)

    def __sub__(self, other: Demand) -> Demand:
        return Demand(self.cpus - other.cpus, self.gpus - other.gpus, self.memory_gb - other.memory_gb)

    def within(self, free: Demand) -> bool:
        """Whether `free` has room for it: of what it does not want there may be less than nothing."""
        pairs = zip(_amounts(self), _amounts(free), strict=True)
        return all(not wanted or wanted <= there + 1e-6 for wanted, there in pairs)

    def share(self, total: Demand) -> float:
        """The dominant share: the largest part that it takes of any resource (Ghodsi et al., NSDI 2011)."""
        return max(part / whole if whole else 0.0 for part, whole in zip(_amounts(self), _amounts(total), strict=True))


def _times(there: float, each: float) -> int:
    """How often `each` goes into what is there; without end where nothing is wanted."""
    return int(there / each + 1e-9) if each else sys.maxsize


def _on_gpus(there: float, each: float) -> int:
    """The same of GPUs: a part of one does not lie on two."""
    return int(there) * _times(1.0, each) if 0 < each < 1 else _times(there, each)


def _amounts(of: Node | Demand) -> tuple[float, float, float]:
    return of.cpus, of.gpus, of.memory_gb


@dataclass(frozen=True)
class Share:
    """What each worker gets, and how many workers there are. `notes` says what was lowered."""

    cpus: float
    gpus: float = 0.0
    workers: int = 1
    memory_gb: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def demand(self) -> Demand:
        """Of all workers together. A part of a GPU counts with what it leaves no other such part room for: sums know
        nothing of devices, and of 0.6 each device takes one."""
        gpus = 1 / _times(1.0, self.gpus) if 0 < self.gpus < 1 else self.gpus
        return Demand(self.cpus * self.workers, gpus * self.workers, self.memory_gb * self.workers)


def share_of(wanted: StageResources, machine: Machine, section: str = "STAGE") -> Share:
    """What a stage of `wanted` gets on `machine`.

    Raises PlacementError, naming the settings in `section`, for what can never be placed.
    """
    notes = []
    where = f"resources.{section}"
    if not machine.cpus:
        raise PlacementError(
            "no node of the cluster has a CPU for jobs", "Wait until its nodes are up: lavatar cluster status --wait N"
        )
    cpus, gpus = min(wanted.cpus, machine.cpus), wanted.gpus
    if 0 < gpus <= 1 and not machine.gpus:
        notes.append(f"{gpus:g} GPUs wanted, the cluster has none: on CPUs")
        gpus = 0.0
    if gpus > machine.gpus:
        raise PlacementError(
            f"a worker of {section} asks for {gpus:g} GPUs, the largest node has {machine.gpus:g}",
            f"Lower {where}.gpus, and raise {where}.workers to train over several nodes.",
        )
    if wanted.memory_gb > machine.memory_gb:
        raise PlacementError(
            f"a worker of {section} asks for {wanted.memory_gb:g} GB of memory, the largest node offers "
            f"{machine.memory_gb:.1f} GB",
            f"Lower {where}.memory_gb, or add a larger node: lavatar cluster join.",
        )
    room = machine.fits(cpus, gpus, wanted.memory_gb)
    if room < wanted.workers:
        each = ", ".join(f"{n:g} {unit}" for n, unit in ((cpus, "CPU"), (gpus, "GPU"), (wanted.memory_gb, "GB")) if n)
        raise PlacementError(
            f"{wanted.workers} workers of {section} ({each} each) are wanted, the cluster has room for {room}",
            f"Lower {where}.workers or what each takes, or add nodes: lavatar cluster join.",
        )
    return Share(cpus, gpus, wanted.workers, wanted.memory_gb, tuple(notes))


def ray_options(share: Share) -> dict[str, float]:
    """A worker's share in Ray's own terms."""
    options = {"CPU": share.cpus, "GPU": share.gpus, "memory": share.memory_gb * 2**30}
    return {name: value for name, value in options.items() if value}


def ray_machine(only: Collection[str] | None = None) -> Machine:
    """What the connected Ray cluster has now, or those of its nodes whose ids are given."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"] and (only is None or node["NodeID"] in only)]
    return Machine(tuple(Node.of(node["Resources"]) for node in nodes))


def node_for(key: str, share: Share) -> Any:
    """Ray's option for a stage all of whose tasks must share a disk: a node that has the CPUs for them. Which of those,
    the key says, so that many stages spread."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in ray.nodes() if node["Alive"]]
    fit = sorted(node["NodeID"] for node in alive if node["Resources"].get("CPU", 0.0) >= share.cpus)
    chosen = fit[zlib.crc32(key.encode()) % len(fit)]  # the largest node always fits: the share was cut to it
    return NodeAffinitySchedulingStrategy(chosen, soft=True)

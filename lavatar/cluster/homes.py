"""Which nodes of a cluster see a folder of whoever drives it: trials read and write in the home, and nowhere else."""

from __future__ import annotations

import contextlib
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavatar.errors import PlacementError

ANSWER_SECONDS = 60.0
_WAY_OUT = "Put LAVATAR_HOME on a disk that the nodes share, at one path; or let this machine take part with its CPUs."


@dataclass(frozen=True)
class Sharing:
    """Ids of the nodes with CPUs that see the folder, and addresses of those that do not, or did not answer."""

    nodes: tuple[str, ...]
    without: tuple[str, ...]

    @property
    def only(self) -> tuple[str, ...] | None:
        """The nodes that work has to keep to; None: there are no others."""
        return self.nodes if self.without else None


def sharing(folder: Path) -> Sharing:
    """Asks every node of the connected cluster that has CPUs. Raises PlacementError where none sees the folder."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in nodes if node["NodeID"] != here]
    seen = {here} | (_seeing(folder, [node["NodeID"] for node in others]) if others else set())
    found = Sharing(
        tuple(sorted(node["NodeID"] for node in nodes if node["NodeID"] in seen)),
        tuple(sorted(node["NodeManagerAddress"] for node in nodes if node["NodeID"] not in seen)),
    )
    if nodes and not found.nodes:
        raise PlacementError(f"no node of the cluster that has CPUs sees {folder}", _WAY_OUT)
    return found


def _seeing(folder: Path, nodes: list[str]) -> set[str]:
    """Those of the nodes that find in the folder what is put there now."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    word = secrets.token_hex(8)
    path = folder / f".{word}.part"
    path.write_text(word)
    try:
        look: Any = ray.remote(num_cpus=0, max_retries=0)(_holds)
        asked = {
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(path, word): node
            for node in nodes
        }
        seen = set()
        for answer in ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)[0]:
            with contextlib.suppress(ray.exceptions.RayError):  # it left, or cannot run anything
                seen |= {asked[answer]} if ray.get(answer) else set()
        return seen
    finally:
        path.unlink(missing_ok=True)


def _holds(path: Path, word: str) -> bool:
    """Whether the file is there on this node."""
    try:
        return path.read_text() == word
    except OSError:
        return False

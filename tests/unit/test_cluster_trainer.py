"""Which workers of a training log, and what: Ray Train's context is a stand-in, for a test has one machine."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from lavatar.cluster.trainer import open_metrics
from lavatar.contracts import NullSink


@dataclass
class Sinks:
    """Remembers what was opened and closed."""

    told: list[str] = field(default_factory=list)

    def __call__(self, node: str = "") -> NullSink:
        return self._open(f"logs on {node or 'the only node'}")

    def beside(self, node: str) -> NullSink:
        return self._open(f"watches {node}")

    def _open(self, what: str) -> NullSink:
        self.told.append(what)
        sink = NullSink()
        sink.close = lambda: self.told.append(f"no longer {what}")  # type: ignore[method-assign]
        return sink


def context(rank: int, nodes: list[int]) -> SimpleNamespace:
    """Of a worker among so many on each node."""
    node, local = 0, rank
    while local >= nodes[node]:
        local -= nodes[node]
        node += 1
    return SimpleNamespace(
        get_world_rank=lambda: rank,
        get_world_size=lambda: sum(nodes),
        get_local_rank=lambda: local,
        get_local_world_size=lambda: nodes[node],
        get_node_rank=lambda: node,
    )


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([1], ["logs on the only node"]),
        ([3], ["logs on the only node", "", ""]),
        ([2, 1], ["logs on node0", "", "watches node1"]),
        ([1, 1, 2], ["logs on node0", "watches node1", "watches node2", ""]),
    ],
)
def test_one_worker_logs_and_one_of_every_node_watches_it(nodes: list[int], expected: list[str]) -> None:
    for rank, what in enumerate(expected):
        sinks = Sinks()
        with ExitStack() as stack:
            sink = open_metrics(sinks, context(rank, nodes), stack)
            assert sinks.told == [what] * bool(what)
            assert ("close" in vars(sink)) == (rank == 0), "what the training logs goes into the run once"
        assert sinks.told[1:] == [f"no longer {what}"] * bool(what)
    with ExitStack() as stack:
        assert type(open_metrics(None, context(0, nodes), stack)) is NullSink

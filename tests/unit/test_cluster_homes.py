"""Which nodes may have trials. The nodes are played here; tests/local/test_sweep_cluster.py asks real ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lavatar.cluster import homes
from lavatar.cluster.resources import Node, ray_machine
from lavatar.cluster.sweep import _request
from lavatar.errors import PlacementError

HERE = "aa"


def play(monkeypatch: pytest.MonkeyPatch, seeing: set[str], **cpus: float) -> None:
    """A cluster of these nodes; the driver is on the first, and of the others some see its folder."""
    rows = [
        {"NodeID": name, "Alive": True, "Resources": {"CPU": count}, "NodeManagerAddress": f"10.0.0.{i}"}
        for i, (name, count) in enumerate(cpus.items(), 1)
    ]
    monkeypatch.setattr("ray.nodes", lambda: [*rows, {**rows[0], "NodeID": "gone", "Alive": False}])
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: HERE))
    monkeypatch.setattr(homes, "_seeing", lambda folder, nodes: seeing & set(nodes))


def test_a_cluster_that_shares_the_home_is_used_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, {"bb"}, aa=2, bb=4)
    found = homes.sharing(tmp_path)
    assert (found.nodes, found.without, found.only) == ((HERE, "bb"), (), None)


def test_what_is_asked_for_keeps_to_the_nodes_that_see_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lavatar.cluster.resources import Share

    play(monkeypatch, {"bb"}, aa=2, bb=4, cc=64)
    found = homes.sharing(tmp_path)
    assert (found.nodes, found.without, found.only) == ((HERE, "bb"), ("10.0.0.3",), (HERE, "bb"))
    assert ray_machine(found.only).nodes == (Node(2), Node(4))
    plan: Any = SimpleNamespace(nodes=found.only)
    request = _request(plan, Share(1.5, 0.5))
    assert request.bundles == [{"CPU": 1.5, "GPU": 0.5}]
    assert request == type(request)(request.bundles, bundle_label_selector=[{"ray.io/node-id": "in(aa,bb)"}])


def test_a_driver_without_cpus_whose_folder_nobody_sees_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, set(), aa=0, bb=4)
    with pytest.raises(PlacementError, match="no node of the cluster that has CPUs sees"):
        homes.sharing(tmp_path)
    play(monkeypatch, {"bb"}, aa=0, bb=4)
    assert homes.sharing(tmp_path).only is None

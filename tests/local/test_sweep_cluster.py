"""Sweeps on a cluster of two nodes, nothing replaced but the GPUs, which are pretended: trials that share them, and a
node that does not have the home."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from submit_files import Lavatar
from test_cluster_join import Machine, address, machines
from test_sweep import command, rates

from lavatar.errors import DataError
from lavatar.platform import sweeps
from lavatar.platform.home import Home

__all__ = ["address"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
BEGINS = re.compile(r"trial (\S+): begins with .* on (\w+) of node (\w+), GPU (\S+) \(process (\d+)\)")
SHARE = {"resources__avatar__gpus": 0.5, "resources__preprocess__cpus": 0.5}


def on_head(head: Machine, address: str, **environment: str) -> Lavatar:
    """The command line on the first machine, whose head has a GPU, pretended."""
    up = head.lavatar("cluster", "up", "--host", address, "--cpus", "1", "--gpus", "1", "--json")
    assert up.returncode == 0, up.stderr
    tool = Lavatar(head.home, environment={"OMP_NUM_THREADS": "1", "TMPDIR": str(head.temp), **environment})
    assert tool("subjects", "add", "--synthetic", "1", "ann")[0] == 0, tool.errors()
    return tool


def most_at_once(lavatar: Lavatar, process: Any) -> int:
    """How many trials of the newest sweep ran at the same time, at most, until it ended."""
    most = 0
    while process.poll() is None:
        for folder in sweeps.folders(Home(lavatar.home))[:1]:
            try:
                rows = sweeps.read_trials(folder)["trials"].values()
            except DataError:
                continue
            most = max(most, sum(row["state"] == "running" for row in rows))
        time.sleep(0.1)
    return most


def places(lavatar: Lavatar) -> dict[str, tuple[str, ...]]:
    """Device, node, GPU and process of each trial, as its own process saw them."""
    (log,) = (lavatar.home / "logs").glob("sweep-*.log")
    return {found[1]: found.groups()[1:] for found in BEGINS.finditer(log.read_text())}


def test_halves_of_two_nodes_gpus_are_shared(tmp_path: Path, address: str) -> None:
    with machines(tmp_path / "home", 2) as (first, second):
        lavatar = on_head(first, address)
        joined = second.lavatar("cluster", "join", "--cpus", "1", "--gpus", "1")
        assert joined.returncode == 0, joined.stderr
        values = (1e-3, 2e-3, 3e-3, 4e-3, 5e-3)
        line = command(lavatar, rates(*values), "--trials", "5", "--scheduler", "none", cpus=0.25, **SHARE)
        process = lavatar.start(*line)
        most = most_at_once(lavatar, process)
        assert process.returncode == 0, lavatar.errors()
        result = json.loads(process.stdout.read())
        assert (result["state"], [row["state"] for row in result["trials"]]) == ("finished", ["finished"] * 5)
        assert most == 4, "two halves on each, and the fifth waits"
        where = places(lavatar)
        assert len(where) == 5
        four = list(where.values())[:4]
        assert sorted(Counter(node for _, node, _, _ in four).values()) == [2, 2]
        assert {gpu for _, _, gpu, _ in where.values()} == {"0"}, "each node has one, and it is visible"
        assert len({process for _, _, _, process in four}) == 4
        assert "on CPUs" not in lavatar.errors()


def test_a_node_without_the_home_gets_no_trials(tmp_path: Path, address: str) -> None:
    """As with LAVATAR_STORE, where each machine has a home of its own at the same path: the second one's is empty."""
    hidden = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"')
    home = tmp_path / "home"
    home.mkdir()
    if subprocess.run([*hidden, str(home), "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount anything: a machine without the home cannot be pretended")
    store = {"LAVATAR_STORE": (tmp_path / "store").as_uri()}
    (tmp_path / "store").mkdir()
    with machines(home, 2) as (first, second):
        lavatar = on_head(first, address, **store)
        token, status = tmp_path / "token", first.told("cluster", "status")
        token.write_text(Path(status["token_file"]).read_text())
        join = ("-m", "lavatar.platform.cli", "cluster", "join", status["address"], "--cpus", "3", "--gpus", "1")
        joined = subprocess.run(
            [*hidden, str(home), sys.executable, *join],
            env=second.environment(RAY_AUTH_TOKEN_PATH=str(token), **store),
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert joined.returncode == 0, joined.stderr
        assert len(first.told("cluster", "status", "--wait", "2")["nodes"]) == 2
        line = command(lavatar, rates(1e-3, 2e-3, 3e-3), "--trials", "3", "--scheduler", "none", cpus=0.25, **SHARE)
        process = lavatar.start(*line)
        most = most_at_once(lavatar, process)
        assert process.returncode == 0, lavatar.errors()
        result = json.loads(process.stdout.read())
        assert (result["state"], [row["state"] for row in result["trials"]]) == ("finished", ["finished"] * 3)
        assert "trials run on 1 of 2 nodes" in lavatar.errors()
        where = places(lavatar)
        assert len({node for _, node, _, _ in where.values()}) == 1, "the head's"
        assert (len(where), most) == (3, 2), "the other node's GPU stays empty"

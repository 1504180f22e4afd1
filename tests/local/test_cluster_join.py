"""Machines that share a home, nothing replaced: a head, a node with a temporary folder of its own (as another machine
has one), work on the node, and its leaving. SLURM's script, and a head as Ray's launcher starts it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from lavatar.cluster.deployment import FOLDER

LIMIT = 300.0
WHERE = """
import json, sys
from pathlib import Path
from lavatar.cluster import head, session
home = Path(sys.argv[1])
own = session.attach(home, head.address_for(home))
import ray

@ray.remote(num_gpus=1)
def work():
    import os, tempfile
    return ray.get_runtime_context().get_node_id(), os.environ["LAVATAR_HOME"], tempfile.gettempdir()

node, home, temp = ray.get(work.remote(), timeout=120)
print(json.dumps({"other": node != ray.get_runtime_context().get_node_id(), "home": home, "temp": temp}))
own.stop()
"""


@dataclass
class Machine:
    """A shell on a machine: the home is shared, the temporary folder its own."""

    home: Path
    temp: Path

    def environment(self, **more: str) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "LAVATAR_"))}
        return {**clean, "LAVATAR_HOME": str(self.home), "TMPDIR": str(self.temp), **more}

    def python(self, *args: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, args)],
            env=self.environment(**more), capture_output=True, text=True, timeout=LIMIT, check=False,
        )  # fmt: skip

    def lavatar(self, *args: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
        return self.python("-m", "lavatar.platform.cli", *args, **more)

    def told(self, *args: str) -> Any:
        answer = self.lavatar(*args, "--json")
        assert answer.returncode == 0, answer.stderr
        return json.loads(answer.stdout)

    def processes(self) -> list[psutil.Process]:
        """All with files in the temporary folder."""
        found = psutil.process_iter(["cmdline"])
        return [one for one in found if any(str(self.temp) in part for part in one.info["cmdline"] or ())]


@contextmanager
def machines(home: Path, count: int) -> Iterator[list[Machine]]:
    """That many; what is left on them at the end is ended."""
    with tempfile.TemporaryDirectory(prefix="m", dir="/tmp", ignore_cleanup_errors=True) as folder:  # sockets: short
        found = [Machine(home, Path(folder) / str(number)) for number in range(1, count + 1)]
        for machine in found:
            machine.temp.mkdir()
        try:
            yield found
        finally:
            for machine in found:
                machine.lavatar("cluster", "down", "--force")


@pytest.fixture(scope="module")
def address() -> str:
    """This machine's, as others see it."""
    every = [one for addresses in psutil.net_if_addrs().values() for one in addresses]
    found = [one.address for one in every if one.family == socket.AF_INET and not one.address.startswith("127.")]
    if not found:
        pytest.skip("this machine has no address but loopback")
    return found[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_machine_joins_works_and_leaves(tmp_path: Path, address: str) -> None:
    with machines(tmp_path / "home", 2) as (first, second):
        head = first.lavatar("cluster", "up", "--host", address, "--cpus", "1", "--gpus", "0", "--json")
        assert head.returncode == 0, head.stderr
        cluster = json.loads(head.stdout)
        token = tmp_path / "home" / "ray" / "token"
        assert cluster["token_file"] == str(token)
        assert token.stat().st_mode & 0o777 == 0o600
        reached = {one["process"]: one["address"] for one in cluster["exposed"]}
        assert {"gcs_server", "raylet", "dashboard"} <= set(reached)
        assert f"{reached['gcs_server']}  gcs_server" in head.stderr
        assert "has the token can run any code as you" in head.stderr

        (tmp_path / "wrong").write_text("0" * 64)
        refused = second.lavatar("cluster", "join", "--cpus", "1", RAY_AUTH_TOKEN_PATH=str(tmp_path / "wrong"))
        assert refused.returncode == 1
        assert "token" in refused.stderr.lower()
        assert second.processes() == []

        joined = second.lavatar("cluster", "join", "--cpus", "1", "--gpus", "1")
        assert joined.stdout == f"this machine is a node of {cluster['address']}\n", joined.stderr
        status = second.told("cluster", "status", "--wait", "2")
        assert (status["address"], status["dashboard"]) == (cluster["address"], cluster["dashboard"])
        assert [node["head"] for node in status["nodes"] if node["alive"]].count(True) == 1
        assert {node["resources"].get("GPU", 0) for node in status["nodes"]} == {0, 1}
        assert second.lavatar("cluster", "join").returncode == 2, "it is one already"
        assert all(str(second.temp) in " ".join(one.cmdline()) for one in second.processes())

        work = first.python("-c", WHERE, first.home)
        assert work.returncode == 0, work.stderr
        assert json.loads(work.stdout) == {"other": True, "home": str(first.home), "temp": str(second.temp)}

        assert second.lavatar("cluster", "down").stdout == "this machine is no node any more\n"
        assert second.processes() == []
        assert list(second.temp.glob("lavatar-*/c")) == []
        until(lambda: sum(node["alive"] for node in first.told("cluster", "status")["nodes"]) == 1)
        assert second.told("cluster", "status")["up"], "the head stays, and its record"
        assert first.lavatar("cluster", "down").stdout == "the cluster is down\n"
        assert second.told("cluster", "status") == {"up": False}
        assert first.lavatar("cluster", "join").returncode == 2, "there is nothing to join"


SRUN = """#!/usr/bin/env bash
# Stands for SLURM's: runs the command here, with the temporary folder of the machine that is named.
while [[ "$1" == --* ]]; do
    case "$1" in --nodelist=*) node="${1#*=}";; esac
    shift
done
echo "$node: $*" >> "$MACHINES/srun.log"
TMPDIR="$MACHINES/${node#node-}" exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
[ "$*" = "show hostnames node-[1-2]" ] && printf 'node-1\\nnode-2\\n'
"""


@contextmanager
def allocation(home: Path, first: Machine, *command: str) -> Iterator[subprocess.Popen[str]]:
    """slurm.sh as SLURM runs it, on the first of two machines."""
    tools = home.parent / "tools"
    tools.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (home.parent / "cluster.env").write_text(f"LAVATAR_HOME={home}\nRAY_AUTH_MODE=token\n")
    venv = Path(sys.executable).parents[1]
    environment = first.environment(
        PATH=f"{tools}:{os.environ['PATH']}", MACHINES=str(first.temp.parent), SLURM_JOB_NODELIST="node-[1-2]",
        SLURM_CPUS_PER_TASK="1", LAVATAR_VENV=str(venv), LAVATAR_ENV=str(home.parent / "cluster.env"),
    )  # fmt: skip
    process = subprocess.Popen(
        ["bash", str(FOLDER / "slurm.sh"), *command],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_slurm_gives_a_cluster_for_one_command(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with machines(home, 2) as (first, second):
        line = 'lavatar cluster status --json > "$LAVATAR_HOME/seen.json"; exit 3'
        with allocation(home, first, "bash", "-c", line) as script:
            _, errors = script.communicate(timeout=LIMIT)
        assert script.returncode == 3, (errors, (first.temp.parent / "srun.log").read_text())
        seen = json.loads((home / "seen.json").read_text())
        assert [node["alive"] for node in seen["nodes"]] == [True, True]
        assert [node["resources"]["CPU"] for node in seen["nodes"]] == [1, 1]
        steps = (first.temp.parent / "srun.log").read_text()
        assert "node-1: lavatar cluster up --block" in steps
        assert "node-2: lavatar cluster join --block" in steps
        assert (first.processes(), second.processes()) == ([], []), errors
        with allocation(home, first) as script:
            assert script.wait(LIMIT) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_slurm_passes_the_signal_before_the_end_on(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with machines(home, 2) as (first, second):
        line = 'trap "echo stored; exit 130" TERM; touch "$LAVATAR_HOME/runs"; while true; do sleep 0.1; done'
        with allocation(home, first, "bash", "-c", line) as script:
            until(lambda: (home / "runs").exists() or script.poll() is not None)
            script.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B:TERM does
            out, errors = script.communicate(timeout=LIMIT)
        assert script.returncode == 130, errors
        assert out.endswith("stored\n")
        assert (first.processes(), second.processes()) == ([], [])


RAY = """#!/usr/bin/env bash
# Ray's, with ports and a folder of its own; `ray stop` would end every Ray of this machine.
[ "$1" = stop ] && exit 0
args=(--dashboard-agent-listen-port=0 "--dashboard-port=$DASHBOARD" "--temp-dir=$TMPDIR/r")
for arg in "$@"; do
    case "$arg" in
        start|--autoscaling-config=*) ;;
        --port=6379) args+=("--port=$GCS") ;;
        *) args+=("$arg") ;;
    esac
done
exec PYTHON -m ray.scripts.scripts start "${args[@]}"
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_a_head_that_the_launcher_started_is_known_by_its_variables(tmp_path: Path, cloud: str) -> None:
    config = yaml.safe_load((FOLDER / f"{cloud}.yaml").read_text())
    tools, token = tmp_path / "tools", tmp_path / "token"
    tools.mkdir()
    (tools / "ray").write_text(RAY.replace("PYTHON", sys.executable))
    (tools / "ray").chmod(0o755)
    token.write_text("5" * 64)
    with machines(tmp_path / "home", 1) as (first,):
        ports = {"GCS": str(free_port()), "DASHBOARD": str(free_port())}
        told = {
            "RAY_AUTH_TOKEN_PATH": str(token), "RAY_AUTH_MODE": "token", "RAY_ADDRESS": f"127.0.0.1:{ports['GCS']}",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports['DASHBOARD']}",
        }  # fmt: skip
        environment = first.environment(PATH=f"{tools}:{os.environ['PATH']}", **ports, **told)
        try:
            for command in config["head_start_ray_commands"]:
                subprocess.run(["bash", "-c", command], env=environment, check=True, capture_output=True, timeout=LIMIT)
            until(lambda: first.lavatar("cluster", "status", **told).returncode == 0)
            status = json.loads(first.lavatar("cluster", "status", "--json", **told).stdout)
            assert (status["address"], status["token_file"]) == (told["RAY_ADDRESS"], str(token))
            assert [node["head"] for node in status["nodes"]] == [True]
            refused = first.lavatar("cluster", "status", **{**told, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")})
            assert "cannot be read" in refused.stderr
            line = "import sys; from pathlib import Path; from lavatar.cluster import head, session\n" \
                "session.attach(Path(sys.argv[1]), head.address_for(Path(sys.argv[1])))\n" \
                "import ray; print(len(ray.nodes()))"  # fmt: skip
            assert first.python("-c", line, first.home, **told).stdout == "1\n"
        finally:
            family = {child.pid: child for one in first.processes() for child in (one, *one.children(recursive=True))}
            for process in family.values():
                process.kill()
            psutil.wait_procs(list(family.values()), timeout=15)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Any, seconds: float = LIMIT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.3)

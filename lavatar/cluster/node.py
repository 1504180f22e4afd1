"""Ray's processes of a cluster on this machine: starting them, finding them, what they listen on, ending them.

On loopback Ray's files lie in HOME/ray/c. Where other machines take part they share the home, and Ray's sockets and
logs cannot lie on what is shared: then they are in a private folder under this machine's temporary one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lavatar.cluster import session
from lavatar.errors import JobError, UsageError

START_SECONDS = 180.0
STOP_SECONDS = 15.0
REACH_SECONDS = 10.0
FOLDER = "c"
MAINS = ("gcs_server", "raylet")
"""The processes whose end is the end of a head or of a node."""


def start(home: Path, options: list[str], host: str, cpus: int | None, gpus: int | None) -> Path:
    """`ray start` at the address `host`, with our folder and limits; the token is the environment's. Returns Ray's
    folder. Raises JobError."""
    loopback = host == session.LOOPBACK
    folder = (session.private_folder if loopback else session.stand_in)(home)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options, f"--temp-dir={folder / FOLDER}"]
    command += ["--disable-usage-stats", "--dashboard-agent-listen-port=0"]
    command += [] if loopback else [f"--node-ip-address={host}"]
    command += [f"--num-cpus={cpus or len(os.sched_getaffinity(0))}"]
    command += [f"--object-store-memory={session.OBJECT_STORE_BYTES}"]
    command += [f"--num-gpus={gpus}"] if gpus is not None else []
    here = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"} if loopback else {}
    environment = {**session.network(host), **os.environ, **here}
    log = folder / "cluster.log"
    with log.open("wb") as stream:
        try:
            code = subprocess.run(
                command, stdout=stream, stderr=stream, env=environment, timeout=START_SECONDS, start_new_session=True
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        except BaseException:
            end(home)
            raise
    if code != 0:
        end(home)
        how = "did not start in time" if code is None else "could not be started"
        raise JobError(f"Ray {how}: {_last_line(log)}", f"What it said is in {log}.")
    return folder / FOLDER


def processes(home: Path) -> list[Any]:
    """Ray's processes on this machine that belong to this home: their command lines name its folder."""
    import psutil

    marks, own = [str(folder) for folder in folders(home)], os.getuid()
    return [
        process
        for process in psutil.process_iter(["cmdline", "uids"])
        if process.info["uids"] and process.info["uids"].real == own and process.pid != os.getpid()
        and any(mark in part for part in process.info["cmdline"] or () for mark in marks)
    ]  # fmt: skip


def has_head(home: Path) -> bool:
    """Whether the head of this home runs on this machine."""
    return any("gcs_server" in " ".join(process.info["cmdline"]) for process in processes(home))


def listening(home: Path) -> list[tuple[str, str, int]]:
    """Where this home's processes here can be reached from other machines: name, address and port, in that order."""
    import psutil

    found = set()
    for process in _families(home):
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections("inet"):
                here = connection.laddr.ip.removeprefix("::ffff:") if connection.laddr else ""
                if connection.status == psutil.CONN_LISTEN and not here.startswith("127.") and here != "::1":
                    found.add((_name(process), here, connection.laddr.port))
    return sorted(found)


def wait(home: Path) -> None:
    """Until the head or node of this home ends. Raises JobError: it did so by itself."""
    import psutil

    mains = [process for process in processes(home) if _name(process) in MAINS]
    gone: list[Any] = []
    while mains and not gone:
        gone, _ = psutil.wait_procs(mains, timeout=1.0)
    what = ", ".join(_name(process) for process in gone) or "all of it"
    logs = ", ".join(str(folder) for folder in folders(home) if folder.exists())
    raise JobError(f"Ray ended by itself: {what}", f"Its logs are in {logs}; lavatar cluster down clears what is left.")


def end(home: Path) -> int:
    """Ends Ray's processes of this home on this machine, and no others, and removes their files; how many they were."""
    import psutil

    family = _families(home)
    for stop in ("terminate", "kill"):
        for process in family:
            with contextlib.suppress(psutil.Error):
                getattr(process, stop)()
        psutil.wait_procs(family, timeout=STOP_SECONDS)
    for folder in folders(home):
        shutil.rmtree(folder, ignore_errors=True)
    return len(family)


def way_to(address: str) -> str:
    """The address of this machine that HOST:PORT sees; nothing is sent. Raises UsageError."""
    host, _, port = address.rpartition(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port)))
            return str(probe.getsockname()[0])
    except (OSError, ValueError) as error:
        raise UsageError(f"{address} cannot be reached from here: {error}", "Give it as HOST:PORT.") from None


def reach(address: str) -> None:
    """Returns when something listens at HOST:PORT. Raises UsageError where nothing does for REACH_SECONDS."""
    host, _, text = address.rpartition(":")
    port = int(text) if text.isascii() and text.isdigit() else -1
    deadline = time.monotonic() + (REACH_SECONDS if 0 < port < 2**16 else 0.0)
    while True:
        try:
            socket.create_connection((host, port), timeout=REACH_SECONDS).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() >= deadline:
                raise UsageError(
                    f"{address} cannot be reached from here: {error}",
                    "Give it as HOST:PORT, as `lavatar cluster up` names it; the head needs --host, and no firewall.",
                ) from None
        time.sleep(1.0)


def free_port(host: str, port: int) -> int:
    """The first from `port` on that nobody listens on at `host` (empty: at any address). Raises JobError."""
    for candidate in range(port, port + 50):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that closed a minute ago is free
            probe.bind((host, candidate))
            return candidate
    raise JobError(f"no port from {port} to {port + 49} is free at {host or 'this machine'}", "End what listens there.")


def folders(home: Path) -> list[Path]:
    """Where a head or a node of this home keeps Ray's files on this machine."""
    return [folder / FOLDER for folder in {session.root_of(home), session.stand_in_of(home)}]


def _families(home: Path) -> list[Any]:
    family = {process.pid: process for found in processes(home) for process in (found, *_children(found))}
    return list(family.values())


def _children(process: Any) -> list[Any]:
    import psutil

    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def _name(process: Any) -> str:
    """As Ray calls it: the raylet's is `raylet`, the dashboard's `dashboard`."""
    import psutil

    try:
        line = process.cmdline()
    except psutil.Error:
        line = process.info["cmdline"] if hasattr(process, "info") else []
    program = Path(line[0]).name if line else ""
    scripts = [Path(part).stem for part in line[1:3] if part.endswith(".py")]
    return scripts[0] if program.startswith("python") and scripts else program.partition(" ")[0]


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"

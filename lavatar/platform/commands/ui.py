"""lavatar ui: MLflow's page on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import click

from lavatar.errors import JobError
from lavatar.platform.home import Home
from lavatar.platform.output import answer, note
from lavatar.platform.signals import terminate_as_interrupt

_START_SECONDS = 90.0


@click.command()
@click.option("--port", default=5000, show_default=True, help="Of MLflow's page; the next free one if it is taken.")
def ui(port: int) -> None:
    """Show runs and models in the browser (MLflow).

    Serves on this machine only, until Ctrl-C. Prints its address, and that of Ray's dashboard while a cluster runs.
    """
    home = Home.from_environment().ensure()
    uri = home.tracking_uri
    if uri.startswith(("http://", "https://")):
        answer(f"MLflow: {uri}")
        answer(f"Ray dashboard: {_dashboard(home)}")
        return
    from lavatar.platform.tracking import connect

    note("starting MLflow …")
    connect(home)
    port = _free_port(port)
    with terminate_as_interrupt():
        _serve(home, uri, port)


def _serve(home: Home, uri: str, port: int) -> None:
    """Until the server ends, or this process is told to: then it ends with it."""
    server = _start(home, uri, port)
    try:
        _wait(server, port)
        answer(f"MLflow: http://127.0.0.1:{port}")
        answer(f"Ray dashboard: {_dashboard(home)}")
        note("Ctrl-C ends it")
        with contextlib.suppress(KeyboardInterrupt):
            server.wait()
    finally:
        _stop(server)


def _start(home: Home, uri: str, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--registry-store-uri", uri]
    command += ["--artifacts-destination", home.mlartifacts.as_uri(), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1"]
    with (home.root / "logs" / "mlflow-server.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env={**os.environ})


def _wait(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise JobError("MLflow's server did not start", "See logs/mlflow-server.log in the home folder.")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.3)
    raise JobError(f"MLflow's server did not answer within {_START_SECONDS:.0f} s", "See logs/mlflow-server.log.")


def _stop(server: subprocess.Popen[bytes]) -> None:
    """The server and its workers, which are a process group of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            return
        try:
            server.wait(10)
            return
        except subprocess.TimeoutExpired:
            continue


def _free_port(port: int) -> int:
    for candidate in range(port, port + 50):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", candidate))
            except OSError:
                continue
            return candidate
    raise JobError(f"no port from {port} to {port + 49} is free", "Give another: lavatar ui --port N")


def _dashboard(home: Home) -> str:
    """Address of Ray's page, or why there is none now."""
    from lavatar.cluster.session import running

    sessions = running(home.root)
    if not sessions:
        return "no cluster is running (it runs while a job does)"
    return sessions[0] or "off; on a small machine it is served where a job has --set resources.dashboard=true"

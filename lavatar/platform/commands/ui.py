"""lavatar ui: MLflow's page on this machine."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from ipaddress import ip_address
from typing import Any

import click

from lavatar.errors import JobError, UsageError
from lavatar.masking import masked
from lavatar.platform.commands.options import json_option
from lavatar.platform.home import Home
from lavatar.platform.output import answer, answer_json, note, reserved
from lavatar.platform.signals import terminate_as_interrupt

_START_SECONDS = 90.0
_LOOPBACK = "127.0.0.1"
_CPUS = 4  # with fewer a job serves no dashboard by itself
_DASHBOARD_ON = "--set resources.dashboard=true"


@click.command()
@click.option(
    "--port",
    default=5000,
    type=click.IntRange(1, 65_000),
    show_default=True,
    help="Of MLflow's page; the next free one if it is taken.",
)
@click.option("--host", default=_LOOPBACK, show_default=True, help="Address of this machine that MLflow listens on.")
@json_option
def ui(port: int, host: str, as_json: bool) -> None:
    """Show runs and models in the browser (MLflow).

    Serves on this machine only unless --host is given, until Ctrl-C. Prints its address and, while a cluster runs, that
    of Ray's dashboard and the file of the token that it asks for.
    """
    from lavatar.platform.runs import end_abandoned
    from lavatar.platform.tracking import connect

    home = Home.from_environment().ensure()
    uri = home.tracking_uri
    with reserved():
        if uri.startswith(("http://", "https://")):
            end_abandoned(home, note)
            _tell(home, uri, as_json)
            return
        note("starting MLflow …")
        connect(home)
        end_abandoned(home, note)
        port = _free_port(port, host)
        with terminate_as_interrupt():
            _serve(home, uri, host, port, as_json)


def _serve(home: Home, uri: str, host: str, port: int, as_json: bool) -> None:
    """Until the server ends, or this process is told to: then it ends with it."""
    server = _start(home, uri, host, port)
    try:
        page = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        _wait(server, page)
        with contextlib.suppress(KeyboardInterrupt):  # from the moment on that it is told where to look
            _tell(home, page, as_json)
            _warn(host, server)
            note("Ctrl-C ends it")
            server.wait()
    finally:
        _stop(server)


def _start(home: Home, uri: str, host: str, port: int) -> subprocess.Popen[bytes]:
    """MLflow's server. The database's address goes by the environment: everybody on the machine sees a command line."""
    command = [sys.executable, "-m", "mlflow", "server", "--artifacts-destination", home.mlartifacts.as_uri()]
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_REGISTRY_STORE_URI": uri}
    if not _everywhere(host):  # else MLflow takes the names that browsers use inside a network
        names = (host, f"{host}:*") if ":" not in host else (f"[[]{host}]", f"[[]{host}]:*")
        environment.setdefault("MLFLOW_SERVER_ALLOWED_HOSTS", ",".join(("localhost", "localhost:*", *names)))
    with (home.root / "logs" / "mlflow-server.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)


def _warn(host: str, server: subprocess.Popen[bytes]) -> None:
    """On standard error: what other machines can reach now, told from the sockets."""
    import psutil

    family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    sockets = {
        f"{connection.laddr.ip}:{connection.laddr.port}"
        for process in family
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and not ip_address(connection.laddr.ip).is_loopback
    }
    if sockets:
        note(
            f"warning: MLflow listens on {', '.join(sorted(sockets))} and asks for no password: whoever reaches it can "
            "read, change and delete every run, picture and model of this home, and put a model there that runs code "
            "where it is loaded. Nothing is encrypted. Keep it inside a network that you trust, or leave --host out "
            "and come by ssh -L."
        )


def _everywhere(host: str) -> bool:
    return host in ("0.0.0.0", "::")


def _wait(server: subprocess.Popen[bytes], page: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise JobError("MLflow's server did not start", "See logs/mlflow-server.log in the home folder.")
        try:
            with urllib.request.urlopen(f"{page}/health", timeout=2):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.3)
    raise JobError(f"MLflow's server did not answer within {_START_SECONDS:.0f} s", "See logs/mlflow-server.log.")


def _stop(server: subprocess.Popen[bytes]) -> None:
    """The server and its workers, which are a process group of their own. Told to stop again, it waits no longer."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            return
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            server.wait(10)
            return


def _free_port(port: int, host: str = _LOOPBACK) -> int:
    for candidate in range(port, port + 50):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
            except OSError as error:
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    continue
                raise UsageError(f"{host} is no address of this machine", "Give one of its own, or none.") from None
            return candidate
    raise JobError(f"no port from {port} to {port + 49} is free", "Give another: lavatar ui --port N")


def _tell(home: Home, mlflow: str, as_json: bool) -> None:
    """Both addresses, and what Ray's dashboard asks for."""
    ray = _dashboard(home)
    if as_json:
        answer_json({"mlflow": masked(mlflow), "ray": ray})
        return
    answer(f"MLflow: {masked(mlflow)}")
    answer(f"Ray dashboard: {ray['dashboard'] or ray['text']}")
    if ray["dashboard"]:
        answer(f"Ray token: {ray['text']}")


def _dashboard(home: Home) -> dict[str, Any]:
    """Whether a cluster runs, the address of Ray's page and the file of its token where there are, and a sentence."""
    from lavatar.cluster.head import current, token_file
    from lavatar.cluster.session import running

    cluster = current(home.root)
    sessions = [cluster.dashboard] if cluster else running(home.root)
    ray: dict[str, Any] = {"running": bool(sessions), "dashboard": None, "token_file": None}
    if not sessions:
        turn_on = f"; here with {_DASHBOARD_ON} only" if (os.cpu_count() or 1) < _CPUS else ""
        return {**ray, "text": f"no cluster is running (it runs while a job does{turn_on})"}
    if sessions[0] is None:
        return {**ray, "text": f"off in the job that runs; with a dashboard: lavatar submit … {_DASHBOARD_ON}"}
    if "RAY_AUTH_TOKEN" in os.environ:
        return {**ray, "dashboard": sessions[0], "text": "it asks for the token in RAY_AUTH_TOKEN"}
    token = str(token_file(home.root))
    return {**ray, "dashboard": sessions[0], "token_file": token, "text": f"it asks for the token in {token}"}

"""`lavatar ui`: a real MLflow server on loopback, and no process of it is left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest

from lavatar.cluster.session import private_folder, temp_of, token_of
from lavatar.errors import UsageError
from lavatar.platform.commands.ui import _dashboard, _free_port
from lavatar.platform.home import Home


def test_ui_serves_mlflow_on_loopback_and_ends_with_its_command(tmp_path: Path) -> None:
    environment = {**os.environ, "LAVATAR_HOME": str(tmp_path)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "lavatar.platform.cli", "ui", "--port", "5177"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        label, _, address = process.stdout.readline().strip().partition(": ")
        assert label == "MLflow"
        assert address.startswith("http://127.0.0.1:")
        assert process.stdout.readline().startswith("Ray dashboard: no cluster is running")
        with urllib.request.urlopen(address, timeout=30) as page:
            assert b"MLflow" in page.read()
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        assert {ip for ip, _ in listening(family)} == {"127.0.0.1"}
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert psutil.wait_procs(family, timeout=10)[1] == []
    finally:
        process.kill()


@pytest.mark.slow
def test_ui_told_to_stop_twice_leaves_nothing(tmp_path: Path) -> None:
    """Also a server that does not listen any more: it stands still here."""
    environment = {**os.environ, "LAVATAR_HOME": str(tmp_path)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "lavatar.platform.cli", "ui", "--port", "5577"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        for one in family:
            one.suspend()
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert psutil.wait_procs(family, timeout=10)[1] == []
    finally:
        process.kill()


def listening(family: Iterable[psutil.Process]) -> set[tuple[str, int]]:
    """Addresses and ports of these processes' sockets that listen."""
    return {
        (connection.laddr.ip, connection.laddr.port)
        for process in family
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


def test_ui_beyond_loopback_says_what_is_exposed_and_shows_no_password(tmp_path: Path) -> None:
    """The sockets are the real ones; the database's address is on no command line."""
    url = f"sqlite:///{tmp_path / 'mlflow.db'}?password=s3cr3t"
    environment = {**os.environ, "LAVATAR_HOME": str(tmp_path), "MLFLOW_TRACKING_URI": url}
    command = [sys.executable, "-m", "lavatar.platform.cli", "ui", "--port", "5377", "--host", "0.0.0.0"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        port = int(process.stdout.readline().rpartition(":")[2])
        lines = iter(process.stderr.readline, "")
        warning = next(line for line in lines if line.startswith("warning: "))
        family = psutil.Process(process.pid).children(recursive=True)
        assert ("0.0.0.0", port) in listening(family)
        assert f"MLflow listens on 0.0.0.0:{port} and asks for no password" in warning
        assert not any("s3cr3t" in part for one in family for part in one.cmdline())
        rebound = urllib.request.Request(f"http://127.0.0.1:{port}/", headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="403"):  # a page whose own name leads to our address
            urllib.request.urlopen(rebound, timeout=30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
    assert "s3cr3t" not in (tmp_path / "logs" / "mlflow-server.log").read_text()


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(UsageError, match=r"192\.0\.2\.77 is no address of this machine"):
        _free_port(5000, "192.0.2.77")


AWAY = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


def tell(tmp_path: Path, *arguments: str, **environment: str) -> str:
    """What `lavatar ui` prints beside an MLflow that runs elsewhere."""
    variables = {**os.environ, "LAVATAR_HOME": str(tmp_path), **AWAY}
    variables.pop("RAY_AUTH_TOKEN_PATH", None)
    command = [sys.executable, "-m", "lavatar.platform.cli", "ui", *arguments]
    return subprocess.run(command, env={**variables, **environment}, check=True, capture_output=True, text=True).stdout


def runs_ray(tmp_path: Path, dashboard: str | None) -> Path:
    """As a job of this home leaves it while its Ray runs: this process stands for it. Returns the token's file."""
    folder = temp_of(private_folder(tmp_path))
    folder.mkdir(exist_ok=True)
    record = {"pid": os.getpid(), "address": "127.0.0.1:6379", "dashboard": dashboard}
    (folder / f"session-{os.getpid()}.json").write_text(json.dumps(record))
    return token_of(tmp_path)


def test_json_names_the_dashboard_and_its_token(tmp_path: Path) -> None:
    ray = json.loads(tell(tmp_path, "--json"))
    assert ray["mlflow"] == AWAY["MLFLOW_TRACKING_URI"]
    assert (ray["ray"]["running"], ray["ray"]["dashboard"], ray["ray"]["token_file"]) == (False, None, None)
    token = runs_ray(tmp_path, "http://127.0.0.1:8265")
    ray = json.loads(tell(tmp_path, "--json"))["ray"]
    assert (ray["running"], ray["dashboard"]) == (True, "http://127.0.0.1:8265")
    assert Path(ray["token_file"]) == token
    assert token.read_text()
    other = json.loads(tell(tmp_path, "--json", RAY_AUTH_TOKEN_PATH="/elsewhere/token"))["ray"]
    assert other["token_file"] == "/elsewhere/token"
    text = tell(tmp_path)
    assert "Ray dashboard: http://127.0.0.1:8265\n" in text
    assert f"Ray token: it asks for the token in {token}\n" in text


def test_a_cluster_without_a_dashboard_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert "--set resources.dashboard=true" in _dashboard(Home(tmp_path))["text"]
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert "--set" not in _dashboard(Home(tmp_path))["text"]
    runs_ray(tmp_path, None)
    assert "lavatar submit … --set resources.dashboard=true" in tell(tmp_path)
    ray = json.loads(tell(tmp_path, "--json"))["ray"]
    assert (ray["running"], ray["dashboard"]) == (True, None)


@pytest.mark.slow
def test_json_is_all_of_standard_output(tmp_path: Path) -> None:
    environment = {**os.environ, "LAVATAR_HOME": str(tmp_path)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "lavatar.platform.cli", "ui", "--port", "5277", "--json"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines = []
        while not lines or lines[-1] != "}\n":
            lines.append(process.stdout.readline())
            assert lines[-1]
        address = json.loads("".join(lines))["mlflow"]
        with urllib.request.urlopen(f"{address}/health", timeout=30) as page:
            assert page.status == 200
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == ""
        assert process.wait(30) == 0
    finally:
        process.kill()


def test_a_taken_port_gives_way() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert _free_port(port) > port

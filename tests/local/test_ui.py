"""`lavatar ui`: a real MLflow server on loopback, and no process of it is left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from lavatar.cluster.session import private_folder, token_of
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
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert psutil.wait_procs(family, timeout=10)[1] == []
    finally:
        process.kill()


def tell(tmp_path: Path, *arguments: str, **environment: str) -> str:
    """What `lavatar ui` prints beside an MLflow that runs elsewhere."""
    variables = {**os.environ, "LAVATAR_HOME": str(tmp_path), "MLFLOW_TRACKING_URI": "http://mlflow.example:5000"}
    variables.pop("RAY_AUTH_TOKEN_PATH", None)
    command = [sys.executable, "-m", "lavatar.platform.cli", "ui", *arguments]
    return subprocess.run(command, env={**variables, **environment}, check=True, capture_output=True, text=True).stdout


def runs_ray(tmp_path: Path, dashboard: str | None) -> Path:
    """As a job of this home leaves it while its Ray runs: this process stands for it. Returns the token's file."""
    folder = private_folder(tmp_path)
    record = {"pid": os.getpid(), "address": "127.0.0.1:6379", "dashboard": dashboard}
    (folder / f"session-{os.getpid()}.json").write_text(json.dumps(record))
    return token_of(tmp_path)


def test_json_names_the_dashboard_and_its_token(tmp_path: Path) -> None:
    ray = json.loads(tell(tmp_path, "--json"))
    assert ray["mlflow"] == "http://mlflow.example:5000"
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

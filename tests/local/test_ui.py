"""`lavatar ui`: a real MLflow server on loopback, and no process of it is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil

from lavatar.platform.commands.ui import _free_port


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


def test_a_taken_port_gives_way() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert _free_port(port) > port

"""MLflow's real server in a process of its own, to be killed and started again."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import dataclass, field

import pytest

from lavatar.platform.commands import ui
from lavatar.platform.home import Home


@dataclass
class MlflowServer:
    """On loopback, always at the same port, over the database and the folder of `home`."""

    home: Home
    port: int = field(default_factory=lambda: ui._free_port(5300))
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Waits as long as a busy machine takes; without MLflow's processes for jobs of its own."""
        self.home.ensure()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ui, "_START_SECONDS", 400.0)
            patch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
            self.process = ui._start(self.home, f"sqlite:///{self.home.root / 'server.db'}", "127.0.0.1", self.port)
            ui._wait(self.process, self.uri)

    def kill(self) -> None:
        """The server and its workers, at once."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def freeze(self, number: int = signal.SIGSTOP) -> None:
        """Connections are still taken, and never answered; SIGCONT ends it."""
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def stop(self) -> None:
        if self.process is not None:
            ui._stop(self.process)

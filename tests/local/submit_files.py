"""The command line in processes of its own, with one home, for jobs of toy size; and what the tests do to them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import sessions

from lavatar.platform.home import Home
from lavatar.platform.registry import open_registry
from lavatar.platform.tables import Stage

TOY = {
    "preprocess.portrait_size": 128,
    "preprocess.face_size": 64,
    "preprocess.synthetic_frames": 60,
    "avatar.image_size": 64,
    "avatar.ray_size": 16,
    "avatar.samples": 6,
    "avatar.face_size": 64,
    "avatar.triplane_size": 16,
    "avatar.triplane_channels": 8,
    "avatar.encoder_widths": [8, 16, 16],
    "avatar_training.steps": 500,
    "avatar_training.batch_size": 2,
    "avatar_training.checkpoint_every": 20,
    "avatar_training.picture_every": 100,
    "avatar_training.log_every": 5,
    "ynet.face_size": 32,
    "ynet.encoder_widths": [8, 16],
    "ynet.decoder_widths": [16, 8],
    "ynet.neck_width": 16,
    "ynet_training.steps": 12,
    "ynet_training.batch_size": 4,
    "ynet_training.checkpoint_every": 6,
    "ynet_training.log_every": 2,
    "mapping_training.steps": 12,
    "mapping_training.batch_size": 4,
    "mapping_training.checkpoint_every": 6,
    "mapping_training.log_every": 2,
    "evaluation.panel_size": 64,
    "evaluation.max_frames": 4,
}
LIMIT = 900.0


@dataclass
class Lavatar:
    """The command line, in processes of its own, with one home."""

    home: Path
    environment: dict[str, str] = field(default_factory=dict)
    script: tuple[str, ...] = ("-m", "lavatar.platform.cli")
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *args: str) -> subprocess.Popen[str]:
        theirs = {k: v for k, v in os.environ.items() if k not in ("LAVATAR_REGISTRY", "MLFLOW_TRACKING_URI")}
        environment = {**theirs, **self.environment, "LAVATAR_HOME": str(self.home)}
        command = [sys.executable, *self.script, *args]
        error = (self.home.parent / "stderr.txt").open("a")
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=error, text=True, start_new_session=True
        )
        self.started.append(process)
        sessions.began(self.home, process.pid)
        return process

    def __call__(self, *args: str) -> tuple[int, str]:
        process = self.start(*args)
        out, _ = process.communicate(timeout=LIMIT)
        return process.returncode, out

    def errors(self) -> str:
        """What standard error got lately, of all commands."""
        return (self.home.parent / "stderr.txt").read_text()[-3000:]

    def submit(self, avatar: str, actor: str, *extra: str, **changes: Any) -> tuple[str, ...]:
        return ("submit", "--avatar", avatar, "--actor", actor, *_settings(changes), *extra)

    def submit_pairs(self, pairs: Sequence[tuple[str, str]], *extra: str, **changes: Any) -> tuple[str, ...]:
        """The same of a file of (avatar, actor)."""
        file = self.home.parent / "pairs.yaml"
        file.write_text("".join(f"- {{avatar: {avatar}, actor: {actor}}}\n" for avatar, actor in pairs))
        return ("submit", "--pairs", str(file), *_settings(changes), *extra)

    def stage(self, name: str) -> Stage | None:
        registry = open_registry(Home(self.home))
        with registry.read() as session:
            rows = [row for row in session.query(Stage) if row.name == name]
        registry.close()
        return rows[0] if rows else None

    def wait_for(self, process: subprocess.Popen[str], name: str, done: int) -> Stage:
        """Until the stage has come so far."""
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            row = self.stage(name)
            if row and row.state == "running" and row.owner_pid == process.pid and (row.done or 0) >= done:
                return row
            assert process.poll() is None, self.errors()
            time.sleep(0.3)
        raise AssertionError(f"{name} did not come to {done}")

    def kill_what_runs(self) -> None:
        """At the end of a test."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
                process.wait()


def _settings(changes: Mapping[str, Any]) -> list[str]:
    """--set of everything that makes a job a toy, and of `changes` (section__key)."""
    toy = {**TOY, **{key.replace("__", "."): value for key, value in changes.items()}}
    return [part for key, value in toy.items() for part in ("--set", f"{key}={json.dumps(value)}")]


@contextlib.contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    process.suspend()
    yield
    process.resume()


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def training_worker(pid: int) -> psutil.Process:
    """The process that trains, below the driver `pid`."""
    found = [p for p in descendants(pid) if any("RayTrainWorker" in part for part in p.cmdline())]
    assert len(found) == 1, [p.cmdline() for p in descendants(pid)]
    return found[0]

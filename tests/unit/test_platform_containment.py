"""lavatar writes into its home and nowhere else; its libraries send and leave nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lavatar.cluster import session
from lavatar.cluster.environment import contained

SCRIPT = """
from lavatar.platform import cli
assert cli.run(["subjects", "add", "--synthetic", "1", "ann"]) == 0
import onnxruntime
import mediapipe.tasks.python
import mlflow
"""


def test_what_a_command_imports_leaves_nothing_in_the_users_folder(tmp_path: Path) -> None:
    user, home = tmp_path / "user", tmp_path / "lavatar"
    user.mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in contained(home)}
    kept = {name: value for name, value in kept.items() if not name.startswith(("XDG_", "MLFLOW_"))}
    environment = {**kept, "HOME": str(user), "LAVATAR_HOME": str(home)}
    subprocess.run([sys.executable, "-c", SCRIPT], env=environment, cwd=tmp_path, capture_output=True, check=True)
    assert list(user.rglob("*")) == []
    assert (home / "cache" / "matplotlib").is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lavatar", "user"]


def test_rays_processes_are_told_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = contained(tmp_path)
    for name in (*wanted, *session.ENVIRONMENT, "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that what is set below is undone
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setenv("MPLCONFIGDIR", "/chosen/by/the/user")
    session.prepare_environment(tmp_path, tmp_path / "token")
    assert {name: os.environ[name] for name in wanted} == {**wanted, "MPLCONFIGDIR": "/chosen/by/the/user"}

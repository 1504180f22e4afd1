"""What unit tests share: the command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def lavatar(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in this process: exit code, standard output, standard error."""

    def call(*args: str | Path) -> tuple[int, str, str]:
        from lavatar.platform.cli import run

        capfd.readouterr()
        code = run([str(a) for a in args])
        out, err = capfd.readouterr()
        return code, out, err

    return call

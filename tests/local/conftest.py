"""One Ray for the whole test session: starting it takes longer than most tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """A Ray of two CPUs; every StageRunner in this process then joins it."""
    from lavatar.cluster import session

    own = session.start(tmp_path_factory.mktemp("ray") / "home", cpus=2)
    yield own
    own.stop()

"""One Ray for the whole test session: starting it takes longer than most tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "unit")]

if TYPE_CHECKING:
    from fault_files import Story
    from submit_files import Lavatar


@pytest.fixture(scope="session")
def undisturbed_home(tmp_path_factory: pytest.TempPathFactory) -> Lavatar:
    """The small job of the tests of faults, to which nothing happened."""
    import fault_files

    lavatar = fault_files.new_home(tmp_path_factory.mktemp("undisturbed"))
    code, _ = lavatar(*fault_files.small_job(lavatar, *fault_files.INLINE))
    assert code == 0, lavatar.errors()
    return lavatar


@pytest.fixture(scope="session")
def undisturbed(undisturbed_home: Lavatar) -> Story:
    """What that job came to."""
    import fault_files

    fault_files.nothing_left(undisturbed_home.home)
    return fault_files.story(undisturbed_home)


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """A Ray of two CPUs; every StageRunner in this process then joins it."""
    from lavatar.cluster import session

    own = session.start(tmp_path_factory.mktemp("ray") / "home", cpus=2)
    yield own
    own.stop()

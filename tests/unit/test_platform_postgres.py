"""A real PostgreSQL that is stopped and started again under an open registry."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lavatar.contracts import StageKind, StageResult, StageSpec
from lavatar.errors import StorageError
from lavatar.platform import ledger, lookup, registry
from lavatar.platform.home import Home
from lavatar.platform.leases import Owner
from lavatar.platform.registry import Registry, now, open_registry, patiently
from lavatar.platform.states import State
from lavatar.platform.tables import Artefact, Event, Stage

sys.path.insert(0, str(Path(__file__).parent))
from postgres_files import Server

KEY = "k" * 64


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server.at(tmp_path_factory.mktemp("pg")) as own:
        yield own


@pytest.fixture
def opened(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    monkeypatch.setenv("LAVATAR_REGISTRY", server.uri)
    own = open_registry(Home(tmp_path))
    with own.write() as session:
        session.query(Event).delete()
        session.query(Artefact).delete()
        session.query(Stage).delete()
        session.add(Stage(key=KEY, kind="avatar", name="avatar:A", out_dir="x", created=now()))
    yield own
    own.close()


@pytest.mark.parametrize("how", ["fast", "immediate"])
def test_what_is_asked_while_the_server_is_away_is_done_when_it_is_back(
    opened: Registry, server: Server, how: str
) -> None:
    owner = Owner.current()
    ledger.claim_stage(opened, KEY, owner, "job")
    server.stop(how)
    back = threading.Timer(2.0, server.start)
    back.start()
    began = time.monotonic()
    assert ledger.set_progress(opened, KEY, owner, 7, 9, "steps")
    assert time.monotonic() - began > 1.5
    back.join()
    row = lookup.get_stage(opened, KEY)
    assert row is not None
    assert (row.state, row.owner, row.done) == (State.RUNNING, owner.id, 7)


def test_a_transaction_that_is_cut_off_is_done_once(opened: Registry, server: Server) -> None:
    tries = []

    @patiently
    def tell(own: Registry) -> None:
        with own.write() as session:
            session.add(Event(time=now(), text="told"))
            session.flush()
            tries.append(1)
            if len(tries) == 1:
                server.stop("immediate")
                server.start()

    tell(opened)
    assert len(tries) == 2
    with opened.read() as session:
        assert [event.text for event in session.query(Event)] == ["told"]


def test_an_answer_that_is_lost_after_the_commit_changes_nothing(opened: Registry, tmp_path: Path) -> None:
    """The changes of a running stage, each done twice by the same owner."""
    owner, home = Owner.current(), Home(tmp_path)
    spec = StageSpec(StageKind.AVATAR, "avatar:A", KEY, tmp_path, tmp_path / "x", {}, {})
    result = StageResult({"release": tmp_path / "x" / "release"}, {"loss": 0.5})

    def twice(change: Callable[[], Any]) -> None:
        first, second = change(), change()
        assert (first is None and second is None) or first == second or first.state == second.state

    twice(lambda: ledger.claim_stage(opened, KEY, owner, "job"))
    twice(lambda: ledger.set_progress(opened, KEY, owner, 1, 2, "steps"))
    twice(lambda: ledger.end_stage(opened, KEY, owner, State.FAILED, "broken"))
    row = lookup.get_stage(opened, KEY)
    assert row is not None
    assert (row.attempts, row.state, row.message) == (1, State.FAILED, "broken")
    twice(lambda: ledger.claim_stage(opened, KEY, owner, "job"))
    twice(lambda: ledger.finish_stage(opened, home, spec, owner, result))
    row = lookup.get_stage(opened, KEY)
    assert row is not None
    assert (row.attempts, row.state, row.metrics) == (2, State.FINISHED, {"loss": 0.5})
    assert len(lookup.artefacts(opened, [KEY], "file")) == 1


def test_a_server_that_stays_away_is_an_error(
    opened: Registry, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "PATIENCE_SECONDS", 1.0)
    server.stop("fast")
    try:
        with pytest.raises(StorageError, match="cannot be used") as caught:
            lookup.get_stage(opened, KEY)
        assert "LAVATAR_REGISTRY" in caught.value.hint
    finally:
        server.start()


def test_a_file_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAVATAR_REGISTRY", raising=False)
    own = open_registry(Home(tmp_path))
    subprocess.run(["rm", "-r", str(tmp_path)], check=True)
    own.close()
    began = time.monotonic()
    with pytest.raises(StorageError):
        lookup.list_jobs(own)
    assert time.monotonic() - began < 1.0

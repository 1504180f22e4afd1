"""The registry: the SQL database that remembers subjects, stages, jobs, artefacts and events.

SQLite in the home by default (write-ahead log, writers queue by BEGIN IMMEDIATE), PostgreSQL by LAVATAR_REGISTRY.
Every change is one `write()` transaction. What is stored how stands in tables.py; subjects.py, ledger.py and leases.py
hold the operations. A PostgreSQL that is restarted under a running job is waited for (`patiently`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError, OperationalError, ProgrammingError, SQLAlchemyError
from sqlalchemy.orm import Session

from lavatar.errors import JobError, LavatarError, StorageError
from lavatar.platform.home import REGISTRY_VARIABLE, Home
from lavatar.training.files import exclusive

HEAD = "0006"
"""The newest revision in migrations/versions."""

BUSY_SECONDS = 30.0
"""How long a writer waits for another one's transaction."""

PATIENCE_SECONDS = 120.0
"""How long a database server that went away under a job is waited for."""

P = ParamSpec("P")
R = TypeVar("R")
_WRITE = "lavatar_write"
_EPOCH_DAY = 2440587.5
"""The first of January 1970 as a Julian day."""
_ADVISORY_LOCK = 0x1A7A7A4  # any number, the same for every lavatar: serialises migrations on one PostgreSQL
_FREEING_LOCK = 0x1A7A7A5  # another one: who frees a stage shuts out who plans it


class Registry:
    """An open registry. Sessions are short; rows read stay readable after their session."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._writer = engine.execution_options(**{_WRITE: True})

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that sees one state of the database and changes nothing."""
        with _database_errors(self._engine), Session(self._engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One transaction: all of it or, on an exception, nothing."""
        with _database_errors(self._engine), Session(self._writer, expire_on_commit=False) as session, session.begin():
            yield session

    @property
    def dialect(self) -> str:
        return self._engine.dialect.name

    def close(self) -> None:
        self._engine.dispose()


def open_registry(home: Home) -> Registry:
    """The registry of `home`, its tables made or brought up to date. Safe from many processes at once."""
    url = home.registry_url
    if url.startswith("sqlite"):
        home.ensure()
    engine = _engine(url)
    with _database_errors(engine):
        if _revision(engine) != HEAD:
            _migrate(engine)
    return Registry(engine)


def schema_revision(home: Home) -> str | None:
    """The revision of the database as it is; None when it has no tables yet."""
    engine = _engine(home.registry_url)
    with _database_errors(engine):
        revision = _revision(engine)
    engine.dispose()
    return revision


def patiently(function: Callable[Concatenate[Registry, P], R]) -> Callable[Concatenate[Registry, P], R]:
    """A function of one transaction, done again from its beginning when the database server went away in its middle.

    The answer to a commit can be lost too: done twice, the function must come to the same as done once. A server that
    stays away, and SQLite, raise StorageError as ever.
    """

    @functools.wraps(function)
    def patient(registry: Registry, *args: P.args, **kwargs: P.kwargs) -> R:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return function(registry, *args, **kwargs)
            except LavatarError as error:
                if not (registry.dialect == "postgresql" and _server_went(error)) or time.monotonic() > deadline:
                    raise
            time.sleep(0.5)

    return patient


def _server_went(error: LavatarError) -> bool:
    """Whether the connection broke or none could be made."""
    cause = error.__cause__
    return isinstance(cause, DBAPIError) and (cause.connection_invalidated or cause.statement is None)


def insert_missing(session: Session, table: type, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert `rows`, leaving those whose key is there already as they are. Column defaults apply."""
    if not rows:
        return
    from sqlalchemy.dialects import postgresql, sqlite

    dialect = session.get_bind().dialect.name
    statement = (postgresql if dialect == "postgresql" else sqlite).insert(table).on_conflict_do_nothing()
    session.execute(statement, [dict(row) for row in rows])


def hold_stages(session: Session, *, freeing: bool = False) -> None:
    """Until this write transaction ends no stage is freed, or, if `freeing`, none is planned.

    SQLite has one writer at a time as it is.
    """
    if session.get_bind().dialect.name == "postgresql":
        lock = sa.func.pg_advisory_xact_lock if freeing else sa.func.pg_advisory_xact_lock_shared
        session.execute(sa.select(lock(_FREEING_LOCK)))


def now() -> float:
    """Unix seconds, by this machine's clock."""
    return time.time()


def database_now(session: Session) -> float:
    """Unix seconds by the database's clock: with PostgreSQL the same one for all machines that share the registry, with
    SQLite this machine's own."""
    if session.get_bind().dialect.name == "postgresql":
        return float(session.scalar(sa.select(sa.func.date_part("epoch", sa.func.clock_timestamp()))) or 0.0)
    days = session.scalar(sa.select(sa.func.julianday("now")))
    return (float(days or 0.0) - _EPOCH_DAY) * 86400.0


def _engine(url: str) -> Engine:
    """An engine with the transactions that `Registry` promises."""
    if url.startswith(("postgresql://", "postgres://")):  # the driver that is installed
        url = "postgresql+psycopg://" + url.split("://", 1)[1]
    try:
        parsed = sa.make_url(url)
        if parsed.get_backend_name() not in ("sqlite", "postgresql"):
            raise ArgumentError(f"{parsed.get_backend_name()} is not supported")
        is_sqlite = parsed.get_backend_name() == "sqlite"
        arguments = {"timeout": BUSY_SECONDS, "check_same_thread": False} if is_sqlite else {"connect_timeout": 10}
        engine = sa.create_engine(parsed, connect_args=arguments, pool_pre_ping=not is_sqlite)
    except (ArgumentError, ModuleNotFoundError, ValueError, TypeError) as error:
        scheme, found, _ = url.partition("://")  # no more is shown of it, or of an error that quotes it: a misspelt
        reason = "it has no form of one" if isinstance(error, ValueError) else str(error)  # address hides no password
        raise JobError(
            f"{REGISTRY_VARIABLE}={f'{scheme}://…' if found else '…'} is not a database address: {reason}",
            "Write sqlite:////absolute/path.db or postgresql+psycopg://user@host/database, or unset it.",
        ) from None
    if is_sqlite:
        _use_explicit_transactions(engine)
    return engine


def _use_explicit_transactions(engine: Engine) -> None:
    """SQLite: the driver begins nothing by itself; a writer takes the write lock at once and never upgrades to it.

    A transaction that reads first and writes later can be refused at the write, whatever the timeout: BEGIN IMMEDIATE
    waits in line instead.
    """

    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, record: Any) -> None:
        connection.isolation_level = None
        connection.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = NORMAL")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get(_WRITE) else "BEGIN")


def _revision(engine: Engine) -> str | None:
    """What alembic_version says, without importing Alembic: this runs at every command."""
    with engine.connect() as connection:
        if not sa.inspect(connection).has_table("alembic_version"):
            return None
        revision = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
        return str(revision) if revision else None


def _migrate(engine: Engine) -> None:
    """Bring the tables to HEAD, one process at a time; the others find it done."""
    with _migration_lock(engine):
        if engine.dialect.name == "sqlite":
            with engine.connect() as connection:  # outside a transaction: SQLite refuses it inside one
                connection.connection.execute("PRAGMA journal_mode = WAL")
        with engine.execution_options(**{_WRITE: True}).begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(:n)"), {"n": _ADVISORY_LOCK})
            _upgrade(connection)


def _migration_lock(engine: Engine) -> AbstractContextManager[None]:
    """SQLite: a lock file beside the database. PostgreSQL locks inside its transaction."""
    from contextlib import nullcontext

    database = engine.url.database
    if engine.dialect.name != "sqlite" or not database:
        return nullcontext()
    return exclusive(Path(f"{database}.lock"))


def _upgrade(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util.exc import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, HEAD)
    except CommandError as error:
        raise JobError(
            f"the registry {connection.engine.url.render_as_string()} was made by another version of lavatar: {error}",
            "Use the newer lavatar, or another LAVATAR_HOME.",
        ) from error


@contextmanager
def _database_errors(engine: Engine) -> Iterator[None]:
    """Turn what the database driver raises into one of our errors."""
    where = engine.url.render_as_string(hide_password=True)
    try:
        yield
    except LavatarError:
        raise
    except OperationalError as error:
        text = str(error.orig).strip()
        if "full" in text:
            raise StorageError(f"the disk of the registry {where} is full: {text}", "Free some space.") from error
        raise StorageError(
            f"the registry {where} cannot be used: {text}",
            f"Check that it exists, is writable and is not held by another program ({REGISTRY_VARIABLE}).",
        ) from error
    except (ProgrammingError, DatabaseError) as error:
        raise JobError(f"the registry {where} refused an operation: {error}", "Run: lavatar doctor") from error
    except SQLAlchemyError as error:
        raise JobError(f"the registry {where}: {error}", "Run: lavatar doctor") from error

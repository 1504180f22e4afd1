"""Whose files the registry speaks of. Machines may share a registry: they then share the home, or a store, as well.

Another home would take every result that it does not hold for lost, and have it made again. It is told so before that.
"""

from __future__ import annotations

import os
from pathlib import Path

from sqlalchemy import delete, select

from lavatar.cluster.environment import this_host
from lavatar.errors import StorageError
from lavatar.platform.home import REGISTRY_VARIABLE, Home
from lavatar.platform.registry import Registry, insert_missing, now, patiently
from lavatar.platform.tables import KnownHome


def belong(registry: Registry, home: Home) -> None:
    """From now on results of this home are in the registry. Raises StorageError where they are another home's."""
    others = strangers(registry, home)
    if others:
        raise StorageError(
            f"the results in this registry lie in {', '.join(map(str, others))}, and not in this home, {home.root}",
            "Set LAVATAR_HOME to that home (on a shared disk), or LAVATAR_STORE on every machine. "
            "If it is lost for good: lavatar doctor --repair --adopt",
        )
    if _shared():
        _remember(registry, home)


def strangers(registry: Registry, home: Home) -> list[KnownHome]:
    """Other homes whose results are in the registry, where this one cannot see them. Raises ConfigError."""
    if not _shared() or home.store() is not None:
        return []
    mine = home.identity()
    with registry.read() as session:
        return [other for other in session.scalars(select(KnownHome)) if other.id != mine and not _gone(other)]


@patiently
def adopt(registry: Registry, home: Home) -> None:
    """The other homes are lost: what is not in this one may be made again."""
    with registry.write() as session:
        session.execute(delete(KnownHome).where(KnownHome.id != home.identity()))


@patiently
def _remember(registry: Registry, home: Home) -> None:
    row = {"id": home.identity(), "host": this_host(), "folder": str(home.root), "created": now()}
    with registry.read() as session:
        if session.get(KnownHome, row["id"]):
            return
    with registry.write() as session:
        insert_missing(session, KnownHome, [row])


def _gone(other: KnownHome) -> bool:
    """Whether its folder was on this machine and is no more, or is another home now."""
    if other.host != this_host():
        return False
    try:
        return (Path(other.folder) / "id").read_text().strip() != other.id
    except OSError:
        return True


def _shared() -> bool:
    """Whether the registry is not the one inside the home."""
    return bool(os.environ.get(REGISTRY_VARIABLE, "").strip())

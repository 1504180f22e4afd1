"""Files that are there whole or not at all, locks, and errors of the disk that say what to do. Imports no torch."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lavatar.errors import StorageError


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes JSON that is either there whole or not at all."""
    with storage_errors(path):
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(data, indent=1, sort_keys=True))
        sync(partial)
        os.replace(partial, path)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Onto the disk, not only into the system's memory."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Errors of the disk become StorageError that names the path."""
    try:
        yield
    except OSError as error:
        raise _storage_error(path, error.strerror or str(error)) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # importing it imports torch
            raise
        raise _storage_error(path, str(error)) from error


def _storage_error(path: Path, reason: str) -> StorageError:
    return StorageError(
        f"cannot write {path}: {reason}",
        "Free some space or make the folder writable, then repeat the command: it goes on from the last checkpoint.",
    )


@contextmanager
def exclusive(lock: Path, *, shared: bool = False) -> Iterator[None]:
    """One process at a time on this machine holds `lock` (an empty file that stays); freed when the process dies.

    `shared`: as many as like, but none of them beside one that holds it alone.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)

"""What was computed once from fixed inputs and is the same every time, kept in the user's cache for other processes.

A calibration is a table of arrays in one safetensors file that is named by everything it depends on. The cache is no
store: a file that cannot be written is not kept, one that cannot be read is computed again, and the least recently
used ones make room.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from lavatar.datasets.weights import user_cache

Arrays = Mapping[str, np.ndarray]

MOST_FILES = 32
FORGOTTEN_SECONDS = 3600.0
"""Files kept, 55 MB each; and the age at which a half-written file belongs to nobody."""


def kept(name: str, depends_on: str, compute: Callable[[], Arrays]) -> Arrays:
    """The arrays of `compute()`, from the cache where an earlier process has left them there.

    name        of the calibration, the beginning of the file's name
    depends_on  everything but the code of synthetic subjects and the libraries that its arrays follow from
    """
    path = folder() / f"{name}-{_key(depends_on)}.safetensors"
    found = _read(path)
    if found is None:
        found = compute()
        with suppress(OSError):
            _write(path, found)
    return found


def folder() -> Path:
    """Where calibrations are kept (XDG_CACHE_HOME honoured)."""
    return user_cache() / "calibrations"


def _read(path: Path) -> Arrays | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays: Arrays = load_file(path)
        os.utime(path)
        return arrays
    except (OSError, ValueError, KeyError, SafetensorError):
        return None


def _write(path: Path, arrays: Arrays) -> None:
    """Whole or not at all; then room is made."""
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, part)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
    used = sorted(((p.stat().st_mtime, p) for p in path.parent.glob("*.safetensors")), reverse=True)
    old = [p for _, p in used[MOST_FILES:]]
    old += [p for p in path.parent.glob("*.part") if time.time() - p.stat().st_mtime > FORGOTTEN_SECONDS]
    for each in old:
        each.unlink(missing_ok=True)


def _key(depends_on: str) -> str:
    return hashlib.sha256(f"{_code()} {depends_on}".encode()).hexdigest()[:24]


@lru_cache(maxsize=1)
def _code() -> str:
    """Of the code of synthetic subjects and the libraries under it: another version computes its own."""
    parts = hashlib.sha256(f"{np.__version__} {cv2.__version__}".encode())
    here = Path(__file__).parent
    for source in (*sorted(here.glob("synthetic*.py")), here / "crops.py", Path(__file__)):
        parts.update(source.read_bytes())
    return parts.hexdigest()

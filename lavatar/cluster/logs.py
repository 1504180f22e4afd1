"""HOME/logs/KEY.log: all that a stage's processes print, native libraries included, and the tracebacks of failures."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from lavatar.contracts import StageSpec
from lavatar.masking import masked


def log_path(spec: StageSpec) -> Path:
    """Where the stage's processes write."""
    return spec.home / "logs" / f"{spec.key}.log"


@contextlib.contextmanager
def redirected(path: Path) -> Iterator[None]:
    """Standard output and error of this process go to the end of `path`; what native code prints does too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _flush()
    kept = os.dup(1), os.dup(2)
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.dup2(target, 1)
        os.dup2(target, 2)
        yield
    finally:
        _flush()
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for descriptor in (*kept, target):
            os.close(descriptor)


@contextlib.contextmanager
def noted(path: Path, name: str) -> Iterator[None]:
    """Begin, end and traceback of one process's work on a stage, in its log."""
    began = time.monotonic()
    note(path, f"{name}: begins (process {os.getpid()})")
    try:
        yield
    except BaseException:
        note(path, f"{name}: ended by an error\n{traceback.format_exc()}")
        raise
    note(path, f"{name}: ended after {time.monotonic() - began:.1f} s")


def note(path: Path, text: str) -> None:
    """One dated line. A log that cannot be written never stops the work."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as stream:
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {masked(text.rstrip())}\n")


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()

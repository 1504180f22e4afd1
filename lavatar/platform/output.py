"""Standard output belongs to the answer: one JSON object with --json, a short text without.

Libraries and worker processes print to file descriptor 1 as they like; while `reserved()` holds, that goes to standard
error, and only `answer` reaches the real standard output.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any

import click

from lavatar.platform.jsonable import plain

_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_answers: list[IO[str]] = []


@contextlib.contextmanager
def reserved() -> Iterator[None]:
    """Keep everything but `answer` off standard output."""
    sys.stdout.flush()
    stream, before = os.fdopen(os.dup(1), "w", encoding="utf-8"), sys.stdout
    _answers.append(stream)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = before
        _answers.remove(stream)
        os.dup2(stream.fileno(), 1)
        with contextlib.suppress(BrokenPipeError):
            stream.close()


def printable(text: str) -> str:
    """`text` with what steers a terminal, or is no text at all, written out: names and paths come from anywhere."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def answer(text: str, mark: str = "", colour: str = "") -> None:
    """Text to the real standard output; `mark` stands before it, coloured where that is a terminal that wants it."""
    stream = _answers[-1] if _answers else sys.stdout
    shown = click.style(mark, fg=colour) if stream.isatty() and "NO_COLOR" not in os.environ else mark
    _write(f"{shown} {printable(text)}" if mark else printable(text))


def _write(text: str) -> None:
    print(text, file=_answers[-1] if _answers else sys.stdout, flush=True)


def answer_json(value: Any) -> None:
    """One JSON object (or array) to the real standard output."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=False)
    _write(text.encode("utf-8", "backslashreplace").decode())  # half of a pair, as in a file's name that is no UTF-8


def note(text: str) -> None:
    """A line for people, beside the answer: standard error."""
    print(printable(text), file=sys.stderr, flush=True)


def table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """Columns as wide as they need to be."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(lines)


def when(seconds: float) -> str:
    """A moment, Unix seconds, by the clock of whoever reads it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))

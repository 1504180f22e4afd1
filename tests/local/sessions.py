"""Whose a process is: by its environment, and by the session that it runs in. Ray's workers and its agents write their
title over their environment, so that nothing in it is left to be found."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

AGENTS_LINGER = 100.0
"""Seconds that two idle agents of Ray take to end after their raylet was killed: they try to report it for 60."""

_begun: dict[Path, dict[int, int | None]] = defaultdict(dict)
"""The sessions of each home, and when their first process began; None where it had ended when the session was seen."""


@dataclass(frozen=True)
class Living:
    """A process that runs. What it wrote over, or may not be read, is empty."""

    process: psutil.Process
    session: int
    environment: dict[str, str]
    words: list[str]

    def names(self, *marks: str) -> bool:
        """Whether one of them is in its command line."""
        return any(mark in word for mark in marks for word in self.words)


def living() -> Iterator[Living]:
    """All processes but this one."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            environment: dict[str, str] = {}
            with contextlib.suppress(psutil.AccessDenied):
                environment = process.environ()
            yield Living(process, os.getsid(process.pid), environment, process.cmdline())


def began(home: Path, session: int) -> None:
    """A session of this home, by its number, which is that of its first process."""
    _begun[home].setdefault(session, _leader(session))


def of_home(home: Path) -> list[Living]:
    """What runs for a home: by its environment, by a path on its command line, or because it is in a session that a
    command of this home began, or in one that such a process was seen in.

    The session of this process is none of them; nor is one in which something names another home, or whose number the
    kernel has given to another process since: others may run these tests on the same machine.
    """
    from lavatar.cluster.session import root_of

    everything, name = list(living()), str(home)
    named = [one for one in everything if one.environment.get("LAVATAR_HOME") == name]
    named += [one for one in everything if one not in named and one.names(name, str(root_of(home)))]
    foreign = {one.session for one in everything if one.environment.get("LAVATAR_HOME", name) != name}
    foreign |= {os.getsid(0), 0}
    for one in named:
        if one.session not in foreign:
            began(home, one.session)
    begun = {one.session for one in everything} & set(_begun[home]) - foreign
    _begun[home] = {number: first for number, first in _begun[home].items() if number in begun}  # the others are over
    own = {number for number, first in _begun[home].items() if _leader(number) in (None, first)}
    return named + [one for one in everything if one.session in own and one not in named]


def _leader(session: int) -> int | None:
    """When the first process of a session began, in the kernel's ticks; None where it has ended."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{session}/stat").read_text().rpartition(")")[2].split()[19])
    return None

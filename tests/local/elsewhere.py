"""Run as a script by the tests: the command line as if on another machine, whose clock is wrong.

elsewhere.py HOST SECONDS LEASE COMMAND...    SECONDS: how far the clock is ahead; LEASE: seconds that leases last

Ray's workers, which the command starts, have the same clock where wrong_clock/ is on their PYTHONPATH.
"""

from __future__ import annotations

import os
import socket
import sys
import time

AHEAD = "LAVATAR_TEST_AHEAD"


def set_clock(ahead: float) -> None:
    """From here on this process's clock is so many seconds ahead."""
    seconds, nanoseconds = time.time, time.time_ns
    time.time = lambda: seconds() + ahead
    time.time_ns = lambda: nanoseconds() + int(ahead * 1e9)


def move(host: str, ahead: float, lease: float) -> None:
    """Makes this process one of machine `host`. Before anything else is imported."""
    set_clock(ahead)
    os.environ[AHEAD] = str(ahead)
    socket.gethostname = lambda: host
    from lavatar.cluster import mailbox
    from lavatar.platform import jobs, leases

    leases.LEASE_SECONDS, jobs.HEARTBEAT_SECONDS = lease, lease / 10
    mailbox.SILENCE_SECONDS = lease * 2 / 3


if __name__ == "__main__":
    move(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]))
    from lavatar.platform.cli import main

    sys.argv[1:] = sys.argv[4:]
    sys.exit(main())

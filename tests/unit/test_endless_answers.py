"""What is read from outside has an end: answers that go on for ever, and JSON nested without sense."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from lavatar.cluster import head, session
from lavatar.errors import DataError, JobError
from lavatar.platform import sweeps
from lavatar.platform.sink import read_values
from lavatar.platform.speed.table import read_baseline

DEEP = "[" * 100_000
CLUSTER = head.Head("127.0.0.1:1", "http://127.0.0.1:2", "127.0.0.1")
SENT = 16 * 2**20


@pytest.fixture
def long_answer(monkeypatch: pytest.MonkeyPatch) -> Iterator[head.Head]:
    """A server with a long valid answer to everything; to /error as an error."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(500 if self.path == "/error" else 200)
            self.end_headers()
            try:
                for _ in range(SENT // 2**16):
                    self.wfile.write(b" " * 2**16)
                self.wfile.write(b"{}")
                self.server.whole += 1  # type: ignore[attr-defined]
            except OSError:  # nobody reads on
                pass

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        server.whole = 0  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield head.Head("127.0.0.1:1", f"http://127.0.0.1:{server.server_port}", "127.0.0.1")
        server.shutdown()
        thread.join()
        assert server.whole == 0, "it was read to its end"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("path", "said"), [("/api/x", "longer than 1 MB"), ("/error", "did not take /error")])
def test_a_long_answer_of_the_dashboard_is_not_read_to_its_end(
    long_answer: head.Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, said: str
) -> None:
    monkeypatch.setattr(head, "MOST_BYTES", 2**20)
    with pytest.raises(JobError, match=said):
        head.request(tmp_path, long_answer, path)


def test_a_dashboard_that_knows_every_job_is_not_asked_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer(home: Path, cluster: head.Head, path: str) -> dict[str, str]:
        asked.append(path)
        assert len(asked) <= head.MOST_SUBMISSIONS
        return {"status": "RUNNING"}

    monkeypatch.setattr(head, "request", answer)
    with pytest.raises(JobError, match="more than 1000 jobs of the name x"):
        head.submissions(tmp_path, CLUSTER, "x")


def test_json_nested_without_sense_is_a_damaged_file(tmp_path: Path) -> None:
    file = tmp_path / sweeps.TRIALS
    file.write_text(DEEP)
    with pytest.raises(DataError, match="is damaged"):
        sweeps.read_trials(tmp_path)
    with pytest.raises(DataError, match="is no baseline"):
        read_baseline(file, None)  # type: ignore[arg-type]  # the file comes first
    assert read_values(file) == []


def test_such_a_record_is_of_no_cluster_and_no_ray(tmp_path: Path) -> None:
    folder = session.private_folder(tmp_path)
    temp = session.temp_of(folder)
    temp.mkdir(exist_ok=True)
    record = temp / "session-1.json"
    try:
        record.write_text(DEEP)
        assert session.running(tmp_path) == []
    finally:
        record.unlink()
        temp.rmdir()
        folder.rmdir()
    session.shared_of(tmp_path).mkdir(exist_ok=True)
    (session.shared_of(tmp_path) / head.RECORD).write_text(DEEP)
    assert head.current(tmp_path) is None

"""What only its owner may read, whatever was there before: the home, Ray's folder, its token."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from lavatar.cluster import head, session
from lavatar.errors import JobError, StorageError
from lavatar.platform.home import Home


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_a_new_home_is_its_owners_and_one_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert mode(Home(tmp_path / "new").ensure().root) == 0o700
        (tmp_path / "shared").mkdir(mode=0o750)
        assert mode(Home(tmp_path / "shared").ensure().root) == 0o750
    finally:
        os.umask(before)


def test_rays_folder_and_token_are_private_whatever_they_were(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        (tmp_path / "ray").mkdir(mode=0o777)
        token = session.token_of(tmp_path)
        assert (mode(token.parent), mode(token)) == (0o700, 0o600)
        text = token.read_text()
        assert len(text) == 64
        token.parent.chmod(0o777)
        token.chmod(0o644)
        assert session.token_of(tmp_path).read_text() == text
        assert (mode(token.parent), mode(token)) == (0o700, 0o600)
    finally:
        os.umask(before)


def test_a_token_that_is_a_link_is_refused(tmp_path: Path) -> None:
    token = session.token_of(tmp_path)
    token.rename(tmp_path / "elsewhere")
    token.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="token is a link"):
        session.token_of(tmp_path)


def test_a_stand_in_that_somebody_put_there_is_refused(tmp_path: Path) -> None:
    """Its name under /tmp can be worked out by anybody."""
    home = tmp_path / ("x" * 80)
    folder = session.root_of(home)
    assert not folder.is_relative_to(tmp_path)
    folder.symlink_to(tmp_path, target_is_directory=True)
    before = mode(tmp_path)
    try:
        with pytest.raises(StorageError, match="is a link"):
            session.private_folder(home)
        assert mode(tmp_path) == before
    finally:
        folder.unlink()


@pytest.fixture
def moved() -> Iterator[tuple[str, list[str]]]:
    """A server that sends everybody elsewhere, and the tokens it was shown at each of its two addresses."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(f"{self.path} {self.headers.get('Authorization')}")
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{server.server_port}/elsewhere")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()


def test_the_token_is_shown_to_the_head_alone(
    tmp_path: Path, moved: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to where an answer leads, and not to a proxy."""
    url, seen = moved
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(session.token_of(tmp_path)))
    with pytest.raises(JobError, match="did not take /api/x"):
        head.request(tmp_path, head.Head("127.0.0.1:1", url, "127.0.0.1"), "/api/x")
    assert seen == [f"/api/x Bearer {session.token_of(tmp_path).read_text()}"]
    monkeypatch.setenv("http_proxy", url)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(JobError):
        head.request(tmp_path, head.Head("127.0.0.1:1", "http://127.0.0.1:1", "127.0.0.1"), "/api/x")
    assert len(seen) == 1


def test_the_record_of_a_head_is_read_or_ignored(tmp_path: Path) -> None:
    folder = session.private_folder(tmp_path)
    temp = session.temp_of(folder)
    temp.mkdir(exist_ok=True)
    for text in ("", "[]", "{}", json.dumps({"address": 1}), json.dumps({"x": 1})):
        (folder / "cluster.json").write_text(text)
        assert head.current(tmp_path) is None
        (temp / f"session-{os.getpid()}.json").write_text(text)
        assert session.running(tmp_path) in ([], [None])

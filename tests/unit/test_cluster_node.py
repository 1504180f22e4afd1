"""A machine that joins: whether anything listens where it is told the head is."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from lavatar.cluster import node
from lavatar.errors import UsageError


@pytest.fixture
def listener() -> socket.socket:
    """Bound to a port of loopback, and not yet listening."""
    found = socket.socket()
    found.bind(("127.0.0.1", 0))
    return found


def test_where_nothing_listens_is_said_soon(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "REACH_SECONDS", 0.5)
    began = time.monotonic()
    with listener, pytest.raises(UsageError, match=r"cannot be reached from here: .*refused") as caught:
        node.reach(f"127.0.0.1:{listener.getsockname()[1]}")
    assert time.monotonic() - began < 5
    assert "--host" in caught.value.hint


@pytest.mark.parametrize("address", ["127.0.0.1:ray", "127.0.0.1:", "127.0.0.1:99999999"])
def test_what_is_no_address_is_said_at_once(address: str) -> None:
    began = time.monotonic()
    with pytest.raises(UsageError, match="cannot be reached from here"):
        node.reach(address)
    assert time.monotonic() - began < 1


def test_a_head_that_begins_to_listen_meanwhile_is_reached(listener: socket.socket) -> None:
    with listener:
        later = threading.Timer(0.5, listener.listen)
        later.start()
        node.reach(f"127.0.0.1:{listener.getsockname()[1]}")
        later.join()

"""An S3 server (moto) in a process of its own, and a proxy before it that fails as networks and servers do."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import itertools
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BUCKET = "lavatar-test"
OWN = ("connection", "transfer-encoding", "content-length", "date", "server")
"""Headers of an answer that are not passed on."""


@dataclass(frozen=True)
class S3:
    """A running server."""

    port: int

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.port)


def environment(port: int) -> dict[str, str]:
    """What a client of the server at this port has in its environment."""
    return {
        "AWS_ACCESS_KEY_ID": "key-of-the-tests",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextlib.contextmanager
def running(log: Path) -> Iterator[S3]:
    """A server with one bucket."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, log.read_text()
            try:
                request = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
                urllib.request.urlopen(request, timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        yield S3(port)
    finally:
        process.kill()
        process.wait()


def in_order(server: S3, root: str, keys: set[str]) -> None:
    """Of the store under `root` nothing is half sent or half removed: no upload is open; an object is the index, the
    result, a file or part of a complete checkpoint of one of these stages; and each is what its index or marker says.
    """
    client = _client(server)
    assert not client.list_multipart_uploads(Bucket=BUCKET).get("Uploads"), "an upload is open"
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{root}/")
    found = {one["Key"] for page in pages for one in page.get("Contents", ())}
    known: dict[str, str] = {}
    for key in keys:
        place = f"{root}/stages/{key}"
        assert {f"{place}/index.json", f"{place}/result.json"} <= found, f"stage {key} is not whole"
        for name in [one for one in found if re.fullmatch(rf"{place}/({LISTS})", one)]:
            known[name] = known[f"{place}/result.json"] = ""
            folder = f"{place}/files" if name.endswith("/index.json") else name.rpartition("/")[0]
            files = json.loads(_read(client, name))["files"]
            known |= {f"{folder}/{file}": about["sha256"] for file, about in files.items()}
    assert found == set(known), f"not known, or missing: {sorted(found ^ set(known))}"
    wrong = [name for name, sha in known.items() if sha and hashlib.sha256(_read(client, name)).hexdigest() != sha]
    assert not wrong, f"not whole: {wrong}"


LISTS = r"index\.json|checkpoints/\w+/step-\d{8}/COMPLETE\.json"
"""Below a stage: what says which files there are."""


def _client(server: S3) -> Any:
    import boto3

    own = server.environment
    return boto3.client(
        "s3",
        endpoint_url=own["AWS_ENDPOINT_URL"],
        region_name=own["AWS_DEFAULT_REGION"],
        aws_access_key_id=own["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=own["AWS_SECRET_ACCESS_KEY"],
    )


def _read(client: Any, name: str) -> bytes:
    return bytes(client.get_object(Bucket=BUCKET, Key=name)["Body"].read())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@dataclass
class Faulty:
    """A proxy before the server. One request in `every` fails, by a seed; `flip`: so many bodies have a wrong byte, and
    until then no checksum of the server's own is passed on."""

    target: int
    seed: int = 0
    every: int = 5
    flip: int = 0
    requests: int = 0
    failed: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random, self._lock = random.Random(self.seed), threading.Lock()
        self._ways = itertools.cycle(("500", "503", "closed at once", "closed afterwards", "body cut"))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.port)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault(self) -> str:
        """How this request fails; "" for not at all."""
        with self._lock:
            self.requests += 1
            if not self.every or self._random.randrange(self.every):
                return ""
            way = next(self._ways)
            self.failed[way] = self.failed.get(way, 0) + 1
            return way

    def spoil(self, method: str, body: bytes) -> bytes:
        """A byte of the body of an object that is long enough to be a file."""
        with self._lock:
            if method != "GET" or len(body) < 1000 or not self.flip:
                return body
            self.flip -= 1
        return body[:500] + bytes([body[500] ^ 1]) + body[501:]

    def _handler(proxy) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = proxy.fault()
                if fault in ("500", "503"):
                    self.send_response(int(fault))
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if fault == "closed at once":
                    self.close_connection = True
                    return
                status, headers, body = proxy.ask(self.command, self.path, sent, dict(self.headers.items()))
                if fault == "closed afterwards":
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in headers:
                    if name.lower() not in OWN and not (proxy.flip and "checksum" in name.lower()):
                        self.send_header(name, value)
                length = next((value for name, value in headers if name.lower() == "content-length"), str(len(body)))
                self.send_header("Content-Length", length)
                self.end_headers()
                body = proxy.spoil(self.command, body)
                if fault == "body cut":
                    self.wfile.write(body[: len(body) // 2])
                    self.close_connection = True
                    return
                self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

            def log_message(self, format: str, *args: Any) -> None: ...

        return Handler

    def ask(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.target, timeout=30)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

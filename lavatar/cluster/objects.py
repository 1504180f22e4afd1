"""An object store by its URL (fsspec): whole objects in and out, every request repeated while the store stumbles.

Repeated here and not by botocore, whose jitter draws from Python's own generator: its state is part of a checkpoint,
and a training must not depend on the network. Exponential back-off; the jitter is the system's. Credentials and
endpoint are those of the environment, as the client library reads them, and stand in no message.
"""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from lavatar.errors import ConfigError, DataError, ObjectError, StorageError
from lavatar.training.files import file_digest, storage_errors

T = TypeVar("T")

Sums = Mapping[str, Mapping[str, Any]]
"""{"sha256", "bytes"} of files by their names, with / between the parts: what a checkpoint's marker holds too."""

STORE_VARIABLE = "LAVATAR_STORE"

WORKERS = 4  # files on their way at once
READS = 3
"""How often an object is fetched that comes with a wrong checksum."""
ATTEMPTS = 8
PATIENCE_SECONDS = 120.0  # no attempt begins later
FIRST_SECONDS, MOST_SECONDS = 0.2, 10.0
"""How long to wait before a second attempt, and at most; doubled from one to the next, less a random part."""

_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "use_listings_cache": False,  # others write beside us
        "config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 1}},
    },
    "file": {"auto_mkdir": True},
}
TOO_MANY_REQUESTS, SERVER_ERROR = 429, 500  # HTTP
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_FOR_GOOD = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError"}
_WRITE = "Write s3://BUCKET/PREFIX or file:///FOLDER, or unset it."
_HINT = (
    f"Check {STORE_VARIABLE}, that bucket and network are there, and the credentials in the environment (S3: AWS_…). "
    "Then submit again: what was finished is kept."
)


class ObjectStore:
    """Objects by names relative to the URL. `say` is told of each failure that is made up for."""

    def __init__(self, url: str, say: Callable[[str], None] = logging.getLogger("lavatar.store").info) -> None:
        self.url, self._say = url.rstrip("/"), say
        self._files, root = _open(self.url)
        self._root = root.rstrip("/")

    def put(self, file: Path, name: str) -> None:
        """A file as object `name`. Raises FileNotFoundError, StorageError."""
        self._patiently(f"writing {name}", lambda: self._files.put_file(str(file), self._path(name)))

    def get(self, name: str, file: Path) -> None:
        """Object `name` as a file. Raises FileNotFoundError, StorageError; OSError where this disk is full."""
        self._patiently(f"reading {name}", lambda: self._files.get_file(self._path(name), str(file)))

    def write(self, name: str, data: bytes) -> None:
        self._patiently(f"writing {name}", lambda: self._files.pipe_file(self._path(name), data))

    def read(self, name: str) -> bytes | None:
        """The bytes of object `name`; None if there is none."""
        try:
            return bytes(self._patiently(f"reading {name}", lambda: self._files.cat_file(self._path(name))))
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> list[str]:
        """What lies directly in `folder`, sorted."""
        try:
            found = self._patiently(f"listing {folder}", lambda: self._files.ls(self._path(folder), detail=False))
        except FileNotFoundError:
            return []
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)

    def size(self, folder: str) -> int | None:
        """Bytes of all in `folder`; None if there is nothing."""
        if not self.names(folder):
            return None
        return int(self._patiently(f"measuring {folder}", lambda: self._files.du(self._path(folder))))

    def remove(self, name: str) -> None:
        """Object `name`, or all in the folder of that name; nothing if there is none."""
        try:
            self._patiently(f"removing {name}", lambda: self._files.rm(self._path(name), recursive=True))
        except FileNotFoundError:
            return

    def put_tree(self, folder: Path, names: Iterable[str], prefix: str) -> Sums:
        """Files of a folder as objects under `prefix`; their sums. Raises FileNotFoundError, StorageError."""

        def put(name: str) -> tuple[str, dict[str, Any]]:
            file = folder / name
            with storage_errors(file):
                summed = {"sha256": file_digest(file), "bytes": file.stat().st_size}
            self.put(file, f"{prefix}/{name}")
            return name, summed

        with ThreadPoolExecutor(WORKERS) as pool:
            return dict(pool.map(put, names))

    def get_tree(self, prefix: str, sums: Sums, folder: Path, way_out: str) -> None:
        """The objects under `prefix` as files of a folder. Raises ObjectError for a damaged or missing one, whose hint
        is `way_out`, DataError for a name that leads out of the folder, StorageError."""
        for name in sums:
            inside = PurePosixPath(name)
            if inside.is_absolute() or ".." in inside.parts:
                raise DataError(f"{self.url}/{prefix} names a file outside of its folder: {name!r}", way_out)

        def get(name: str) -> None:
            with storage_errors(folder / name):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                self._get_whole(f"{prefix}/{name}", folder / name, str(sums[name]["sha256"]), way_out)

        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(get, sums))

    def _get_whole(self, name: str, file: Path, wanted: str, way_out: str) -> None:
        for _ in range(READS):
            try:
                self.get(name, file)
            except FileNotFoundError:
                raise ObjectError(f"{self.url}/{name} is missing", way_out) from None
            found = file_digest(file)
            if found == wanted:
                return
            self._say(f"{self.url}/{name} came with SHA-256 {found[:12]}…, wanted {wanted[:12]}…: fetched again")
        raise ObjectError(
            f"{self.url}/{name} is damaged: its SHA-256 is {found[:12]}…, wanted {wanted[:12]}…, {READS} times", way_out
        )

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _patiently(self, what: str, call: Callable[[], T]) -> T:
        began = time.monotonic()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return call()
            except FileNotFoundError:
                raise
            except Exception as error:
                if getattr(error, "errno", None) in _FULL:
                    raise
                last = attempt == ATTEMPTS or time.monotonic() - began > PATIENCE_SECONDS
                if last or isinstance(error, PermissionError) or type(error).__name__ in _FOR_GOOD:
                    raise StorageError(f"the store {self.url} failed at {what}: {reason(error)}", _HINT) from error
                self._say(f"the store failed at {what}, attempt {attempt} of {ATTEMPTS}: {reason(error)}")
            time.sleep(random.SystemRandom().uniform(0.5, 1.0) * min(MOST_SECONDS, FIRST_SECONDS * 2 ** (attempt - 1)))
        raise AssertionError("the last attempt returns or raises")


def reason(error: Exception) -> str:
    """What it says, in one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"


def _open(url: str) -> tuple[Any, str]:
    """fsspec's file system for the URL, and the path in it. Raises ConfigError."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigError(f"{STORE_VARIABLE} is not an address: {error}", _WRITE) from None
    if parts.password or "@" in parts.netloc:
        raise ConfigError(
            f"{STORE_VARIABLE} holds credentials", "Leave them out of the address: they are read from the environment."
        )
    if not parts.scheme or "://" not in url:
        raise ConfigError(f"{STORE_VARIABLE}={url!r} is not an address", _WRITE)
    import fsspec

    try:
        if parts.scheme == "s3":
            _repeat_parts()
        files, root = fsspec.core.url_to_fs(url, **_OPTIONS.get(parts.scheme, {}))
    except ImportError as error:
        raise ConfigError(
            f"{STORE_VARIABLE}={url!r} needs a package that is not here: {reason(error)}",
            "For S3: pip install 'lavatar[s3]'",
        ) from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"{STORE_VARIABLE}={url!r} cannot be used: {reason(error)}", _WRITE) from error
    return files, str(root)


def _repeat_parts() -> None:
    """A large file goes to S3 in parts: one that the server refuses for the moment is sent again by itself."""
    from s3fs.core import set_custom_error_handler

    def passes(error: Exception) -> bool:
        answer = getattr(error, "response", {}).get("ResponseMetadata", {})
        status = int(answer.get("HTTPStatusCode", 0))
        return status == TOO_MANY_REQUESTS or status >= SERVER_ERROR

    set_custom_error_handler(passes)

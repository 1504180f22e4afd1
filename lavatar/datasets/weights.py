"""The pretrained files that lavatar uses: where each comes from, its SHA-256, its licence, and where it lies here.

Looked up in LAVATAR_WEIGHTS, then in the user's cache; `fetch` downloads into the first of the two that is set. Nothing
is ever unpickled that could run code: PyTorch files are read with `weights_only=True`, and torchvision's are rewritten
as safetensors.
"""

from __future__ import annotations

import bz2
import hashlib
import json
import os
import struct
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavatar.datasets.weights_table import WEIGHTS, Weight
from lavatar.errors import StorageError, WeightsError

if TYPE_CHECKING:
    import numpy as np

Progress = Callable[[str, int, int], None]
"""name, bytes so far, bytes in all"""


__all__ = ["WEIGHTS", "Weight"]
CONV_LAYERS = {"vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), "alex": (0, 3, 6, 8, 10)}
FETCH = "lavatar weights fetch"
MOST_BYTES, SLACK = 2**30, 2**20
"""Of a download whose length is not known; beyond a known one, for what packing adds."""


def user_cache() -> Path:
    """lavatar's part of the user's cache (XDG_CACHE_HOME honoured)."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "lavatar"


def cache_folder() -> Path:
    """The user's cache of weights."""
    return user_cache() / "weights"


def folders() -> list[Path]:
    """Where weights are looked for, in this order."""
    given = os.environ.get("LAVATAR_WEIGHTS")
    return ([Path(given)] if given else []) + [cache_folder()]


def find(name: str) -> Path:
    """The file of `name`, its checksum verified. WeightsError names file, folder and the command that gets it."""
    weight = _weight(name)
    for folder in folders():
        path = folder / weight.file
        if path.is_file():
            got = _digest_once(str(path), path.stat().st_mtime_ns, path.stat().st_size)
            if got != weight.sha256:
                raise WeightsError(
                    f"{path}: wrong SHA-256 {got[:12]}…, expected {weight.sha256[:12]}…",
                    f"Delete the file, then run: {FETCH} {name}",
                )
            return path
    where = " or ".join(str(f) for f in folders())
    raise WeightsError(f"pretrained weights {weight.file} are not in {where}", f"Get them with: {FETCH} {name}")


def digests(names: list[str] | tuple[str, ...]) -> dict[str, str]:
    """SHA-256 by name, as they enter a dataset's digest."""
    return {name: _weight(name).sha256 for name in names}


def status() -> list[dict[str, Any]]:
    """One row a file for `lavatar weights list`: state is present, missing or wrong; bytes are None if not known."""
    rows = []
    for weight in WEIGHTS.values():
        path, state = "", "missing"
        for folder in folders():
            if (folder / weight.file).is_file():
                path = str(folder / weight.file)
                state = "present" if file_sha256(Path(path)) == weight.sha256 else "wrong"
                break
        rows.append(
            {"name": weight.name, "file": weight.file, "state": state, "path": path, "url": weight.url,
             "licence": weight.licence, "bytes": weight.bytes or None, "sha256": weight.sha256}
        )  # fmt: skip
    return rows


def fetch(name: str, progress: Progress | None = None, url: str | None = None) -> Path:
    """Download `name` if it is not here, check it, rename it into place. A wrong file never gets its final name."""
    weight = _weight(name)
    try:
        return find(name)
    except WeightsError:
        pass
    folder = folders()[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
            part = Path(scratch) / "download"
            _download(weight, url or weight.url, part, progress)
            if weight.trunk:
                _check(weight, part, weight.url_sha256, url or weight.url)
                converted = Path(scratch) / weight.file
                convert_trunk(part, weight.trunk, converted)
                part = converted
            if weight.bz2:
                part = _decompressed(weight, part, url or weight.url)
            _check(weight, part, weight.sha256, url or weight.url)
            os.replace(part, folder / weight.file)
    except PermissionError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror})", "Set LAVATAR_WEIGHTS.") from error
    except OSError as error:
        raise StorageError(f"{folder}: {weight.file} cannot be stored ({error})", "Make room on the disk.") from error
    return folder / weight.file


def convert_trunk(source: Path, net: str, target: Path) -> None:
    """torchvision's .pth (convolutions only) plus the linear weights in the lpips package → one safetensors file."""
    import torch

    try:
        trunk = torch.load(source, map_location="cpu", weights_only=True)
        lin = torch.load(_lpips_folder() / f"{net}.pth", map_location="cpu", weights_only=True)
        tensors: dict[str, np.ndarray] = {}
        for layer in CONV_LAYERS[net]:
            for part in ("weight", "bias"):
                tensors[f"features.{layer}.{part}"] = trunk[f"features.{layer}.{part}"].float().numpy()
        for i in range(5):
            tensors[f"lin{i}.weight"] = lin[f"lin{i}.model.1.weight"].float().numpy()
    except (KeyError, RuntimeError, EOFError, AttributeError, TypeError, ValueError) as error:
        raise WeightsError(f"{source.name} is not the torchvision file it should be ({error})", "Try again.") from None
    except Exception as error:  # pickle.UnpicklingError and zip errors have no common root
        raise WeightsError(f"{source.name} cannot be read ({error})", "Try again.") from error
    write_safetensors(target, tensors)


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """The safetensors layout in the order given, so that the file's SHA-256 is known beforehand.

    8-byte little-endian length, JSON header padded with spaces to 8 bytes, then the raw float32 arrays.
    """
    import numpy as np  # planning a job asks for digests only, and should not wait for it

    header: dict[str, Any] = {}
    offset = 0
    for name, array in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array, dtype="<f4").tobytes())


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, remembered while it does not change."""
    stat = path.stat()
    return _digest_once(str(path), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=64)
def _digest_once(path: str, modified: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weight(name: str) -> Weight:
    if name not in WEIGHTS:
        raise WeightsError(f"there are no weights called {name!r}", f"Known: {', '.join(WEIGHTS)}.")
    return WEIGHTS[name]


def _lpips_folder() -> Path:
    """Where the installed lpips package keeps its linear weights, found without importing it (it needs torchvision)."""
    from importlib.util import find_spec

    spec = find_spec("lpips")
    if spec is None or spec.origin is None:
        raise WeightsError("the package lpips is not installed", "Install it: pip install lpips")
    return Path(spec.origin).parent / "weights" / "v0.1"


def _download(weight: Weight, url: str, target: Path, progress: Progress | None) -> None:
    hint = f"Check the network, or put the file into {folders()[0]} yourself, then run: {FETCH} {weight.name}"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, target.open("wb") as file:
            total = int(answer.headers.get("Content-Length") or (0 if weight.trunk or weight.bz2 else weight.bytes))
            done = 0
            while block := answer.read(1 << 20):
                file.write(block)
                done += len(block)
                _check_length(weight, done, url)
                if progress:
                    progress(weight.name, done, total)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise WeightsError(f"{weight.file} could not be downloaded from {url} ({reason})", hint) from error
    if done < total:
        raise WeightsError(f"{weight.file}: the download from {url} broke off at {done} of {total} bytes", hint)


def _decompressed(weight: Weight, packed: Path, url: str) -> Path:
    """The file inside a bz2, beside it."""
    plain = packed.with_name(weight.file)
    with bz2.open(packed) as source, plain.open("wb") as target:
        try:
            while block := source.read(1 << 20):
                target.write(block)
                _check_length(weight, target.tell(), url)
        except (OSError, EOFError) as error:
            if isinstance(error, OSError) and error.errno:  # of the disk, not of the data
                raise
            raise WeightsError(
                f"{url} is no bz2 file ({error})",
                f"A proxy may have answered instead. Try again: {FETCH} {weight.name}",
            ) from error
    return plain


def _check_length(weight: Weight, done: int, url: str) -> None:
    """What never ends, or unfolds to more than the file, must not fill the disk before its checksum is asked for."""
    most = (MOST_BYTES if weight.trunk else weight.bytes or MOST_BYTES) + SLACK
    if done > most:
        raise WeightsError(
            f"{url} is not {weight.file}: it goes on after {most} bytes",
            f"A proxy may have answered instead. Try again: {FETCH} {weight.name}",
        )


def _check(weight: Weight, path: Path, expected: str, url: str) -> None:
    got = file_sha256(path)
    if not got.startswith(expected):
        raise WeightsError(
            f"{url} is not {weight.file}: SHA-256 {got[:12]}…, expected {expected[:12]}…",
            f"A proxy may have answered instead. Try again: {FETCH} {weight.name}",
        )

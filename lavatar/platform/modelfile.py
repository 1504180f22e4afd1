"""A registered model in one file, to take elsewhere: a tar (ustar) of a few plain files, not compressed, no pickle.

    SHA256SUMS               of all that follow, as `sha256sum -c` reads it
    about.json               whose it is, where it comes from, its recipe (about.py)
    card.md                  the same for people
    avatar/config.json       the avatar's release (lavatar.training.release)
    avatar/model.safetensors
    pair/config.json         of a pair, also the pair's: it reenacts alone
    pair/model.safetensors

Each byte follows from these contents: members in this order, headers that say name and size and nothing else, padding
of zeros. So one model is always the same file, and a file that differs from what would be written is refused. The sums
tell damage, and changes by who cannot change them too; they are no signature (docs/SECURITY.md).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from lavatar.errors import DataError, UsageError
from lavatar.training.files import file_digest, storage_errors, sync

SUMS, ABOUT, CARD = "SHA256SUMS", "about.json", "card.md"
_AVATAR = (ABOUT, CARD, "avatar/config.json", "avatar/model.safetensors")
_PAIR = (*_AVATAR, "pair/config.json", "pair/model.safetensors")
MEMBERS = {"avatar": _AVATAR, "pair": _PAIR}
"""What stands behind the sums, by kind, in this order."""

MOST_TEXT = 2**20
"""Bytes of a member that is no weights: those are bounded by the file itself, for nothing is compressed."""
BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * BLOCK)
_PIECE = 2**20
_SIZE = slice(124, 135)  # of a header: eleven octal digits
AGAIN = "Export or copy it again; `sha256sum` of both copies tells whether they are the same."


def write_model_file(path: Path, kind: str, folder: Path) -> None:
    """The members of that kind, which lie in `folder` under their names, as one file: whole or not at all."""
    names = MEMBERS[kind]
    sums = _sums({name: file_digest(folder / name) for name in names})
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with storage_errors(path):
        try:
            with part.open("wb") as out:
                _append(out, SUMS, len(sums))
                out.write(sums + _padding(len(sums)))
                for name in names:
                    size = (folder / name).stat().st_size
                    _append(out, name, size)
                    with (folder / name).open("rb") as member:
                        shutil.copyfileobj(member, out, _PIECE)
                    out.write(_padding(size))
                out.write(_END)
            sync(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def unpack_model_file(path: Path, folder: Path) -> str:
    """The members into `folder`, an empty one, every byte of the file checked; its kind.

    Raises UsageError where there is no file to read, DataError for one that is not what `write_model_file` writes.
    What was written until then is the caller's to remove.
    """
    _require_file(path)
    with path.open("rb") as stream:
        reader = _Reader(path, stream)
        wanted = reader.text(SUMS)
        found: dict[str, str] = {}
        for name in _PAIR:
            if name == _PAIR[len(_AVATAR)] and reader.at_end():
                break
            found[name] = reader.copy(name, folder / name)
        reader.finish()
    if wanted != _sums(found):
        sums = _read_sums(wanted)
        wrong = ", ".join(name for name in found if sums.get(name) != found[name])
        what = f"{wrong} does not have its checksum" if wrong else f"{SUMS} names other files than it holds"
        raise DataError(f"{path} is damaged or was changed: {what}", AGAIN)
    return "pair" if len(found) == len(_PAIR) else "avatar"


class _Reader:
    """Members of a model file one after the other. DataError for the first thing that is not as it is written."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self._path, self._stream = path, stream
        self._left = os.fstat(stream.fileno()).st_size  # nothing longer than that is believed

    def text(self, name: str) -> bytes:
        """A small member."""
        size = self._header(name)
        content = self._read(size, name)
        self._pad(size, name)
        return content

    def copy(self, name: str, target: Path) -> str:
        """A member into a file; its SHA-256."""
        size = left = self._header(name)
        digest = hashlib.sha256()
        with storage_errors(target):
            target.parent.mkdir(exist_ok=True)
            with target.open("xb") as out:
                while left:
                    piece = self._read(min(_PIECE, left), name)
                    digest.update(piece)
                    out.write(piece)
                    left -= len(piece)
        self._pad(size, name)
        return digest.hexdigest()

    def at_end(self) -> bool:
        """Whether nothing but the end is left."""
        return self._left == len(_END)

    def finish(self) -> None:
        if self._left != len(_END) or self._read(len(_END), "its end") != _END:
            raise self._refused("there is something behind its last member")

    def _header(self, name: str) -> int:
        """The size in the header that comes next, which must be that of `name`."""
        header = self._read(BLOCK, f"the header of {name}")
        digits = header[_SIZE]
        size = int(digits, 8) if re.fullmatch(rb"[0-7]{11}", digits) else -1
        if size < 0 or header != _header(name, size):
            raise self._refused(f"{_shown(header)} stands where {name} belongs")
        if size > self._left:
            raise self._refused(f"it ends inside {name}")
        if size > MOST_TEXT and not name.endswith(".safetensors"):
            raise self._refused(f"{name} has {size} bytes, at most {MOST_TEXT} are taken")
        return size

    def _pad(self, size: int, name: str) -> None:
        if any(self._read(len(_padding(size)), name)):
            raise self._refused(f"there is something between {name} and what follows it")

    def _read(self, count: int, what: str) -> bytes:
        content = self._stream.read(count)
        self._left -= len(content)
        if len(content) < count:
            raise self._refused(f"it ends inside {what}")
        return content

    def _refused(self, reason: str) -> DataError:
        return DataError(f"{self._path} is no whole model of lavatar: {reason}", AGAIN)


def _append(out: IO[bytes], name: str, size: int) -> None:
    try:
        out.write(_header(name, size))
    except ValueError:
        raise DataError(f"{name} has {size} bytes, at most {8**11 - 1} fit", "Export a smaller model.") from None


def _header(name: str, size: int) -> bytes:
    """The one header that a member of this name and size has."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


def _shown(header: bytes) -> str:
    """What a header that is not the right one says, for people."""
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "replace")
    except tarfile.TarError:
        return "something"
    kind = "" if member.isreg() else f" (type {member.type!r})"
    return f"{member.name[:100]!r}{kind}"


def _sums(digests: Mapping[str, str]) -> bytes:
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()


def _read_sums(content: bytes) -> dict[str, str]:
    """Names and sums as far as they can be read, to say which one is wrong."""
    lines: Sequence[tuple[str, str, str]] = [
        line.partition("  ") for line in content.decode("utf-8", "replace").splitlines()
    ]
    return {name: digest for digest, _, name in lines}


def _require_file(path: Path) -> None:
    """Raises UsageError for a path that leads to no plain file, or to one that may not be read."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise UsageError(f"there is no file {path} ({error.strerror})", "Check the path.") from None
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path} is no plain file", "Name the file that `lavatar models export` wrote.")
    if not os.access(path, os.R_OK):
        raise UsageError(f"{path} cannot be read: no permission", f"Allow it: chmod u+r {path}")

"""Where the members of a tar lie. Shards may come from elsewhere: nothing in one is unpacked, followed or believed.

Only plain files of plain names are taken, as our writer makes them: a link, a device, a folder, an extended header or a
name with a slash is an error, and so is a length that the file does not have or that no sample needs.
"""

from __future__ import annotations

import re
import stat
import tarfile
from pathlib import Path

from lavatar.errors import ShardError

BLOCK = tarfile.BLOCKSIZE
MOST_BYTES = 64 * 2**20
"""Of one member: a portrait of 2048² without loss has 16 MB."""
_NAME = re.compile(r"\w[\w-]{0,99}\.\w[\w.]{0,99}", re.ASCII)

MemberSpan = tuple[int, int]
"""Offset and length in bytes of one member's data in its tar."""


def members(path: Path) -> dict[str, MemberSpan]:
    """KEY.NAME → where its bytes lie, in the order of the tar. Only headers are read.

    Raises ShardError, which says how far it came, without the path; OSError.
    """
    about = path.lstat()
    if not stat.S_ISREG(about.st_mode):
        raise ShardError("it is no plain file")
    spans: dict[str, MemberSpan] = {}
    with path.open("rb") as stream:
        while True:
            where = f"after {next(reversed(spans), 'its beginning')}"
            try:
                member = tarfile.TarInfo.frombuf(stream.read(BLOCK), "utf-8", "strict")
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
                return spans
            except (tarfile.TarError, ValueError) as error:
                raise ShardError(f"{where}: {error}") from None
            _require_plain(member, where)
            begin = stream.tell()
            if member.name in spans:
                raise ShardError(f"{where}: {member.name} is in it twice")
            if begin + member.size > about.st_size:
                raise ShardError(f"{where}: it ends inside {member.name}")
            spans[member.name] = (begin, member.size)
            stream.seek(begin + -(-member.size // BLOCK) * BLOCK)


def _require_plain(member: tarfile.TarInfo, where: str) -> None:
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise ShardError(f"{where}: {member.name[:100]!r} is no plain file (type {member.type!r})")
    if not _NAME.fullmatch(member.name):
        raise ShardError(f"{where}: {member.name[:100]!r} is no name of a sample's member")
    if not 0 <= member.size <= MOST_BYTES:
        raise ShardError(f"{where}: {member.name} has {member.size} bytes, at most {MOST_BYTES} are taken")

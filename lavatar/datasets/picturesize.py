"""The size of a picture by its header, before a decoder reserves memory for it."""

from __future__ import annotations

import struct

_PNG = b"\x89PNG\r\n\x1a\n"
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # SOF0 to SOF15: all of Cx but tables


def png_size(content: bytes) -> tuple[int, int] | None:
    """Width and height; None where it is no PNG."""
    if not content.startswith(_PNG) or content[12:16] != b"IHDR" or len(content) < 24:
        return None
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Width and height; None where it is no JPEG whose segments follow each other without anything between."""
    if not content.startswith(b"\xff\xd8"):
        return None
    at = 2
    while at + 9 <= len(content):
        mark, kind, length = struct.unpack(">BBH", content[at : at + 4])
        if mark != 0xFF or not 0xC0 <= kind < 0xFF or 0xD0 <= kind <= 0xDA or length < 2:
            return None
        if kind in _FRAMES:
            height, width = struct.unpack(">HH", content[at + 5 : at + 9])
            return width, height
        at += 2 + length
    return None

"""Input as it may come from anywhere: JSON of any kind, and damage to what was good."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from lavatar.errors import LavatarError

NUMBERS = (
    st.sampled_from([0, -1, 1, 2**31, 2**63, 10**400, float("nan"), float("inf"), -float("inf"), 1e308, 1e-308])
    | st.integers()
    | st.floats()
)
TEXTS = st.sampled_from(["", ".", "..", "../x", "/etc/passwd", "a/b", "a\0b", "\ud800", "x" * 300, "' OR 1=1 --"]) | (
    st.text(max_size=8)
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@contextlib.contextmanager
def only_our_errors() -> Iterator[None]:
    """What is read is either used or refused by a LavatarError; any other exception passes, and the test fails."""
    with contextlib.suppress(LavatarError):
        yield


@st.composite
def changed(draw: st.DrawFn, good: Any) -> Any:
    """`good` JSON with one of its values, at any depth, replaced or left out."""
    if isinstance(good, dict) and good and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(good)))
        if not draw(st.integers(0, 4)):
            return {k: v for k, v in good.items() if k != key}
        return {**good, key: draw(changed(good[key]))}
    if isinstance(good, (list, tuple)) and good and draw(st.integers(0, 4)):
        at = draw(st.integers(0, len(good) - 1))
        return [*good[:at], draw(changed(good[at])), *good[at + 1 :]]
    return draw(JSON)


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """`good` bytes cut off, or with a few of them overwritten, left out or doubled."""
    content = bytearray(good)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        length = draw(st.sampled_from([1, 2, 4, 8, 64, 512]))
        how = draw(st.sampled_from(["set", "random", "drop", "double", "cut"]))
        if how == "set":
            content[at : at + length] = bytes([draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))]) * length
        elif how == "random":
            content[at : at + length] = draw(st.binary(min_size=1, max_size=length))
        elif how == "drop":
            del content[at : at + length]
        elif how == "double":
            content[at:at] = content[at : at + length]
        else:
            del content[at:]
    return bytes(content)

"""Passwords and tokens out of texts: every error, logged line and remembered address goes through `masked`."""

from __future__ import annotations

import re

HIDDEN = "***"
_NAMED = r"(?:password|passwd|pwd|token|secret|signature|credentials?|api_?key|access_?key|secret_?key)"
_PATTERNS = (
    (re.compile(r"(?<=://)([^\s:/@]*:)\S*@"), rf"\1{HIDDEN}@"),  # user:password@host
    (re.compile(r"(?<=http://)[^\s:/@]+@|(?<=https://)[^\s:/@]+@"), f"{HIDDEN}@"),  # token@host
    (re.compile(rf"(?i)((?:\b|_){_NAMED}=)[^\s&;,]+"), rf"\1{HIDDEN}"),  # ?password=…, of addresses and of libpq
    (re.compile(rf"(?i)([\"']\w*{_NAMED}[\"']\s*:\s*[\"'])[^\"']+"), rf"\1{HIDDEN}"),  # of JSON
    (re.compile(r"(?i)(\bbearer\s+)\S+"), rf"\1{HIDDEN}"),
)


def masked(text: str) -> str:
    """`text` with `***` for what stands in it as the password of an address or as a named secret; else unchanged."""
    for pattern, shown in _PATTERNS:
        text = pattern.sub(shown, text)
    return text


def is_secret(name: str, value: str) -> bool:
    """Whether a variable holds one, by its name or as part of its value."""
    return bool(re.search(rf"(?i){_NAMED}|key_id|pass", name)) or masked(value) != value

"""Values as JSON can hold them, and JSON of others as values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """Not-a-number and infinity become None, numpy scalars and arrays numbers and lists, paths and enums text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def mapping(text: Any) -> dict[str, Any]:
    """The object in a JSON text, or a mapping as it is. Anything else is an empty one: what lies on a server may have
    been changed there."""
    if isinstance(text, Mapping):
        return dict(text)
    try:
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}

"""Figures as they leave this room: ordered, rounded, fit for JSON; flat for curves and tables."""

from __future__ import annotations

import math
from typing import Any

SIGNIFICANT = 6  # digits
ORDER = ("self", "cross", "mean_frame", "nearest_frame")


def in_order(metrics: dict[str, Any]) -> dict[str, Any]:
    """Top-level keys in the order that a reader wants, figures rounded."""
    figures: dict[str, Any] = rounded({name: metrics[name] for name in ORDER if name in metrics})
    return figures


def rounded(value: Any) -> Any:
    """Figures to six significant digits; what is not finite becomes None, so that JSON can hold it."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT}g}") if math.isfinite(value) else None
    return value


def flat(figures: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """{"self": {"psnr": 27.0}} as {"self/psnr": 27.0}; what is no number is left out."""
    result: dict[str, float] = {}
    for key, value in figures.items():
        if isinstance(value, dict):
            result.update(flat(value, f"{prefix}{key}/"))
        elif isinstance(value, (int, float)) and math.isfinite(value):
            result[f"{prefix}{key}"] = float(value)
    return result

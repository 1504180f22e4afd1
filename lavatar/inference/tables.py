"""The figures of metrics.json as tables for people: what stands in which cell, and the tables as text.

No torch here: the command line formats figures that it reads from the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from textwrap import fill
from typing import Any

from lavatar.contracts import EXPRESSIONS

ROWS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("self", ("self",)),
    ("mean frame", ("mean_frame",)),
    ("nearest frame", ("nearest_frame",)),
    ("cross", ("cross",)),
    ("cross against truth", ("cross", "truth")),  # synthetic pairs alone have one
)
DIGITS = {"mse": 5, "psnr": 2, "ssim": 3, "lpips": 3, "flicker": 2, "expression_error": 2}
NONE = "-"
WIDTH = 120  # of the legends, in characters


@dataclass(frozen=True)
class Table:
    """Cells as text, the first column naming the row; `legend` says what the numbers are."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    legend: str


Figures = Mapping[str, Any]


def tables(metrics: Figures) -> list[Table]:
    """The picture, the face, and the expression; rows and tables that have no figures are left out."""
    face = tuple(f"face {name.upper()}" for name in ("psnr", "ssim", "lpips"))
    made = (
        _table(
            metrics, "picture", ("MSE", "PSNR", "SSIM", "LPIPS"),
            lambda row: [spread_cell(row, name) for name in ("mse", "psnr", "ssim", "lpips")],
            "whole portrait: mean ± standard deviation over the frames",
        ),
        _table(
            metrics, "face", (*face, "flicker", "mouth", "eyes", "identity"), _face_cells,
            "flicker: change from frame to frame that the truth does not have, 255ths; mouth, eyes: error of the "
            "landmarks, % of the inter-ocular distance; identity: distance of the face descriptors (true frames among "
            "themselves), one person below 0.6",
        ),
        _table(
            metrics, "expression", (*EXPRESSIONS, "error"), _expression_cells,
            "in each cell correlation, amplitude (1 is right, 0 a frozen face), error (RMS ÷ deviation of the truth); "
            "cross: against the actor, each less its own mean",
        ),
    )  # fmt: skip
    return [table for table in made if table.rows]


def as_text(metrics: Figures) -> str:
    """The tables for a terminal, each with its legend below."""
    parts = [(aligned(table.header, table.rows), fill(f"({table.legend})", WIDTH)) for table in tables(metrics)]
    return "\n\n".join("\n".join(part) for part in parts)


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    )


def spread_cell(figures: Figures, name: str) -> str:
    """'27.48 ± 1.20'; without the spread where it is not known."""
    return with_spread(figures.get(name), (figures.get("spread") or {}).get(name), DIGITS[name])


def with_spread(value: Any, spread: Any, digits: int) -> str:
    """A figure and its deviation, to so many digits after the point."""
    if not isinstance(value, (int, float)):
        return NONE
    return f"{value:.{digits}f}" + (f" ± {spread:.{digits}f}" if isinstance(spread, (int, float)) else "")


def agreement_cell(figures: Any) -> str:
    """'0.91 1.04 0.42': correlation, amplitude and error of one measure."""
    if not isinstance(figures, Mapping) or all(value is None for value in figures.values()):
        return NONE
    values = (figures.get(name) for name in ("r", "amplitude", "error"))
    return " ".join(f"{value:.2f}" if isinstance(value, (int, float)) else NONE for value in values)


def mean_of(expression: Mapping[str, Mapping[str, float | None]], what: str) -> float | None:
    """Mean over the measures that have it; a result that stands still has no r and counts as 0."""
    still = {"r": 0.0}.get(what)
    values = [
        v.get(what) if v.get(what) is not None else still
        for v in expression.values()
        if v.get(what) is not None or (still is not None and v.get("amplitude") is not None)
    ]
    known = [v for v in values if v is not None]
    return mean(known) if known else None


def main_figures(metrics: Figures) -> dict[str, dict[str, float | None]]:
    """The few that tell most, of self and cross reenactment; None where one was not measured."""
    found: dict[str, dict[str, float | None]] = {}
    for name in ("self", "cross"):
        row = metrics.get(name)
        if isinstance(row, Mapping):
            expression = row.get("expression") or {}
            means = {f"expression_{of}": mean_of(expression, of) for of in ("r", "error")}
            found[name] = {figure: row.get(figure) for figure in ("psnr", "ssim", "lpips") if figure in row} | means
    return found


def _face_cells(row: Figures) -> list[str]:
    face, landmarks = row.get("face") or {}, row.get("landmark_error") or {}
    cells = [spread_cell(face, name) for name in ("psnr", "ssim", "lpips")] + [spread_cell(row, "flicker")]
    for name in ("mouth", "eyes"):
        mean, spread = landmarks.get(name), (landmarks.get("spread") or {}).get(name)
        cells.append(with_spread(_percent(mean), _percent(spread), 1))
    return [*cells, identity_cell(row.get("identity") or {})]


def identity_cell(figures: Figures) -> str:
    """'0.31 ± 0.05 (0.28)': distance, its deviation, and that among the true frames."""
    reference = (figures.get("reference") or {}).get("distance")
    text = with_spread(figures.get("distance"), (figures.get("spread") or {}).get("distance"), 2)
    return text + (f" ({reference:.2f})" if text != NONE and isinstance(reference, (int, float)) else "")


def _percent(value: Any) -> float | None:
    return 100 * value if isinstance(value, (int, float)) else None


def _expression_cells(row: Figures) -> list[str]:
    expression = row.get("expression") or {}
    return [agreement_cell(expression.get(name)) for name in EXPRESSIONS] + [spread_cell(row, "expression_error")]


def _table(
    metrics: Figures, title: str, columns: tuple[str, ...], cells: Callable[[Figures], list[str]], legend: str
) -> Table:
    rows = []
    for name, place in ROWS:
        figures: Any = metrics
        for key in place:
            figures = (figures or {}).get(key)
        if isinstance(figures, Mapping):
            texts = cells(figures)
            if any(text != NONE for text in texts):
                rows.append((name, *texts))
    return Table(title, (title, *columns), tuple(rows), legend)

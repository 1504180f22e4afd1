"""The metric of all trials of a sweep, over steps and over time, as an SVG file: no library is needed for lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lavatar.inference.chart import Axis, value_axis
from lavatar.platform import sweeps
from lavatar.platform.sweeps import Sweep
from lavatar.platform.trialtable import copies_text, values_text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 500, 350, 60, 34, 56, 46
"""Of a panel and its margins; there are two beside each other."""
LOOKS = {
    "best": ("#d0461e", "the best"),
    "finished": ("#3c6eb4", "came to its end"),
    "stopped": ("#7d8ea3", "stopped early"),
    "failed": ("#a0522d", "failed"),
    "interrupted": ("#b8860b", "left to take up"),
}
"""Colour and meaning, by what became of a trial."""
LETTER = 11
Line = list[tuple[float, float]]
_End = tuple[float, float, str, str]


def plot(sweep: Sweep, trials: Mapping[str, Any]) -> str:
    """The text of the file. Every trial is a line that ends in a dot with its number; the best one is thick."""
    won = sweeps.best(sweep, trials)
    rows = sorted(trials["trials"].values(), key=lambda row: row is won)  # the best one on top
    panels = [
        _panel(sweep, rows, won, across, title, i * WIDTH)
        for i, (across, title) in enumerate((("step", "steps"), ("training_seconds", "seconds of training")))
    ]
    value = sweeps.figure(sweep, won) if won else None
    best = f": best {value:.4g}, trial {won['number']}" if won and value is not None else ""
    size = f'width="{2 * WIDTH}" height="{HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="{LETTER}">'
    better = "lower" if sweep.mode == "min" else "higher"
    title = f"{sweep.kind.value} of {sweep.avatar}, {sweep.metric} ({better} is better) of {len(rows)} trials{best}"
    white, text = '<rect width="100%" height="100%" fill="white"/>', _text(LEFT, 22, title, 'font-size="13"')
    key = _key([_look(row, won) for row in rows], any(row.get("copies") for row in rows))
    return "\n".join([head, white, text, key, *panels, "</svg>", ""])


def _look(row: Mapping[str, Any], won: Mapping[str, Any] | None) -> str:
    if row is won:
        return "best"
    return row["state"] if row["state"] in LOOKS else "interrupted"


def _key(looks: Sequence[str], copied: bool) -> str:
    """What the colours that occur mean, and a ring where there is one."""
    parts, x = [], float(LEFT)
    for look, (colour, meaning) in LOOKS.items():
        if look in looks:
            parts += [_dot(x + 4, 38, colour, 4), _text(x + 12, 42, meaning)]
            x += 30 + 6 * len(meaning)
    if copied:
        parts += [_ring(x + 4, 38, "#333"), _text(x + 14, 42, "goes on with the weights of another")]
    return "\n".join(parts)


def _panel(
    sweep: Sweep, rows: Sequence[Mapping[str, Any]], won: Mapping[str, Any] | None, across: str, title: str, left: int
) -> str:
    lines = [(row, _pieces(row, rows, across, sweep.metric)) for row in rows]
    points = [point for _, pieces in lines for line in pieces for point in line]
    x_axis = value_axis([0.0, max((x for x, _ in points), default=1.0) or 1.0])
    y_axis = value_axis([y for _, y in points] or [0.0, 1.0])
    box = (left + LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)

    def place(x: float, y: float) -> tuple[float, float]:
        return box[0] + box[2] * x_axis.share(x), box[1] + box[3] * (1 - y_axis.share(y))

    parts = _frame(box, x_axis, y_axis, title)
    ends: list[_End] = []
    for row, pieces in lines:
        colour, placed = LOOKS[_look(row, won)][0], [[place(x, y) for x, y in line] for line in pieces]
        name, thick = f"<title>{escape(_label(row))}</title>", 2.8 if row is won else 1.3
        for piece in placed:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in piece)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{thick}">{name}</polyline>'
            )
        parts += [_ring(*piece[0], colour) for piece in placed[1:]]
        ends += [(x, y, colour, str(row["number"])) for x, y in placed[-1][-1:]]
    return "\n".join([*parts, *_ends(ends)])


def _ends(ends: Sequence[_End]) -> list[str]:
    """A dot for each, and its number where there is room; the last one, the best, comes first."""
    parts, named = [_dot(x, y, colour, 3.5) for x, y, colour, _ in ends], list[tuple[float, float]]()
    for x, y, colour, number in reversed(ends):
        if all(abs(x - other) > 2 * LETTER or abs(y - down) >= LETTER for other, down in named):
            parts.append(_text(x + 6, y + 4, number, f'style="fill:{colour}"'))
            named.append((x, y))
    return parts


def _frame(box: tuple[int, int, int, int], x_axis: Axis, y_axis: Axis, title: str) -> list[str]:
    """The panel without its lines."""
    left, top, width, height = box
    parts = [f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#888"/>']
    for value in y_axis.ticks:
        y = top + height * (1 - y_axis.share(value))
        parts.append(f'<path d="M{left} {y:.1f}h{width}" stroke="#e4e4e4"/>')
        parts.append(_text(left - 5, y + 4, f"{value:.3g}", 'text-anchor="end"'))
    for value in x_axis.ticks:
        x = left + width * x_axis.share(value)
        parts.append(_text(x, top + height + 15, f"{value:,.6g}", 'text-anchor="middle"'))
    return [*parts, _text(left + width / 2, top + height + 36, title, 'text-anchor="middle"')]


def _pieces(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], across: str, metric: str) -> list[Line]:
    """A trial's line; where it took another one's weights it ends, and goes on at the point where that one was."""
    pieces, after = list[Line](), row["reports"]
    for copy in reversed(row.get("copies", ())):
        own = [report for report in after if report["step"] > copy["step"]]
        after = after[: len(after) - len(own)]
        donor = [report for other in rows if other["number"] == copy["trial"] for report in other["reports"]]
        begins = [report for report in donor if report["step"] == copy["step"]]
        pieces.insert(0, _line([*begins, *own], across, metric))
    pieces.insert(0, _line(after, across, metric))
    return [piece for piece in pieces if piece] or [[]]


def _line(reports: Sequence[Mapping[str, Any]], across: str, metric: str) -> Line:
    found = [(float(r[across]), float(r[metric])) for r in reports if r.get(metric) is not None and across in r]
    return [(x, y) for x, y in found if math.isfinite(y)]


def _label(row: Mapping[str, Any]) -> str:
    copies = f"; weights of {copies_text(row['copies'])}" if row.get("copies") else ""
    return f"trial {row['number']} ({row['state']}): {values_text(row['params'])}{copies}"


def _dot(x: float, y: float, colour: str, radius: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>'


def _ring(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="none" stroke="{colour}" stroke-width="1.3"/>'


def _text(x: float, y: float, text: str, how: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="#333" {how}>{escape(text)}</text>'

"""The metric of all trials of a sweep, over steps and over time, as an SVG file: no library is needed for lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lavatar.platform import sweeps
from lavatar.platform.sweeps import Sweep
from lavatar.platform.trialtable import values_text

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 460, 320, 60, 40, 46, 20
COLOURS = {"best": "#d0461e", "finished": "#3c6eb4", "stopped": "#a9b7c9", "failed": "#c9a9a9"}
TICKS = 5
Line = list[tuple[float, float]]


def plot(sweep: Sweep, trials: Mapping[str, Any]) -> str:
    """The text of the file. The best trial is red, those that ended blue, the stopped ones grey."""
    won = sweeps.best(sweep, trials)
    rows = sorted(trials["trials"].values(), key=lambda row: row is won)  # the best one on top
    panels = [
        _panel(sweep, rows, won, across, title, i * (WIDTH + GAP))
        for i, (across, title) in enumerate((("step", "steps"), ("training_seconds", "seconds of training")))
    ]
    best = f": best {sweeps.figure(sweep, won):.4g}, trial {won['number']}" if won else ""
    size = f'width="{2 * WIDTH + GAP}" height="{HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
    title = f"{sweep.kind.value} of {sweep.avatar}, {sweep.metric} ({sweep.mode}) of {len(rows)} trials{best}"
    white, text = '<rect width="100%" height="100%" fill="white"/>', _text(LEFT, 20, title, 'font-size="13"')
    return "\n".join([head, white, text, *panels, "</svg>", ""])


def _panel(
    sweep: Sweep, rows: Sequence[Mapping[str, Any]], won: Mapping[str, Any] | None, across: str, title: str, left: int
) -> str:
    lines = [(row, _line(row, across, sweep.metric)) for row in rows]
    points = [point for _, line in lines for point in line]
    x_ends, y_ends = _ends([x for x, _ in points], zero=True), _ends([y for _, y in points])
    box = (left + LEFT, TOP, WIDTH - LEFT - 10, HEIGHT - TOP - BOTTOM)

    def place(x: float, y: float) -> tuple[float, float]:
        right = box[0] + box[2] * (x - x_ends[0]) / (x_ends[1] - x_ends[0])
        return right, box[1] + box[3] * (1 - (y - y_ends[0]) / (y_ends[1] - y_ends[0]))

    parts = [f'<rect x="{box[0]}" y="{box[1]}" width="{box[2]}" height="{box[3]}" fill="none" stroke="#888"/>']
    for i in range(TICKS):
        share = i / (TICKS - 1)
        x, y = (ends[0] + share * (ends[1] - ends[0]) for ends in (x_ends, y_ends))
        right, down = place(x, y)
        parts.append(_text(right, box[1] + box[3] + 15, f"{x:.3g}", 'text-anchor="middle"'))
        parts.append(_text(box[0] - 5, down + 4, f"{y:.3g}", 'text-anchor="end"'))
    parts.append(_text(box[0] + box[2] / 2, HEIGHT - 10, title, 'text-anchor="middle"'))
    for row, line in lines:
        colour = COLOURS["best"] if row is won else COLOURS.get(row["state"], COLOURS["stopped"])
        placed = [place(x, y) for x, y in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        name = f"<title>{escape(_label(sweep, row))}</title>"
        thick = 2.5 if row is won else 1.2
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{thick}">{name}</polyline>'
        )
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{thick}" fill="{colour}"/>' for x, y in placed[-1:]]
    return "\n".join(parts)


def _line(row: Mapping[str, Any], across: str, metric: str) -> Line:
    return [(float(r[across]), float(r[metric])) for r in row["reports"] if r.get(metric) is not None and across in r]


def _ends(values: Sequence[float], *, zero: bool = False) -> tuple[float, float]:
    """Of an axis; never one point."""
    low, high = (0.0 if zero else min(values, default=0.0)), max(values, default=1.0)
    return (low, high) if high > low else (low, low + 1.0)


def _label(sweep: Sweep, row: Mapping[str, Any]) -> str:
    return f"trial {row['number']} ({row['state']}): {values_text(row['params'])}"


def _text(x: float, y: float, text: str, how: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="#333" {how}>{escape(text)}</text>'

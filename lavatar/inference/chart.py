"""Curves over one axis of steps (or frames) as inline SVG, with the legend as text below."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lavatar.inference.document import Html, joined, tag

POINTS = 300
"""Most points of a curve: more are brought together, as the mean of neighbours."""
COLOURS = 8  # --c0 to --c7 of the pages' style
LOGARITHMIC, DECADES = 20.0, 8
"""From this ratio of the largest to the smallest value on the axis is logarithmic; it shows so many decades at most."""
LEFT, TOP, WIDTH, HEIGHT, BOTTOM, RIGHT = 52, 8, 336, 176, 22, 12  # of the drawing, in its own units

STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); gap: 1.2rem 1.6rem; }
.charts.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 260px), 1fr)); }
@media (min-width: 601px) { .charts.small .chart text { font-size: 16px; } }
.charts > * { min-width: 0; }
.chart svg { display: block; width: 100%; max-width: 640px; height: auto; overflow: visible; }
.chart figcaption { font-size: .95rem; font-weight: 600; color: inherit; }
.chart text { font: 11px system-ui, sans-serif; fill: var(--soft); } .chart .grid { stroke: var(--line); }
.line { fill: none; stroke-width: 1.6; stroke-linejoin: round; stroke: currentColor; }
.line.bold { stroke-width: 3; } .line.d1 { stroke-dasharray: 6 3; } .line.d2 { stroke-dasharray: 2 2.5; }
circle.line { fill: currentColor; stroke: none; }
.k0 { color: var(--c0); } .k1 { color: var(--c1); } .k2 { color: var(--c2); } .k3 { color: var(--c3); }
.k4 { color: var(--c4); } .k5 { color: var(--c5); } .k6 { color: var(--c6); } .k7 { color: var(--c7); }
ul.key { list-style: none; margin: .2rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: .1rem 1rem;
  font-size: .82rem; } ul.key svg { display: inline; width: 26px; height: 8px; margin-right: .35rem; }
"""


@dataclass(frozen=True)
class Curve:
    """Values by step, in order. Not-a-number is a gap."""

    name: str
    points: tuple[tuple[int, float], ...]

    @property
    def last(self) -> float:
        return self.points[-1][1]


def chart(
    title: str,
    curves: Sequence[Curve],
    *,
    bold: str = "",
    last: int = 0,
    look: Mapping[str, int] | None = None,
    across: str = "step",
    ends: bool = True,
) -> Html:
    """All curves on one axis of steps, one axis of values; the curve called `bold` is drawn thicker. The steps end with
    the curves, or at `last`. `look`: the place of a name in the order of colours; else the curves' own order. `across`:
    what a step is called; `ends`: the legend says where each curve ends."""
    shown = [Curve(curve.name, thinned(curve.points)) for curve in curves]
    values = [v for curve in shown for _, v in curve.points if math.isfinite(v)]
    if not values:
        return tag("figure", tag("figcaption", title), tag("p", "No value is finite."), class_="chart")
    axis = value_axis(values)
    last = max(last, 1, *(step for curve in shown for step, _ in curve.points))
    looks = [_look((look or {}).get(curve.name, i), curve.name == bold) for i, curve in enumerate(shown)]
    lines = [_line(curve, axis, last, classes) for curve, classes in zip(shown, looks, strict=True)]
    box = f"0 0 {LEFT + WIDTH + RIGHT} {TOP + HEIGHT + BOTTOM}"
    label = f"{title}: {', '.join(f'{c.name} ends at {c.last:.3g}' if ends else c.name for c in curves)}"
    drawn = tag("svg", _grid(axis, last, across), *lines, viewBox=box, role="img", aria_label=label)
    caption = f"{title} (logarithmic)" if axis.logarithmic else title
    return tag("figure", tag("figcaption", caption), drawn, _key(curves, looks, ends), class_="chart")


def thinned(points: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """At most POINTS of them: neighbours become their mean at their last step."""
    size = math.ceil(len(points) / POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if size > 1 else [[p] for p in points]
    return tuple((group[-1][0], sum(value for _, value in group) / len(group)) for group in groups)


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, marked at `ticks`."""

    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool

    def share(self, value: float) -> float:
        """Where a value lies, 0 at the bottom and 1 at the top; what lies below is at the bottom."""
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log10(max(value, low)), math.log10(low), math.log10(high)
        return min(1.0, max(0.0, (value - low) / (high - low)))


def value_axis(values: Sequence[float]) -> Axis:
    """Whole decades where positive values differ widely, else round numbers about them."""
    low, high = min(values), max(values)
    positive = [v for v in values if v > 0]
    if low >= 0 and positive and high > LOGARITHMIC * min(positive):
        top = math.ceil(math.log10(high))
        bottom = max(math.floor(math.log10(min(positive))), top - DECADES)
        ticks = tuple(10.0**i for i in range(bottom, top + 1))
        return Axis(ticks[0], ticks[-1], ticks, True)
    step = _round_step((high - low) or abs(high) or 1.0)
    first, final = math.floor(low / step), math.ceil(high / step)
    if final <= first:  # a curve that stays where it is lies between two lines
        first, final = (first - 1 if first else 0), first + 1
    ticks = tuple(i * step for i in range(first, final + 1))
    return Axis(ticks[0], ticks[-1], ticks, False)


def _round_step(span: float) -> float:
    """1, 2 or 5 times a power of ten: three to five of it make the span."""
    power = 10.0 ** math.floor(math.log10(span / 3))
    return next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 5)


def _x(step: float, last: int) -> float:
    return LEFT + WIDTH * step / last


def _y(share: float) -> float:
    return TOP + HEIGHT * (1 - share)


def _grid(axis: Axis, last: int, across: str) -> Html:
    """Lines and numbers of both axes."""
    parts = []
    every = math.ceil(len(axis.ticks) / 7)
    for value in axis.ticks[::every]:
        y = _y(axis.share(value))
        parts.append(tag("line", x1=f"{LEFT}", x2=f"{LEFT + WIDTH}", y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"))
        parts.append(tag("text", f"{value:.3g}", x=f"{LEFT - 6}", y=f"{y + 4:.1f}", text_anchor="end"))
    for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        step = round(last * share)
        text = f"{across} {step:,}" if share == 1 else f"{step:,}"
        y = TOP + HEIGHT + 16
        parts.append(tag("text", text, x=f"{_x(last * share, last):.1f}", y=f"{y}", text_anchor=anchor))
    return joined(parts)


def _look(i: int, bold: bool) -> str:
    """The classes of the curve in that place: colours in turn, and another dash with each, for eyes that see few."""
    return f"line k{i % COLOURS} d{i % 3}" + (" bold" if bold else "")


def _line(curve: Curve, axis: Axis, last: int, look: str) -> Html:
    """Unbroken where the values are finite; a point that stands alone is a dot."""
    runs: list[list[str]] = [[]]
    for step, value in curve.points:
        if math.isfinite(value):
            runs[-1].append(f"{_x(step, last):.1f},{_y(axis.share(value)):.1f}")
        elif runs[-1]:
            runs.append([])
    parts = [tag("title", curve.name)]
    for run in filter(None, runs):
        if len(run) > 1:
            parts.append(tag("polyline", points=" ".join(run), class_=look))
        else:
            x, _, y = run[0].partition(",")
            parts.append(tag("circle", cx=x, cy=y, r="2.5", class_=look))
    return tag("g", *parts)


def _key(curves: Sequence[Curve], looks: Sequence[str], ends: bool) -> Html:
    items = []
    for curve, look in zip(curves, looks, strict=True):
        line = tag("line", x1="0", x2="26", y1="4", y2="4", class_=look)
        swatch = tag("svg", line, viewBox="0 0 26 8", aria_hidden="true")
        items.append(tag("li", swatch, f"{curve.name} {curve.last:.3g}" if ends else curve.name))
    return tag("ul", *items, class_="key")

"""The figures of two evaluations beside each other, with the difference and which way is better. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lavatar.contracts import EXPRESSIONS
from lavatar.inference.tables import NONE, ROWS, Figures, mean_of, with_spread

UP, DOWN, ONE = "up", "down", "one"  # what is better: larger, smaller, nearer to one


@dataclass(frozen=True)
class Figure:
    """A figure of a row: where it stands, to how many digits, which way is better, and its unit's factor."""

    name: str
    place: tuple[str, ...]
    digits: int
    better: str
    factor: float = 1.0


MAIN = (
    Figure("PSNR", ("psnr",), 2, UP),
    Figure("SSIM", ("ssim",), 3, UP),
    Figure("LPIPS", ("lpips",), 3, DOWN),
    Figure("face PSNR", ("face", "psnr"), 2, UP),
    Figure("face LPIPS", ("face", "lpips"), 3, DOWN),
    Figure("flicker, 255ths", ("flicker",), 2, DOWN),
    Figure("mouth, %", ("landmark_error", "mouth"), 1, DOWN, 100),
    Figure("eyes, %", ("landmark_error", "eyes"), 1, DOWN, 100),
    Figure("identity", ("identity", "distance"), 2, DOWN),
    Figure("expression error", ("expression_error",), 2, DOWN),
)
MEASURES = tuple(
    Figure(f"{name} {of}", ("expression", name, of), 2, better)
    for name in EXPRESSIONS
    for of, better in (("r", UP), ("amplitude", ONE), ("error", DOWN))
)


@dataclass(frozen=True)
class Compared:
    """A figure of two evaluations; `verdict` is of the second one: better, worse, the same, or nothing."""

    figure: Figure
    first: float | None
    second: float | None
    cells: tuple[str, str]

    @property
    def difference(self) -> float | None:
        return None if self.first is None or self.second is None else self.second - self.first

    @property
    def verdict(self) -> str:
        """By the figures as they are shown."""
        if self.first is None or self.second is None:
            return ""
        first, second = round(self.first, self.figure.digits), round(self.second, self.figure.digits)
        worth = {UP: lambda v: v, DOWN: lambda v: -v, ONE: lambda v: -abs(1 - v)}[self.figure.better]
        gain = round(worth(second) - worth(first), self.figure.digits)
        return "better" if gain > 0 else "worse" if gain < 0 else "the same"


def rows_of(first: Figures, second: Figures) -> Iterator[tuple[str, Figures, Figures]]:
    """The rows of tables.py that either evaluation has."""
    for name, place in ROWS:
        both = [_at(metrics, place) for metrics in (first, second)]
        if any(both):
            yield name, both[0] or {}, both[1] or {}


def compared(first: Figures, second: Figures) -> list[Compared]:
    """A row's main figures, the mean correlation among them, that either has."""
    means = [mean_of(row.get("expression") or {}, "r") for row in (first, second)]
    cells = (with_spread(means[0], None, 2), with_spread(means[1], None, 2))
    mean = Compared(Figure("expression r", (), 2, UP), means[0], means[1], cells)
    return _known([*(_compared(figure, first, second) for figure in MAIN), mean])


def compared_measures(first: Figures, second: Figures) -> list[Compared]:
    """A row's correlation, amplitude and error of each measure that either has."""
    return _known([_compared(figure, first, second) for figure in MEASURES])


def _known(made: list[Compared]) -> list[Compared]:
    return [each for each in made if each.cells != (NONE, NONE)]


def _compared(figure: Figure, first: Figures, second: Figures) -> Compared:
    values = [_number(_at(row, figure.place), figure.factor) for row in (first, second)]
    spreads = [
        _number(_at(row, (*figure.place[:-1], "spread", figure.place[-1])), figure.factor) for row in (first, second)
    ]
    cells = [with_spread(v, s, figure.digits) for v, s in zip(values, spreads, strict=True)]
    return Compared(figure, values[0], values[1], (cells[0], cells[1]))


def _at(figures: Any, place: tuple[str, ...]) -> Any:
    for key in place:
        figures = figures.get(key) if isinstance(figures, Mapping) else None
    return figures


def _number(value: Any, factor: float) -> float | None:
    return value * factor if isinstance(value, (int, float)) else None

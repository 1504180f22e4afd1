"""The result of `lavatar bench` as a table, its machine in a line, and the check against a baseline."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavatar.errors import UNREADABLE, DataError, UsageError

if TYPE_CHECKING:
    from lavatar.platform.speed.measure import Row, Session

WORSE = 0.2
"""Share by which a ratio may fall short of the baseline's."""
COLUMNS = ("row", "what", "median", "reference", "ratio", "spread", "peak memory", "of peak")


def machine(session: Session) -> str:
    """What the seconds depend on: processor or GPU, cores, threads, torch, and its product of matrices."""
    import torch

    from lavatar.platform.machine import describe

    about = describe()
    if session.device.type == "cuda":
        name = f"{torch.cuda.get_device_name(session.device)}, {about['cores']} cores"
    else:
        name = f"{about['processor']}, {about['cores']} cores, {torch.get_num_threads()} threads"
    load = f"{os.getloadavg()[0]:.1f}"
    speed = f"{session.peak / 1e9:,.0f} GFLOP/s in a product of matrices"
    return f"{name}, {about['memory']}, torch {torch.__version__}, {speed}, load {load}"


def as_markdown(machine: str, rows: Iterable[Row]) -> str:
    """The table of docs/BENCHMARKS.md."""
    lines = [machine, "", f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    for row in rows:
        cells = (
            row.row, row.what, _seconds(row.median_s), _seconds(row.reference_s), _number(row.ratio, ".2f"),
            _number(row.spread, ".0%"), _number(row.peak_mb, ",.0f", " MB"), _number(row.of_peak, ".0%"),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def shapes(session: Session) -> str:
    """What a baseline is of: ratios at other shapes, or on a GPU, are others."""
    return f"{session.device.type}, {'full' if session.full else 'half'} shapes"


def baseline(session: Session, machine: str, rows: Iterable[Row]) -> str:
    """The text of a baseline's file: the ratio of every row that has one."""
    ratios = {row.row: round(row.ratio, 3) for row in rows if row.ratio is not None}
    return json.dumps({"of": shapes(session), "machine": machine, "ratios": ratios}, indent=1) + "\n"


def read_baseline(path: Path | None, session: Session) -> Mapping[str, float]:
    """The ratios in `path`, else those that come with lavatar. Raises UsageError for other shapes, DataError for a
    file that is none."""
    where = path or Path(str(resources.files("lavatar.configs") / "speed.json"))
    try:
        data: Any = json.loads(where.read_text())
        of, ratios = data["of"], {str(row): float(value) for row, value in data["ratios"].items()}
    except OSError as error:
        raise UsageError(f"{where} cannot be read: {error.strerror}", "Name a file that --save wrote.") from None
    except UNREADABLE as error:
        message = f"{where} is no baseline ({type(error).__name__}: {error})"
        raise DataError(message, "Write one with --save FILE.") from None
    if of != shapes(session):
        raise UsageError(
            f"the baseline {where} is of {of}, this is {shapes(session)}", "Give another one: --baseline FILE."
        )
    return ratios


def compare(rows: Sequence[Row], ratios: Mapping[str, float]) -> list[str]:
    """A line for each row whose ratio is worse than the baseline's by more than WORSE, or that has none any more."""
    lines = []
    for row in rows:
        wanted = ratios.get(row.row)
        if wanted is None:
            continue
        if row.ratio is None:
            lines.append(f"{row.row}: no ratio, the baseline has {wanted:.2f}")
        elif row.ratio < (1 - WORSE) * wanted:
            lines.append(f"{row.row}: ratio {row.ratio:.2f}, the baseline has {wanted:.2f}")
    return lines

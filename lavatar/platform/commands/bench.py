"""lavatar bench: how fast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lavatar.errors import SlowerError, UsageError, WeightsError
from lavatar.platform.commands.options import json_option
from lavatar.platform.output import answer, answer_json, reserved
from lavatar.platform.speed.rows import ROWS

if TYPE_CHECKING:
    from lavatar.contracts import EventSink
    from lavatar.platform.speed.measure import Row, Session

LINES = "\n".join(f"    {name:<13} {text}" for name, (_, text) in ROWS.items())


@click.command(help=f"""Measure how fast this machine does it, beside a plain reference.

This code and the plain reference (eager fp32) run in turn in one process; the ratio says how many times faster this
code is. How good methods are is another question: lavatar benchmark. Rows, all if none is named:

\b
{LINES}

Without a GPU the models are measured at half their sides, so that all rows take minutes; what was measured stands in
each row. Nothing is read from or written to LAVATAR_HOME.
""")  # fmt: skip
@click.argument("rows", nargs=-1, metavar="[ROW]...")
@click.option("--full", is_flag=True, help="Full shapes on a CPU too: a quarter of an hour and more.")
@click.option("--seconds", default=30.0, show_default=True, help="Time for the runs of a row, beyond the first three.")
@click.option("--check", is_flag=True, help="Fail where a ratio is worse than the baseline by 20 %.")
@click.option("--baseline", type=click.Path(path_type=Path), metavar="FILE", help="Another one than lavatar's own.")
@click.option("--save", type=click.Path(path_type=Path), metavar="FILE", help="Write the ratios as a baseline.")
@json_option
def bench(
    rows: tuple[str, ...],
    full: bool,
    seconds: float,
    check: bool,
    baseline: Path | None,
    save: Path | None,
    as_json: bool,
) -> None:
    import tempfile

    unknown = [name for name in rows if name not in ROWS]
    if unknown:
        raise UsageError(f"there is no row {unknown[0]!r}", f"The rows are: {', '.join(ROWS)}.")
    with reserved(), tempfile.TemporaryDirectory(prefix="lavatar-bench-") as folder:
        from lavatar.platform.progress import DisplaySink, open_display
        from lavatar.platform.speed import table

        display = open_display()
        try:
            session = _session(Path(folder), full, seconds, DisplaySink(display))
            ratios = table.read_baseline(baseline, session) if check or baseline else {}
            about = table.machine(session)
            found = [row for name in rows or ROWS for row in _measured(session, name)]
        finally:
            display.close()
        if save is not None:
            save.write_text(table.baseline(session, about, found))
        if as_json:
            answer_json({"machine": about, "rows": [row.to_json() for row in found]})
        else:
            answer(table.as_markdown(about, found))
        worse = table.compare(found, ratios)
    if worse:
        error = SlowerError("; ".join(worse), "Run it again on a quiet machine; if it stays, look for the change.")
        error.answered = True  # type: ignore[attr-defined]  # the rows stand on standard output already
        raise error


def _session(folder: Path, full: bool, seconds: float, events: EventSink) -> Session:
    import torch

    from lavatar.inference.loading import best_device
    from lavatar.platform.speed.material import Material
    from lavatar.platform.speed.measure import Session

    device = torch.device(best_device())
    return Session(Material(folder, events), device, full or device.type == "cuda", seconds, events)


def _measured(session: Session, name: str) -> list[Row]:
    """The rows of one name; without figures where pretrained weights are missing."""
    import importlib

    from lavatar.platform.output import note
    from lavatar.platform.speed.measure import Row

    module, _, function = ROWS[name][0].partition(":")
    session.say(name, "begins")
    try:
        found: list[Row] = getattr(importlib.import_module(module), function)(session)
    except WeightsError as error:
        note(f"{name} is not measured: {error.message}. {error.hint}")
        return [Row(name, "not measured: pretrained weights are missing")]
    return found

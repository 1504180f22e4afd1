"""lavatar gc: free what no job refers to."""

from __future__ import annotations

import click

from lavatar.platform.commands.options import json_option
from lavatar.platform.home import Home, size_text
from lavatar.platform.output import answer, answer_json, note, reserved, table


@click.command()
@click.option("--dry-run", is_flag=True, help="Print what would be freed, and free nothing.")
@json_option
def gc(dry_run: bool, as_json: bool) -> int:
    """Free what no job refers to.

    Datasets, models, logs and MLflow runs of jobs that were deleted (lavatar jobs delete JOB), MLflow runs of sweeps
    that were (lavatar sweep delete SWEEP), stored videos of people who were removed and of whom no job is left, and
    temporary files of processes that died. Registered models stay, and so does what a living process uses, what
    evaluations wrote, what the benchmarks in the home show, sweeps with their trials, and what reproductions kept to
    be looked into (HOME/reproductions; remove it yourself).
    """
    from lavatar.contracts import Event
    from lavatar.platform.garbage import freed, garbage
    from lavatar.platform.progress import open_display
    from lavatar.platform.registry import open_registry

    home = Home.from_environment()
    registry = open_registry(home)
    with reserved():
        items = garbage(home, registry, note)
        gone = items
        if not dry_run:
            display, gone = open_display(), []
            for number, item in enumerate(items, 1):
                if freed(item, lambda text: display.message(text, "warning")):
                    gone.append(item)
                display.progress("freeing", Event("freeing", done=number, total=len(items), unit="things"))
            display.close()
        total = sum(item.bytes for item in gone)
        left = len(items) - len(gone)
        if as_json:
            shown = [item.to_json() for item in gone]
            answer_json({"dry_run": dry_run, "freed" if not dry_run else "items": shown, "bytes": total, "left": left})
        elif gone:
            answer(table([(item.what, size_text(item.bytes), item.where) for item in gone], ("WHAT", "SIZE", "WHERE")))
            answer(f"{size_text(total)} {'can be' if dry_run else 'were'} freed ({_count(len(gone))})")
        elif not items:
            answer("nothing to free: every file belongs to a job")
    return 1 if left else 0


def _count(number: int) -> str:
    return "1 thing" if number == 1 else f"{number} things"

"""lavatar doctor: check this machine and the home."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lavatar.errors import UsageError
from lavatar.platform.commands.options import json_option
from lavatar.platform.home import Home
from lavatar.platform.output import answer, answer_json, reserved

if TYPE_CHECKING:
    from lavatar.platform.findings import Outcome

_MARKS = {"ok": ("ok     ", "green"), "warning": ("warning", "yellow"), "error": ("error  ", "red")}


@click.command()
@click.option("--ray", is_flag=True, help="Start and stop a local Ray cluster as well (half a minute).")
@click.option("--repair", is_flag=True, help="Mend what a crash or a bad disk left in the home, and say what was done.")
@click.option(
    "--adopt", is_flag=True, help="With --repair: other homes of this registry are lost, it is this one's now."
)
@json_option
def doctor(ray: bool, repair: bool, adopt: bool, as_json: bool) -> int:
    """Check this machine and the home; mend what a crash left.

    In the home it looks for stages and jobs whose process died, MLflow runs that nobody ends, values that were never
    sent to them, half-written datasets, temporary files, what trials of a sweep left, and files that do not have their
    checksum, each of which is read. What a living process uses is left alone.

    Exit code 1 if something that every job needs is wrong, or something in the home is left to mend.
    """
    from lavatar.platform.doctor import examine

    if adopt and not repair:
        raise UsageError("--adopt goes with --repair", "Give both, or neither.")
    home = Home.from_environment()
    with reserved():
        checks = examine(home, ray=ray)
        if not as_json:
            for check in checks:
                mark, colour = _MARKS[check.state]
                answer(f"{check.name}: {check.text}", mark, colour)
                if check.hint:
                    answer(f"        {check.hint}")
        usable = not any(check.state == "error" and check.name in ("home", "registry") for check in checks)
        outcomes = _inspect(home, repair, adopt, as_json) if usable else []
        failed = any(check.state == "error" for check in checks) or any(not found.mended for found in outcomes)
        if as_json:
            findings = [found.to_json() for found in outcomes]
            answer_json({"ok": not failed, "checks": [vars(check) for check in checks], "findings": findings})
        elif outcomes and not repair:
            answer("mend what was found with: lavatar doctor --repair")
        elif usable and not outcomes:
            answer("the home: nothing to mend", *_MARKS["ok"])
    return 1 if failed else 0


def _inspect(home: Home, repair: bool, adopt: bool, as_json: bool) -> list[Outcome]:
    """What is wrong in the home, shown as it is found."""
    from lavatar.platform.progress import DisplaySink, open_display
    from lavatar.platform.repair import inspect

    display, outcomes = open_display(), []
    try:
        for found in inspect(home, DisplaySink(display), repair=repair, adopt=adopt):
            outcomes.append(found)
            if not as_json:
                _show(found)
    finally:
        display.close()
    return outcomes


def _show(found: Outcome) -> None:
    mark, colour = ("mended ", "green") if found.mended else ("found  ", "red")
    answer(found.finding.what, mark, colour)
    answer(f"        {found.finding.where}")
    answer(f"        {found.finding.mending}" + (f"; not mended: {found.reason}" if found.reason else ""))

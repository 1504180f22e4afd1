"""lavatar doctor: check this machine."""

from __future__ import annotations

import click

from lavatar.platform.commands.options import json_option
from lavatar.platform.home import Home
from lavatar.platform.output import answer, answer_json, reserved

_MARKS = {"ok": ("ok     ", "green"), "warning": ("warning", "yellow"), "error": ("error  ", "red")}


@click.command()
@click.option("--ray", is_flag=True, help="Start and stop a local Ray cluster as well (half a minute).")
@json_option
def doctor(ray: bool, as_json: bool) -> int:
    """Check this machine.

    Exit code 1 if something that every job needs is wrong.
    """
    from lavatar.platform.doctor import examine

    with reserved():
        checks = examine(Home.from_environment(), ray=ray)
        failed = any(check.state == "error" for check in checks)
        if as_json:
            answer_json({"ok": not failed, "checks": [vars(check) for check in checks]})
        else:
            for check in checks:
                mark, colour = _MARKS[check.state]
                answer(f"{click.style(mark, fg=colour)} {check.name}: {check.text}")
                if check.hint:
                    answer(f"        {check.hint}")
    return 1 if failed else 0

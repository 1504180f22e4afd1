"""lavatar reproduce: do a finished job or stage again and compare."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lavatar.platform.commands.options import json_option
from lavatar.platform.home import Home, working_in
from lavatar.platform.output import answer, answer_json, reserved

if TYPE_CHECKING:
    from lavatar.platform.progress import Display
    from lavatar.platform.registry import Registry
    from lavatar.platform.reproduction import Comparison, Original


@click.command()
@click.argument("run")
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Of a figure, as a part of it: on a CPU results are the same to the bit, on a GPU they are not.",
)
@json_option
def reproduce(run: str, tolerance: float, as_json: bool) -> int:
    """Do a finished job or stage again and compare the figures.

    RUN is a job's id, JOB/STAGE such as 3c5a/avatar:anna, or an MLflow run's id; of ids a beginning is enough. What is
    different today of code, packages, machine and environment is said first. Nothing of the job is touched: it is done
    again in HOME/reproductions, which stays only where something differs. The exit code is 1 where figures differ.
    """
    from lavatar.platform.commands.runs import differences_text
    from lavatar.platform.progress import open_display
    from lavatar.platform.recorded import find
    from lavatar.platform.registry import open_registry
    from lavatar.platform.reproduction import original, require_inputs

    home = Home.from_environment()
    registry = open_registry(home)
    found = original(home, registry, find(home, registry, run))
    with reserved(), working_in(home):
        display = open_display()
        try:
            if found.elsewhere:
                for line in differences_text(found.elsewhere, "then", "now").splitlines():
                    display.message(line)
            else:
                display.message("code, packages, machine and environment are those of then")
            require_inputs(home, found)
            results, kept = _again(home, registry, found, display, tolerance)
        finally:
            display.close()
        same = not any(result.differ for result in results)
        if as_json:
            answer_json(
                {
                    "run": found.named.run_id,
                    "reproduces": found.named.title,
                    "same": same,
                    "elsewhere": found.elsewhere,
                    "stages": [result.to_json() for result in results],
                    "folder": kept,
                }
            )
        else:
            answer("\n".join(_lines(results)))
            if kept:
                answer(f"what was made is in {kept}")
    return 0 if same else 1


def _again(
    home: Home, registry: Registry, found: Original, display: Display, tolerance: float
) -> tuple[list[Comparison], str | None]:
    """What came of it, and the folder where it is kept for something differs."""
    from lavatar.cluster.stages import StageRunner
    from lavatar.platform.reproduction import Again, keep, scratch, without_store
    from lavatar.platform.signals import terminate_as_interrupt
    from lavatar.platform.tracking import Tracker

    def warn(text: str) -> None:
        display.message(text, "warning")

    resources = found.plan.recipe.resources
    with terminate_as_interrupt(), scratch(home, found) as place, without_store():
        again = Again(home, place, registry, display, Tracker(home, warn))
        with StageRunner(place.root, None, resources.backend, dashboard=resources.dashboard) as runner:
            results = list(again.run(found, runner, tolerance))
        differs = any(result.differ or result.files_differ for result in results)
        return results, str(keep(place)) if differs else None


def _lines(results: list[Comparison]) -> list[str]:
    lines: list[str] = []
    for result in results:
        same = result.figures - len(result.differ)
        files = f"{result.files - len(result.files_differ)} of {result.files} files to the byte"
        lines.append(f"{result.stage}: {same} of {result.figures} figures are the same, {files}")
        lines += [f"  {name}: {_pair(values)}" for name, values in result.differ.items()]
        lines += [f"  {name}: other bytes" for name in result.files_differ]
    return lines


def _pair(values: list[Any]) -> str:
    return f"{values[0]} then, {values[1]} now"

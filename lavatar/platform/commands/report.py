"""lavatar report, lavatar compare: jobs as pages to look at."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from lavatar.errors import UsageError
from lavatar.platform.commands.options import json_option
from lavatar.platform.home import Home, size_text, working_in
from lavatar.platform.output import answer, answer_json, note, reserved

_output = click.option(
    "-o", "--output", "out", type=click.Path(path_type=Path), help="The HTML file; default: outputs/report in the home."
)
_pairs = click.option(
    "--pairs", default=6, show_default=True, type=click.IntRange(1), help="Pairs shown with video, curves and pictures."
)


@click.command()
@click.argument("job")
@_output
@_pairs
@json_option
def report(job: str, out: Path | None, pairs: int, as_json: bool) -> None:
    """Write a job's page: videos, figures, curves, pictures, cost, troubles.

    One HTML file that needs no network. JOB may be the beginning of its id; a job that runs or failed has a page too.
    """
    from lavatar.platform.jobfacts import gather
    from lavatar.platform.jobpage import job_answer, job_page
    from lavatar.platform.registry import open_registry

    home = Home.from_environment()
    registry = open_registry(home)
    with reserved(), working_in(home):
        facts = gather(registry, home, job, pairs)
        text, room = job_page(facts)
        _finish(_path(home, out, facts.job.id), text, job_answer(facts, room), as_json)


@click.command()
@click.argument("first")
@click.argument("second")
@_output
@_pairs
@json_option
def compare(first: str, second: str, out: Path | None, pairs: int, as_json: bool) -> None:
    """Write two jobs' page: one beside the other.

    Videos side by side, figures with their difference, curves in one chart, and in what the recipes differ. FIRST and
    SECOND may be the beginnings of the jobs' ids.
    """
    from lavatar.platform.comparison import comparison_answer, comparison_page
    from lavatar.platform.jobfacts import gather
    from lavatar.platform.registry import open_registry

    home = Home.from_environment()
    registry = open_registry(home)
    with reserved(), working_in(home):
        one, other = (gather(registry, home, job, pairs) for job in (first, second))
        if one.job.id == other.job.id:
            raise UsageError(f"{first!r} and {second!r} are the same job {one.job.id}", "Name two: lavatar jobs list")
        text, room = comparison_page(one, other)
        path = _path(home, out, f"{one.job.id}-{other.job.id}")
        _finish(path, text, comparison_answer(one, other, room), as_json)


def _path(home: Home, out: Path | None, name: str) -> Path:
    """Where the page goes. Raises UsageError for a folder."""
    path = (out or home.report_path(name)).absolute()
    if path.is_dir():
        raise UsageError(f"the output {path} is a folder", f"Name the file: -o {path / f'{name}.html'}")
    return path


def _finish(path: Path, text: str, result: dict[str, Any], as_json: bool) -> None:
    """Write the page by rename, and answer."""
    from lavatar.training.files import storage_errors

    data = text.encode("utf-8", "replace")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            part.write_bytes(data)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    if as_json:
        answer_json({"page": str(path), "bytes": len(data), **result})
        return
    for each in result["notes"]:
        note(f"note: {each}")
    answer(f"{path} ({size_text(len(data))})")

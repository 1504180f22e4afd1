"""lavatar runs: what MLflow remembers of jobs and stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from lavatar.platform.commands.options import json_option
from lavatar.platform.home import Home
from lavatar.platform.output import answer, answer_json, table


@click.group()
def runs() -> None:
    """What was recorded of runs: diff."""


@runs.command()
@click.argument("run1")
@click.argument("run2")
@json_option
def diff(run1: str, run2: str, as_json: bool) -> None:
    """What differs between two runs: recipe, seeds, code, packages, machine, environment, data, figures.

    A run is a job's id, JOB/STAGE such as 3c5a/avatar:anna, or an MLflow run's id; of ids a beginning is enough.
    What is the same in both is not listed. Times are not compared.
    """
    from lavatar.platform.recorded import compare, find, recorded
    from lavatar.platform.registry import open_registry

    home = Home.from_environment()
    registry = open_registry(home)
    first, second = (recorded(home, registry, find(home, registry, text)) for text in (run1, run2))
    found = compare(first, second)
    if as_json:
        named = [{"name": each.title, "run": each.run_id} for each in (first, second)]
        answer_json({"runs": named, "differs": found})
        return
    answer(differences_text(found, first.title, second.title))


def differences_text(found: Mapping[str, Mapping[str, list[Any]]], first: str, second: str) -> str:
    """For people: a table of each thing that differs."""
    if not found:
        return f"{first} and {second}: nothing of what was recorded differs"
    rows = []
    for what, differing in found.items():
        rows += [(what, name, *(_short(value) for value in values)) for name, values in differing.items()]
    return table(rows, ("", "", first, second))


def _short(value: Any) -> str:
    text = "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

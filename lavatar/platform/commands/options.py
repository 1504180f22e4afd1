"""Options that several commands take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def json_option(function: F) -> F:
    """--json: one JSON object on standard output and nothing else there."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")(function)


def choice_options(function: F) -> F:
    """--version and --job: which of the models of an avatar or a pair (choosing.py)."""
    version = "A version of the registered model: its number, or an alias such as latest (default: champion)."
    job = "The model that this job trained, registered or not; the beginning of its id is enough."
    function = click.option("--job", metavar="JOB", help=job)(function)
    return click.option("--version", metavar="N|ALIAS", help=version)(function)


def recipe_options(default: str | None) -> Callable[[F], F]:
    """--recipe and --set."""

    def decorate(function: F) -> F:
        text = "tiny (two CPU cores, minutes), paper, official or fast"
        function = click.option(
            "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Change one number of the recipe."
        )(function)
        return click.option("--recipe", default=default, show_default=default is not None, help=text)(function)

    return decorate

"""lavatar weights: the pretrained files."""

from __future__ import annotations

import sys

import click

from lavatar.errors import LavatarError, UsageError
from lavatar.platform.commands.options import json_option
from lavatar.platform.home import size_text
from lavatar.platform.output import answer, answer_json, note, reserved, table


@click.group()
def weights() -> None:
    """The pretrained files: list, fetch."""


@weights.command(name="list")
@json_option
def list_(as_json: bool) -> None:
    """Which files there are, whether they are here, and their licences."""
    from lavatar.datasets.weights import status

    rows = status()
    if as_json:
        answer_json({"weights": rows})
        return
    cells = [(r["name"], r["state"], _size(r["bytes"]), r["licence"], r["path"] or r["url"]) for r in rows]
    answer(table(cells, ("NAME", "STATE", "SIZE", "LICENCE", "WHERE")))
    missing = [r["name"] for r in rows if r["state"] != "present"]
    if missing:
        note(f"get what is missing with: lavatar weights fetch {' '.join(missing)}")


def _size(count: int | None) -> str:
    return size_text(count) if count else "size unknown"


@weights.command()
@click.argument("names", nargs=-1)
@json_option
def fetch(names: tuple[str, ...], as_json: bool) -> None:
    """Download NAMES (default: all) from their official addresses and check them."""
    from lavatar.datasets.weights import WEIGHTS
    from lavatar.datasets.weights import fetch as fetch_one

    unknown = [name for name in names if name not in WEIGHTS]
    if unknown:
        raise UsageError(f"there are no weights called {', '.join(unknown)}", f"The names are: {', '.join(WEIGHTS)}.")

    shown = {"tenth": -1}

    def progress(name: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{name}: {size_text(done)} of {_size(total)} ", end="", file=sys.stderr, flush=True)
        elif total and done * 10 // total != shown["tenth"]:
            shown["tenth"] = done * 10 // total
            note(f"{name}: {size_text(done)} of {size_text(total)}")

    found, failed = {}, []
    with reserved():
        for name in names or tuple(WEIGHTS):
            try:
                found[name] = str(fetch_one(name, progress))
                note(f"{name}: {found[name]}")
            except LavatarError as error:
                failed.append(error)
                note(f"{name}: {error.message}")
        if as_json:
            answer_json({"weights": found, "failed": [error.message for error in failed]})
        if failed:
            failed[0].answered = True  # type: ignore[attr-defined]
            raise failed[0]

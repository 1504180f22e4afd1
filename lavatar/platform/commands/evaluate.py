"""lavatar evaluate: measure a finished avatar or pair again."""

from __future__ import annotations

import click

from lavatar.platform.commands.options import json_option
from lavatar.platform.home import Home
from lavatar.platform.output import answer, answer_json, reserved


@click.command()
@click.option("--avatar", required=True, metavar="NAME", help="Self reenactment of its held-out frames.")
@click.option("--actor", metavar="NAME", help="Also cross reenactment of this actor's held-out frames.")
@json_option
def evaluate(avatar: str, actor: str | None, as_json: bool) -> None:
    """Measure a finished avatar or pair again, on the frames held out of training.

    Beside the results stand the mean and the nearest training frame. Expressions are reported as correlation (r) and
    amplitude (result ÷ truth).
    """
    from lavatar.inference.tables import as_text
    from lavatar.platform.finished import find_avatar, find_pair
    from lavatar.platform.progress import DisplaySink, open_display
    from lavatar.platform.registry import open_registry

    home = Home.from_environment()
    registry = open_registry(home)
    found = find_avatar(registry, home, avatar) if actor is None else find_pair(registry, home, avatar, actor)
    with reserved():
        from lavatar.inference.evaluate import evaluate as measure
        from lavatar.inference.loading import best_device, load_avatar, load_pair

        display = open_display()
        try:
            metrics, notes = measure(
                load_avatar(found.avatar, device := best_device()),
                found.avatar_data,
                found.recipe,
                load_pair(found.pair, device) if found.pair else None,
                found.actor_data,
                events=DisplaySink(display),
            )
        finally:
            display.close()
        if as_json:
            answer_json({"job": found.job, "avatar": avatar, "actor": actor, "metrics": metrics, "notes": notes})
        else:
            answer(
                "\n".join([f"models of job {found.job}", "", as_text(metrics), *(f"note: {note}" for note in notes)])
            )

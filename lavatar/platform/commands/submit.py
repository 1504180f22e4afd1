"""lavatar submit: make an avatar drivable by an actor."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lavatar.errors import UsageError
from lavatar.platform.commands.foreground import hand_over, run_plan, warm_texts
from lavatar.platform.commands.options import json_option, recipe_options
from lavatar.platform.home import Home, size_text
from lavatar.platform.output import answer, answer_json, note, table

if TYPE_CHECKING:
    from lavatar.platform.planning import Plan
    from lavatar.platform.registry import Registry

STARTS = ("pair_learning.warm", "pair_learning.warm_steps")
"""Keys of a recipe that say how a pair begins."""


@click.command()
@click.option("--avatar", "avatars", multiple=True, metavar="NAME|VIDEO", help="Who is animated; several: one by one.")
@click.option("--actor", "actors", multiple=True, metavar="NAME|VIDEO", help="Who drives; several drive every avatar.")
@click.option(
    "--pairs", "file", type=click.Path(path_type=Path), metavar="FILE.yaml", help="Pairs: [{avatar: A, actor: B}, …]."
)
@click.option("--shared", is_flag=True, help="One network for all avatars and actors, not one for each pair.")
@recipe_options(default="tiny")
@click.option("--cold", is_flag=True, help="Do not begin at another pair of the avatar (pair_learning.warm=false).")
@click.option(
    "--promote",
    type=click.Choice(["always", "better", "never"]),
    help="When a new version becomes the champion of its model (evaluation.promote).  [default: better]",
)
@click.option("--detach", is_flag=True, help="Hand the job to the cluster that is up (lavatar cluster up) and return.")
@click.option("--priority", type=int, help="Its stages start before those of jobs of a lower one.  [default: 0]")
@click.option("--dry-run", is_flag=True, help="Print the stages, which are done already and what they need.")
@json_option
def submit(
    avatars: tuple[str, ...],
    actors: tuple[str, ...],
    file: Path | None,
    shared: bool,
    recipe: str,
    overrides: tuple[str, ...],
    cold: bool,
    promote: str | None,
    detach: bool,
    priority: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make an avatar drivable by an actor, or many by many.

    Every avatar is driven by every actor but itself; --pairs names chosen pairs. What several pairs need is made once,
    and one that fails stops no other.
    Runs in the foreground, but for --detach. Ctrl-C stops it and keeps what is done; the same command goes on from
    there.
    A path to a video is taken in place of a name, and adds the person under the file's name.
    """
    from lavatar.configs.recipe import load_recipe
    from lavatar.platform.planned import make_plan
    from lavatar.platform.registry import open_registry
    from lavatar.platform.subjects import add_subject, resolve

    named = named_pairs(avatars, actors, file, shared)
    if shared:
        require_no_start(cold, overrides)
    flags = (*(["pair_learning.warm=false"] if cold else []), *([f"evaluation.promote={promote}"] if promote else []))
    chosen = load_recipe(recipe, (*overrides, *flags))
    home = Home.from_environment()
    registry = open_registry(home)
    found = {name: resolve(registry, name) for name in dict.fromkeys(chain.from_iterable(named))}
    plan = make_plan(home, registry, [(found[a], found[b]) for a, b in named], chosen, shared)
    if dry_run:
        _show_plan(home, registry, plan, as_json)
        return
    people = [add_subject(registry, subject)[0] for subject in found.values()]
    bring = hand_over if detach else run_plan
    bring(home, registry, plan, people, as_json, priority)


def require_no_start(cold: bool, overrides: Sequence[str]) -> None:
    """Raises UsageError where somebody says how a shared network begins. What a recipe says by itself is for pairs."""
    said = ["--cold"] if cold else []
    said += [f"--set {text}" for text in overrides if text.partition("=")[0].strip() in STARTS]
    if said:
        way_out = f"A shared network always begins anew: leave {said[0][:200]} out."
        raise UsageError(f"{said[0][:200]} with --shared has no effect", way_out)


def named_pairs(
    avatars: Sequence[str], actors: Sequence[str], file: Path | None, shared: bool
) -> list[tuple[str, str]]:
    """(avatar, actor) as the command line names them. Raises UsageError."""
    if file is not None:
        if avatars or actors or shared:
            raise UsageError(
                "--pairs goes with none of --avatar, --actor and --shared", "Name the pairs in one of the two ways."
            )
        return read_pairs(file)
    if not avatars or not actors:
        missing = "--actor" if avatars else "--avatar"
        raise UsageError(f"{missing} is missing", "Name an avatar and an actor, or a file of pairs: --pairs FILE.yaml.")
    every = [(avatar, actor) for avatar in avatars for actor in actors]
    return [pair for pair in every if pair[0] != pair[1]] or every[:1]


def read_pairs(file: Path) -> list[tuple[str, str]]:
    """The pairs that a YAML file lists. Raises UsageError, naming the entry that is wrong."""
    from lavatar.configs.yamltext import MOST_CHARACTERS, read_yaml

    way_out = "Write a list: - {avatar: ada, actor: bruna}"
    try:
        with file.open() as stream:
            entries = read_yaml(stream.read(MOST_CHARACTERS + 1))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}", way_out) from None
    except ValueError as error:
        raise UsageError(f"{file} is no YAML: {error}", way_out) from None
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{file} is no list of pairs", way_out)
    for number, entry in enumerate(entries, 1):
        names = entry.values() if isinstance(entry, dict) and set(entry) == {"avatar", "actor"} else ()
        if not names or not all(isinstance(name, str) and name for name in names):
            raise UsageError(f"{file}: entry {number} is no pair: {reprlib.repr(entry)}", way_out)
    return [(entry["avatar"], entry["actor"]) for entry in entries]


def _show_plan(home: Home, registry: Registry, plan: Plan, as_json: bool) -> None:
    """The dry run."""
    from lavatar.platform.ledger import finished
    from lavatar.platform.planning import space_needed, weights_present
    from lavatar.platform.report import resources_text

    done = finished(registry, home, [stage.key for stage in plan.stages])
    place = {stage.key: number for number, stage in enumerate(plan.stages)}
    present = cache(weights_present)
    stages: list[dict[str, Any]] = []
    for stage in plan.stages:
        names = (*stage.weights, *stage.optional_weights)
        missing = [name for name in names if not present(name)]
        stages.append(
            {
                "name": stage.name,
                "key": stage.key,
                "cached": stage.key in done,
                "needs": [plan.stages[number].name for number in sorted(place[key] for key in stage.needs)],
                "resources": stage.resources.model_dump(mode="json"),
                "weights": list(names),
                "missing_weights": missing,
            }
        )
    warm = {f"{p.avatar.name}<-{p.actor.name}": p.warm.name if p.warm else None for p in plan.pairs}
    space = space_needed([s for s in plan.stages if s.key not in done], plan.people)
    if as_json:
        answer_json(
            {
                "job": plan.job_id,
                "recipe": plan.recipe.name,
                "dry_run": True,
                "warm": next(iter(warm.values())) if len(plan.pairs) == 1 else warm,
                "disk_bytes": space,
                "stages": stages,
            }
        )
        return
    rows = []
    for row in stages:
        needs = resources_text(row["resources"])
        weights = ", ".join(n + (" (missing)" if n in row["missing_weights"] else "") for n in row["weights"])
        rows.append((row["name"], row["key"][:12], "done" if row["cached"] else "to do", needs, weights or "-"))
    answer(table(rows, ("STAGE", "KEY", "STATE", "RESOURCES", "WEIGHTS")))
    for text in warm_texts(plan):
        answer(text)
    answer(f"disk: about {size_text(space)}; free: {size_text(home.free_bytes())}")
    missing = sorted({name for row in stages for name in row["missing_weights"]})
    if missing:
        note(f"get the missing weights with: lavatar weights fetch {' '.join(missing)}")

"""lavatar sweep: search for better settings."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lavatar.errors import DataError, JobError, LavatarError, UsageError
from lavatar.platform.commands.options import json_option, recipe_options
from lavatar.platform.home import Home, working_in
from lavatar.platform.output import answer, answer_json, note, reserved, table, when

if TYPE_CHECKING:
    from lavatar.platform.registry import Registry
    from lavatar.platform.sweeps import Sweep
    from lavatar.platform.tables import Subject

SCHEDULERS, SEARCHES = ("asha", "pbt", "median", "none"), ("random", "grid", "optuna")
"""As in lavatar.configs.sweep (a test compares): importing that takes half a second."""


@click.group(invoke_without_command=True)
@click.option("--avatar", metavar="NAME|VIDEO", help="The trials train this avatar.")
@click.option("--actor", metavar="NAME|VIDEO", help="They train the pair with this actor instead, on one avatar.")
@click.option("--space", metavar="FILE.yaml", help="What may vary; or a ready one: loss_weights, size_speed.")
@click.option("--trials", type=click.IntRange(1, 10_000), help="How many; a grid has as many as it has.")
@click.option(
    "--scheduler",
    type=click.Choice(SCHEDULERS),
    default="asha",
    show_default=True,
    help="Bad trials: stopped early (asha, median) or continued from a good one (pbt).",
)
@click.option(
    "--search", type=click.Choice(SEARCHES), default="random", show_default=True, help="How values are chosen."
)
@click.option("--metric", help="A figure of the evaluation.  [default: lpips; of a pair expression_error]")
@click.option("--mode", type=click.Choice(["min", "max"]), help="Which is better.  [default: by the metric]")
@click.option("--steps", type=click.IntRange(1), help="Length of a trial.  [default: the recipe's]")
@click.option("--every", type=click.IntRange(1), help="Steps between two measurements.  [default: a tenth]")
@click.option("--concurrent", type=click.IntRange(1), help="Trials at once, at most.  [default: as many as fit]")
@recipe_options(default="tiny")
@json_option
@click.pass_context
def sweep(context: click.Context, **options: Any) -> None:
    """Search for better settings, and train with the best.

    Trials of the avatar's training, or with --actor of the pair's, are compared on held-out frames while they train.
    The same command goes on where it was stopped. The best one is trained in full by `lavatar sweep promote`.
    """
    if context.invoked_subcommand is None:
        _sweep(**options)


def _sweep(
    avatar: str | None, actor: str | None, space: str | None, recipe: str, overrides: tuple[str, ...], **options: Any
) -> None:
    from lavatar.platform.planned import person
    from lavatar.platform.registry import open_registry
    from lavatar.platform.subjects import add_subject, resolve

    if avatar is None or space is None:
        missing = "--avatar" if avatar is None else "--space"
        raise UsageError(
            f"{missing} is missing", "lavatar sweep --avatar NAME --space loss_weights --trials 20; see --help."
        )
    home = Home.from_environment()
    registry = open_registry(home)
    subjects = [resolve(registry, name) for name in (avatar, actor) if name is not None]
    defined = _define([person(each) for each in subjects], space, recipe, overrides, options)
    subjects = [add_subject(registry, each)[0] for each in subjects]
    _run(home, registry, defined, subjects, options["concurrent"], options["as_json"])


def _define(
    people: list[Any], space: str, recipe: str, overrides: tuple[str, ...], options: Mapping[str, Any]
) -> Sweep:
    """The sweep that a command line says. Raises UsageError, ConfigError."""
    from lavatar.configs.recipe import load_recipe, with_values
    from lavatar.configs.space import load_space
    from lavatar.configs.sweep import checked_metric, require_search, trial_points
    from lavatar.platform.planning import SECTIONS
    from lavatar.platform.preparing import kind_of
    from lavatar.platform.sweeps import Sweep, digests_of, interval_of, length_of

    avatar, actor = people[0], people[1] if len(people) > 1 else None
    kind, chosen = kind_of(actor), load_recipe(recipe, overrides)
    require_search(options["search"])
    found = load_space(space, chosen, kind, SECTIONS[kind])
    points = trial_points(found, options["search"], options["trials"], options["scheduler"])
    for point in points:
        with_values(chosen, point)
    synthetic = all(each.synthetic for each in people)
    metric, mode = checked_metric(options["metric"], options["mode"], kind, synthetic)
    length = length_of(chosen, kind, options["steps"])
    return Sweep(
        avatar=avatar.name,
        actor=actor.name if actor else None,
        digests=digests_of(avatar, actor),
        recipe=recipe,
        overrides=overrides,
        space=found.to_json(),
        points=tuple(points),
        trials=len(points) or options["trials"],
        scheduler=options["scheduler"],
        search=options["search"],
        metric=metric,
        mode=mode,
        length=length,
        every=interval_of(length, options["every"]),
    )


def _run(
    home: Home, registry: Registry, defined: Sweep, subjects: list[Subject], concurrent: int | None, as_json: bool
) -> None:
    """Run it to its end and answer with its results."""
    from lavatar.platform import sweeps
    from lavatar.platform.planned import person
    from lavatar.platform.progress import QuietDisplay, open_display
    from lavatar.platform.subjects import require_unchanged
    from lavatar.platform.sweeping import run_sweep
    from lavatar.platform.sweepreport import result_of

    for each in subjects:
        require_unchanged(each)
    avatar, actor = person(subjects[0]), person(subjects[1]) if len(subjects) > 1 else None
    display = QuietDisplay() if as_json else open_display()
    with reserved(), working_in(home.ensure()):
        try:
            folder = run_sweep(home, registry, defined, avatar, actor, display, concurrent or 0)
        except LavatarError as error:
            folder = sweeps.folder_of(home, defined.id)
            if as_json and (folder / sweeps.DEFINITION).exists():
                answer_json({**result_of(folder), "error": {"message": error.message, "hint": error.hint}})
                error.answered = True  # type: ignore[attr-defined]
            raise
        finally:
            display.close()
        _answer(folder, as_json)


@sweep.command()
@click.argument("name", metavar="SWEEP")
@click.option("--concurrent", type=click.IntRange(1), help="Trials at once, at most.  [default: as many as fit]")
@json_option
def resume(name: str, concurrent: int | None, as_json: bool) -> None:
    """Take a sweep up where it stopped; trials that failed are tried again. SWEEP may be the beginning of its id."""
    from lavatar.platform.registry import open_registry

    home = Home.from_environment()
    registry = open_registry(home)
    _, defined, subjects = _still(home, registry, name)
    _run(home, registry, defined, subjects, concurrent, as_json)


def _still(home: Home, registry: Registry, name: str) -> tuple[Path, Sweep, list[Subject]]:
    """A sweep, and its subjects. Raises JobError where today it would be another one."""
    from lavatar.platform import sweeps
    from lavatar.platform.subjects import get_subject

    folder = sweeps.find(home, name)
    defined = sweeps.read(folder)
    subjects = [get_subject(registry, each) for each in (defined.avatar, defined.actor) if each]
    if tuple(each.digest for each in subjects) != defined.digests:
        raise JobError(f"a subject of sweep {folder.name} is another video now", "Sweep again with the new one.")
    if defined.id != folder.name:
        raise JobError(f"sweep {folder.name} was made by another lavatar: today it is another", "Sweep again.")
    return folder, defined, subjects


@sweep.command()
@click.argument("name", metavar="SWEEP")
@json_option
def cancel(name: str, as_json: bool) -> None:
    """Stop a sweep, wherever it runs. What is measured is kept, and `lavatar sweep resume` goes on from there.

    Cancelling a sweep that is finished or failed changes nothing. SWEEP may be the beginning of its id.
    """
    from lavatar.errors import UnknownJobError
    from lavatar.platform import sweeps
    from lavatar.platform.ledger import cancel_job
    from lavatar.platform.registry import open_registry
    from lavatar.platform.sweepreport import state_now

    home = Home.from_environment()
    folder = sweeps.find(home, name)
    state = state_now(folder)
    if state in ("running", "interrupted"):
        sweeps.ask_to_stop(folder)
        with contextlib.suppress(UnknownJobError):  # it has not begun with what its trials need
            cancel_job(open_registry(home), folder.name)
        state = state_now(folder)
    if as_json:
        answer_json({"sweep": folder.name, "state": state, "cancel_asked": state == "running"})
    elif state == "running":
        answer(f"sweep {folder.name} was asked to stop; see: lavatar sweep show {folder.name}")
    else:
        answer(f"sweep {folder.name} is {state}")


@sweep.command()
@click.argument("name", metavar="SWEEP")
@json_option
def delete(name: str, as_json: bool) -> None:
    """Remove a sweep that does not run: its trials, their states, its plot and log. A promoted job stays.

    `lavatar gc` frees its MLflow runs, and datasets that were made for it alone. SWEEP may be the beginning of its id.
    """
    from lavatar.platform import sweeps
    from lavatar.platform.deletion import delete_sweep
    from lavatar.platform.registry import open_registry

    home = Home.from_environment()
    folder = sweeps.find(home, name)
    left = delete_sweep(home, open_registry(home), folder)
    if as_json:
        answer_json({"deleted": folder.name, "stages_no_job_needs": left})
        return
    answer(f"deleted sweep {folder.name}")
    note("its MLflow runs are freed by lavatar gc" + (f", and {len(left)} stages that no job needs" if left else ""))


@sweep.command(name="list")
@json_option
def list_(as_json: bool) -> None:
    """All sweeps, newest first."""
    from lavatar.platform import sweeps
    from lavatar.platform.sweepreport import result_of

    rows = []
    for folder in sweeps.folders(Home.from_environment()):
        try:
            rows.append(result_of(folder))
        except DataError as error:
            note(f"sweep {folder.name} is left out: {error.message}; {error.hint}")
    if as_json:
        answer_json({"sweeps": [{k: v for k, v in row.items() if k not in ("trials", "space")} for row in rows]})
    elif rows:
        cells = [
            (r["sweep"], r["avatar"], r["actor"] or "-", r["state"], f"{r['ended']}/{r['wanted']}", when(r["created"]),
             f"{r['metric']} {r['best']['value']:.4g}" if r["best"] else "-")
            for r in rows
        ]  # fmt: skip
        answer(table(cells, ("SWEEP", "AVATAR", "ACTOR", "STATE", "TRIALS", "BEGUN", "BEST")))
    else:
        note("no sweeps yet: lavatar sweep --avatar A --space loss_weights --trials 20")


@sweep.command()
@click.argument("name", metavar="SWEEP")
@json_option
def show(name: str, as_json: bool) -> None:
    """One sweep: its trials, best first. SWEEP may be the beginning of its id."""
    from lavatar.platform import sweeps

    _answer(sweeps.find(Home.from_environment(), name), as_json)


@sweep.command()
@click.argument("name", metavar="SWEEP")
@click.option("--actor", metavar="NAME|VIDEO", help="Who drives the avatar: needed where the avatar was swept.")
@click.option("--detach", is_flag=True, help="On the cluster that is up, as submit --detach.")
@json_option
def promote(name: str, actor: str | None, detach: bool, as_json: bool) -> None:
    """Train the winner of a sweep at the recipe's full length: submits a job, which registers its models."""
    from lavatar.configs.recipe import with_values
    from lavatar.contracts import StageKind
    from lavatar.platform import sweeps
    from lavatar.platform.commands.foreground import hand_over, run_plan
    from lavatar.platform.planned import make_plan
    from lavatar.platform.registry import open_registry
    from lavatar.platform.states import State
    from lavatar.platform.subjects import add_subject, resolve

    home = Home.from_environment()
    registry = open_registry(home)
    folder, defined, subjects = _still(home, registry, name)
    driver = actor or defined.actor
    if driver is None:
        raise UsageError(f"sweep {folder.name} is of an avatar, and a job needs an actor", "Say --actor NAME.")
    won = sweeps.best(defined, sweeps.read_trials(folder))
    if won is None:
        raise JobError(
            f"sweep {folder.name} has no winner: no trial was measured", f"lavatar sweep resume {folder.name}"
        )
    state = sweeps.state_of(folder, defined, sweeps.read_trials(folder))
    if state != State.FINISHED:
        note(f"sweep {folder.name} is {state}: its best trial so far is taken")
    recipe = sweeps.winner_recipe(defined, won)
    if defined.kind is StageKind.PAIR:  # as its trials began
        recipe = with_values(recipe, {"pair_learning.warm": False})
    pair = (subjects[0], resolve(registry, driver))
    plan = make_plan(home, registry, [pair], recipe, shared=False)
    people = [add_subject(registry, each)[0] for each in pair]
    note(f"trial {won['number']} of sweep {folder.name} becomes job {plan.job_id}")
    bring = hand_over if detach else run_plan
    bring(home, registry, plan, people, as_json)


def _answer(folder: Path, as_json: bool) -> None:
    from lavatar.platform.sweepreport import result_of, result_text

    answer_json(result_of(folder)) if as_json else answer(result_text(folder))

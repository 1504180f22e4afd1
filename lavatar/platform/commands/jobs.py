"""lavatar jobs: what was submitted, and what is to become of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from lavatar.errors import UsageError
from lavatar.platform.commands.options import json_option
from lavatar.platform.commands.renewal import renew
from lavatar.platform.home import Home
from lavatar.platform.output import answer, answer_json, note, table, when
from lavatar.platform.titles import actor_or_none

if TYPE_CHECKING:
    from lavatar.platform.registry import Registry

FOLLOW_SECONDS = 1.0
STRANDED_SECONDS = 10.0
"""How often who follows a job looks whether the cluster that it was handed to will still begin with it."""


@click.group()
def jobs() -> None:
    """What was submitted: list, show, logs, cancel, resume, retry, delete."""


@jobs.command(name="list")
@json_option
def list_(as_json: bool) -> None:
    """All jobs, newest first."""
    from lavatar.platform.ledger import release_dead
    from lavatar.platform.lookup import list_jobs
    from lavatar.platform.registry import open_registry

    registry = open_registry(Home.from_environment())
    release_dead(registry)
    rows = list_jobs(registry)
    if as_json:
        fields = ("id", "avatar", "state", "created", "ended", "seconds", "message", "priority")
        told = [
            {**{f: getattr(j, f) for f in fields}, "actor": actor_or_none(j.actor), "recipe": j.recipe_name}
            for j in rows
        ]
        answer_json({"jobs": told})
    elif rows:
        cells = [(j.id, j.avatar, j.actor, j.recipe_name, j.state, when(j.created), j.message) for j in rows]
        answer(table(cells, ("JOB", "AVATAR", "ACTOR", "RECIPE", "STATE", "SUBMITTED", "")))
    else:
        note("no jobs yet: lavatar submit --avatar A --actor B")


@jobs.command()
@click.argument("job")
@json_option
def show(job: str, as_json: bool) -> None:
    """One job: its stages, files, models and metrics. JOB may be the beginning of its id."""
    from lavatar.platform.ledger import release_dead
    from lavatar.platform.lookup import get_job, job_stages
    from lavatar.platform.registry import open_registry
    from lavatar.platform.report import report, report_text

    home = Home.from_environment()
    registry = open_registry(home)
    release_dead(registry)
    row = get_job(registry, job)
    result = report(registry, home, row.id)
    if as_json:
        answer_json(result)
        return
    answer(report_text(result))
    for view in job_stages(registry, row.id):
        stage = view.stage
        if stage.state == "running" and stage.total:
            answer(f"  {view.name} is at {stage.done}/{stage.total} {stage.unit} (process {stage.owner_pid})")
        elif stage.message:
            answer(f"  {view.name}: {stage.message}")
    if row.message:
        answer(f"  {row.message}" + (f"\n  {row.hint}" if row.hint else ""))


@jobs.command()
@click.argument("job")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job ends.")
@json_option
def logs(job: str, follow: bool, as_json: bool) -> None:
    """What happened in a job, in order."""
    from lavatar.platform.ledger import release_dead
    from lavatar.platform.lookup import events, get_job
    from lavatar.platform.registry import open_registry
    from lavatar.platform.states import State

    if follow and as_json:
        raise UsageError("--follow and --json do not go together", "Leave one of them out.")
    home = Home.from_environment()
    registry = open_registry(home)
    row = get_job(registry, job)
    if as_json:
        fields = ("time", "stage", "level", "text")
        found = events(registry, row.id)
        answer_json({"job": row.id, "events": [{f: getattr(e, f) for f in fields} for e in found]})
        return
    last, going, looked = 0, True, time.monotonic()
    while going:
        release_dead(registry)
        going = follow and get_job(registry, row.id).state in (State.RUNNING, State.PENDING)
        for event in events(registry, row.id, after=last):
            where = f"{event.stage}: " if event.stage else ""
            level = "" if event.level == "info" else f"{event.level}: "
            answer(f"{when(event.time)} {where}{level}{event.text}")
            last = event.id
        if going and time.monotonic() - looked > STRANDED_SECONDS:
            looked = time.monotonic()
            _require_begun(home, registry, row.id)
        if going:
            time.sleep(FOLLOW_SECONDS)


def _require_begun(home: Home, registry: Registry, job_id: str) -> None:
    """Raises JobError for a job that was handed to a cluster that will never begin with it."""
    from lavatar.errors import JobError
    from lavatar.platform.detached import stranded
    from lavatar.platform.ledger import strand_job

    try:
        reason = stranded(home, registry, job_id)
    except JobError:  # it does not answer: it may still begin
        return
    if reason:
        strand_job(registry, job_id, reason)
        raise JobError(f"job {job_id} was never begun: {reason}", f"Take it up: lavatar jobs resume {job_id}")


@jobs.command()
@click.argument("job")
@json_option
def cancel(job: str, as_json: bool) -> None:
    """Stop a job, wherever it runs. What is done is kept, training stores a checkpoint first.

    Cancelling a job that is cancelled or finished changes nothing.
    """
    from lavatar.platform.ledger import cancel_job
    from lavatar.platform.lookup import get_job
    from lavatar.platform.registry import open_registry
    from lavatar.platform.states import State

    registry = open_registry(Home.from_environment())
    row = get_job(registry, job)
    state = cancel_job(registry, row.id)
    if as_json:
        answer_json({"job": row.id, "state": state.value, "cancel_asked": state is State.RUNNING})
    elif state is State.RUNNING:
        answer(f"job {row.id} was asked to stop; see: lavatar jobs show {row.id}")
    else:
        answer(f"job {row.id} is {state.value}")


_detach = click.option("--detach", is_flag=True, help="On the cluster that is up, as submit --detach.")


@jobs.command()
@click.argument("job")
@_detach
@json_option
def resume(job: str, detach: bool, as_json: bool) -> None:
    """Take a job up where it stopped, with the recipe it was submitted with. Runs in the foreground, as submit does.

    Resuming a job that runs or is finished changes nothing.
    """
    _take_up(job, as_json, detach=detach)


@jobs.command()
@click.argument("job", required=False)
@click.option("--stale", is_flag=True, help="No JOB: all pairs whose avatar has another champion now.")
@_detach
@json_option
def retry(job: str | None, stale: bool, detach: bool, as_json: bool) -> None:
    """Try what failed in a job again; what it finished is kept. The same as resume for a job that was stopped.

    With --stale new jobs train the pairs anew of which no version was trained with today's champion of their avatar
    (lavatar models list): with the recipe that a pair's newest version was made with, and the champion's for what the
    avatar depends on. A pair for which that does not give the champion again is left out, with the reason; a job that
    fails stops no other.
    """
    if stale == (job is not None):
        raise UsageError(
            "--stale and JOB do not go together" if job else "JOB is missing",
            "Name a job to try again, or write --stale alone for the pairs whose avatar was retrained.",
        )
    if job is not None:
        _take_up(job, as_json, detach=detach)
    else:
        renew(as_json, detach=detach)


@jobs.command()
@click.argument("job")
@json_option
def delete(job: str, as_json: bool) -> None:
    """Forget a job that does not run, and its log. Files stay until `lavatar gc` frees what no other job needs."""
    from lavatar.platform.deletion import delete_job
    from lavatar.platform.lookup import get_job
    from lavatar.platform.registry import open_registry

    registry = open_registry(Home.from_environment())
    row = get_job(registry, job)
    left = delete_job(registry, row.id)
    if as_json:
        answer_json({"deleted": row.id, "stages_no_job_needs": left})
        return
    answer(f"deleted {row!r}")
    if left:
        note(f"{len(left)} of its stages are needed by no other job: lavatar gc --dry-run")


@jobs.command(hidden=True)
@click.argument("job")
def run(job: str) -> None:
    """What a cluster runs of a detached job: the same as resume, unless the job was cancelled meanwhile."""
    _take_up(job, False, but_cancelled=True)


def _take_up(job: str, as_json: bool, *, detach: bool = False, but_cancelled: bool = False) -> None:
    from lavatar.platform.commands.foreground import hand_over, run_plan
    from lavatar.platform.ledger import release_dead
    from lavatar.platform.lookup import get_job
    from lavatar.platform.planned import stored_plan
    from lavatar.platform.registry import open_registry
    from lavatar.platform.report import report, report_text
    from lavatar.platform.states import State

    home = Home.from_environment()
    registry = open_registry(home)
    release_dead(registry)
    row = get_job(registry, job)
    if row.state == State.RUNNING:
        result = report(registry, home, row.id)
        answer_json(result) if as_json else answer(f"job {row.id} is running already (process {row.owner_pid})")
        return
    if row.state == State.FINISHED:
        result = report(registry, home, row.id)
        answer_json(result) if as_json else answer(report_text(result))
        return
    if row.state == State.CANCELLED and but_cancelled:
        answer(f"job {row.id} was cancelled")
        return
    plan, people = stored_plan(home, registry, row)
    if detach:
        hand_over(home, registry, plan, people, as_json)
    else:
        run_plan(home, registry, plan, people, as_json, but_cancelled=but_cancelled)

"""A job handed to a cluster that is up: it outlives the command (Ray's Jobs API), and runs `lavatar jobs run` there."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from lavatar.cluster import head
from lavatar.cluster.environment import hand_over
from lavatar.cluster.resources import Machine, Node, share_of
from lavatar.errors import ConfigError, UsageError
from lavatar.platform import ledger, lookup
from lavatar.platform.home import HOME_VARIABLE, Home
from lavatar.platform.planning import Plan
from lavatar.platform.provenance import COMMAND_VARIABLE, command_line
from lavatar.platform.registry import Registry
from lavatar.platform.states import State
from lavatar.platform.storejob import store_job

HANDED = "handed to the cluster"
"""How the event begins that says so."""


def detach(
    home: Home, registry: Registry, plan: Plan, warn: Callable[[str], None], priority: int | None = None
) -> tuple[head.Head, str | None]:
    """Hand the job over. The cluster, and what Ray calls the job: its id, with a number from the second time on; None
    where it is running or has nothing left to do. Raises what keeps a job from being written down, UsageError without
    a cluster."""
    cluster = head.current(home.root)
    if cluster is None:
        raise UsageError(
            "no cluster is up that could run the job", "Start one: lavatar cluster up; or leave --detach out."
        )
    if plan.recipe.resources.backend == "inline":
        raise ConfigError("resources.backend=inline runs in this process", "Leave --detach or that setting out.")
    living = [node for node in head.nodes(home.root, cluster) if node["alive"]]
    _require_room(plan, Machine(tuple(Node.of(node["resources"]) for node in living)))
    todo = store_job(registry, home, plan, warn, priority)
    state = lookup.get_job(registry, plan.job_id).state
    if state == State.RUNNING or (state == State.FINISHED and not todo):
        return cluster, None
    if state == State.PENDING and (going := _going(home, cluster, plan.job_id)):
        return cluster, going
    ledger.reopen_job(registry, plan.job_id)
    command = shlex.join([sys.executable, "-m", "lavatar.platform.cli", "jobs", "run", plan.job_id])
    passed = {
        **hand_over(home.root, plan.job_id),
        HOME_VARIABLE: str(Path(home.root).absolute()),
        COMMAND_VARIABLE: command_line(),
        "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # the driver hands its variables on to the stages
    }
    name = head.submit(home.root, cluster, plan.job_id, command, passed)
    ledger.record(registry, plan.job_id, f"{HANDED} at {cluster.address} as {name}")
    return cluster, name


def _going(home: Home, cluster: head.Head, job_id: str) -> str | None:
    """What Ray calls the job, where it was handed over and Ray still begins or runs it."""
    return next((one.name for one in head.submissions(home.root, cluster, job_id) if one.going), None)


def waiting(home: Home, registry: Registry) -> list[str]:
    """Ids of jobs that were handed to the cluster that is up, which has not begun with them. Raises JobError."""
    cluster = head.current(home.root)
    pending = [job.id for job in lookup.list_jobs(registry) if job.state == State.PENDING]
    return [job_id for job_id in pending if cluster and _going(home, cluster, job_id)]


def stranded(home: Home, registry: Registry, job_id: str) -> str | None:
    """Why a job that was handed to a cluster will never begin; None where it may, or has. Raises JobError where the
    cluster does not answer."""
    if lookup.get_job(registry, job_id).state != State.PENDING:
        return None
    if not any(event.text.startswith(HANDED) for event in lookup.events(registry, job_id)):
        return None
    cluster = head.current(home.root)
    found = head.submissions(home.root, cluster, job_id) if cluster else []
    if any(one.going for one in found) or lookup.get_job(registry, job_id).state != State.PENDING:
        return None
    if not found:
        return "the cluster that it was handed to is gone"
    newest = found[-1]
    return f"Ray says of {newest.name}: {newest.status}{f' ({newest.message[:200]})' if newest.message else ''}"


def _require_room(plan: Plan, machine: Machine) -> None:
    """Raises PlacementError for stages that the cluster could never run."""
    for stage in {stage.spec.kind: stage for stage in plan.stages}.values():
        share_of(stage.resources, machine, stage.spec.kind.value)

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
from lavatar.platform.jobs import store_job
from lavatar.platform.planning import Plan
from lavatar.platform.registry import Registry
from lavatar.platform.states import State


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
    ledger.reopen_job(registry, plan.job_id)
    command = shlex.join([sys.executable, "-m", "lavatar.platform.cli", "jobs", "run", plan.job_id])
    passed = {
        **hand_over(home.root, plan.job_id),
        HOME_VARIABLE: str(Path(home.root).absolute()),
        "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # the driver hands its variables on to the stages
    }
    name = head.submit(home.root, cluster, plan.job_id, command, passed)
    ledger.record(registry, plan.job_id, f"handed to the cluster at {cluster.address} as {name}")
    return cluster, name


def _require_room(plan: Plan, machine: Machine) -> None:
    """Raises PlacementError for stages that the cluster could never run."""
    for stage in {stage.spec.kind: stage for stage in plan.stages}.values():
        share_of(stage.resources, machine, stage.spec.kind.value)

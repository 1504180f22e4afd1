"""lavatar cluster: a Ray cluster that outlives its commands."""

from __future__ import annotations

from typing import Any

import click

from lavatar.platform.commands.options import json_option
from lavatar.platform.home import Home
from lavatar.platform.output import answer, answer_json, note, reserved, table

_LOOPBACK = "127.0.0.1"


@click.group()
def cluster() -> None:
    """A Ray cluster that outlives its commands: up, join, status, down.

    While one is up, jobs of this home run on it, and can be detached: lavatar submit --detach.
    """


@cluster.command()
@click.option("--host", default=_LOOPBACK, show_default=True, help="Address to listen on; others let machines join.")
@click.option("--cpus", type=click.IntRange(1), help="That jobs may use of this machine; default: all.")
@click.option("--gpus", type=click.IntRange(0), help="Likewise; default: all that Ray finds.")
@click.option("--dashboard-port", default=8265, show_default=True, help="The next free one if it is taken.")
@json_option
def up(host: str, cpus: int | None, gpus: int | None, dashboard_port: int, as_json: bool) -> None:
    """Start the head on this machine. Where it is up already, nothing changes."""
    from lavatar.cluster.head import up as start

    home = Home.from_environment().ensure()
    if host != _LOOPBACK:
        note(
            f"warning: Ray and its dashboard listen on {host}: whoever reaches it and has the token can run any code "
            "as you. Keep it inside a network that you trust."
        )
    note("starting Ray …")
    with reserved():
        head, started = start(home.root, host=host, cpus=cpus, gpus=gpus, dashboard_port=dashboard_port)
    _tell(home, head, as_json, started=started)


@cluster.command()
@click.argument("address")
@click.option("--cpus", type=click.IntRange(1), help="That jobs may use of this machine; default: all.")
@click.option("--gpus", type=click.IntRange(0), help="Likewise; default: all that Ray finds.")
@json_option
def join(address: str, cpus: int | None, gpus: int | None, as_json: bool) -> None:
    """Make this machine a node of the cluster at ADDRESS. Its token: RAY_AUTH_TOKEN_PATH=FILE."""
    from lavatar.cluster.head import join as start

    home = Home.from_environment().ensure()
    note("starting Ray …")
    with reserved():
        start(home.root, address, cpus=cpus, gpus=gpus)
    answer_json({"joined": address}) if as_json else answer(f"this machine is a node of {address}")


@cluster.command()
@json_option
def status(as_json: bool) -> None:
    """Whether a cluster is up, its addresses, and what its nodes have."""
    from lavatar.cluster.head import current

    home = Home.from_environment()
    head = current(home.root)
    if head is not None:
        _tell(home, head, as_json)
    elif as_json:
        answer_json({"up": False})
    else:
        answer("no cluster is up: lavatar cluster up")


@cluster.command()
@click.option("--force", is_flag=True, help="Also while jobs run on it: they are interrupted.")
@json_option
def down(force: bool, as_json: bool) -> None:
    """End the head or node that was started here, and nothing else. Where none is, nothing changes."""
    from lavatar.cluster.head import current
    from lavatar.cluster.head import down as stop
    from lavatar.errors import JobError
    from lavatar.platform.ledger import list_jobs, release_dead
    from lavatar.platform.registry import open_registry
    from lavatar.platform.states import State

    home = Home.from_environment()
    if current(home.root) and not force:
        registry = open_registry(home)
        release_dead(registry)
        running = [job.id for job in list_jobs(registry) if job.state == State.RUNNING]
        if running:
            raise JobError(
                f"jobs are running: {', '.join(running)}",
                f"Cancel them first (lavatar jobs cancel {running[0]}), or add --force: what is done is kept.",
            )
    ended = stop(home.root)
    if as_json:
        answer_json({"up": False, "processes_ended": ended})
    else:
        answer("the cluster is down" if ended else "no cluster was up")


def _tell(home: Home, head: Any, as_json: bool, **more: bool) -> None:
    from lavatar.cluster.head import nodes, token_file

    found = nodes(home.root, head)
    token = str(token_file(home.root))
    if as_json:
        addresses = {"address": head.address, "dashboard": head.dashboard, "token_file": token}
        answer_json({"up": True, **more, **addresses, "nodes": found})
        return
    answer(f"Ray: {head.address}\ndashboard: {head.dashboard} (it asks for the token in {token})")
    rows = []
    for node in found:
        has = node["resources"]
        state = "alive" if node["alive"] else "dead"
        gigabytes = f"{has.get('memory', 0) / 2**30:.1f} GiB"
        rows.append((node["address"], state, f"{has.get('CPU', 0):g}", f"{has.get('GPU', 0):g}", gigabytes))
    answer(table(rows, ("NODE", "STATE", "CPUS", "GPUS", "MEMORY")))

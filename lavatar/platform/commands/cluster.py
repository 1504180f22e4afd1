"""lavatar cluster: a Ray cluster that outlives its commands, and the files that start one elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from lavatar.cluster.deployment import KINDS
from lavatar.errors import JobError, UsageError
from lavatar.platform.commands.options import json_option
from lavatar.platform.home import Home
from lavatar.platform.output import answer, answer_json, note, reserved, table

_LOOPBACK = "127.0.0.1"
_CPUS = click.option("--cpus", type=click.IntRange(1), help="That jobs may use of this machine; default: all.")
_GPUS = click.option("--gpus", type=click.IntRange(0), help="Likewise; default: all that Ray finds.")
_BLOCK = click.option("--block", is_flag=True, help="Stay until Ctrl-C or SIGTERM, then take it down (SLURM, systemd).")


@click.group()
def cluster() -> None:
    """A Ray cluster that outlives its commands: up, join, status, down, files.

    While one is up, jobs of this home run on it, and can be detached: lavatar submit --detach. docs/CLUSTER.md leads
    from nothing to three machines.
    """


@cluster.command()
@click.option("--host", default=_LOOPBACK, show_default=True, help="Address of this machine; others let machines join.")
@_CPUS
@_GPUS
@click.option("--dashboard-port", default=8265, show_default=True, help="The next free one if it is taken.")
@_BLOCK
@json_option
def up(host: str, cpus: int | None, gpus: int | None, dashboard_port: int, block: bool, as_json: bool) -> None:
    """Start the head on this machine. Where it is up already, nothing changes."""
    from lavatar.cluster.head import up as start

    home = Home.from_environment().ensure()
    with _held(home, block):
        note("starting Ray …")
        with reserved():
            head, started = start(home.root, host=host, cpus=cpus, gpus=gpus, dashboard_port=dashboard_port)
        if block and not started:
            raise UsageError(
                f"a cluster is up already, at {head.dashboard}", "Leave --block out: it is not this one's."
            )
        _tell(home, head, as_json, started=started)


@cluster.command()
@click.argument("address", required=False)
@click.option("--host", help="Address of this machine that the others reach; default: the one towards the head.")
@_CPUS
@_GPUS
@_BLOCK
@json_option
def join(address: str | None, host: str | None, cpus: int | None, gpus: int | None, block: bool, as_json: bool) -> None:
    """Make this machine a node of the cluster at ADDRESS; default: of the one whose home this machine shares.

    The token is that home's; for another cluster: RAY_AUTH_TOKEN_PATH=FILE.
    """
    from lavatar.cluster.head import join as start

    home = Home.from_environment().ensure()
    with _held(home, block):
        note("starting Ray …")
        with reserved():
            joined = start(home.root, address, host=host, cpus=cpus, gpus=gpus)
        exposed = _exposed(home)
        if as_json:
            answer_json({"joined": joined, "exposed": exposed})
        else:
            answer(f"this machine is a node of {joined}")
        _warn(exposed)


@cluster.command()
@click.option("--wait", type=click.IntRange(1), metavar="N", help="Until N nodes are alive, at most three minutes.")
@json_option
def status(wait: int | None, as_json: bool) -> None:
    """Whether a cluster is up, its addresses, what its nodes have, and what other machines can reach of this one."""
    from lavatar.cluster.head import current, wait_for

    home = Home.from_environment()
    head = current(home.root)
    if head is not None:
        if wait:
            wait_for(home.root, head, wait)
        _tell(home, head, as_json)
    elif wait:
        raise JobError("no cluster is up", "Start one: lavatar cluster up")
    elif as_json:
        answer_json({"up": False})
    else:
        answer("no cluster is up: lavatar cluster up")


@cluster.command()
@click.option("--force", is_flag=True, help="Also while jobs run on it: they are interrupted.")
@json_option
def down(force: bool, as_json: bool) -> None:
    """End the head or node that was started here, and nothing else. Where none is, nothing changes."""
    from lavatar.cluster.head import down as stop
    from lavatar.cluster.node import has_head
    from lavatar.platform.detached import waiting
    from lavatar.platform.ledger import release_dead
    from lavatar.platform.lookup import list_jobs
    from lavatar.platform.registry import open_registry
    from lavatar.platform.states import State

    home = Home.from_environment()
    led = has_head(home.root)
    if led and not force:
        registry = open_registry(home)
        release_dead(registry)
        running = [job.id for job in list_jobs(registry) if job.state == State.RUNNING]
        with contextlib.suppress(JobError):  # a head that does not answer begins with none
            running += waiting(home, registry)
        if running:
            raise JobError(
                f"jobs are running or about to: {', '.join(running)}",
                f"Cancel them first (lavatar jobs cancel {running[0]}), or add --force: what is done is kept.",
            )
    ended = stop(home.root)
    if as_json:
        answer_json({"up": False, "processes_ended": ended})
    else:
        what = "the cluster is down" if led else "this machine is no node any more"
        answer(what if ended else "no cluster was up")


@cluster.command()
@click.argument("kinds", nargs=-1, metavar="[KIND]...", type=click.Choice(sorted(KINDS)))
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="A folder.")
@json_option
def files(kinds: tuple[str, ...], output: Path, as_json: bool) -> None:
    """Write the files that start a cluster elsewhere, to be edited: aws, docker, gcp, kuberay, slurm; default: all."""
    from lavatar.cluster.deployment import write

    written = write(kinds or tuple(KINDS), output)
    if as_json:
        answer_json({"files": [str(path) for path in written]})
        return
    answer("\n".join(str(path) for path in written))
    note("What to edit is marked EDIT; docs/CLUSTER.md says what to do with them.")


def _tell(home: Home, head: Any, as_json: bool, **more: bool) -> None:
    from lavatar.cluster.head import nodes, token_file

    found, exposed = nodes(home.root, head), _exposed(home)
    token = str(token_file(home.root))
    if as_json:
        addresses = {"address": head.address, "dashboard": head.dashboard, "token_file": token}
        answer_json({"up": True, **more, **addresses, "nodes": found, "exposed": exposed})
    else:
        answer(f"Ray: {head.address}\ndashboard: {head.dashboard} (it asks for the token in {token})")
        rows = []
        for node in found:
            has = node["resources"]
            kind, state = "head" if node["head"] else "node", "alive" if node["alive"] else "dead"
            gigabytes = f"{has.get('memory', 0) / 2**30:.1f} GiB"
            rows.append((node["address"], kind, state, f"{has.get('CPU', 0):g}", f"{has.get('GPU', 0):g}", gigabytes))
        answer(table(rows, ("ADDRESS", "KIND", "STATE", "CPUS", "GPUS", "MEMORY")))
    _warn(exposed)


def _exposed(home: Home) -> list[dict[str, str]]:
    from lavatar.cluster.node import listening

    return [{"process": name, "address": f"{host}:{port}"} for name, host, port in listening(home.root)]


def _warn(exposed: list[dict[str, str]]) -> None:
    """On standard error: what is not on loopback."""
    if not exposed:
        return
    note("warning: other machines can reach, here:")
    note("\n".join(f"  {one['address']}  {one['process']}" for one in exposed))
    note(
        "Whoever reaches these and has the token can run any code as you; what passes is not encrypted; Ray's metrics "
        "ask for no token. Keep them inside a network that you trust."
    )


@contextlib.contextmanager
def _held(home: Home, block: bool) -> Iterator[None]:
    """A signal ends what starts inside. With --block it stays until Ray ends (JobError) or a signal, at any time, takes
    it down."""
    from lavatar.cluster.head import down as stop
    from lavatar.cluster.node import wait
    from lavatar.platform.signals import terminate_as_interrupt

    with terminate_as_interrupt():
        if not block:
            yield
            return
        try:
            yield
            wait(home.root)
        except KeyboardInterrupt:
            note("taking it down …")
            stop(home.root)

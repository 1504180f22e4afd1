"""How the platform scales: a real job of N avatars × M actors whose trainings are replaced by a sleep of known length.

    python benchmarks/scale.py --gpus 2 --gpus 8 --gpus 32 --avatars 40 --actors 40 --ideal 800 -o scale.json

Everything but the training is real: a cluster of several Ray nodes on this machine with pretended GPUs, the queue, the
registry, MLflow, one driver. Each pair holds a GPU for `ideal × GPUs ÷ pairs` seconds, so that the ideal wall time,
work ÷ GPUs, is about the same for every number of GPUs; an avatar takes as long as a pair. Ends in a table and a file.

--alone: the same work as bare Ray tasks on the same cluster first. What a stage costs beyond them is lavatar's own.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import psutil
import sqlalchemy as sa

from lavatar.cluster.bodies import Context
from lavatar.contracts import Event, StageKind, StageResult, StageSpec
from lavatar.datasets.shards import Manifest, write_manifest

SECONDS = "LAVATAR_SCALE_SECONDS"
NODE_GPUS = 8
_DATABASES = ("registry", "mlflow")


def _hold(seconds: float) -> tuple[float, float]:
    """The work: a GPU is held. When it began and ended, Unix seconds."""
    began = time.time()
    time.sleep(seconds)
    return began, time.time()


def sleeping_body(spec: StageSpec, context: Context) -> StageResult:
    """A stage that leaves what a real one leaves, and in its middle holds its GPU for a known time."""
    import ray

    wanted = spec.recipe["resources"][spec.kind.value]
    work = ray.remote(num_cpus=wanted["cpus"], num_gpus=wanted["gpus"], max_calls=0)(_hold)  # processes are used again
    began, ended = ray.get(work.remote(float(os.environ[SECONDS]) if wanted["gpus"] else 0.0))
    spec.out_dir.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"began": began, "ended": ended}
    if spec.kind is StageKind.PREPROCESS:
        (subject,) = spec.sources.values()
        empty = Manifest(spec.key, subject.name, "synthetic", 0, 0, 0, 25.0, 256, 128, [])
        return StageResult({"manifest": write_manifest(spec.out_dir, empty)}, figures)
    if spec.kind is StageKind.PREVIEW:
        (spec.out_dir / "metrics.json").write_text("{}")
        return StageResult({"metrics": spec.out_dir / "metrics.json"}, figures)
    (spec.out_dir / "release").mkdir(exist_ok=True)
    (spec.out_dir / "release" / "config.json").write_text("{}")
    context.events.emit(Event(spec.name, done=1, total=1, unit="steps"))
    return StageResult({"release": spec.out_dir / "release"}, figures)


BODIES: Mapping[StageKind, Callable[[StageSpec, Context], StageResult]] = dict.fromkeys(StageKind, sleeping_body)


@dataclass
class Watch:
    """What the driver costs while it runs: registry statements, memory, processor time."""

    statements: int = 0
    commits: int = 0
    rss: list[float] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)

    def count(self, registry: Any) -> None:
        """Every statement on the registry from here on."""

        def statement(*_: object) -> None:
            self.statements += 1

        def commit(*_: object) -> None:
            self.commits += 1

        sa.event.listen(registry._engine, "before_cursor_execute", statement)
        sa.event.listen(registry._engine, "commit", commit)

    def start(self) -> None:
        def sample() -> None:
            process = psutil.Process()
            while not self._ended.wait(1.0):
                self.rss.append(process.memory_info().rss / 1e6)

        threading.Thread(target=sample, daemon=True).start()

    def stop(self) -> None:
        self._ended.set()


class Nodes:
    """A head and more nodes on this machine, each with up to eight pretended GPUs."""

    def __init__(self, home: Path, gpus: int) -> None:
        from lavatar.cluster import head

        self._head, self._homes = head, [home]
        shares = [NODE_GPUS] * (gpus // NODE_GPUS) + ([gpus % NODE_GPUS] if gpus % NODE_GPUS else [])
        self.head, _ = head.up(home, host=_address(), cpus=2 * shares[0], gpus=shares[0])
        for number, share in enumerate(shares[1:], 1):
            other = home.with_name(f"node{number}")
            other.mkdir()
            head.join(other, self.head.address, cpus=2 * share, gpus=share)
            self._homes.append(other)

    def down(self) -> None:
        for home in reversed(self._homes):
            self._head.down(home)


def _address() -> str:
    """Of this machine on its network: Ray forms no cluster on loopback."""
    every = [one for addresses in psutil.net_if_addrs().values() for one in addresses]
    found = [one.address for one in every if one.family == socket.AF_INET and not one.address.startswith("127.")]
    return found[0] if found else "127.0.0.1"


def bare(root: Path, address: str, tasks: int, seconds: float) -> list[tuple[float, float]]:
    """As many pieces of work as bare Ray tasks, all handed to Ray at once: when each began and ended."""
    import ray

    from lavatar.cluster import session

    connected = session.attach(root, address)
    try:
        work = ray.remote(num_cpus=1, num_gpus=1, max_calls=0)(_hold)
        spans: list[tuple[float, float]] = ray.get([work.remote(seconds) for _ in range(tasks)])
        return spans
    finally:
        connected.stop()


def _alone(address: str, tasks: int) -> list[tuple[float, float]]:
    """`bare` in a process of its own, as any driver is."""
    command = [sys.executable, __file__, "--bare", address, "--one", str(tasks)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [(began, ended) for began, ended in json.loads(answer.strip().splitlines()[-1])]


def run(root: Path, gpus: int, avatars: int, actors: int, alone: bool) -> dict[str, Any]:
    """One job on `gpus` GPUs; its figures. In a process of its own: Ray reads its settings once."""
    from lavatar.cluster.stages import StageRunner
    from lavatar.configs.recipe import load_recipe
    from lavatar.platform import jobs, storejob
    from lavatar.platform.execution import Office
    from lavatar.platform.home import Home
    from lavatar.platform.leases import Owner
    from lavatar.platform.planned import make_plan
    from lavatar.platform.progress import PlainDisplay
    from lavatar.platform.registry import open_registry
    from lavatar.platform.subjects import add_subject, describe_synthetic

    storejob.space_needed = lambda stages, people: 0  # the sleeping stages write next to nothing
    home = Home.from_environment().ensure()
    nodes = Nodes(home.root, gpus)
    watch = Watch()
    try:
        registry = open_registry(home)
        names = [f"a{i:03}" for i in range(avatars)] + [f"b{i:03}" for i in range(actors)]
        people = [add_subject(registry, describe_synthetic(name, seed))[0] for seed, name in enumerate(names)]
        pairs = [(a, b) for a in people[:avatars] for b in people[avatars:]]
        wanted = [f"resources.{kind}.{what}=1" for kind in ("avatar", "pair") for what in ("gpus", "cpus")]
        recipe = load_recipe("tiny", [*wanted, "resources.preview.cpus=1", "pair_learning.warm=false"])
        began = time.monotonic()
        plan = make_plan(home, registry, pairs, recipe, shared=False)
        planned = time.monotonic() - began
        before = _alone(nodes.head.address, len(pairs) + avatars) if alone else []
        watch.count(registry)
        watch.start()

        def open_runner() -> StageRunner:
            return StageRunner(home.root, nodes.head.address, bodies=BODIES)

        began, cpu = time.monotonic(), time.process_time()
        jobs.run_job(Office(home, registry, PlainDisplay(), open_runner, Owner.current()), plan)
        wall, cpu = time.monotonic() - began, time.process_time() - cpu
        watch.stop()
        listed = [_timed([sys.executable, "-m", "lavatar.platform.cli", "jobs", "list"]) for _ in range(3)]
        figures = _figures(registry, plan, gpus, float(os.environ[SECONDS]))
        figures |= _beyond(before, figures) if alone else {}
        stages = len(plan.stages)
        return {
            "gpus": gpus, "pairs": len(pairs), "stages": stages, "plan_seconds": planned, "wall_seconds": wall,
            **figures, "driver_cpu_seconds_a_stage": cpu / stages,
            "registry_statements_a_stage": watch.statements / stages,
            "registry_transactions_a_stage": watch.commits / stages, "driver_mb": max(watch.rss, default=0.0),
            "jobs_list_seconds": min(listed),
            **{f"{name}_kb_a_stage": (home.root / f"{name}.db").stat().st_size / 1e3 / stages for name in _DATABASES},
        }  # fmt: skip
    finally:
        nodes.down()


def _figures(registry: Any, plan: Any, gpus: int, seconds: float) -> dict[str, Any]:
    """From when each stage worked: how long after it could have begun it began, how much of the GPUs was used."""
    from lavatar.platform import lookup

    rows = {row.key: row for row in lookup.get_stages(registry, [stage.key for stage in plan.stages])}
    spans = {key: (row.metrics["began"], row.metrics["ended"]) for key, row in rows.items()}
    on_gpu = [stage.key for stage in plan.stages if stage.spec.kind in (StageKind.AVATAR, StageKind.PAIR)]
    first, last = min(spans[key][0] for key in on_gpu), max(spans[key][1] for key in on_gpu)
    work = len(on_gpu) * seconds
    gaps = _gaps([spans[key] for key in on_gpu])
    previews = [
        spans[stage.key][0] - max(spans[need][1] for need in stage.needs)
        for stage in plan.stages
        if stage.spec.kind is StageKind.PREVIEW
    ]
    return {
        "seconds_a_pair": seconds, "ideal_seconds": work / gpus, "gpu_seconds": last - first,
        "of_ideal": work / gpus / (last - first), "turnover_seconds": _summary(gaps),
        "preview_after_pair_seconds": _summary(previews),
    }  # fmt: skip


def _beyond(alone: list[tuple[float, float]], job: dict[str, Any]) -> dict[str, Any]:
    """What bare Ray tasks take between two pieces of work, and what a stage of the job takes beyond that on average."""
    gaps = _summary(_gaps(alone))
    took = max(ended for _, ended in alone) - min(began for began, _ in alone)
    return {
        "ray_turnover_seconds": gaps, "ray_of_ideal": job["ideal_seconds"] / took,
        "overhead_a_stage_seconds": job["turnover_seconds"]["mean"] - gaps["mean"],
    }  # fmt: skip


def _gaps(spans: list[tuple[float, float]]) -> list[float]:
    """How long a GPU stood idle between two stages: each beginning takes the GPU that has been free the longest."""
    free: list[float] = []
    gaps = []
    events = sorted([(began, 1) for began, _ in spans] + [(ended, 0) for _, ended in spans])
    for when, begins in events:
        if not begins:
            free.append(when)
        elif free:
            gaps.append(when - free.pop(0))
    return gaps


def _summary(values: list[float]) -> dict[str, float]:
    """Mean, median and 95th percentile, the last two being values that occurred; zeros where there are none."""
    ordered = sorted(values) or [0.0]
    at = {name: ordered[min(len(ordered) - 1, int(q * len(ordered)))] for name, q in (("p50", 0.5), ("p95", 0.95))}
    return {"mean": sum(ordered) / len(ordered), **at}


def _timed(command: list[str]) -> float:
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


@click.command()
@click.option("--gpus", multiple=True, type=int, default=(2, 8, 32), show_default=True)
@click.option("--avatars", default=40, show_default=True)
@click.option("--actors", default=40, show_default=True)
@click.option("--ideal", default=800.0, show_default=True, help="Work ÷ GPUs of the pairs, in seconds.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A JSON file of all figures.")
@click.option("--alone", is_flag=True, help="First the same work as bare Ray tasks, to compare with.")
@click.option("--one", hidden=True, type=int)
@click.option("--bare", "address", hidden=True)
def main(
    gpus: tuple[int, ...], avatars: int, actors: int, ideal: float, output: Path | None, alone: bool,
    one: int | None, address: str | None,
) -> None:  # fmt: skip
    """Run the job at each number of GPUs."""
    if one is not None:
        home = Path(os.environ["LAVATAR_HOME"])
        answer = (
            bare(home, address, one, float(os.environ[SECONDS])) if address else run(home, one, avatars, actors, alone)
        )
        click.echo(json.dumps(answer))
        return
    rows = []
    for number in gpus:
        with tempfile.TemporaryDirectory(prefix="scale-") as folder:
            seconds = ideal * number / (avatars * actors)
            environment = {**os.environ, "LAVATAR_HOME": f"{folder}/home", SECONDS: str(seconds)}
            options = ["--one", str(number), "--avatars", str(avatars), "--actors", str(actors)]
            command = [sys.executable, __file__, *options, *(["--alone"] if alone else [])]
            answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
            rows.append(json.loads(answer.strip().splitlines()[-1]))
            click.echo(json.dumps(rows[-1], indent=1))
    if output:
        output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

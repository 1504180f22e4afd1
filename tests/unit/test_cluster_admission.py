"""Whose turn it is: order, fairness, priority, patience, and that nothing beyond the cluster's room is started."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lavatar.cluster.admission import FORGET_SECONDS, PATIENCE_SECONDS, Queue, Turn, counted
from lavatar.cluster.resources import Demand, Machine, Node, Share
from lavatar.cluster.stages import StageRunner
from lavatar.contracts import StageKind, StageSpec
from lavatar.platform.home import Home

sys.path.insert(0, str(Path(__file__).parent))
from platform_fakes import make_plan_of, plain_digest

__all__ = ["plain_digest"]

CPU, GPU, QUARTER = Demand(1), Demand(1, 1), Demand(1, 0.25)


class Cluster:
    """A queue in front of a machine whose clock the test moves."""

    def __init__(self, *nodes: Node) -> None:
        self.now, self.machine = 100.0, Machine(nodes)
        self.queue = Queue(lambda: self.machine, lambda: self.now)
        self.running: dict[str, list[Demand]] = {}

    def ask(self, driver: str, *ready: Demand, priority: int = 0) -> list[Demand]:
        """What the driver may start; it starts it."""
        running = self.running.setdefault(driver, [])
        entries = counted(ready)
        granted = self.queue.ask(Turn(driver, priority, counted(running), entries))
        assert all(number <= count for number, (_, count) in zip(granted, entries, strict=True))
        started = [demand for number, (demand, _) in zip(granted, entries, strict=True) for demand in [demand] * number]
        running += started
        return started

    @property
    def used(self) -> Demand:
        return sum((demand for running in self.running.values() for demand in running), Demand())


def test_no_more_starts_than_there_is_room_for() -> None:
    cluster = Cluster(Node(16, 2), Node(16, 2))
    assert cluster.ask("a", *[GPU] * 1600) == [GPU] * 4
    assert cluster.ask("a", *[GPU] * 1596) == []
    cluster.running["a"].pop()
    assert cluster.ask("a", *[GPU] * 1596) == [GPU]


def test_parts_of_a_gpu_pack_onto_it() -> None:
    cluster = Cluster(Node(16, 1))
    assert cluster.ask("a", *[QUARTER] * 6) == [QUARTER] * 4


def test_what_one_stage_has_no_room_for_goes_to_the_next() -> None:
    cluster = Cluster(Node(4, 1))
    cluster.ask("a", GPU)
    assert cluster.ask("a", GPU, CPU, CPU, CPU, CPU) == [CPU] * 3


def test_small_stages_are_started_ahead_to_wait_for_the_next_gpu() -> None:
    cluster = Cluster(Node(16, 8), Node(16, 8), Node(6, 1))
    assert cluster.ask("a", *[GPU] * 40) == [GPU] * 19  # 17 GPUs, and one more for eight
    assert cluster.ask("a", *[QUARTER] * 4) == cluster.ask("a", Demand(2, 2)) == []
    assert cluster.ask("a", CPU, CPU) == [CPU] * 2  # what wants no GPU has its room
    cluster.running["a"].remove(GPU)
    cluster.ask("a")
    assert cluster.ask("b", *[QUARTER] * 6) == [QUARTER] * 4
    few = Cluster(Node(16, 7))
    assert few.ask("a", *[GPU] * 40) == [GPU] * 7
    alone = Cluster(Node(16, 16))
    assert alone.ask("a", Demand(8, 8), Demand(8, 8), Demand(2, 2)) == [Demand(8, 8)] * 2  # those of one GPU only


def test_a_small_job_is_not_behind_a_large_one() -> None:
    cluster = Cluster(Node(8))
    assert len(cluster.ask("large", *[CPU] * 1600)) == 8
    assert cluster.ask("small", *[CPU] * 2) == []
    for left in (2, 1):  # whatever ends next, the small job has less and is given it, though the large one asks first
        cluster.running["large"].pop()
        assert cluster.ask("large", *[CPU] * 1592) == []
        assert cluster.ask("small", *[CPU] * left) == [CPU]


def test_equals_come_to_equal_shares() -> None:
    cluster = Cluster(Node(12))
    cluster.ask("a", *[CPU] * 100)
    for _ in range(40):
        for driver in ("a", "b", "c"):
            cluster.ask(driver, *[CPU] * 100)
        busiest = max(cluster.running.values(), key=len)
        busiest.pop()
    assert sorted(len(running) for running in cluster.running.values()) in ([3, 4, 4], [4, 4, 4])


def test_the_share_that_counts_is_that_of_the_scarcest_resource() -> None:
    cluster = Cluster(Node(24, 4))
    assert cluster.ask("gpus", GPU, GPU) == [GPU, GPU]  # half of the GPUs, a twelfth of the CPUs
    assert len(cluster.ask("cpus", *[CPU] * 20)) == 20  # five sixths of the CPUs
    assert cluster.ask("gpus", *[CPU] * 9) == [CPU] * 2
    cluster.ask("cpus", *[CPU] * 9)
    cluster.running["cpus"].pop()
    assert cluster.ask("cpus", *[CPU] * 9) == []  # .5, of the GPUs, stands against .79, of the CPUs
    assert cluster.ask("gpus", *[CPU] * 7) == [CPU]


def test_a_higher_priority_goes_first_whatever_it_holds() -> None:
    cluster = Cluster(Node(4))
    cluster.ask("night", *[CPU] * 10)
    cluster.ask("urgent", *[CPU] * 10, priority=1)
    for count in range(1, 5):
        cluster.running["night"].pop()
        assert cluster.ask("night", *[CPU] * 10) == []
        assert cluster.ask("urgent", *[CPU] * 10, priority=1) == [CPU]
        assert len(cluster.running["urgent"]) == count


def test_a_large_stage_waits_for_small_ones_only_so_long() -> None:
    cluster = Cluster(Node(64, 8))
    eight = Demand(8, 8)
    assert cluster.ask("small", *[GPU] * 100) == [GPU] * 9  # one ahead
    assert cluster.ask("large", eight) == []
    cluster.running["small"].pop()
    assert cluster.ask("small", *[GPU] * 91) == []  # none ahead any more
    cluster.running["small"].pop()
    cluster.now += 1
    assert cluster.ask("small", *[GPU] * 91) == [GPU]  # what the large one cannot use passes it
    for _ in range(int(PATIENCE_SECONDS / 10) + 1):
        cluster.now += 10
        cluster.ask("small", *[GPU] * 90), cluster.ask("large", eight)
    for _ in range(8):
        cluster.running["small"].pop()
        assert cluster.ask("small", *[GPU] * 90) == []  # from now on it is kept
    assert cluster.ask("large", eight) == [eight]


def test_stages_whose_memory_does_not_fit_together_run_one_after_the_other() -> None:
    cluster, large = Cluster(Node(16, 0, 16)), Demand(1, 0, 10)
    assert cluster.ask("a", large, large) == [large]
    assert cluster.ask("b", large) == []
    assert cluster.ask("b", Demand(1, 0, 6), CPU) == [Demand(1, 0, 6), CPU]  # what needs less, or says nothing, passes
    assert cluster.ask("a", large) == []
    assert cluster.ask("b", Demand(1, 0, 0.1)) == [], "the memory is full"
    cluster.running["b"].clear()
    assert cluster.ask("b", large) == []
    cluster.running["a"].pop()
    cluster.ask("a")
    assert cluster.ask("b", large) == [large]


def runner_of(machine: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> StageRunner:
    """A runner before a cluster that is only told of."""
    monkeypatch.setattr("lavatar.cluster.resources.ray_machine", lambda: machine)
    runner = StageRunner(folder)
    queue = Queue(lambda: machine)
    runner._queue = SimpleNamespace(ask=lambda priority, *counts: queue.ask(Turn("here", priority, *counts)))
    return runner


def pairs_of(folder: Path, *overrides: str) -> list[StageSpec]:
    """Two pairs of one job, ready to be trained."""
    plan = make_plan_of(Home(folder), "AB AC", *overrides)
    return [stage.spec for stage in plan.stages if stage.spec.kind is StageKind.PAIR]


@pytest.mark.usefixtures("plain_digest")
@pytest.mark.parametrize(("memory_gb", "at_once"), [(8.5, 1), (7.5, 2)])
def test_the_memory_that_a_recipe_names_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_gb: float, at_once: int
) -> None:
    runner = runner_of(Machine((Node(16, 0, 16),)), tmp_path, monkeypatch)
    first, second = pairs_of(tmp_path, f"resources.pair.memory_gb={memory_gb}", "resources.pair.cpus=1")
    assert runner.admit(0, [first, second], []) == [first.key, second.key][:at_once]
    assert runner.admit(0, [second], [first]) == [second.key][: at_once - 1]
    assert runner.admit(0, [second], []) == [second.key]


@pytest.mark.usefixtures("plain_digest")
def test_a_runner_asks_with_the_priority_of_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, asked = runner_of(Machine((Node(16),)), tmp_path, monkeypatch), []

    def ask(priority: int, running: Any, ready: Any) -> list[int]:
        asked.append(priority)
        return [0 for _ in ready]

    runner._queue = SimpleNamespace(ask=ask)
    assert runner.admit(-3, pairs_of(tmp_path), []) == []
    assert asked == [-3]


def test_what_no_longer_fits_at_all_blocks_nobody() -> None:
    cluster = Cluster(Node(16, 8))
    cluster.ask("a", GPU)
    cluster.machine, cluster.now = Machine((Node(16, 4),)), cluster.now + PATIENCE_SECONDS + 1
    cluster.ask("large", Demand(8, 8))
    cluster.now += PATIENCE_SECONDS + 1
    cluster.ask("large", Demand(8, 8))
    assert cluster.ask("a", GPU) == [GPU]


def test_a_driver_that_is_gone_holds_nothing() -> None:
    cluster = Cluster(Node(4))
    cluster.ask("dead", *[CPU] * 4)
    assert cluster.ask("living", CPU) == []
    cluster.now += FORGET_SECONDS + 1
    assert cluster.ask("living", CPU) == [CPU]


@pytest.mark.parametrize("gpus", [0.6, 0.4, 0.3, 0.25, 0.34, 1 / 3, 0.07, 1.0])
@pytest.mark.parametrize("nodes", [(Node(64, 1), Node(64, 1)), (Node(64, 4),), (Node(64, 1), Node(64, 0), Node(64, 3))])
def test_no_more_parts_of_gpus_start_than_lie_on_devices(nodes: tuple[Node, ...], gpus: float) -> None:
    cluster, share = Cluster(*nodes), Share(1, gpus)
    fits = cluster.machine.fits(share.cpus, share.gpus, 0)
    assert len(cluster.ask("a", *[share.demand] * 100)) == fits
    assert cluster.ask("b", share.demand, priority=1) == []
    assert cluster.ask("a", CPU) == [CPU], "what wants none passes"


def test_workers_that_each_take_a_part_of_a_gpu_take_devices() -> None:
    cluster, two = Cluster(Node(64, 2)), Share(1, 0.6, workers=2).demand
    assert cluster.ask("a", two) == [two]
    assert cluster.ask("a", Share(1, 0.6).demand) == []


def test_a_queue_that_was_lost_knows_again_what_runs_after_each_has_asked() -> None:
    cluster = Cluster(Node(4))
    cluster.ask("a", *[CPU] * 3)
    cluster.queue = Queue(lambda: cluster.machine, lambda: cluster.now)
    cluster.ask("a")
    assert cluster.ask("b", *[CPU] * 4) == [CPU]


def test_nobody_starves_and_no_room_is_left_unused() -> None:
    """Random jobs on a random cluster, each stage one tick long: all end, and none could have started earlier."""
    rng = random.Random(4)
    for _ in range(20):
        cluster = Cluster(*[Node(rng.choice([4, 8]), rng.choice([0, 1, 2])) for _ in range(3)])
        total = cluster.machine.total
        kinds = [demand for demand in (CPU, GPU, QUARTER, Demand(2)) if demand.within(total)]
        jobs = {name: [rng.choice(kinds) for _ in range(rng.randint(1, 60))] for name in "abcd"}
        ticks = 0
        while any(jobs.values()) or any(cluster.running.values()):
            for name, left in jobs.items():
                _start(cluster, name, left)  # only now it is known that nothing of theirs runs any more
            while [started for name in jobs for started in [_start(cluster, name, jobs[name])] if started]:
                assert cluster.used.within(total)
            assert not any(d.within(total - cluster.used) for left in jobs.values() for d in left)
            cluster.running = {name: [] for name in jobs}
            cluster.now, ticks = cluster.now + 0.1, ticks + 1
            assert ticks < 300


def _start(cluster: Cluster, name: str, left: list[Demand]) -> list[Demand]:
    """Start what the queue allows and take it off the list."""
    started = cluster.ask(name, *left)
    for demand in started:
        left.remove(demand)
    return started

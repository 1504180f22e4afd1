"""Where a new pair begins: the best of what there is, once for good. Stages are small functions."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

sys.path.insert(0, str(Path(__file__).parent))
from platform_fakes import (
    FakeHandle,
    FakeRunner,
    NoTracker,
    either,
    finish,
    fresh,
    no_models,
    office,
    person,
    plain_digest,
    tiny,
)

from lavatar.contracts import StageKind, StageResult
from lavatar.errors import StageFailedError
from lavatar.platform import jobs, planning
from lavatar.platform.home import Home
from lavatar.platform.jobs import run_job
from lavatar.platform.planning import Plan
from lavatar.platform.registry import Registry
from lavatar.platform.report import report, report_text
from lavatar.platform.warm import WarmChoice

pytestmark = pytest.mark.usefixtures("plain_digest", "home")
__all__ = ["either", "plain_digest"]
World = tuple[Home, Registry]


@pytest.fixture(autouse=True)
def without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "Tracker", NoTracker)
    no_models(monkeypatch)
    monkeypatch.setattr("lavatar.platform.execution.POLL_SECONDS", 0.01)
    monkeypatch.setattr("lavatar.platform.home.Home.tracking_uri", "none")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return fresh(tmp_path)


def warm_plan(world: World, actor: str, *overrides: str, avatar: str = "A") -> Plan:
    """As `lavatar submit` plans it."""
    home, registry = world
    recipe, people = tiny(*overrides), [person(name, ord(name[0])) for name in (avatar, actor)]
    choice = WarmChoice(registry, home, recipe)
    return planning.plan(home.root, home.out_dir, [(people[0], people[1])], recipe, choice)


def run(world: World, plan: Plan, r: float | None = None, **bodies: object) -> FakeRunner:
    """Brings a job to its end; `r` is what its preview says of how well the jaw follows."""

    def preview(handle: FakeHandle) -> StageResult:
        cross = {"expression": {"jaw": {"r": r}, "gaze": {"r": None}}, "frames": 3}
        return replace(finish(handle), metrics={"cross": cross})

    runner = FakeRunner({"preview": preview, **bodies})  # type: ignore[arg-type]
    run_job(office(*world, runner), plan)
    return runner


def test_the_first_pair_is_cold_and_the_second_begins_at_it(world: World) -> None:
    first = warm_plan(world, "B")
    assert first.pairs[0].warm is None
    assert "warm" not in first.stage(StageKind.PAIR).spec.inputs
    run(world, first)
    second = warm_plan(world, "C")
    assert second.pairs[0].warm is not None
    assert second.pairs[0].warm.name == "A<-B"
    pair = first.stage(StageKind.PAIR)
    assert second.stage(StageKind.PAIR).spec.inputs["warm"] == planning.release_dir(pair.spec.out_dir)
    assert warm_plan(world, "C", avatar="D").pairs[0].warm is None, "that avatar has no pair"


def test_of_a_job_of_many_pairs_only_the_avatars_own_are_begun_at(either: str, world: World) -> None:
    home, registry = world
    people = {name: person(name, ord(name)) for name in "ABCDE"}
    pairs = [(people[a], people[b]) for a, b in ("AC", "AD", "BC", "BD")]
    many = planning.plan(home.root, home.out_dir, pairs, tiny("pair_learning.warm=false"))
    follows = {"preview:A<-C": 0.8, "preview:A<-D": 0.2, "preview:B<-C": 0.3, "preview:B<-D": 0.9}

    def preview(handle: FakeHandle) -> StageResult:
        cross = {"expression": {"jaw": {"r": follows[handle.spec.name]}}, "frames": 3}
        return replace(finish(handle), metrics={"cross": cross})

    run_job(office(home, registry, FakeRunner({"preview": preview})), many)
    for avatar, best in (("A", "A<-C"), ("B", "B<-D")):
        warm = warm_plan(world, "E", avatar=avatar).pairs[0].warm
        assert warm is not None
        assert warm.name == best
        assert warm.release == next(p.release for p in many.pairs if f"{p.avatar.name}<-{p.actor.name}" == best)
    own = warm_plan(world, "D", "pair_learning.shift=0.01", avatar="B").pairs[0].warm
    assert own is not None
    assert own.name == "B<-C", "not at its own actor's"


def test_many_pairs_ask_the_registry_no_more_than_one(world: World) -> None:
    """Neither when they are new nor when they are planned again; and each begins where it would by itself."""
    home, registry = world
    for actor in "BC":
        run(world, warm_plan(world, actor), 0.5)
    actors = [person(f"actor{k}", 1000 + k) for k in range(30)]
    people = {actor.name: actor for actor in (*actors, person("A", ord("A")))}

    def planned(names: list[str]) -> tuple[Plan, int]:
        asked: list[str] = []

        def count(*arguments: object) -> None:
            asked.append(str(arguments[2]))

        sa.event.listen(sa.Engine, "before_cursor_execute", count)
        try:
            pairs = [(people["A"], people[name]) for name in names]
            made = planning.plan(home.root, home.out_dir, pairs, tiny(), WarmChoice(registry, home, tiny()))
        finally:
            sa.event.remove(sa.Engine, "before_cursor_execute", count)
        return made, len(asked)

    names = [actor.name for actor in actors]
    (one, queries), (many, same) = planned(names[:1]), planned(names)
    assert 0 < queries == same
    assert [pair.warm for pair in many.pairs] == [one.pairs[0].warm] * 30
    run(world, many, 0.9)
    (one, queries), (again, more) = planned(names[:1]), planned(names)
    assert again.job_id == many.job_id
    assert [pair.warm for pair in again.pairs] == [pair.warm for pair in many.pairs]
    assert one.pairs[0].warm == many.pairs[0].warm
    assert more == queries + 29, "of each that is finished, whether its files are there"


def test_the_best_is_the_one_whose_expressions_follow_best_else_the_newest(world: World) -> None:
    cold = "pair_learning.warm=false"
    for actor, r in (("B", 0.6), ("C", 0.8), ("D", 0.7), ("E", None)):
        run(world, warm_plan(world, actor, cold), r)
    best = warm_plan(world, "Z").pairs[0].warm
    assert best is not None
    assert best.name == "A<-C", "not the newest, and not one that nobody measured"
    other = world[0].root / "other"
    unmeasured = fresh(other)
    for actor in "BC":
        run(unmeasured, warm_plan(unmeasured, actor, cold), None)
    newest = warm_plan(unmeasured, "Z").pairs[0].warm
    assert newest is not None
    assert newest.name == "A<-C"


@pytest.mark.parametrize(
    ("override", "fits"),
    [
        ("ynet.code_dim=32", False),
        ("ynet_loss.lambda_ssim=0.2", False),
        ("avatar_training.steps=7", False),
        ("ynet_training.steps=7", True),
        ("mapping.ridge=0.2", True),
    ],
)
def test_only_a_pair_of_the_same_avatar_network_and_loss_fits(world: World, override: str, fits: bool) -> None:
    run(world, warm_plan(world, "B"))
    assert (warm_plan(world, "C", override).pairs[0].warm is not None) == fits


def test_the_same_actor_under_other_settings_begins_cold(world: World) -> None:
    """Else no two settings of one pair could be compared."""
    run(world, warm_plan(world, "B"))
    assert warm_plan(world, "B", "mapping.ridge=0.2").pairs[0].warm is None


def test_a_repeated_submit_finds_its_own_result_whatever_was_trained_since(world: World) -> None:
    run(world, warm_plan(world, "B"), 0.5)
    warm = warm_plan(world, "C")
    run(world, warm, 0.5)
    run(world, warm_plan(world, "D", "pair_learning.warm=false"), 0.9)
    for actor, before in (("B", None), ("C", warm.pairs[0].warm)):
        again = warm_plan(world, actor)
        assert again.pairs[0].warm == before
        assert run(world, again).started == []
    assert warm_plan(world, "C").job_id == warm.job_id
    fresh_one = warm_plan(world, "E").pairs[0].warm
    assert fresh_one is not None
    assert fresh_one.name == "A<-D"


def test_a_pair_that_stopped_goes_on_from_where_it_began(world: World) -> None:
    def fail(handle: FakeHandle) -> StageResult:
        raise RuntimeError("power cut")

    run(world, warm_plan(world, "B"), 0.5)
    stopped = warm_plan(world, "C")
    with pytest.raises(StageFailedError, match="power cut"):
        run(world, stopped, pair=fail)
    run(world, warm_plan(world, "D", "pair_learning.warm=false"), 0.9)
    again = warm_plan(world, "C")
    assert (again.job_id, again.pairs[0].warm) == (stopped.job_id, stopped.pairs[0].warm)
    assert stopped.pairs[0].warm is not None
    shutil.rmtree(stopped.pairs[0].warm.release)
    elsewhere = warm_plan(world, "C").pairs[0].warm
    assert elsewhere is not None
    assert elsewhere.name == "A<-D", "it cannot begin there any more"


def test_a_finished_pair_outlives_the_one_it_began_at(world: World) -> None:
    run(world, warm_plan(world, "B"))
    warm = warm_plan(world, "C")
    run(world, warm)
    assert warm.pairs[0].warm is not None
    shutil.rmtree(warm.pairs[0].warm.release)
    assert run(world, warm_plan(world, "C")).started == []


def test_cold_is_another_pair_and_keeps_the_key_it_always_had(world: World) -> None:
    run(world, warm_plan(world, "B"))
    warm, cold = warm_plan(world, "C"), warm_plan(world, "C", "pair_learning.warm=false")
    plain = planning.plan(world[0].root, world[0].out_dir, [(warm.pairs[0].avatar, warm.pairs[0].actor)], tiny())
    assert cold.pairs[0].warm is None
    assert cold.job_id == plain.job_id != warm.job_id
    assert [s.key for s in cold.stages] == [s.key for s in plain.stages]
    changed = [a.name for a, b in zip(warm.stages, cold.stages, strict=True) if a.key != b.key]
    assert changed == ["pair:A<-C", "preview:A<-C"]
    shorter = warm_plan(world, "C", "pair_learning.warm_steps=0.5")
    assert shorter.stage(StageKind.PAIR).key != warm.stage(StageKind.PAIR).key
    assert warm_plan(world, "B", "pair_learning.warm_steps=0.5").job_id == warm_plan(world, "B").job_id


def test_the_report_says_what_the_warm_start_came_to(world: World) -> None:
    def pair(handle: FakeHandle) -> StageResult:
        return replace(finish(handle), notes=("began at the shared encoder of A<-B; 480 steps saved",))

    run(world, warm_plan(world, "B"))
    plan = warm_plan(world, "C")
    run(world, plan, pair=pair)
    result = report(world[1], world[0], plan.job_id)
    assert [s["notes"] for s in result["stages"] if s["name"] == "pair:A<-C"] == [
        ["began at the shared encoder of A<-B; 480 steps saved"]
    ]
    assert "480 steps saved" in report_text(result)

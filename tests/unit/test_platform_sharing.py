"""A job with a shared network: its stages and keys, what it leaves, and how its pairs are found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from lavatar.contracts import StageKind
from lavatar.errors import ConfigError, Interrupted, JobError, StageFailedError, UsageError
from lavatar.platform import jobs
from lavatar.platform.commands.evaluate import run_of
from lavatar.platform.finished import find_avatar, find_pair
from lavatar.platform.home import Home
from lavatar.platform.jobs import run_job
from lavatar.platform.planning import Plan, listed
from lavatar.platform.registry import HEAD, Registry, open_registry, schema_revision
from lavatar.platform.report import report, report_text
from lavatar.platform.sharing import plan_shared

sys.path.insert(0, str(Path(__file__).parent))
from platform_fakes import (
    FakeHandle,
    FakeRunner,
    NoTracker,
    finish,
    fresh,
    make_plan,
    make_shared_plan,
    no_models,
    office,
    person,
    plain_digest,
    tiny,
)

pytestmark = pytest.mark.usefixtures("plain_digest", "home")
__all__ = ["plain_digest"]
HOME = Home(Path("/nowhere"))
World = tuple[Home, Registry]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(jobs, "Tracker", NoTracker)
    no_models(monkeypatch)
    monkeypatch.setattr("lavatar.platform.execution.POLL_SECONDS", 0.01)
    monkeypatch.setattr("lavatar.platform.home.Home.tracking_uri", "none")
    return fresh(tmp_path)


def keys(plan: Plan) -> dict[str, str]:
    return {stage.name: stage.key for stage in plan.stages}


def test_the_stages_of_three_subjects() -> None:
    plan = make_shared_plan(HOME, "AB", "AC")
    assert list(keys(plan)) == [
        "preprocess:A", "preprocess:B", "preprocess:C", "avatar:A", "avatar:B", "shared:A, B, C",
        "preview:A<-C", "preview:B<-A", "preview:B<-C",
    ]  # fmt: skip
    seen: set[str] = set()
    for stage in plan.stages:
        assert set(stage.needs) <= seen
        seen.add(stage.key)
    a, b, c = (stage.key[:12] for stage in plan.stages[:3])
    shared = plan.stage(StageKind.SHARED).spec
    assert {role.partition("/")[0] for role in shared.inputs} == {"avatar", "avatar_dataset", "actor_dataset"}
    assert {role.partition("/")[2] for role in shared.inputs if role.startswith("actor_dataset/")} == {a, c}
    assert plan.pairs[2].release == shared.out_dir / "release" / b / c == plan.stages[-1].spec.inputs["pair"]
    pairwise = make_plan(HOME, "A", "C")
    assert keys(pairwise)["avatar:A"] == keys(plan)["avatar:A"], "avatars are shared with other jobs"
    assert keys(pairwise)["preview:A<-C"] != keys(plan)["preview:A<-C"]


def test_the_order_of_the_names_changes_nothing() -> None:
    plan = make_shared_plan(HOME, "AB", "ACD")
    for avatars, actors in (("BA", "DCA"), ("ABA", "CADD")):
        again = make_shared_plan(HOME, avatars, actors)
        assert (again.job_id, keys(again)) == (plan.job_id, keys(plan))
    for avatars, actors in (("AB", "AC"), ("A", "ABCD"), ("ABC", "ABCD")):
        assert keys(make_shared_plan(HOME, avatars, actors))["preview:A<-C"] != keys(plan)["preview:A<-C"]


def test_names_do_not_matter_to_the_network() -> None:
    """Two names of one video make one stage, as everywhere; in one job they are refused."""
    first, renamed = (
        plan_shared(HOME.root, HOME.out_dir, [person("A", 1)], [person(name, 2), person("C", 3)], tiny())
        for name in ("B", "Z")
    )
    assert first.stage(StageKind.SHARED).key == renamed.stage(StageKind.SHARED).key
    with pytest.raises(UsageError, match="'A' and 'Y' are the same video"):
        plan_shared(HOME.root, HOME.out_dir, [person("A", 1)], [person("Y", 1)], tiny())
    with pytest.raises(UsageError, match="two videos are named 'A'"):
        plan_shared(HOME.root, HOME.out_dir, [person("A", 1)], [person("A", 2)], tiny())
    with pytest.raises(UsageError, match="both 'A'"):
        make_shared_plan(HOME, "A", "A")
    with pytest.raises(ConfigError, match=r"mapping\.joint=false|trains the mapping"):
        make_shared_plan(HOME, "A", "B", "mapping.joint=true", "mapping.reads=code", "mapping.align=none")


def test_what_changes_the_network_changes_its_key() -> None:
    plain = make_shared_plan(HOME, "A", "BC").stage(StageKind.SHARED).key
    for override in (
        "ynet_training.seed=7",
        "mapping.ridge=0.5",
        "avatar_training.steps=7",
        "preprocess.crop_scale=1.7",
    ):
        assert make_shared_plan(HOME, "A", "BC", override).stage(StageKind.SHARED).key != plain
    assert make_shared_plan(HOME, "A", "BC", "resources.shared.cpus=1").stage(StageKind.SHARED).key == plain


def test_a_shared_job_ends_with_every_pair_and_is_done_once(world: World) -> None:
    home, registry = world
    plan, runner = make_shared_plan(home, "AB", "AC"), FakeRunner()
    run_job(office(home, registry, runner), plan)
    assert sorted(runner.started) == sorted(stage.name for stage in plan.stages)
    result = report(registry, home, plan.job_id)
    assert result["state"] == "finished"
    assert run_of(registry, plan.job_id, "B", "A") == "run of preview:B<-A", "of many pairs each has a run of its own"
    assert run_of(registry, plan.job_id, "B", None) == "run of avatar:B"
    assert (result["avatar"], result["actor"]) == ("A, B", "C, A")
    assert [(p["avatar"], p["actor"]) for p in result["pairs"]] == [("A", "C"), ("B", "A"), ("B", "C")]
    assert all(Path(p["video"]).name == "preview.mp4" and p["metrics"] for p in result["pairs"])
    assert {m["name"] for m in result["models"]} == {
        "lavatar-avatar-A", "lavatar-avatar-B", "lavatar-pair-A-C", "lavatar-pair-B-A", "lavatar-pair-B-C",
    }  # fmt: skip
    text = report_text(result)
    assert text.count("preview.mp4") == 3
    assert "B driven by A" in text
    again = FakeRunner()
    run_job(office(home, registry, again), make_shared_plan(home, "BA", "CA"))
    assert again.started == []


def test_pairs_of_shared_jobs_are_found(world: World) -> None:
    home, registry = world
    plan = make_shared_plan(home, "AB", "AC")
    run_job(office(home, registry, FakeRunner()), plan)
    for pair in plan.pairs:
        found = find_pair(registry, home, pair.avatar.name, pair.actor.name)
        assert found.pair == pair.release
        assert found.avatar == pair.head.spec.out_dir / "release"
        assert found.avatar_data == pair.preview.spec.inputs["avatar_dataset"]
        assert found.actor_data == pair.preview.spec.inputs["actor_dataset"]
    assert find_avatar(registry, home, "B").avatar == plan.pairs[1].head.spec.out_dir / "release"
    assert find_avatar(registry, home, "A").avatar == plan.pairs[0].head.spec.out_dir / "release"
    with pytest.raises(JobError, match="avatar 'A' driven by 'B'"):
        find_pair(registry, home, "A", "B")
    newer = make_plan(home, "B", "C")
    run_job(office(home, registry, FakeRunner()), newer)
    assert find_pair(registry, home, "B", "C").pair == newer.pairs[0].release
    assert find_pair(registry, home, "B", "A").pair == plan.pairs[1].release


def test_one_failed_preview_lets_the_others_run_and_is_made_up_for(world: World) -> None:
    home, registry = world
    plan = make_shared_plan(home, "AB", "C")

    def broken(handle: FakeHandle) -> Any:
        raise RuntimeError("no picture")

    def slow(handle: FakeHandle) -> Any:
        assert not handle.cancelled.wait(0.5), "it was stopped"
        return finish(handle)

    with pytest.raises(StageFailedError, match="preview:A<-C failed"):
        run_job(office(home, registry, FakeRunner({"preview:A<-C": broken, "preview:B<-C": slow})), plan)
    again = FakeRunner()
    run_job(office(home, registry, again), plan)
    assert again.started == ["preview:A<-C"]


def test_a_stopped_network_is_taken_up_again(world: World) -> None:
    home, registry = world
    plan = make_shared_plan(home, "A", "BC")

    def stopped(handle: FakeHandle) -> Any:
        raise Interrupted("stopped as asked")

    with pytest.raises(Interrupted):
        run_job(office(home, registry, FakeRunner({"shared": stopped})), plan)
    again = FakeRunner()
    run_job(office(home, registry, again), plan)
    assert again.started[0] == "shared:A, B, C"
    assert set(again.started[1:]) == {"preview:A<-B", "preview:A<-C"}


def test_a_registry_of_before_keeps_its_pairs(tmp_path: Path) -> None:
    home, registry = fresh(tmp_path)
    plan = make_plan(home)
    from lavatar.platform import ledger, lookup

    ledger.store_plan(registry, home, plan, "x")
    with registry.write() as session:  # back to what revision 0001 made
        for table in ("job_pairs", "homes"):
            session.execute(sa.text(f"DROP TABLE {table}"))
        for table, column in (("jobs", "cancel"), ("jobs", "priority"), ("stages", "warm")):
            session.execute(sa.text(f"ALTER TABLE {table} DROP COLUMN {column}"))
        for column in ("avatar_digest", "actor_digest"):
            session.execute(sa.text(f"ALTER TABLE jobs ADD COLUMN {column} VARCHAR(80) NOT NULL DEFAULT 'd'"))
        for column in ("avatar", "actor"):
            session.execute(sa.text(f"CREATE INDEX ix_jobs_{column} ON jobs ({column})"))
        session.execute(sa.text("UPDATE alembic_version SET version_num = '0001'"))
    registry.close()
    upgraded = open_registry(home)
    assert schema_revision(home) == HEAD
    (pair,) = lookup.job_pairs(upgraded, plan.job_id)
    assert (pair.avatar, pair.actor, pair.avatar_digest) == ("A", "B", "d")


def test_names_in_one_line() -> None:
    assert listed(["b", "a", "b"]) == "b, a"
    many = listed([f"person{i}" for i in range(40)])
    assert len(many) <= 100
    assert many.endswith(", …")


def test_several_people_are_a_job_of_pairs_or_share_a_network(lavatar: Any) -> None:
    for seed, name in enumerate("abc"):
        lavatar("subjects", "add", "--synthetic", str(seed), name)
    several = ("submit", "--avatar", "a", "--avatar", "b", "--actor", "c")
    code, out, _ = lavatar(*several, "--dry-run", "--json")
    assert code == 0
    names = [stage["name"] for stage in json.loads(out)["stages"]]
    assert names[-4:] == ["pair:a<-c", "pair:b<-c", "preview:a<-c", "preview:b<-c"]
    code, out, _ = lavatar(*several, "--shared", "--dry-run", "--json")
    assert code == 0
    dry = json.loads(out)
    assert [stage["name"] for stage in dry["stages"]][-3:] == ["shared:a, b, c", "preview:a<-c", "preview:b<-c"]
    assert (
        lavatar("submit", "--actor", "c", "--avatar", "b", "--avatar", "a", "--shared", "--dry-run", "--json")[1] == out
    )
    code, _, err = lavatar(*several, "--shared", "--recipe", "official", "--dry-run")
    assert code == 2
    assert "--set mapping.joint=false" in err

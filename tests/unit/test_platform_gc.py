"""`lavatar jobs delete` and `lavatar gc`: what nobody needs is freed, what a job needs never."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

from lavatar.contracts import StageKind, VideoSource
from lavatar.errors import StageBusyError
from lavatar.platform import jobs, ledger, lookup, planned, planning
from lavatar.platform.deletion import delete_job
from lavatar.platform.garbage import Item, freed, garbage
from lavatar.platform.home import Home, working_in
from lavatar.platform.jobs import run_job
from lavatar.platform.leases import Owner
from lavatar.platform.modelregistry import Release, register
from lavatar.platform.planning import Plan
from lavatar.platform.registry import Registry, hold_stages, now
from lavatar.platform.storejob import store_job
from lavatar.platform.subjects import add_subject, remove_subject
from lavatar.platform.tables import Artefact, Dataset, Event, JobStage, Stage, Subject
from lavatar.platform.tracking import Tracker, connect
from lavatar.platform.warm import WarmChoice
from lavatar.training.files import file_digest

sys.path.insert(0, str(Path(__file__).parent))
from inference_files import FACE, RECIPE, make_avatar_release
from platform_fakes import (
    FakeRunner,
    NoTracker,
    either,
    fresh,
    make_plan,
    make_plan_of,
    no_models,
    office,
    person,
    plain_digest,
    tiny,
)

__all__ = ["either", "plain_digest"]
pytestmark = pytest.mark.usefixtures("home", "plain_digest")
World = tuple[Home, Registry]


@pytest.fixture
def world(home: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A home whose jobs go without MLflow."""
    monkeypatch.setattr(jobs, "Tracker", NoTracker)
    no_models(monkeypatch)
    monkeypatch.setattr("lavatar.platform.execution.POLL_SECONDS", 0.001)
    monkeypatch.setattr("lavatar.platform.runs.tracked", lambda home: False)
    return fresh(home)


def run(world: World, plan: Plan) -> list[str]:
    """Bring the job to its end; the stages that it ran."""
    runner = FakeRunner()
    run_job(office(*world, runner), plan)
    return runner.started


def collect(world: World) -> list[Item]:
    """What `lavatar gc` frees."""
    told: list[str] = []
    gone = [item for item in garbage(*world, told.append) if freed(item, told.append)]
    assert told == []
    return gone


def names(items: list[Item]) -> list[str]:
    return sorted(item.what.removeprefix("stage ").partition(" ")[0] for item in items)


def folders(home: Home) -> set[str]:
    return {folder.name for folder in home.stage_dirs()}


SETS = ("AB", "AC", "DB", "BA")


@pytest.mark.parametrize("kept", [(), ("AB",), ("BA",), ("AC", "DB"), ("AB", "AC", "BA")], ids=",".join)
def test_what_a_job_needs_is_never_freed(world: World, kept: tuple[str, ...]) -> None:
    """Of four jobs that share stages some are deleted: the others find all of theirs, and nothing else is left."""
    home, registry = world
    plans = {pairs: make_plan_of(home, pairs) for pairs in SETS}
    for plan in plans.values():
        run(world, plan)
    for pairs in set(SETS).difference(kept):
        delete_job(registry, plans[pairs].job_id)
    wanted = {stage.key for pairs in kept for stage in plans[pairs].stages}
    items = garbage(home, registry, print)
    assert len(items) == len({s.key for p in plans.values() for s in p.stages}) - len(wanted)
    assert all(freed(item, print) for item in items)
    assert folders(home) == wanted
    with registry.read() as session:
        assert set(session.scalars(select(Stage.key))) == wanted
        assert {row.stage_key for row in session.scalars(select(Artefact))} == wanted
        assert {row.key for row in session.scalars(select(Dataset))} <= wanted
        assert {row.job_id for row in session.scalars(select(Event))} == {plans[pairs].job_id for pairs in kept}
    for pairs in kept:
        assert run(world, make_plan_of(home, pairs)) == []
    assert garbage(home, registry, print) == []


def test_the_command_lines(world: World, lavatar: Any, home: Path) -> None:
    place, _ = world
    plan = make_plan(place)
    run(world, plan)
    run(world, make_plan(place, "A", "C"))
    (home / "logs" / f"{plan.stages[1].key}.log").write_text("y" * 5000)
    code, out, _ = lavatar("gc", "--dry-run")
    assert (code, out) == (0, "nothing to free: every file belongs to a job\n")
    code, out, err = lavatar("jobs", "delete", plan.job_id[:6])
    assert (code, out) == (0, f"deleted job {plan.job_id} (A <- B)\n")
    assert "3 of its stages are needed by no other job: lavatar gc --dry-run" in err
    assert lavatar("jobs", "delete", plan.job_id)[0] == 2
    assert lavatar("jobs", "show", plan.job_id)[0] == 2
    before = folders(place)
    shown = json.loads(lavatar("gc", "--dry-run", "--json")[1])
    sizes = {row["what"].split()[1]: row["bytes"] for row in shown["items"]}
    assert sizes.keys() == {"preprocess:B", "pair:A<-B", "preview:A<-B"}
    assert sizes["preview:A<-B"] == 3
    assert sizes["preprocess:B"] > 5000, "its log is counted"
    assert shown["bytes"] == sum(sizes.values())
    assert folders(place) == before, "a dry run frees nothing"
    code, out, err = lavatar("gc", "--dry-run")
    assert code == 0
    assert out.splitlines()[-1].endswith("can be freed (3 things)")
    code, out, err = lavatar("gc")
    assert code == 0
    assert out.splitlines()[-1] == f"{shown['bytes'] / 1000:.1f} kB were freed (3 things)"
    assert "freeing: 1/3 things" in err
    assert len(before - folders(place)) == 3
    assert not list((home / "logs").iterdir())
    assert json.loads(lavatar("gc", "--json")[1]) == {"dry_run": False, "freed": [], "bytes": 0, "left": 0}


def test_a_job_that_runs_is_not_deleted_and_its_stages_are_not_freed(world: World, lavatar: Any) -> None:
    home, registry = world
    plan, owner = make_plan(home), Owner.current()
    run(world, plan)
    ledger.claim_job(registry, plan.job_id, owner)
    with pytest.raises(StageBusyError, match="cannot be deleted: process"):
        delete_job(registry, plan.job_id)
    assert lavatar("jobs", "delete", plan.job_id)[0] == 1
    ledger.end_job(registry, plan.job_id, owner, ledger.State.FINISHED)
    with registry.write() as session:  # a stage that somebody works on although no job has it any more
        session.add(Stage(key="a" * 64, kind="avatar", name="avatar:X", out_dir="checkpoints/x", created=now()))
    ledger.claim_stage(registry, "a" * 64, owner, plan.job_id)
    delete_job(registry, plan.job_id)
    assert delete_job(registry, plan.job_id) == []
    assert "avatar:X" not in names(collect(world))
    ledger.end_stage(registry, "a" * 64, owner, ledger.State.INTERRUPTED)
    assert names(collect(world)) == ["avatar:X"]


def test_the_pair_that_a_pair_began_at_is_kept(world: World) -> None:
    """The key of a pair says where it began: without that place its job would not find it again."""
    home, registry = world

    def warm_plan(actor: str) -> Plan:
        people = [person(name, ord(name)) for name in ("A", actor)]
        return planning.plan(
            home.root, home.out_dir, [(people[0], people[1])], tiny(), WarmChoice(registry, home, tiny())
        )

    first = warm_plan("B")
    run(world, first)
    second = warm_plan("C")
    assert second.pairs[0].warm is not None
    assert second.pairs[0].warm.key == first.pairs[0].bridge.key
    run(world, second)
    delete_job(registry, first.job_id)
    assert names(collect(world)) == ["preprocess:B", "preview:A<-B"]
    again = warm_plan("C")
    assert again.job_id == second.job_id
    assert run(world, again) == []
    delete_job(registry, second.job_id)
    assert {"pair:A<-B", "pair:A<-C"} <= set(names(collect(world))), "no job needs the place any more"
    assert folders(home) == set()


def test_what_no_row_and_no_benchmark_names_is_freed(world: World, home: Path) -> None:
    place, registry = world
    shown, lost, log = "a" * 64, "b" * 64, home / "logs" / f"{'c' * 64}.log"
    for key in (shown, lost):
        (home / "checkpoints" / key / "release").mkdir(parents=True)
        (home / "checkpoints" / key / "release" / "config.json").write_text("{}")
    runs = home / "outputs" / "benchmark" / "runs"
    runs.mkdir(parents=True)
    (runs / "row.json").write_text(json.dumps({"release": f"checkpoints/{shown}/release", "dataset": "shards/x"}))
    log.write_text("x")
    evaluation = home / "outputs" / "evaluation" / "A" / "index.html"
    evaluation.parent.mkdir(parents=True)
    evaluation.write_text("x")
    part = home / "outputs" / f".{lost}.1.part"
    part.mkdir()
    with working_in(place):
        assert garbage(place, registry, print) == [], "a benchmark may be at it"
    assert {item.where for item in collect(world)} == {str(home / "checkpoints" / lost), str(log), str(part)}
    assert folders(place) == {shown}
    assert evaluation.exists()
    assert not part.exists()


def test_what_is_freed_is_gone_from_the_store_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    home, registry = world
    plans = {actor: make_plan(home, "A", actor) for actor in "BC"}
    for plan in plans.values():
        run(world, plan)
    monkeypatch.setenv("LAVATAR_STORE", (home.root / "store").as_uri())
    store = home.store()
    assert store is not None
    for stage in {stage.key: stage for plan in plans.values() for stage in plan.stages}.values():
        (stage.spec.out_dir / "result.json").write_text(json.dumps({"key": stage.key}))
        store.publish(stage.spec)
        store.finish(stage.spec)
    store.objects.write(f"stages/{'f' * 64}/result.json", b"another home's")
    delete_job(registry, plans["B"].job_id)
    preview = next(item for item in garbage(home, registry, print) if "preview" in item.what)
    assert preview.bytes == 2 * 3 + len(json.dumps({"key": "f" * 64})), "on this disk and in the store"
    assert len(collect(world)) == 3
    kept = {stage.key for stage in plans["C"].stages}
    assert set(store.objects.names("stages")) == {*kept, "f" * 64}
    assert ledger.finished(registry, home, [stage.key for plan in plans.values() for stage in plan.stages]) == kept


def test_a_video_is_freed_when_its_person_and_their_jobs_are_gone(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From the store, and the copy that a node fetched; another home's, in the same store, stays."""
    home, registry = world
    monkeypatch.setenv("LAVATAR_STORE", (tmp_path / "store").as_uri())
    store, subjects = home.store(), {}
    assert store is not None
    for name in ("ann", "bob"):
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(name.encode() * 1000)
        subjects[name] = Subject(name=name, kind="video", digest=file_digest(path), path=str(path), created=now())
        add_subject(registry, subjects[name])
    people = [planned.person(subject) for subject in subjects.values()]
    plan = planning.plan(home.root, home.out_dir, [(people[0], people[1])], tiny())
    monkeypatch.setattr("lavatar.platform.storejob.require_weights", lambda stages: None)
    for _ in range(2):
        store_job(registry, home, plan, print)
    digests = {name: subject.digest for name, subject in subjects.items()}
    assert set(store.objects.names("videos")) == set(digests.values())
    store.keep_video(VideoSource("far", tmp_path / "ann.mp4", digest="f" * 64))
    copy = home.root / "videos" / digests["bob"] / "bob.mp4"
    copy.parent.mkdir(parents=True)
    shutil.copy(tmp_path / "bob.mp4", copy)

    remove_subject(registry, "bob")
    assert collect(world) == [], "a job has the video: its dataset may have to be made again"
    delete_job(registry, plan.job_id)
    found = [item for item in collect(world) if "video" in item.what]
    assert [(item.where, item.bytes) for item in found] == [
        (str(copy.parent), 3000),
        (f"{store.objects.url}/videos/{digests['bob']}", 3000),
    ]
    assert set(store.objects.names("videos")) == {digests["ann"], "f" * 64}
    assert not copy.parent.exists()
    assert garbage(home, registry, print) == []

    remove_subject(registry, "ann")
    (item,) = garbage(home, registry, print)
    add_subject(registry, Subject(name="eve", kind="video", digest=digests["ann"], path="x", created=now()))
    assert not item.free(), "somebody has it again"
    assert set(store.objects.names("videos")) == {digests["ann"], "f" * 64}
    remove_subject(registry, "eve")
    assert item.free()
    assert store.objects.names("videos") == ["f" * 64]
    assert garbage(home, registry, print) == []
    store_job(registry, home, plan, print)
    assert len(store.objects.names("videos")) == 3, "a new submit stores them again"


def test_a_killed_gc_leaves_what_the_next_one_frees(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    home, registry = world
    plan = make_plan(home)
    run(world, plan)
    delete_job(registry, plan.job_id)

    class Killed(BaseException):
        pass

    def kill(path: object) -> None:
        raise Killed

    item = next(item for item in garbage(home, registry, print) if "avatar:A" in item.what)
    with monkeypatch.context() as patch:
        patch.setattr("lavatar.platform.garbage.shutil.rmtree", kill)
        with pytest.raises(Killed):
            item.free()
    (part,) = home.root.glob("checkpoints/.*.part")
    assert lookup.get_stage(registry, part.name[1:65]) is None
    collect(world)
    assert not part.exists()


def test_a_submit_that_counted_on_a_stage_freed_meanwhile_does_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, registry = world
    plan = make_plan(home)
    run(world, plan)
    delete_job(registry, plan.job_id)
    store = ledger.store_plan

    def freed_before(*args: Any) -> None:
        assert len(collect(world)) == 5
        store(*args)

    monkeypatch.setattr(ledger, "store_plan", freed_before)
    todo = store_job(registry, home, plan, print)
    assert [stage.key for stage in todo] == [stage.key for stage in plan.stages]


@pytest.fixture
def busy_world(either: str, world: World) -> Iterator[World]:
    """The home with a registry of each kind."""
    yield world
    world[1].close()


def test_planning_and_freeing_at_the_same_moment(busy_world: World) -> None:
    """One thread submits and deletes a job, again and again, another frees: no job is without one of its stages."""
    home, registry = busy_world
    plan, errors, rounds = make_plan(home), [], [0, 0]
    end = time.monotonic() + 30

    def going() -> bool:
        return min(rounds) < 4 and time.monotonic() < end and not errors

    def submit() -> None:
        while going():
            ledger.store_plan(registry, home, plan, "x")
            with registry.read() as session:
                linked = set(session.scalars(select(JobStage.stage_key)))
                present = set(session.scalars(select(Stage.key)))
            assert {stage.key for stage in plan.stages} == linked <= present
            delete_job(registry, plan.job_id)
            rounds[0] += 1

    def free() -> None:
        while going():
            rounds[1] += len([item for item in garbage(home, registry, print) if item.free()])

    def guarded(work: Any) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in (submit, free)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert min(rounds) >= 4


def test_freeing_waits_for_a_plan_that_is_being_stored(busy_world: World) -> None:
    home, registry = busy_world
    plan = make_plan(home)
    ledger.store_plan(registry, home, plan, "x")
    delete_job(registry, plan.job_id)
    item, done = garbage(home, registry, print)[0], threading.Event()

    def free() -> None:
        item.free()
        done.set()

    with registry.write() as session:
        hold_stages(session)
        assert session.scalars(select(Stage.key)).all()
        thread = threading.Thread(target=free)
        thread.start()
        assert not done.wait(0.3)
    thread.join(30)
    assert done.is_set()


def test_runs_of_deleted_jobs_go_and_registered_models_stay(home: Path) -> None:
    """The real MLflow. A run of another home, a benchmark's and that of a registered model are kept."""
    import mlflow.pyfunc

    from lavatar.platform.benchmark import EXPERIMENT

    place, registry = fresh(home)
    tracker = Tracker(place, print)
    plan = make_plan(place)
    ledger.store_plan(registry, place, plan, "lavatar/A<-B")
    job = lookup.get_job(registry, plan.job_id)
    run_id = tracker.open_job("lavatar/A<-B", job.id, None, {})
    ledger.set_run(registry, job, run_id, open_=False)
    avatar = plan.stages[2]
    row = lookup.get_stage(registry, avatar.key)
    assert row is not None
    stage_run = tracker.open_stage("lavatar/A<-B", avatar.name, None, run_id, {})
    ledger.set_run(registry, row, stage_run, open_=False)
    figures = home / "figures.json"
    figures.write_text("x" * 2000)
    tracker.log_result(run_id, {}, {"figures": figures})
    model = {"avatar": make_avatar_release(avatar.spec.out_dir / "release")}
    release = Release(StageKind.AVATAR, avatar.key, "lavatar-avatar-A", model, RECIPE.avatar.image_size, FACE)
    assert register(place, tracker, release, stage_run, print) == 1
    shown = tracker.open_job(EXPERIMENT, "row", None, {})
    foreign = connect(place).create_run(connect(place).get_experiment_by_name("lavatar/A<-B").experiment_id)
    for run in (run_id, shown):
        tracker.end(run, ledger.State.FINISHED)
    assert garbage(place, registry, print) == []
    for run in (run_id, shown, "0" * 32):
        place.unsent(run).write_text('["total", 0.5, 1, 1]\n')
    (unsent,) = garbage(place, registry, print)
    assert unsent.where == str(place.unsent("0" * 32)), "its run is gone, and no job's"
    delete_job(registry, job.id)
    assert (items := [item for item in garbage(place, registry, print) if item.what.startswith("MLflow")])
    assert [(item.what.split(" (")[0], item.bytes) for item in items] == [(f"MLflow run 'job {job.id}'", 2000)]
    assert collect((place, registry))
    assert folders(place) == set()
    assert list(place.unsent_files()) == [shown], "those of a run that stays can still be sent"
    client = connect(place)
    lifecycle = {run: client.get_run(run).info.lifecycle_stage for run in (run_id, stage_run, shown)}
    assert lifecycle == {run_id: "deleted", stage_run: "active", shown: "active"}
    assert client.get_run(foreign.info.run_id).info.lifecycle_stage == "active"
    assert not list(place.mlartifacts.rglob("figures.json"))
    assert garbage(place, registry, print) == []
    faces = np.full((1, FACE, FACE, 3), 128, np.uint8)
    assert len(mlflow.pyfunc.load_model("models:/lavatar-avatar-A@latest").predict(faces)) == 1
    client.delete_registered_model("lavatar-avatar-A")
    (item,) = collect((place, registry))
    assert item.what.startswith("MLflow run 'avatar:A'"), "nobody has registered it any more"
    assert item.bytes > 1000
    assert not list(place.mlartifacts.rglob("*.safetensors"))


def test_what_cannot_be_removed_is_told(world: World, lavatar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    home, registry = world
    plan = make_plan(home)
    run(world, plan)
    delete_job(registry, plan.job_id)

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(source))

    monkeypatch.setattr(os, "replace", refuse)
    code, out, err = lavatar("gc")
    assert (code, out) == (1, "")
    assert err.count("is not freed: ") == 5
    assert "Permission denied" in err
    monkeypatch.undo()
    assert lookup.get_stage(registry, plan.stages[0].key) is not None, "nothing was forgotten either"

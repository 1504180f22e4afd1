"""What finished jobs left: of many pairs, of several names for one video, of an older lavatar."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from lavatar.errors import JobError
from lavatar.platform import jobs, lookup, planning
from lavatar.platform.commands.evaluate import run_of
from lavatar.platform.finished import find_avatar, find_pair
from lavatar.platform.home import Home
from lavatar.platform.jobs import run_job
from lavatar.platform.planning import Plan
from lavatar.platform.registry import Registry
from lavatar.platform.tables import Job

sys.path.insert(0, str(Path(__file__).parent))
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
World = tuple[Home, Registry, Plan]


@pytest.fixture
def world(tmp_path: Path, home: Path, plain_digest: None, monkeypatch: pytest.MonkeyPatch) -> World:
    """A finished job of A driven by B."""
    monkeypatch.setattr(jobs, "Tracker", NoTracker)
    no_models(monkeypatch)
    monkeypatch.setattr("lavatar.platform.execution.POLL_SECONDS", 0.01)
    monkeypatch.setattr("lavatar.platform.home.Home.tracking_uri", "none")
    place, registry = fresh(tmp_path)
    plan = make_plan(place)
    run_job(office(place, registry, FakeRunner()), plan)
    return place, registry, plan


def rewrite(world: World, **sections: dict[str, Any]) -> None:
    """The stored recipe with these keys in its sections, as another lavatar wrote it."""
    _, registry, plan = world
    with registry.write() as session:
        job = session.get(Job, plan.job_id)
        assert job is not None
        job.recipe = {**job.recipe, **{k: {**job.recipe.get(k, {}), **v} for k, v in sections.items()}}


def test_each_pair_of_a_job_of_many_finds_its_own_models(either: str, world: World) -> None:
    place, registry, _ = world
    plan = make_plan_of(place, "AC AD BC BD")
    run_job(office(place, registry, FakeRunner()), plan)
    found = [find_pair(registry, place, pair.avatar.name, pair.actor.name) for pair in plan.pairs]
    assert [one.pair for one in found] == [pair.release for pair in plan.pairs]
    assert len({one.pair for one in found}) == 4
    for one, pair in zip(found, plan.pairs, strict=True):
        assert one.avatar == pair.head.spec.out_dir / "release"
        inputs = pair.preview.spec.inputs
        assert (one.avatar_data, one.actor_data) == (inputs["avatar_dataset"], inputs["actor_dataset"])
    assert find_avatar(registry, place, "B").avatar == plan.pairs[2].head.spec.out_dir / "release"


def test_names_of_one_video_find_the_same_models(either: str, world: World) -> None:
    place, registry, _ = world
    one, two, other = person("one", 7), person("two", 7), person("C", 8)
    plan = planning.plan(place.root, place.out_dir, [(one, other), (two, other), (other, two)], tiny())
    run_job(office(place, registry, FakeRunner()), plan)
    pair = next(pair for pair in plan.pairs if pair.avatar.name == "one")
    for name in ("one", "two"):
        found = find_pair(registry, place, name, "C")
        assert found.pair == pair.release
        assert found.avatar_data == pair.preview.spec.inputs["avatar_dataset"]
        assert find_avatar(registry, place, name).avatar == pair.head.spec.out_dir / "release"
        runs = {view.stage.key: view.stage.mlflow_run_id for view in lookup.job_stages(registry, plan.job_id)}
        assert run_of(registry, plan.job_id, name, "C") == runs[pair.preview.key]
        assert run_of(registry, plan.job_id, name, None) == runs[pair.head.key]
    assert find_pair(registry, place, "C", "two").actor_data == found.avatar_data


def test_keys_that_are_gone_are_left_out(world: World) -> None:
    place, registry, plan = world
    rewrite(world, sky={"colour": "blue"}, avatar={"wings": 2, "samples": 7}, resources={"avatar": {"tpus": 1}})
    for found in (find_avatar(registry, place, "A"), find_pair(registry, place, "A", "B")):
        assert found.job == plan.job_id
        assert found.recipe.avatar.samples == 7
        assert found.recipe.ynet == plan.recipe.ynet
        assert found.recipe.evaluation == plan.recipe.evaluation


def test_values_that_mean_nothing_any_more_are_told(world: World) -> None:
    place, registry, _ = world
    rewrite(world, avatar={"samples": "many"})
    with pytest.raises(JobError, match=r"made by another lavatar: avatar\.samples of its recipe") as caught:
        find_pair(registry, place, "A", "B")
    assert caught.value.hint == "Make it again: lavatar submit --avatar A --actor B"

"""Finished jobs of an older lavatar: their recipes have keys that are gone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from lavatar.errors import JobError
from lavatar.platform import jobs, registering
from lavatar.platform.finished import find_avatar, find_pair
from lavatar.platform.home import Home
from lavatar.platform.jobs import run_job
from lavatar.platform.planning import Plan
from lavatar.platform.registry import Registry
from lavatar.platform.tables import Job

sys.path.insert(0, str(Path(__file__).parent))
from platform_fakes import FakeRunner, NoTracker, fresh, make_plan, office, plain_digest

__all__ = ["plain_digest"]
World = tuple[Home, Registry, Plan]


@pytest.fixture
def world(tmp_path: Path, home: Path, plain_digest: None, monkeypatch: pytest.MonkeyPatch) -> World:
    """A finished job of A driven by B."""
    monkeypatch.setattr(jobs, "Tracker", NoTracker)
    monkeypatch.setattr(registering, "register", lambda home, tracker, release, run_id, warn: 1)
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

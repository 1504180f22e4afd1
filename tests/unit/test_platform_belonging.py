"""Machines that share a registry share the home or a store: another home's results are not taken for lost."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lavatar.errors import StorageError
from lavatar.platform import jobs, ledger, lookup
from lavatar.platform.belonging import belong
from lavatar.platform.home import Home
from lavatar.platform.jobs import run_job
from lavatar.platform.registry import Registry, open_registry

sys.path.insert(0, str(Path(__file__).parent))
from platform_fakes import NoTracker, make_plan, no_models, office, plain_digest
from repair_files import solid_runner

__all__ = ["plain_digest"]
World = tuple[Home, Home, Registry]


@pytest.fixture
def world(tmp_path: Path, plain_digest: None, monkeypatch: pytest.MonkeyPatch) -> World:
    """Two homes with one registry, in the first of which a job has finished."""
    monkeypatch.setattr(jobs, "Tracker", NoTracker)
    no_models(monkeypatch)
    monkeypatch.setattr("lavatar.platform.execution.POLL_SECONDS", 0.01)
    monkeypatch.setenv("LAVATAR_REGISTRY", f"sqlite:///{tmp_path / 'shared.db'}")
    here, there = Home(tmp_path / "here"), Home(tmp_path / "there")
    for home in (here, there):
        home.ensure()
    registry = open_registry(here)
    assert submit(here, registry) == ["preprocess:A", "preprocess:B", "avatar:A", "pair:A<-B", "preview:A<-B"]
    return here, there, registry


def submit(home: Home, registry: Registry) -> list[str]:
    """The stages that the same submit in that home runs."""
    runner = solid_runner()
    run_job(office(home, registry, runner), make_plan(home))
    return sorted(runner.started, key=order)


def order(stage: str) -> tuple[int, str]:
    """As they depend on each other."""
    return ["preprocess", "avatar", "pair", "preview"].index(stage.partition(":")[0]), stage


def finished(home: Home, registry: Registry) -> int:
    keys = [stage.key for stage in make_plan(home).stages]
    return len(ledger.finished(registry, home, keys))


def test_a_home_that_does_not_hold_the_results_is_refused_and_loses_nothing(world: World) -> None:
    here, there, registry = world
    with pytest.raises(StorageError, match=f"lie in {here.root} on .* and not in this home, {there.root}") as caught:
        submit(there, registry)
    assert "LAVATAR_STORE" in caught.value.hint
    assert "lavatar doctor --repair --adopt" in caught.value.hint
    states = {view.stage.state for view in lookup.job_stages(registry, make_plan(here).job_id)}
    assert (states, finished(here, registry)) == ({"finished"}, 5)
    assert submit(here, registry) == [], "nothing is to be done again"


def test_a_home_is_made_before_it_is_asked_for_its_name(tmp_path: Path) -> None:
    """With a registry on a server nothing has made it before the first job."""
    new = Home(tmp_path / "new" / "home")
    name = new.identity()
    assert name == new.identity() == Home(new.root).identity()
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"):
        Home(tmp_path / "file").identity()


def test_doctor_leaves_them_and_adopts_them_when_told(
    world: World, lavatar: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there, registry = world
    monkeypatch.setenv("LAVATAR_HOME", str(there.root))
    code, out, _ = lavatar("doctor", "--repair", "--json")
    (found,) = json.loads(out)["findings"]
    assert (code, found["mended"]) == (1, False)
    assert f"results lie in {here.root} on " in found["what"]
    assert finished(here, registry) == 5
    assert lavatar("doctor", "--adopt")[0] == 2
    code, out, _ = lavatar("doctor", "--repair", "--adopt", "--json")
    assert next(found["mended"] for found in json.loads(out)["findings"]) is True
    assert len(submit(there, registry)) == 5, "all is made again in the home that is left"
    with pytest.raises(StorageError, match=f"lie in {there.root}"):
        submit(here, registry)


def test_with_a_store_they_are_shared(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, there, registry = world
    monkeypatch.setenv("LAVATAR_STORE", (tmp_path / "store").as_uri())
    belong(registry, there)
    assert finished(there, registry) == 0, "nothing was stored yet"
    monkeypatch.delenv("LAVATAR_STORE")
    for home, other in world[:2], world[1::-1]:
        with pytest.raises(StorageError, match=f"lie in {other.root} on .* and not in this home"):
            submit(home, registry)


def test_a_home_that_is_gone_from_this_machine_or_was_moved_keeps_nobody_out(world: World) -> None:
    here, there, registry = world
    moved = Home(here.root.with_name("moved"))
    here.root.rename(moved.root)
    assert submit(moved, registry) == [], "it has its name with it"
    shutil.rmtree(moved.root)
    assert len(submit(there, registry)) == 5


def test_a_registry_in_the_home_is_the_homes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _, there, _ = world
    monkeypatch.delenv("LAVATAR_REGISTRY")
    assert len(submit(there, open_registry(there))) == 5

"""Jobs that are cancelled, resumed and retried: from another process, from the registry alone, twice over."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lavatar.cluster import head
from lavatar.contracts import StageKind, StageResult, StageSpec
from lavatar.errors import FaceError, JobError, StageFailedError, UnknownSubjectError
from lavatar.platform import jobs, ledger, lookup, storejob
from lavatar.platform.home import Home
from lavatar.platform.jobs import run_job
from lavatar.platform.leases import Owner
from lavatar.platform.planned import make_plan, stored_plan
from lavatar.platform.planning import METHOD_VERSION, Plan
from lavatar.platform.registry import Registry, open_registry
from lavatar.platform.states import State
from lavatar.platform.subjects import add_subject, describe_synthetic, remove_subject

sys.path.insert(0, str(Path(__file__).parent))
from platform_fakes import (
    FakeHandle,
    FakeRunner,
    NoTracker,
    fresh,
    make_plan_of,
    no_models,
    office,
    plain_digest,
    start_driver,
    tiny,
)

__all__ = ["plain_digest"]
pytestmark = pytest.mark.usefixtures("plain_digest", "home", "quick")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "Tracker", NoTracker)
    no_models(monkeypatch)
    monkeypatch.setattr(jobs, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr("lavatar.platform.execution.POLL_SECONDS", 0.01)
    monkeypatch.setattr("lavatar.platform.home.Home.tracking_uri", "none")


@pytest.fixture
def world(tmp_path: Path) -> tuple[Home, Registry]:
    return fresh(tmp_path)


def test_a_cancel_from_another_process_stops_the_job_and_a_second_one_changes_nothing(tmp_path: Path) -> None:
    process = start_driver(tmp_path)
    home, registry = Home(tmp_path), open_registry(Home(tmp_path))
    plan = make_plan_of(home, "AB")
    assert ledger.cancel_job(registry, plan.job_id) is State.RUNNING
    assert ledger.cancel_job(registry, plan.job_id) is State.RUNNING
    process.join(30)
    assert process.exitcode == 130
    job = lookup.get_job(registry, plan.job_id)
    assert (job.state, job.hint) == ("cancelled", f"Take it up again: lavatar jobs resume {plan.job_id}")
    states = {view.name: view.stage.state for view in lookup.job_stages(registry, plan.job_id)}
    assert (states["preprocess:A"], states["avatar:A"], states["pair:A<-B"]) == ("finished", "interrupted", "pending")
    assert ledger.cancel_job(registry, plan.job_id) is State.CANCELLED
    runner = FakeRunner()
    run_job(office(home, registry, runner), plan)
    assert runner.started == ["avatar:A", "pair:A<-B", "preview:A<-B"], "what was asked of the first attempt is over"
    assert ledger.cancel_job(registry, plan.job_id) is State.FINISHED


def test_a_job_whose_process_died_is_cancelled_at_once(tmp_path: Path) -> None:
    process = start_driver(tmp_path)
    process.kill()
    process.join()
    registry = open_registry(Home(tmp_path))
    assert ledger.cancel_job(registry, make_plan_of(Home(tmp_path), "AB").job_id) is State.CANCELLED


@pytest.mark.parametrize("seen", ["pending", "failed"])
def test_a_job_that_nobody_runs_is_cancelled_at_once(world: tuple[Home, Registry], seen: str) -> None:
    home, registry = world
    plan = make_plan_of(home, "AB")
    ledger.store_plan(registry, home, plan, "x")
    if seen == "failed":
        with pytest.raises(StageFailedError):
            run_job(office(home, registry, FakeRunner({"avatar": broken})), plan)
    assert lookup.get_job(registry, plan.job_id).state == seen
    assert ledger.cancel_job(registry, plan.job_id) is State.CANCELLED


def broken(handle: FakeHandle) -> StageResult:
    raise FaceError("no face")


def planned(world: tuple[Home, Registry], pairs: str, *overrides: str, shared: bool = False) -> Plan:
    """A job as submit plans it, written down and not run; each letter is a synthetic person."""
    home, registry = world
    people = {name: add_subject(registry, describe_synthetic(name, ord(name)))[0] for name in sorted({*pairs} - {" "})}
    named = [(people[a], people[b]) for a, b in pairs.split()]
    plan = make_plan(home, registry, named, tiny(*overrides), shared)
    ledger.store_plan(registry, home, plan, "x")
    return plan


@pytest.mark.parametrize(("pairs", "shared"), [("ab", False), ("ab ac db", False), ("ac bc", True)])
def test_a_stored_job_is_planned_as_it_was_submitted(world: tuple[Home, Registry], pairs: str, shared: bool) -> None:
    home, registry = world
    plan = planned(world, pairs, "avatar_training.steps=77", shared=shared)
    again, people = stored_plan(home, registry, lookup.get_job(registry, plan.job_id))
    assert [(s.key, s.name) for s in again.stages] == [(s.key, s.name) for s in plan.stages]
    assert again.recipe.avatar_training.steps == 77
    assert {person.name for person in people} == {*pairs} - {" "}


def test_a_job_whose_people_are_others_today_is_not_taken_up(world: tuple[Home, Registry]) -> None:
    home, registry = world
    plan = planned(world, "ab cb")
    remove_subject(registry, "b")
    job = lookup.get_job(registry, plan.job_id)
    with pytest.raises(UnknownSubjectError, match="no subject 'b'"):
        stored_plan(home, registry, job)
    add_subject(registry, describe_synthetic("b", 7))
    with pytest.raises(JobError, match="'b' is another video than when job") as caught:
        stored_plan(home, registry, job)
    assert caught.value.hint == "Submit it anew: lavatar submit --avatar a --avatar c --actor b"


def test_a_job_of_another_lavatar_is_not_taken_up(
    world: tuple[Home, Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, registry = world
    plan = planned(world, "ab cd")
    monkeypatch.setattr("lavatar.platform.planning.METHOD_VERSION", {**METHOD_VERSION, StageKind.AVATAR: 99})
    with pytest.raises(JobError, match="made by another lavatar") as caught:
        stored_plan(home, registry, lookup.get_job(registry, plan.job_id))
    assert caught.value.hint == "Submit it anew: lavatar submit --pairs FILE.yaml", "not every avatar has every actor"


@pytest.mark.parametrize("verb", ["resume", "retry"])
def test_the_command_line_takes_a_job_up_once(
    lavatar: Any, home: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Home.from_environment()
    registry = open_registry(place)
    plan = planned((place, registry), "ab")
    runner = FakeRunner()
    monkeypatch.setattr("lavatar.cluster.stages.StageRunner", lambda *args, **options: runner.open())
    code, out, _ = lavatar("jobs", "cancel", plan.job_id[:6], "--json")
    assert (code, json.loads(out)) == (0, {"job": plan.job_id, "state": "cancelled", "cancel_asked": False})
    assert lavatar("jobs", "cancel", plan.job_id)[1] == f"job {plan.job_id} is cancelled\n"
    assert json.loads(lavatar("jobs", "list", "--json")[1])["jobs"][0]["state"] == "cancelled"
    code, out, err = lavatar("jobs", verb, plan.job_id[:6], "--json")
    assert code == 0, err
    assert json.loads(out)["state"] == "finished"
    assert len(runner.started) == 5
    code, out, _ = lavatar("jobs", verb, plan.job_id)
    assert (code, len(runner.started)) == (0, 5), "finished: nothing is run again"
    assert f"job {plan.job_id} finished" in out
    assert lavatar("jobs", "cancel", plan.job_id)[1] == f"job {plan.job_id} is finished\n"
    assert lavatar("jobs", verb, "nosuch")[0] == 2


class Asked(FakeRunner):
    """Remembers with what priority it was asked whose turn it is."""

    def admit(self, priority: int, ready: Sequence[StageSpec], running: Sequence[StageSpec]) -> list[str]:
        self.priorities.add(priority)
        return super().admit(priority, ready, running)

    def __init__(self) -> None:
        super().__init__()
        self.priorities: set[int] = set()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """In place of the cluster, for the command line."""
    runner = Asked()
    monkeypatch.setattr("lavatar.cluster.stages.StageRunner", lambda *args, **options: runner.open())
    return runner


def submit(lavatar: Any, *more: str) -> dict[str, Any]:
    """A job of two synthetic people; what the command line says of it."""
    for seed, name in enumerate(("ann", "bob")):
        lavatar("subjects", "add", "--synthetic", str(seed), name)
    code, out, err = lavatar(
        "submit", "--avatar", "ann", "--actor", "bob", "--set", "avatar_loss.lambda_vgg=0", "--json", *more
    )
    assert code == 0, err
    answer: dict[str, Any] = json.loads(out)
    return answer


def priority_of(lavatar: Any, job: str) -> int:
    return int(json.loads(lavatar("jobs", "show", job, "--json")[1])["priority"])


def test_the_priority_of_a_submit_comes_to_the_queue(lavatar: Any, asked: Asked) -> None:
    job = submit(lavatar, "--priority", "3")["job"]
    assert asked.priorities == {3}
    assert priority_of(lavatar, job) == 3
    assert submit(lavatar)["job"] == job
    assert priority_of(lavatar, job) == 3, "as it was"
    submit(lavatar, "--priority", "-1")
    assert priority_of(lavatar, job) == -1


def test_nothing_said_is_priority_0(lavatar: Any, asked: Asked) -> None:
    assert priority_of(lavatar, submit(lavatar)["job"]) == 0
    assert asked.priorities == {0}


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Mapping[str, str]]]:
    """What is handed to a cluster that seems to be up: commands, and the variables that they are to have."""
    found: list[tuple[str, Mapping[str, str]]] = []

    def take(root: Path, cluster: head.Head, name: str, command: str, environment: Mapping[str, str]) -> str:
        found.append((command, environment))
        return name

    monkeypatch.setattr(head, "current", lambda root: head.Head("here:1", "http://here", "here"))
    monkeypatch.setattr(head, "nodes", lambda *args: [{"alive": True, "resources": {"CPU": 8, "memory": 2**34}}])
    monkeypatch.setattr(head, "submissions", lambda *args: [])
    monkeypatch.setattr(head, "submit", take)
    return found


def test_a_cancel_while_the_cluster_begins_with_a_job_is_kept(
    lavatar: Any, asked: Asked, handed: list[tuple[str, Mapping[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its driver has looked whether it was cancelled, and writes it down before it claims it."""
    job = submit(lavatar, "--detach")["job"]
    ((command, _),) = handed
    _, _, _, *words = shlex.split(command)
    told: list[State] = []

    def cancelled_meanwhile(registry: Registry, *given: Any) -> Any:
        todo = storejob.store_job(registry, *given)
        if not told:
            told.append(ledger.cancel_job(registry, job))
        return todo

    monkeypatch.setattr(jobs, "store_job", cancelled_meanwhile)
    code, _, err = lavatar(*words)
    assert (code, told) == (130, [State.CANCELLED])
    assert f"job {job} was cancelled" in err
    assert asked.started == []
    row = lookup.get_job(open_registry(Home.from_environment()), job)
    assert (row.state, row.owner, row.mlflow_run_id) == ("cancelled", None, None)
    assert lavatar(*words)[0] == 0, "so does a driver that begins later"
    assert asked.started == []
    told.clear()
    assert lavatar("jobs", "resume", "--detach", job)[0] == 0
    told.append(State.RUNNING)  # nobody cancels it this time
    assert lavatar(*words)[0] == 0
    assert len(asked.started) == 5


def test_a_claim_that_is_done_again_keeps_the_cancel_that_came_between(world: tuple[Home, Registry]) -> None:
    """The answer to its commit was lost."""
    home, registry = world
    plan, owner = make_plan_of(home, "AB"), Owner.current()
    ledger.store_plan(registry, home, plan, "x")
    ledger.claim_job(registry, plan.job_id, owner)
    assert ledger.cancel_job(registry, plan.job_id) is State.RUNNING
    assert ledger.claim_job(registry, plan.job_id, owner).cancel is True


def test_the_priority_of_a_detached_submit_comes_to_the_queue_of_the_cluster(
    lavatar: Any, asked: Asked, handed: list[tuple[str, Mapping[str, str]]]
) -> None:
    """What is handed over is run here, as the cluster would: the job's priority comes by the registry."""
    job = submit(lavatar, "--detach", "--priority", "3")["job"]
    assert (priority_of(lavatar, job), asked.started) == (3, [])
    ((command, _),) = handed
    _, _, module, *words = shlex.split(command)
    assert (module, words) == ("lavatar.platform.cli", ["jobs", "run", job])
    assert lavatar(*words)[0] == 0
    assert asked.priorities == {3}
    assert len(asked.started) == 5


def test_what_a_shell_of_the_cluster_runs_is_what_was_handed_over_word_by_word(
    lavatar: Any,
    handed: list[tuple[str, Mapping[str, str]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray's Jobs API has a shell run the command: so does this test, with paths that a shell would make much of."""
    place = tmp_path / "a b; touch stolen & $(touch stolen) `touch stolen` 'c' \"d\" *"
    home, python = place / "home", place / "python"
    place.mkdir()
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$0" "$@" "$LAVATAR_HOME"\n')
    python.chmod(0o700)
    monkeypatch.setenv("LAVATAR_HOME", str(home))
    monkeypatch.setattr(sys, "executable", str(python))
    job = submit(lavatar, "--detach")["job"]
    ((command, variables),) = handed
    theirs = {"PATH": os.defpath, **variables}
    done = subprocess.run(command, shell=True, env=theirs, cwd=tmp_path, capture_output=True, text=True, check=False)
    wanted = [str(python), "-m", "lavatar.platform.cli", "jobs", "run", job, str(home)]
    assert (done.stdout.splitlines(), done.stderr) == (wanted, "")
    assert not list(tmp_path.rglob("stolen"))


def test_a_running_job_is_not_taken_up_twice(lavatar: Any, home: Path) -> None:
    process = start_driver(Home.from_environment().root)
    job = make_plan_of(Home.from_environment(), "AB").job_id
    code, out, _ = lavatar("jobs", "resume", job)
    assert (code, out) == (0, f"job {job} is running already (process {process.pid})\n")
    code, out, _ = lavatar("jobs", "cancel", job)
    assert (code, out) == (0, f"job {job} was asked to stop; see: lavatar jobs show {job}\n")
    process.join(30)
    assert process.exitcode == 130

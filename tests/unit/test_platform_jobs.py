"""The driver of jobs, against a runner of small functions: order, sharing, failures, interruptions, take-over."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from lavatar.cluster.results import read_result, write_result
from lavatar.contracts import Event, StageKind, StageResult, StageSpec
from lavatar.errors import FaceError, Interrupted, JobError, ShardError, StageBusyError, StageFailedError, StorageError
from lavatar.platform import execution, jobs, ledger, lookup
from lavatar.platform.home import Home
from lavatar.platform.ids import by_id
from lavatar.platform.jobs import run_job
from lavatar.platform.leases import Owner
from lavatar.platform.planning import Plan
from lavatar.platform.registering import Registrar
from lavatar.platform.registry import Registry, open_registry
from lavatar.platform.report import report, report_text
from lavatar.platform.states import State

sys.path.insert(0, str(Path(__file__).parent))
from platform_fakes import (
    FakeHandle,
    FakeRunner,
    NoTracker,
    Recorder,
    finish,
    fresh,
    make_plan,
    make_plan_of,
    no_models,
    office,
    plain_digest,
    start_driver,
    until_cancelled,
)

__all__ = ["plain_digest"]
pytestmark = pytest.mark.usefixtures("plain_digest", "home", "no_mlflow")


@pytest.fixture
def no_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "Tracker", NoTracker)
    no_models(monkeypatch)
    monkeypatch.setattr("lavatar.platform.execution.POLL_SECONDS", 0.01)
    monkeypatch.setattr("lavatar.platform.home.Home.tracking_uri", "none")


@pytest.fixture
def world(tmp_path: Path) -> tuple[Home, Registry]:
    return fresh(tmp_path)


def states(registry: Registry, plan: Plan) -> dict[str, str]:
    return {v.name.split(":")[0] + (":B" if v.name == "preprocess:B" else ""): v.stage.state
            for v in lookup.job_stages(registry, plan.job_id)}  # fmt: skip


def test_a_job_runs_in_order_and_its_report_says_all(world: tuple[Home, Registry]) -> None:
    home, registry = world
    plan, runner = make_plan(home), FakeRunner()
    run_job(office(home, registry, runner), plan)
    assert set(runner.started[:2]) == {"preprocess:A", "preprocess:B"}
    assert runner.started[2:] == ["avatar:A", "pair:A<-B", "preview:A<-B"]
    result = report(registry, home, plan.job_id)
    assert result["state"] == "finished"
    assert [s["cached"] for s in result["stages"]] == [False] * 5
    assert result["video"].endswith("preview.mp4")
    assert Path(result["video"]).is_file()
    assert result["still"].endswith("still.png")
    assert result["models"] == [{"name": "lavatar-avatar-A", "version": 1}, {"name": "lavatar-pair-A-B", "version": 1}]
    assert result["metrics"]["self"]["psnr"] == 30.0
    assert result["metrics"]["self"]["lpips"] is None
    assert result["metrics"]["cross"]["expression"]["jaw"] == {"r": 0.7, "amplitude": None}
    assert "1 frame dropped" in report_text(result)
    json.dumps(result, allow_nan=False)
    assert lookup.list_datasets(registry, "A")[0].summary["dropped"] == 1


def test_a_finished_job_runs_no_stage_again(world: tuple[Home, Registry]) -> None:
    home, registry = world
    plan = make_plan(home)
    run_job(office(home, registry, FakeRunner()), plan)
    again = FakeRunner()
    run_job(office(home, registry, again), make_plan(home))
    assert again.started == []
    result = report(registry, home, plan.job_id)
    assert all(s["cached"] and s["seconds"] == 0 for s in result["stages"])
    assert result["state"] == "finished"
    assert result["video"]
    assert result["metrics"]["self"]["psnr"] == 30.0


def test_another_actor_shares_the_avatar(world: tuple[Home, Registry]) -> None:
    home, registry = world
    run_job(office(home, registry, FakeRunner()), make_plan(home))
    runner = FakeRunner()
    run_job(office(home, registry, runner), make_plan(home, "A", "C"))
    assert runner.started == ["preprocess:C", "pair:A<-C", "preview:A<-C"]


def test_independent_stages_run_side_by_side_as_far_as_there_is_room(world: tuple[Home, Registry]) -> None:
    home, registry = world

    both = threading.Barrier(2)

    def together(handle: FakeHandle) -> StageResult:
        both.wait(10)
        return finish(handle)

    def slow(handle: FakeHandle) -> StageResult:
        time.sleep(0.1)
        return finish(handle)

    run_job(office(home, registry, FakeRunner({"preprocess": together})), make_plan(home))
    runner = FakeRunner({"preprocess": slow}, slots=1)
    run_job(office(home, registry, runner), make_plan(home, "C", "D"))
    (a0, a1), (b0, b1) = runner.spans["preprocess:C"], runner.spans["preprocess:D"]
    assert a1 <= b0 or b1 <= a0


def test_deleted_files_are_made_again(world: tuple[Home, Registry]) -> None:
    home, registry = world
    plan = make_plan(home)
    run_job(office(home, registry, FakeRunner()), plan)
    shutil.rmtree(plan.stages[2].spec.out_dir)
    (plan.stages[4].spec.out_dir / "preview.mp4").unlink()
    runner = FakeRunner()
    desk = office(home, registry, runner)
    run_job(desk, plan)
    assert runner.started == ["avatar:A", "preview:A<-B"]
    assert isinstance(desk.display, Recorder)
    assert any("files of avatar:A are gone" in m for m in desk.display.messages)


def test_a_failure_is_told_and_the_rest_kept(world: tuple[Home, Registry]) -> None:
    home, registry = world

    def faceless(handle: FakeHandle) -> StageResult:
        raise FaceError("no face in b.mp4", "Use a video with one face.")

    def slow(handle: FakeHandle) -> StageResult:
        time.sleep(0.2)
        return finish(handle)

    plan, runner = make_plan(home), FakeRunner({"preprocess:B": faceless, "preprocess:A": slow})
    with pytest.raises(StageFailedError) as caught:
        run_job(office(home, registry, runner), plan)
    assert caught.value.message == "preprocess:B failed: no face in b.mp4"
    assert caught.value.hint == "Use a video with one face."
    assert states(registry, plan) == {
        "preprocess": "finished",
        "preprocess:B": "failed",
        "avatar": "pending",
        "pair": "pending",
        "preview": "pending",
    }
    job = lookup.get_job(registry, plan.job_id)
    assert (job.state, job.message) == ("failed", "preprocess:B failed: no face in b.mp4")
    assert any("no face in b.mp4" in e.text for e in lookup.events(registry, plan.job_id))
    again = FakeRunner()
    run_job(office(home, registry, again), plan)
    assert again.started[0] == "preprocess:B"
    assert "preprocess:A" not in again.started


def test_a_failure_stops_training_that_runs_beside_it(world: tuple[Home, Registry]) -> None:
    home, registry = world
    training = threading.Event()

    def late(handle: FakeHandle) -> StageResult:
        training.wait(10)
        raise FaceError("two faces")

    plan = make_plan(home)
    with pytest.raises(StageFailedError, match="two faces"):
        run_job(office(home, registry, FakeRunner({"avatar": until_cancelled(training), "preprocess:B": late})), plan)
    assert states(registry, plan)["avatar"] == "interrupted"


def broken(handle: FakeHandle) -> StageResult:
    raise FaceError("no face", "Use another video.")


def states_of(registry: Registry, plan: Plan) -> dict[str, str]:
    return {view.name: view.stage.state for view in lookup.job_stages(registry, plan.job_id)}


def test_a_job_of_many_pairs_makes_once_what_several_need(world: tuple[Home, Registry]) -> None:
    home, registry = world
    plan, runner = make_plan_of(home, "AB AC DB"), FakeRunner()
    run_job(office(home, registry, runner), plan)
    assert sorted(runner.started) == [
        "avatar:A", "avatar:D", "pair:A<-B", "pair:A<-C", "pair:D<-B", "preprocess:A", "preprocess:B", "preprocess:C",
        "preprocess:D", "preview:A<-B", "preview:A<-C", "preview:D<-B",
    ]  # fmt: skip
    result = report(registry, home, plan.job_id)
    assert result["state"] == "finished"
    assert [(pair["avatar"], pair["actor"], bool(pair["video"])) for pair in result["pairs"]] == [
        ("A", "B", True), ("A", "C", True), ("D", "B", True),
    ]  # fmt: skip
    alone = FakeRunner()
    run_job(office(home, registry, alone), make_plan(home, "A", "C"))
    assert alone.started == [], "a job of one of these pairs finds everything"


@pytest.mark.parametrize(
    ("fails", "lost"),
    [
        ("pair:A<-B", ["A<-B"]),
        ("preview:A<-B", ["A<-B"]),
        ("preprocess:B", ["A<-B", "D<-B"]),
        ("avatar:A", ["A<-B", "A<-C"]),
    ],
)
def test_a_failure_ends_its_own_pairs_and_no_others(world: tuple[Home, Registry], fails: str, lost: list[str]) -> None:
    home, registry = world
    plan = make_plan_of(home, "AB AC DB")
    with pytest.raises(StageFailedError) as caught:
        run_job(office(home, registry, FakeRunner({fails: broken})), plan)
    assert caught.value.message == f"{len(lost)} of 3 pairs failed: {fails} failed: no face"
    assert caught.value.hint == "Use another video."
    after = states_of(registry, plan)
    assert after.pop(fails) == "failed"
    for pair in ("A<-B", "A<-C", "D<-B"):
        if pair not in lost:
            assert after[f"preview:{pair}"] == "finished"
        elif not fails.startswith("preview"):
            assert after[f"preview:{pair}"] == "pending"
    assert lookup.get_job(registry, plan.job_id).state == "failed"
    again = FakeRunner()
    run_job(office(home, registry, again), plan)
    assert fails in again.started
    assert not [name for name in again.started if any(name.endswith(p) for p in {"A<-B", "A<-C", "D<-B"} - {*lost})]
    assert lookup.get_job(registry, plan.job_id).state == "finished"


def test_two_failures_are_counted_and_training_for_nobody_stops(world: tuple[Home, Registry]) -> None:
    home, registry = world
    training = threading.Event()

    def late(handle: FakeHandle) -> StageResult:
        training.wait(10)
        raise FaceError("two faces")

    plan = make_plan_of(home, "AB CD")
    runner = FakeRunner({"avatar:A": until_cancelled(training), "preprocess:B": late, "pair:C<-D": broken})
    with pytest.raises(StageFailedError, match=r"2 of 2 pairs failed: .* and 1 more"):
        run_job(office(home, registry, runner), plan)
    after = states_of(registry, plan)
    assert after["avatar:A"] == "interrupted", "it goes on when its actor has been mended"
    assert (after["avatar:C"], after["pair:C<-D"], after["pair:A<-B"]) == ("finished", "failed", "pending")


def test_an_unexpected_exception_fails_the_stage_too(world: tuple[Home, Registry]) -> None:
    home, registry = world

    def broken(handle: FakeHandle) -> StageResult:
        raise ZeroDivisionError("division by zero")

    plan = make_plan(home)
    with pytest.raises(StageFailedError, match="ZeroDivisionError"):
        run_job(office(home, registry, FakeRunner({"pair": broken})), plan)
    assert states(registry, plan)["pair"] == "failed"
    assert states(registry, plan)["avatar"] == "finished"


def test_a_runner_that_cannot_start_leaves_nothing_running(world: tuple[Home, Registry]) -> None:
    home, registry = world

    class NoRoom(FakeRunner):
        def start(self, spec: object, metric_sink_factory: object) -> FakeHandle:
            raise StorageError("no room")

    plan = make_plan(home)
    with pytest.raises(StorageError):
        run_job(office(home, registry, NoRoom()), plan)
    assert "running" not in states(registry, plan).values()
    assert lookup.get_job(registry, plan.job_id).state == "failed"


def test_a_full_disk_is_seen_before_the_job(world: tuple[Home, Registry], monkeypatch: pytest.MonkeyPatch) -> None:
    home, registry = world
    monkeypatch.setattr(Home, "free_bytes", lambda self: 1000)
    runner = FakeRunner()
    with pytest.raises(StorageError, match="this job needs about"):
        run_job(office(home, registry, runner), make_plan(home))
    assert runner.started == []


def test_progress_can_be_read_from_outside(world: tuple[Home, Registry]) -> None:
    home, registry = world
    plan = make_plan(home)
    seen: list[tuple[int | None, int | None, str]] = []

    def train(handle: FakeHandle) -> StageResult:
        handle.emit(Event(handle.spec.name, done=5, total=50, unit="steps"))
        for _ in range(200):
            row = lookup.get_stage(registry, handle.spec.key)
            if row and row.done:
                seen.append((row.done, row.total, row.unit))
                break
            time.sleep(0.01)
        return finish(handle)

    run_job(office(home, registry, FakeRunner({"avatar": train})), plan)
    assert seen == [(5, 50, "steps")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_is_done_and_the_next_submit_goes_on(tmp_path: Path, number: int) -> None:
    process = start_driver(tmp_path)
    os.kill(process.pid or 0, number)
    process.join(30)
    assert process.exitcode == 130
    home, registry = Home(tmp_path), open_registry(Home(tmp_path))
    plan = make_plan(home)
    assert lookup.get_job(registry, plan.job_id).state == "interrupted"
    assert states(registry, plan)["avatar"] == "interrupted"
    assert states(registry, plan)["preprocess"] == "finished"
    runner = FakeRunner()
    run_job(office(home, registry, runner), plan)
    assert runner.started == ["avatar:A", "pair:A<-B", "preview:A<-B"]


def test_a_second_submit_is_refused_while_the_first_lives_and_takes_over_when_it_was_killed(tmp_path: Path) -> None:
    process = start_driver(tmp_path)
    home, registry = Home(tmp_path), open_registry(Home(tmp_path))
    plan, runner = make_plan(home), FakeRunner()
    with pytest.raises(StageBusyError, match=f"job {plan.job_id} .* is being run by process {process.pid}"):
        run_job(office(home, registry, runner), plan)
    assert runner.started == []
    assert lookup.get_job(registry, plan.job_id).state == "running"
    process.kill()
    process.join()
    run_job(office(home, registry, runner), plan)
    assert runner.started == ["avatar:A", "pair:A<-B", "preview:A<-B"]
    row = lookup.get_stage(registry, plan.stages[2].key)
    assert row is not None
    assert (row.state, row.attempts) == ("finished", 2)


def idle(spec: StageSpec) -> FakeHandle:
    """The handle of a stage whose thread leaves its folder alone."""
    return FakeHandle(spec, None, lambda _: StageResult({}))


def _other_job(home: Path, plan: Plan, host: str | None) -> Owner:
    """Another living process' hold on the shared avatar stage, on this machine or on `host`."""
    registry = open_registry(Home(home))
    owner = Owner.current() if host is None else Owner("theirs", host, 1, 1.0)
    ledger.store_plan(registry, Home(home), plan, "x")
    for stage in plan.stages[:2]:
        ledger.claim_stage(registry, stage.key, owner, "other")
        ledger.finish_stage(registry, Home(home), stage.spec, owner, finish(idle(stage.spec)))
    ledger.claim_stage(registry, plan.stages[2].key, owner, "other")
    return owner


@pytest.mark.parametrize("host", [None, "another machine"])
@pytest.mark.parametrize("end", [State.FINISHED, State.FAILED, State.INTERRUPTED])
def test_a_stage_that_another_job_runs_is_waited_for(
    world: tuple[Home, Registry], end: State, host: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, registry = world
    monkeypatch.setattr("lavatar.platform.execution.BUSY_POLL_SECONDS", 0.02)
    other, mine = make_plan(home, "A", "C"), make_plan(home)
    owner = _other_job(home.root, other, host)
    runner, avatar = FakeRunner(), other.stages[2]

    desk = office(home, registry, runner)

    def end_it() -> None:
        deadline = time.monotonic() + 20
        while ("avatar:A", "waiting") not in desk.display.states and time.monotonic() < deadline:  # type: ignore[attr-defined]
            time.sleep(0.02)
        time.sleep(0.1)  # it looks whether the owner lives, and waits on
        if end is State.FINISHED:
            result = finish(idle(avatar.spec))
            ledger.finish_stage(registry, home, avatar.spec, owner, result)
        else:
            ledger.end_stage(registry, avatar.key, owner, end, "loss is not finite", "lower the rate")

    thread = threading.Thread(target=end_it)
    thread.start()
    if end is State.FAILED:
        with pytest.raises(StageFailedError, match="avatar:A failed: loss is not finite"):
            run_job(desk, mine)
    else:
        run_job(desk, mine)
    thread.join()
    assert isinstance(desk.display, Recorder)
    assert ("avatar:A", "waiting") in desk.display.states
    assert ("avatar:A" in runner.started) is (end is State.INTERRUPTED)


def test_a_stage_whose_owner_on_another_machine_is_gone_is_taken_over(
    world: tuple[Home, Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When its lease has run out, while this job waits for it."""
    home, registry = world
    monkeypatch.setattr("lavatar.platform.execution.BUSY_POLL_SECONDS", 0.02)
    monkeypatch.setattr("lavatar.platform.leases.LEASE_SECONDS", 1.5)
    other = make_plan(home, "A", "C")
    _other_job(home.root, other, "another machine")
    began, runner = time.monotonic(), FakeRunner()
    run_job(office(home, registry, runner), make_plan(home))
    assert time.monotonic() - began >= 1
    assert "avatar:A" in runner.started
    row = lookup.get_stage(registry, other.stages[2].key)
    assert row is not None
    assert (row.state, row.attempts) == ("finished", 2)


def test_models_of_a_job_that_runs_on_another_machine_are_left_to_it(world: tuple[Home, Registry]) -> None:
    home, registry = world
    other, mine = make_plan(home, "A", "C"), make_plan(home)
    _other_job(home.root, other, "another machine")
    ledger.claim_job(registry, other.job_id, Owner("theirs", "another machine", 1, 1.0))
    with registry.write() as session:
        session.execute(ledger.update(ledger.Stage).values(job_id=other.job_id))
    row = lookup.get_stage(registry, other.stages[2].key)
    assert row is not None
    registrar = Registrar(office(home, registry, FakeRunner()), mine, None, print)
    assert registrar._another_does(row)
    with registry.write() as session:
        session.execute(ledger.update(ledger.Job).values(lease_until=1.0))
    assert not registrar._another_does(row), "it is dead"


def test_a_job_that_was_taken_over_stops_itself(world: tuple[Home, Registry], monkeypatch: pytest.MonkeyPatch) -> None:
    home, registry = world
    monkeypatch.setattr(jobs, "HEARTBEAT_SECONDS", 0.05)
    plan = make_plan(home)

    def robbed(handle: FakeHandle) -> StageResult:
        with registry.write() as session:
            session.execute(ledger.update(ledger.Job).values(owner="somebody else"))
            session.execute(ledger.update(ledger.Stage).values(owner="somebody else"))
        handle.until_cancelled()
        raise AssertionError

    ended: list[str | None] = []
    monkeypatch.setattr(NoTracker, "end", lambda self, run_id, state: ended.append(run_id) or True)
    with pytest.raises(Exception, match="another process has taken this job over"):
        run_job(office(home, registry, FakeRunner({"avatar": robbed})), plan)
    job = lookup.get_job(registry, plan.job_id)
    assert (job.state, job.owner) == ("running", "somebody else")
    assert ended, "those of the stages before"
    assert all(run.startswith("run of preprocess:") for run in ended if run), "the others go on, elsewhere"


def test_a_damaged_model_is_trained_again(world: tuple[Home, Registry]) -> None:
    home, registry = world

    def trained(handle: FakeHandle) -> StageResult:
        result = finish(handle)
        release = result.artefacts["release"]
        (release / "model.safetensors").write_bytes(b"weights")
        digest = hashlib.sha256(b"weights").hexdigest()
        (release / "config.json").write_text(json.dumps({"weights": {"file": "model.safetensors", "sha256": digest}}))
        return write_result(handle.spec, result)

    plan = make_plan(home)
    run_job(office(home, registry, FakeRunner({"avatar": trained})), plan)
    spec = plan.stage(StageKind.AVATAR).spec
    assert read_result(spec) is not None
    (spec.out_dir / "release" / "model.safetensors").write_bytes(b"wei")
    assert read_result(spec) is None
    again = FakeRunner({"avatar": trained})
    run_job(office(home, registry, again), plan)
    assert again.started == ["avatar:A"]
    assert read_result(spec) is not None


@pytest.mark.parametrize("then", ["goes on", "ends", "stops", "fails"])
def test_a_stage_that_was_taken_over_ends_the_job(
    world: tuple[Home, Registry], monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """Another machine took the stage when its lease had run out; the job's own lease is still ours."""
    home, registry = world
    monkeypatch.setattr(execution, "STORE_SECONDS", 0.0)
    plan = make_plan(home)

    def robbed(handle: FakeHandle) -> StageResult:
        with registry.write() as session:
            avatar = ledger.Stage.kind == StageKind.AVATAR.value
            session.execute(ledger.update(ledger.Stage).where(avatar).values(owner="somebody else"))
        if then == "goes on":
            handle.emit(Event(handle.spec.name, done=7, total=9, unit="steps"))
            handle.until_cancelled()
        if then == "stops":  # as what trains does when it hears nothing of its driver
            raise Interrupted("told to stop")
        if then == "fails":
            raise FaceError("no face")
        return finish(handle)

    with pytest.raises(JobError, match="another process has taken avatar:A over"):
        run_job(office(home, registry, FakeRunner({"avatar": robbed})), plan)
    stage = lookup.get_stage(registry, plan.stage(StageKind.AVATAR).key)
    assert stage is not None
    assert (stage.state, stage.owner) == ("running", "somebody else")
    assert lookup.get_job(registry, plan.job_id).state == "failed"


@pytest.mark.parametrize("what", ["this job", "avatar:A"])
@pytest.mark.parametrize("known", [True, False])
def test_what_is_taken_over_while_its_run_is_opened_has_the_run_of_its_heir(
    world: tuple[Home, Registry], monkeypatch: pytest.MonkeyPatch, what: str, known: bool
) -> None:
    """A driver that freezes while MLflow answers. The run of an earlier attempt is the heir's now, its own new one is
    ended."""
    home, registry = world
    plan = make_plan(home)
    name = plan.job_id if what == "this job" else what
    ended: list[str | None] = []

    class Robbed(NoTracker):
        def open_job(self, experiment: str, job_id: str, run_id: str | None, params: object) -> str:
            return self.opened(job_id, run_id)

        def open_stage(self, experiment: str, name: str, run_id: str | None, parent: str | None, params: object) -> str:
            return self.opened(name, run_id)

        def opened(self, row: str, run_id: str | None) -> str:
            if row == name:
                assert (run_id is not None) == known
                table = ledger.Job if what == "this job" else ledger.Stage
                here = ledger.Job.id == row if what == "this job" else ledger.Stage.key == avatar
                heirs = {"owner": "somebody else", "mlflow_run_id": run_id or "run of the heir", "mlflow_open": True}
                with registry.write() as session:
                    session.execute(ledger.update(table).where(here).values(**heirs))
            return run_id or f"run of {row}"

        def end(self, run_id: str | None, state: object) -> bool:
            ended.append(run_id)
            return True

    def failing(handle: FakeHandle) -> StageResult:
        raise FaceError("no face")

    avatar = plan.stage(StageKind.AVATAR).key
    if known:
        with pytest.raises(StageFailedError):
            run_job(office(home, registry, FakeRunner({"avatar": failing})), plan)
    monkeypatch.setattr(jobs, "Tracker", Robbed)
    runner = FakeRunner()
    with pytest.raises(JobError, match=f"another process has taken {what} over"):
        run_job(office(home, registry, runner), plan)
    assert "avatar:A" not in runner.started
    row = lookup.get_job(registry, plan.job_id) if what == "this job" else lookup.get_stage(registry, avatar)
    assert row is not None
    assert (row.owner, row.mlflow_open) == ("somebody else", True)
    assert row.mlflow_run_id == (f"run of {name}" if known else "run of the heir")
    assert (f"run of {name}" in ended) == (not known)


def test_a_worker_that_was_told_to_stop_interrupts_the_job(world: tuple[Home, Registry]) -> None:
    home, registry = world

    def stopped(handle: FakeHandle) -> StageResult:
        raise Interrupted("the cluster is going down")

    plan = make_plan(home)
    with pytest.raises(Interrupted):
        run_job(office(home, registry, FakeRunner({"avatar": stopped})), plan)
    assert lookup.get_job(registry, plan.job_id).state == "interrupted"


def test_jobs_are_found_by_the_beginning_of_their_id(world: tuple[Home, Registry]) -> None:
    home, registry = world
    plan = make_plan(home)
    run_job(office(home, registry, FakeRunner()), plan)
    assert lookup.get_job(registry, plan.job_id[:4]).id == plan.job_id
    with pytest.raises(ledger.UnknownJobError, match="no job 'zzz'"):
        lookup.get_job(registry, "zzz")
    for other in ("", plan.job_id.upper(), "%", "_" * 10):
        with pytest.raises(ledger.UnknownJobError, match="there is no job"):
            lookup.get_job(registry, other)


def test_an_id_is_whole_or_begins_one_alone() -> None:
    things = [("ab", 1), ("abc", 2), ("b1", 3), *((f"c{i}", i) for i in range(20))]
    assert [by_id(text, things, "job", "look") for text in ("ab", "abc", "b")] == [1, 2, 3]
    with pytest.raises(ledger.UnknownJobError, match=r"'a' begins the ids of 2: ab, abc\n") as caught:
        by_id("a", things, "job", "look")
    assert caught.value.hint == "Write more of the job's id."
    with pytest.raises(ledger.UnknownJobError, match=r"'c' begins the ids of 20: C0 0, .*, C7 7, …\n"):
        by_id("c", things, "job", "look", lambda own, thing: f"{own.upper()} {thing}")
    for text in ("", "d", "abcd"):
        with pytest.raises(ledger.UnknownJobError, match=f"there is no job '{text}'") as caught:
            by_id(text, things, "job", "look")
        assert caught.value.hint == "look"


def _meets_damage(handle: FakeHandle) -> StageResult:
    """A training whose dataset is damaged as often as there is a file that says so."""
    folder = handle.spec.inputs["actor_dataset"]
    if (folder / "damaged").exists():
        raise ShardError(f"{folder}: 00001.tar has another SHA-256")
    return finish(handle)


def _take_away(folder: Path) -> bool:
    found = (folder / "damaged").exists()
    if found:
        (folder / "manifest.json").unlink()
        (folder / "damaged").unlink()
    return found


@pytest.mark.parametrize("times", [1, 2])
def test_a_damaged_dataset_is_made_again_once(
    world: tuple[Home, Registry], monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    home, registry = world
    plan, made = make_plan(home), []

    def preprocess(handle: FakeHandle) -> StageResult:
        result = finish(handle)
        made.append(handle.spec.name)
        if made.count("preprocess:B") <= times and handle.spec.name == "preprocess:B":
            (handle.spec.out_dir / "damaged").touch()
        return result

    monkeypatch.setattr(execution, "take_away_damaged", _take_away)
    runner = FakeRunner({"preprocess": preprocess, "pair": _meets_damage})
    if times == 1:
        run_job(office(home, registry, runner), plan)
        assert runner.started[2:] == ["avatar:A", "pair:A<-B", "preprocess:B", "pair:A<-B", "preview:A<-B"]
        attempts = {view.name: view.stage.attempts for view in lookup.job_stages(registry, plan.job_id)}
        assert attempts["preprocess:B"] == attempts["pair:A<-B"] == 2
        assert attempts["preprocess:A"] == attempts["avatar:A"] == 1
        assert set(states(registry, plan).values()) == {"finished"}
        texts = [event.text for event in lookup.events(registry, plan.job_id)]
        assert any("00001.tar has another SHA-256: preprocess:B is made again" in text for text in texts)
    else:
        with pytest.raises(StageFailedError, match=r"00001\.tar has another SHA-256"):
            run_job(office(home, registry, runner), plan)
        assert made.count("preprocess:B") == 2


def test_a_reader_that_finds_no_damage_on_disk_fails(
    world: tuple[Home, Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, registry = world

    def broken(handle: FakeHandle) -> StageResult:
        raise ShardError("00001.tar, sample 00000003: image.jpg cannot be decoded")

    monkeypatch.setattr(execution, "take_away_damaged", _take_away)
    runner = FakeRunner({"pair": broken})
    with pytest.raises(StageFailedError, match="cannot be decoded"):
        run_job(office(home, registry, runner), make_plan(home))
    assert runner.started.count("pair:A<-B") == 1


@pytest.mark.parametrize("times", [1, 2])
def test_a_copy_that_is_damaged_while_it_is_read_is_fetched_again_once(
    world: tuple[Home, Registry], monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """The store has the dataset whole: nothing is made again."""
    home, registry = world
    monkeypatch.setenv("LAVATAR_STORE", (home.root / "store").as_uri())
    store, met = home.store(), []
    assert store is not None

    def stored(handle: FakeHandle) -> StageResult:
        if handle.spec.kind == "pair" and len(met) < times:
            met.append(handle.spec.name)
            raise ShardError("00001.tar, sample 00000003: image.jpg has another checksum")
        result = write_result(handle.spec, finish(handle))
        store.publish(handle.spec)
        store.finish(handle.spec)
        return result

    runner, plan = FakeRunner(dict.fromkeys(("preprocess", "avatar", "pair", "preview"), stored)), make_plan(home)
    if times == 1:
        run_job(office(home, registry, runner), plan)
        assert set(states(registry, plan).values()) == {"finished"}
    else:
        with pytest.raises(StageFailedError, match="has another checksum"):
            run_job(office(home, registry, runner), plan)
    assert runner.started[2:5] == ["avatar:A", "pair:A<-B", "pair:A<-B"]
    attempts = {view.name: view.stage.attempts for view in lookup.job_stages(registry, plan.job_id)}
    assert (attempts["preprocess:A"], attempts["preprocess:B"], attempts["pair:A<-B"]) == (1, 1, 2)
    texts = [event.text for event in lookup.events(registry, plan.job_id)]
    assert len([text for text in texts if text.endswith("it begins again with the store's copy")]) == 1


def test_what_was_lowered_is_in_the_jobs_log(world: tuple[Home, Registry]) -> None:
    """A detached job has no terminal."""
    home, registry = world
    plan, lowered = make_plan(home), "avatar: 1 GPUs wanted, the cluster has none: on CPUs"
    run_job(office(home, registry, FakeRunner(notes=(lowered,))), plan)
    (line,) = [event for event in lookup.events(registry, plan.job_id) if event.text == lowered]
    assert (line.level, line.stage) == ("warning", "")

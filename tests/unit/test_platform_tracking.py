"""MLflow, the real one: runs, curves that go on, pictures, models. One tracking database for the whole file."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lavatar.contracts import StageKind, StageResult
from lavatar.errors import JobError, StageFailedError
from lavatar.platform import ledger, lookup
from lavatar.platform.home import Home
from lavatar.platform.jobs import run_job
from lavatar.platform.modelregistry import MODELS, Release, register
from lavatar.platform.registry import open_registry
from lavatar.platform.sink import MlflowSink, MlflowSinkFactory
from lavatar.platform.states import State
from lavatar.platform.tracking import Tracker, connect, experiment_name, quiet

sys.path.insert(0, str(Path(__file__).parent))
from platform_fakes import METRICS, FakeHandle, FakeRunner, finish, fresh, make_plan, office, plain_digest

__all__ = ["plain_digest"]
fork = multiprocessing.get_context("fork")
TRACKING = "lavatar.platform.home.Home.tracking_uri"


def _connect(root: Path, barrier: Any, results: Any) -> None:
    try:
        barrier.wait()
        connect(Home(root))
        results.put("ok")
    except BaseException as error:
        results.put(repr(error))


@pytest.fixture(scope="module")
def mlhome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A home whose MLflow was first touched by two processes at the same moment."""
    quiet()  # before the import: MLflow reads it then
    import mlflow  # noqa: F401  # once here, not in each process

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        home = Home(tmp_path_factory.mktemp("mlflow")).ensure()
        barrier, results = fork.Barrier(2), fork.Queue()
        processes = [fork.Process(target=_connect, args=(home.root, barrier, results)) for _ in range(2)]
        for process in processes:
            process.start()
        assert [results.get(timeout=120) for _ in processes] == ["ok", "ok"]
        for process in processes:
            process.join()
        yield home


@pytest.fixture
def tracker(mlhome: Home) -> Tracker:
    def never(text: str) -> None:
        raise AssertionError(text)

    return Tracker(mlhome, never)


def curve(tracker: Tracker, run_id: str, name: str = "total") -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in tracker.client.get_metric_history(run_id, name))


def test_a_job_and_its_stages_are_nested_runs(tracker: Tracker, mlhome: Home) -> None:
    name = experiment_name("A", "nested")
    job = tracker.open_job(name, "j1", None, {"avatar": {"samples": 16}, "actor": "B"})
    stage = tracker.open_stage(name, "avatar:A", None, job, {"key": "k"})
    assert job
    assert stage
    run = tracker.client.get_run(stage)
    assert run.data.tags["mlflow.parentRunId"] == job
    assert run.info.run_name == "avatar:A"
    assert run.info.artifact_uri.startswith(mlhome.mlartifacts.as_uri())
    assert tracker.client.get_run(job).data.params == {"avatar.samples": "16", "actor": "B"}
    for state, status in ((State.INTERRUPTED, "KILLED"), (State.FAILED, "FAILED"), (State.FINISHED, "FINISHED")):
        assert tracker.open_stage(name, "avatar:A", stage, job, {"key": "other"}) == stage
        assert tracker.client.get_run(stage).info.status == "RUNNING"
        assert tracker.end(stage, state)
        assert tracker.client.get_run(stage).info.status == status


def test_a_run_that_was_deleted_is_made_anew(tracker: Tracker) -> None:
    name = experiment_name("A", "deleted")
    first = tracker.open_job(name, "j", None, {})
    assert first
    tracker.client.delete_run(first)
    second = tracker.open_job(name, "j", first, {})
    assert second not in (None, first)
    assert tracker.end(first, State.FAILED)
    tracker.client.delete_experiment(tracker.client.get_run(second or "").info.experiment_id)
    assert tracker.open_job(name, "j", None, {})


def _log_and_die(factory: MlflowSinkFactory, steps: range) -> None:
    sink = factory()
    for step in steps:
        sink.log_metrics(step, {"total": 1 / (1 + step), "rate [1]": 1e-3})
    sink.flush()
    os._exit(9)


def test_a_curve_goes_on_in_the_same_run_without_double_steps(tracker: Tracker) -> None:
    run = tracker.open_stage(experiment_name("A", "curve"), "avatar:A", None, None, {})
    factory = pickle.loads(pickle.dumps(tracker.sink_factory(run)))
    worker = fork.Process(target=_log_and_die, args=(factory, range(60)))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 9
    sink = factory()  # goes on from the checkpoint at step 40
    for step in range(40, 100):
        sink.log_metrics(step, {"total": 1 / (1 + step), "rate [1]": 1e-3})
    sink.close()
    assert sink.failures == 0
    assert curve(tracker, run) == [(step, 1 / (1 + step)) for step in range(100)]
    assert len(curve(tracker, run, "rate _1_")) == 100


def test_a_sink_that_wakes_late_repeats_nothing_of_what_another_logged(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process was stopped, another one went on with the run, and then it was continued."""
    monkeypatch.setattr("lavatar.platform.sink.SILENT_SECONDS", 0.1)
    run = tracker.open_stage(experiment_name("A", "late"), "avatar:A", None, None, {})
    late, other = MlflowSink(tracker.uri, run or "", flush_seconds=60), MlflowSink(tracker.uri, run or "")
    late.log_metrics(1, {"total": 1.0})
    late.flush()
    time.sleep(0.2)
    for sink in (other, late):
        for step in (1, 2, 3):
            sink.log_metrics(step, {"total": float(step)})
        sink.flush()
    for sink in (other, late):
        sink.close()
    assert curve(tracker, run or "") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_results_that_an_attempt_logged_before_it_died_are_not_logged_again(tracker: Tracker) -> None:
    run = tracker.open_stage(experiment_name("A", "twice"), "preview:A<-B", None, None, {})
    for _ in range(2):
        tracker.log_result(run, {"self": {"psnr": 30.0, "lpips": None}}, {})
    assert curve(tracker, run or "", "self.psnr") == [(0, 30.0)]
    tracker.log_result(run, {"self": {"psnr": 31.0}}, {})
    assert len(curve(tracker, run or "", "self.psnr")) == 2, "another evaluation is another figure"


def test_pictures_params_and_files(tracker: Tracker, tmp_path: Path) -> None:
    run = tracker.open_stage(experiment_name("A", "pictures"), "avatar:A", None, None, {"steps": 5})
    (tmp_path / "curves.json").write_text("{}")
    picture = np.full((32, 48, 3), 200, np.uint8)
    for _ in range(2):  # the second round is a worker that was started again
        sink = MlflowSink(tracker.uri, run, flush_seconds=0.05)
        sink.log_params({"steps": 6, "workers": 2})
        sink.log_picture(10, "portraits", picture)
        sink.log_file(tmp_path / "curves.json", "notes")
        sink.close()
    sink = MlflowSink(tracker.uri, run)
    sink.log_picture(20, "portraits", picture)
    sink.close()
    assert tracker.client.get_run(run).data.params == {"steps": "5", "workers": "2"}
    files = [f.path for f in tracker.client.list_artifacts(run, "images") if f.path.endswith(".png")]
    assert len(files) == 2
    assert [f.path for f in tracker.client.list_artifacts(run, "notes")] == ["notes/curves.json"]


def test_logging_never_hurts_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    sink = MlflowSink(f"sqlite:///{tmp_path}/file/nowhere.db", "no such run", flush_seconds=0.05)
    began = time.monotonic()
    for step in range(1000):
        sink.log_metrics(step, {"total": 1.0})
        sink.log_picture(step, "p", np.zeros((4, 4, 3), np.uint8))
    sink.log_metrics(0, {"total": object()})  # type: ignore[dict-item]
    assert time.monotonic() - began < 1.0
    sink.close()
    assert sink.failures > 0


def test_logging_costs_a_step_nothing(tracker: Tracker) -> None:
    run = tracker.open_stage(experiment_name("A", "cost"), "avatar:A", None, None, {})
    sink = MlflowSink(tracker.uri, run, flush_seconds=60)
    began = time.thread_time()
    for step in range(1000):
        sink.log_metrics(step, {f"loss{i}": 0.5 for i in range(6)})
    assert (time.thread_time() - began) / 1000 < 1e-3
    sink.close()
    assert len(curve(tracker, run, "loss5")) == 1000


def test_a_server_that_is_away_is_named_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(JobError, match=r"MLflow at http://127\.0\.0\.1:9 does not answer") as caught:
        connect(Home(tmp_path))
    assert "MLFLOW_TRACKING_URI" in caught.value.hint


def test_trouble_later_is_a_warning(tracker: Tracker) -> None:
    said: list[str] = []
    tracker._warn = said.append
    tracker.log_result("no such run", {"a": 1.0}, {})
    assert tracker.end("no such run", State.FAILED)
    assert len(said) == 1
    assert "could not log results" in said[0]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, mlhome: Home, plain_digest: None) -> None:
    """Jobs of any home use the one tracking database; models are not what these tests are about."""
    monkeypatch.setattr(TRACKING, mlhome.tracking_uri)
    monkeypatch.setattr("lavatar.platform.registering.register", lambda *a: None)
    monkeypatch.setattr("lavatar.platform.execution.POLL_SECONDS", 0.01)


def train(handle: FakeHandle) -> StageResult:
    """Ten steps through the sink that came with the stage."""
    assert handle.factory
    sink = handle.factory()
    for step in range(10):
        sink.log_metrics(step, {"total": float(step)})
    sink.close()
    return finish(handle)


@pytest.mark.usefixtures("quick")
def test_a_job_as_mlflow_shows_it(tmp_path: Path, tracker: Tracker) -> None:
    home, registry = fresh(tmp_path)
    plan = make_plan(home, "A", "Shown")
    run_job(office(home, registry, FakeRunner({"avatar": train})), plan)
    job = lookup.get_job(registry, plan.job_id)
    assert job.mlflow_run_id
    parent = tracker.client.get_run(job.mlflow_run_id)
    experiment = tracker.client.get_experiment(parent.info.experiment_id)
    assert experiment.name == "lavatar/A<-Shown"
    runs = tracker.client.search_runs([experiment.experiment_id])
    assert {r.info.run_name for r in runs} == {f"job {plan.job_id}", *(s.name for s in plan.stages)}
    assert {r.info.status for r in runs} == {"FINISHED"}
    assert {r.data.tags.get("mlflow.parentRunId") for r in runs} == {None, job.mlflow_run_id}
    assert parent.data.metrics["evaluation/self/psnr"] == METRICS["self"]["psnr"]
    assert "evaluation/self/lpips" not in parent.data.metrics
    files = {f.path for f in tracker.client.list_artifacts(job.mlflow_run_id, "evaluation")}
    assert files == {"evaluation/preview.mp4", "evaluation/still.png"}
    preview = next(r for r in runs if r.info.run_name.startswith("preview"))
    assert {f.path for f in tracker.client.list_artifacts(preview.info.run_id)} == {"preview.mp4", "still.png"}
    assert ledger.unended_runs(registry) == []


def _job_that_hangs(root: Path, training: Any) -> None:
    home, registry = fresh(root)

    def hang(handle: FakeHandle) -> StageResult:
        train(handle)
        training.set()
        time.sleep(60)
        raise AssertionError

    run_job(office(home, registry, FakeRunner({"avatar": hang})), make_plan(home, "A", "Killed"))


@pytest.mark.usefixtures("quick")
def test_a_killed_job_goes_on_in_the_same_runs(tmp_path: Path, tracker: Tracker) -> None:
    training = fork.Event()
    process = fork.Process(target=_job_that_hangs, args=(tmp_path, training))
    process.start()
    assert training.wait(60)
    process.kill()
    process.join()
    home, registry = Home(tmp_path), open_registry(Home(tmp_path))
    plan = make_plan(home, "A", "Killed")
    before = lookup.get_stage(registry, plan.stages[2].key)
    assert before is not None
    assert before.mlflow_run_id
    assert tracker.client.get_run(before.mlflow_run_id).info.status == "RUNNING"
    seen: list[str] = []

    def go_on(handle: FakeHandle) -> StageResult:
        seen.append(tracker.client.get_run(before.mlflow_run_id or "").info.status)
        sink = handle.factory() if handle.factory else None
        assert sink
        for step in range(5, 20):
            sink.log_metrics(step, {"total": float(step)})
        sink.close()
        return finish(handle)

    run_job(office(home, registry, FakeRunner({"avatar": go_on})), plan)
    after = lookup.get_stage(registry, plan.stages[2].key)
    assert after is not None
    assert (after.mlflow_run_id, after.attempts, seen) == (before.mlflow_run_id, 2, ["RUNNING"])
    assert curve(tracker, before.mlflow_run_id) == [(step, float(step)) for step in range(20)]
    assert tracker.client.get_run(before.mlflow_run_id).info.status == "FINISHED"
    job = lookup.get_job(registry, plan.job_id)
    assert len(tracker.client.search_runs([tracker.client.get_run(job.mlflow_run_id).info.experiment_id])) == 6


@pytest.mark.usefixtures("quick")
def test_the_runs_of_a_dead_job_are_ended_by_another_job(tmp_path: Path, tracker: Tracker) -> None:
    training = fork.Event()
    process = fork.Process(target=_job_that_hangs, args=(tmp_path, training))
    process.start()
    assert training.wait(60)
    process.kill()
    process.join()
    home, registry = Home(tmp_path), open_registry(Home(tmp_path))
    run_job(office(home, registry, FakeRunner()), make_plan(home, "C", "D"))
    dead = make_plan(home, "A", "Killed")
    rows = [lookup.get_stage(registry, dead.stages[2].key), lookup.get_job(registry, dead.job_id)]
    assert [tracker.client.get_run(row.mlflow_run_id).info.status for row in rows if row] == ["KILLED", "KILLED"]
    assert ledger.unended_runs(registry) == []


@pytest.mark.usefixtures("quick")
def test_a_failed_stage_fails_its_run_and_the_jobs(tmp_path: Path, tracker: Tracker) -> None:
    home, registry = fresh(tmp_path)

    def broken(handle: FakeHandle) -> StageResult:
        raise RuntimeError("no")

    plan = make_plan(home, "A", "Failed")
    with pytest.raises(StageFailedError):
        run_job(office(home, registry, FakeRunner({"pair": broken})), plan)
    rows = [lookup.get_stage(registry, plan.stages[i].key) for i in (2, 3)]
    job = lookup.get_job(registry, plan.job_id)
    statuses = [tracker.client.get_run(row.mlflow_run_id).info.status for row in [*rows, job] if row]
    assert statuses == ["FINISHED", "FAILED", "FAILED"]


def test_models_load_from_the_registry_and_draw(tmp_path: Path, mlhome: Home, tracker: Tracker) -> None:
    import mlflow.pyfunc
    from inference_files import FACE, RECIPE, make_avatar_release, make_pair_release, make_subject

    data = make_subject(tmp_path / "data", 3, frames=12, held_out=4)
    avatar, pair = make_avatar_release(tmp_path / "1" / "release"), make_pair_release(tmp_path / "2" / "release")
    run = tracker.open_stage(experiment_name("A", "models"), "avatar:A", None, None, {})
    size = RECIPE.avatar.image_size
    releases = [
        Release(StageKind.AVATAR, "a" * 64, "lavatar-avatar-A", {"avatar": avatar}, size, FACE, data),
        Release(StageKind.PAIR, "b" * 64, "lavatar-pair-A-B", {"avatar": avatar, "pair": pair}, size, FACE, data),
    ]
    assert [register(mlhome, tracker, r, run, print) for r in releases] == [1, 1]
    assert register(mlhome, tracker, releases[0], run, print) == 2
    assert mlflow.active_run() is None
    faces = np.random.default_rng(0).integers(0, 255, (9, FACE, FACE, 3), dtype=np.uint8)
    drawn = {}
    for release in releases:
        model = mlflow.pyfunc.load_model(f"models:/{release.name}@latest")
        assert model.metadata.signature.inputs.inputs[0].shape == (-1, -1, -1, 3)
        drawn[release.name] = model.predict(faces)
        assert drawn[release.name].shape == (9, size, size, 3)
        assert drawn[release.name].dtype == np.uint8
        stored = model.metadata.load_input_example(
            mlflow.artifacts.download_artifacts(f"models:/{release.name}@latest")
        )
        assert np.asarray(stored).shape == (1, FACE, FACE, 3)
    assert np.abs(drawn["lavatar-avatar-A"].astype(int) - drawn["lavatar-pair-A-B"]).max() > 0
    assert mlflow.pyfunc.load_model("models:/lavatar-avatar-A/latest").metadata.metadata["stage"] == "a" * 64
    stored_files = [p for p in mlhome.mlartifacts.rglob("*") if p.is_file()]
    assert any(p.suffix == ".safetensors" for p in stored_files)
    assert not [p for p in stored_files if p.suffix in (".pkl", ".pickle", ".pth", ".pt", ".bin")]


def test_a_model_that_cannot_be_registered_is_a_warning(tmp_path: Path, mlhome: Home, tracker: Tracker) -> None:
    said: list[str] = []
    gone = Release(StageKind.AVATAR, "c" * 64, "lavatar-avatar-C", {"avatar": tmp_path / "gone"}, 32, 32)
    assert register(mlhome, tracker, gone, None, said.append) is None
    assert "could not be registered" in said[0]
    run = tracker.open_stage(experiment_name("C", "models"), "avatar:C", None, None, {})
    tracker.end(run, State.FINISHED)
    assert register(mlhome, tracker, gone, run, said.append) is None
    assert not list(mlhome.root.glob("release-*"))
    assert tracker.client.search_model_versions("name = 'lavatar-avatar-C'") == []
    assert tracker.client.get_run(run).info.status == "FINISHED", "it is the stage's"
    kept = tracker.client.get_experiment_by_name(MODELS)
    (own,) = tracker.client.search_runs([kept.experiment_id])
    assert own.info.status == "FAILED"
    experiments = [own.info.experiment_id, tracker.client.get_run(run).info.experiment_id]
    assert [str(model.status) for model in tracker.client.search_logged_models(experiments)] == ["FAILED"] * 2


def test_a_picture_and_a_file_that_fail_once_are_sent_again(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    run = tracker.open_stage(experiment_name("A", "again"), "avatar:A", None, None, {})
    (tmp_path / "notes.txt").write_text("kept")
    for method in ("log_image", "log_artifact"):
        _fail_once(monkeypatch, MlflowClient, method)
    sink = MlflowSink(tracker.uri, run, flush_seconds=0.05)
    sink.log_picture(1, "portraits", np.zeros((4, 4, 3), np.uint8))
    sink.log_file(tmp_path / "notes.txt")
    sink.close()
    assert sink.failures == 2
    assert "notes.txt" in [f.path for f in tracker.client.list_artifacts(run)]
    assert any(f.path.endswith(".png") for f in tracker.client.list_artifacts(run, "images"))


def _fail_once(monkeypatch: pytest.MonkeyPatch, owner: type, method: str) -> None:
    real, calls = getattr(owner, method), []

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            raise ConnectionError("the server is away")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, method, broken)


def test_threads_share_one_sink(tracker: Tracker) -> None:
    run = tracker.open_stage(experiment_name("A", "threads"), "pair", None, None, {})
    sink = MlflowSink(tracker.uri, run, flush_seconds=0.05)

    def log(name: str) -> None:
        for step in range(200):
            sink.log_metrics(step, {name: 1.0})

    threads = [threading.Thread(target=log, args=(name,)) for name in ("ynet/total", "mapping/total")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sink.close()
    assert [len(curve(tracker, run, n)) for n in ("ynet/total", "mapping/total")] == [200, 200]


@pytest.mark.parametrize(("variable", "kept"), [(None, True), ("home", True), ("http://127.0.0.1:1", False)])
def test_artifacts_lie_in_the_home_unless_a_server_keeps_them(
    mlhome: Home, tracker: Tracker, monkeypatch: pytest.MonkeyPatch, variable: str | None, kept: bool
) -> None:
    """Also when MLFLOW_TRACKING_URI names the home's own database, as `mlflow.set_tracking_uri` leaves it behind."""
    if variable is None:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    else:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.uri if variable == "home" else variable)
    assert mlhome.keeps_artifacts is kept
    if kept:
        run = tracker.open_job(experiment_name("A", f"artifacts {variable}"), "j", None, {})
        assert tracker.client.get_run(run).info.artifact_uri.startswith(mlhome.mlartifacts.as_uri())

"""What a year later is asked of a run is in MLflow, the real one; and two runs are compared by it."""

from __future__ import annotations

import json
import pickle
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lavatar.contracts import StageKind, StageResult, StageSpec, measures_time
from lavatar.errors import UnknownJobError, UsageError
from lavatar.platform import ledger, lookup, machine, provenance
from lavatar.platform.home import Home
from lavatar.platform.jobs import run_job
from lavatar.platform.leases import Owner
from lavatar.platform.recorded import compare, find, recorded
from lavatar.platform.registry import Registry
from lavatar.platform.runs import end_abandoned
from lavatar.platform.sink import MlflowSink
from lavatar.platform.tables import Job, Stage
from lavatar.platform.tracking import PROVENANCE_TAG, Tracker, quiet

sys.path.insert(0, str(Path(__file__).parent))
from platform_fakes import (
    FakeHandle,
    FakeRunner,
    Recorder,
    finish,
    fresh,
    make_plan,
    office,
    person,
    use_plain_digest,
)

STEPS = "avatar_training.steps=7"


def train(handle: FakeHandle) -> StageResult:
    """Three steps through the sink that came with the stage; the last loss is the number of steps of the recipe."""
    assert handle.factory
    sink = handle.factory()
    steps = float(handle.spec.recipe["avatar_training"]["steps"])
    for step in (1, 2, 3):
        sink.log_metrics(step, {"avatar/total": steps, "avatar/timing/samples_per_second": time.monotonic()})
    sink.close()
    return finish(handle)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Home, Registry, list[str]]]:
    """Two finished jobs of the same people, the second trained longer, submitted as `lavatar`."""
    quiet()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr("lavatar.platform.registering.register", lambda *a: None)
        patch.setattr("lavatar.platform.execution.POLL_SECONDS", 0.01)
        patch.setattr("sys.argv", ["lavatar", "submit", "--avatar", "A"])
        use_plain_digest(patch)
        home, registry = fresh(tmp_path_factory.mktemp("recorded"))
        plans = [make_plan(home), make_plan(home, "A", "B", STEPS)]
        for plan in plans:
            run_job(office(home, registry, FakeRunner({"avatar": train})), plan)
        yield home, registry, [plan.job_id for plan in plans]
        registry.close()


World = tuple[Home, Registry, list[str]]


@pytest.fixture
def tracker(world: World) -> Tracker:
    def never(text: str) -> None:
        raise AssertionError(text)

    return Tracker(world[0], never)


def stage(world: World, job: str, name: str) -> Stage:
    return next(view.stage for view in lookup.job_stages(world[1], job) if view.name == name)


def test_a_jobs_run_holds_recipe_code_packages_machine_and_command(world: World, tracker: Tracker) -> None:
    _, registry, (first, _) = world
    job = lookup.get_job(registry, first)
    run = tracker.client.get_run(str(job.mlflow_run_id))
    assert {"avatar_training.seed", "ynet.encoder_widths", "resources.pair.cpus", "people.actor"} <= set(
        run.data.params
    )
    assert run.data.tags[provenance.COMMAND_TAG] == "lavatar submit --avatar A"
    assert run.data.tags["lavatar.machine.cores"]
    assert run.data.tags[PROVENANCE_TAG].startswith("1 ")
    folder = Path(tracker.client.download_artifacts(str(job.mlflow_run_id), "provenance/1"))
    assert json.loads((folder / provenance.RECIPE).read_text()) == job.recipe
    assert "mlflow==" in (folder / provenance.PACKAGES).read_text()
    code = provenance.find_code()
    assert run.data.tags.get(provenance.COMMIT_TAG, "") == code.commit
    assert run.data.tags[provenance.CODE_TAG].partition(":")[0] == code.state.partition(":")[0]
    assert run.data.tags["mlflow.source.name"] == "lavatar submit"
    read = [(each.tags[0].value, each.dataset.name, each.dataset.digest) for each in run.inputs.dataset_inputs]
    (pair,) = lookup.job_pairs(registry, first)
    assert sorted(read) == sorted(
        [
            *(("dataset", name, stage(world, first, f"preprocess:{name}").key[:36]) for name in "AB"),
            ("video", "A", pair.avatar_digest[:36]),
            ("video", "B", pair.actor_digest[:36]),
        ]
    )


def test_a_benchmarks_run_holds_the_same_and_goes_on_where_it_was_stopped(
    world: World, tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lavatar.configs.methods import build_methods
    from lavatar.platform import benchmark
    from lavatar.platform.benchmark_budget import Budget

    (method,) = build_methods(["tiny"], ["latentavatar"])
    row = benchmark.Row(method, person("A", ord("A")), person("B", ord("B")), 7, Budget("minutes", 1, 1), 4)
    ran: list[str] = []

    def run_stage(runner: Any, display: Any, spec: StageSpec, factory: Any) -> StageResult:
        ran.append(spec.name)
        if spec.kind is StageKind.PAIR and ran.count(spec.name) == 1:
            raise KeyboardInterrupt
        if factory:
            sink = factory()
            sink.log_metrics(1, {f"{spec.kind.value}/total": 1.0})
            sink.close()
        return finish(SimpleNamespace(spec=spec, emit=lambda event: None))  # type: ignore[arg-type]

    def budgeted(bench: Any, row: Any, recipe: Any, which: str, stage: Any, build: Any) -> Any:
        return benchmark.with_steps(recipe, which, {"avatar": 11, "ynet": 5}[which])

    monkeypatch.setattr(benchmark, "run_stage", run_stage)
    monkeypatch.setattr(benchmark, "_budgeted", budgeted)
    monkeypatch.setattr(benchmark, "_evaluate", lambda *args: ({"self": {"psnr": 20.0}}, ()))
    monkeypatch.setattr(benchmark, "require_weights", lambda stages: None)
    monkeypatch.setattr("sys.argv", ["lavatar", "benchmark", "method", "--pair", "A:B"])
    tracker.log_origin(tracker.open_job("another", "row", None, {}), {"a": 1})
    bench = benchmark.Bench(world[0], tmp_path, Recorder(), FakeRunner(), tracker, world[1])  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        list(benchmark.measured(bench, [row]))
    (stopped,) = [file.read_text() for file in (tmp_path / "runs").iterdir()]
    assert tracker.client.get_run(stopped).info.status == "KILLED"
    list(benchmark.measured(bench, [row]))
    experiment = tracker.client.get_experiment_by_name(benchmark.EXPERIMENT)
    (run,) = tracker.client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.status) == (stopped, "FINISHED")
    assert [file.suffix for file in (tmp_path / "runs").iterdir()] == [".json"]
    params, tags = run.data.params, run.data.tags
    assert {k: params[k] for k in ("people.avatar", "avatar_training.steps", "ynet_training.steps", "seed")} == {
        "people.avatar": "A", "avatar_training.steps": "11", "ynet_training.steps": "5", "seed": "7",
    }  # fmt: skip
    assert {params[f"{which}_training.seed"] for which in ("avatar", "ynet", "mapping")} == {"7"}
    assert len(params["stage.pair"]) == len(params["stage.avatar"]) == 64
    assert tags[provenance.COMMAND_TAG] == "lavatar benchmark method --pair A:B"
    assert tags["mlflow.source.name"] == "lavatar benchmark method"
    assert tags.get(provenance.COMMIT_TAG, "") == provenance.find_code().commit
    assert tags["lavatar.machine.host"]
    newest = tags[PROVENANCE_TAG].partition(" ")[0]
    folder = Path(tracker.client.download_artifacts(stopped, f"provenance/{newest}"))
    assert json.loads((folder / provenance.RECIPE).read_text())["ynet_training"]["steps"] == 5
    read = {each.dataset.name: json.loads(each.dataset.profile) for each in run.inputs.dataset_inputs}
    assert {name: profile["frames"] for name, profile in read.items()} == {"A": 10, "B": 10}
    assert set(run.data.metrics) >= {"avatar/total", "pair/total", "self.psnr"}


def test_a_stages_run_says_where_it_ran_and_what_it_read(world: World, tracker: Tracker) -> None:
    _, registry, (first, _) = world
    row, data = stage(world, first, "avatar:A"), stage(world, first, "preprocess:A")
    run = tracker.client.get_run(str(row.mlflow_run_id))
    job = lookup.get_job(registry, first)
    assert run.data.tags[PROVENANCE_TAG] == f"runs:/{job.mlflow_run_id}/provenance/1"
    assert run.data.tags["lavatar.machine.host"] == machine.describe()["host"]
    assert run.data.params["inputs.dataset"] == data.key
    (read,) = run.inputs.dataset_inputs
    assert (read.dataset.name, read.dataset.digest, read.tags[0].value) == ("A", data.key[:36], "dataset")
    assert json.loads(read.dataset.profile) == {
        **lookup.dataset_summaries(registry, [data.key])[data.key],
        "digest": data.key,
    }
    (video,) = tracker.client.get_run(str(data.mlflow_run_id)).inputs.dataset_inputs
    assert json.loads(video.dataset.profile)["sha256"] == lookup.job_pairs(registry, first)[0].avatar_digest


def test_what_differs_from_the_commit_is_in_the_run(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    code = provenance.Code("1.0", "c" * 40, "-old line\n+new line\n")
    monkeypatch.setattr(provenance, "find_code", lambda: code)
    run = str(tracker.open_job("changed", "j", None, {}))
    tracker.log_origin(run, {"a": 1})
    text = Path(tracker.client.download_artifacts(run, f"provenance/1/{provenance.DIFF}")).read_text()
    assert (provenance.DIFF, text) == ("code.diff", code.diff)
    assert tracker.client.get_run(run).data.tags[provenance.CODE_TAG].startswith("changed: diff ")


def test_the_same_job_again_records_nothing_twice_and_another_way_beside_it(
    world: World, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tracker.open_job("again", "j", None, {})
    recipe: dict[str, Any] = {"a": 1}
    for argv, folders in ((["x"], 1), (["x"], 1), (["y"], 2), (["x"], 3)):
        monkeypatch.setattr("sys.argv", argv)
        tracker.log_origin(run, recipe)
        assert len(tracker.client.list_artifacts(str(run), provenance.FOLDER)) == folders
    row = stage(world, world[2][0], "avatar:A")
    before = tracker.client.get_run(str(row.mlflow_run_id))
    plan = make_plan(world[0])
    from lavatar.platform.inputs import inputs_of

    tracker.log_inputs(row.mlflow_run_id, inputs_of(world[1], plan, plan.stages[2].spec))
    after = tracker.client.get_run(str(row.mlflow_run_id))
    assert len(after.inputs.dataset_inputs) == len(before.inputs.dataset_inputs) == 1


def test_what_differs_between_two_jobs_is_told_and_nothing_else(world: World) -> None:
    home, registry, (first, second) = world
    found = compare(*(recorded(home, registry, find(home, registry, job)) for job in (first, second)))
    recipe, figures = found.pop("recipe"), found.pop("figures")
    assert recipe.pop("avatar_training.steps")[1] == "7"
    assert recipe == {}
    assert figures["avatar/avatar/total"][1] == 7.0
    assert list(figures) == ["avatar/avatar/total"], "not the pace, which never is the same"
    assert set(found) == {"data"}, "the avatar that the pair begins at has another key"
    assert {name.rpartition(" ")[2] for name in found["data"]} == {"avatar", "pair"}


def test_runs_diff_tells_it_as_text_and_as_json(world: World, lavatar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    home, registry, (first, second) = world
    monkeypatch.setenv("LAVATAR_HOME", str(home.root))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code, out, _ = lavatar("runs", "diff", first, second)
    steps = str(lookup.get_job(registry, first).recipe["avatar_training"]["steps"])
    assert (code, [line.split() for line in out.splitlines() if line.startswith("recipe")]) == (
        0, [["recipe", "avatar_training.steps", steps, "7"]],
    )  # fmt: skip
    code, out, _ = lavatar("runs", "diff", first, second, "--json")
    told = json.loads(out)
    assert (code, told["differs"]["recipe"]) == (0, {"avatar_training.steps": [steps, "7"]})
    assert [run["run"] for run in told["runs"]] == [
        lookup.get_job(registry, job).mlflow_run_id for job in (first, second)
    ]
    code, out, _ = lavatar("runs", "diff", first, first)
    assert (code, out.rstrip().endswith("nothing of what was recorded differs")) == (0, True)


def test_seeds_have_a_place_of_their_own(world: World) -> None:
    home, registry, (first, _) = world
    both = recorded(home, registry, find(home, registry, first))
    assert "avatar_training.seed" in both.seeds
    assert "avatar_training.seed" not in both.recipe
    assert both.packages["mlflow"]


def test_runs_by_name(world: World) -> None:
    home, registry, (first, second) = world
    row = stage(world, first, "avatar:A")
    run_id = str(row.mlflow_run_id)
    for text in (f"{first}/avatar:A", f"{first[:6]}/avatar:A", run_id, run_id[:12]):
        named = find(home, registry, text)
        assert (named.run_id, named.stage and named.stage.key) == (run_id, row.key)
    job_run = str(lookup.get_job(registry, second).mlflow_run_id)
    for text in (second, second[:6], job_run):
        assert find(home, registry, text).run_id == job_run
    with pytest.raises(UnknownJobError, match="there is no job or run 'nobody'"):
        find(home, registry, "nobody")
    with pytest.raises(UsageError, match="has no stage 'avatar:Z'") as caught:
        find(home, registry, f"{first}/avatar:Z")
    assert "avatar:A" in caught.value.hint


def test_system_metrics_go_on_by_time_and_are_kept_while_mlflow_is_away(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "FIRST_SECONDS", 0.1)
    monkeypatch.setattr(machine, "SAMPLE_SECONDS", 0.2)
    run = str(tracker.open_stage("system", "avatar:A", None, None, {}))
    unsent = tmp_path / "unsent.jsonl"
    (tmp_path / "file").write_text("")
    away = MlflowSink(f"sqlite:///{tmp_path}/file/nowhere.db", run, unsent, 0.05, machine.SystemMetrics())
    time.sleep(1.5)
    away.flush()
    away.close()
    assert unsent.exists()
    sink = MlflowSink(tracker.uri, run, unsent, 0.05, machine.SystemMetrics())
    time.sleep(2.2)
    sink.close()
    assert not unsent.exists()
    assert not sink._thread.is_alive(), "no thread outlives the sink"
    points = tracker.client.get_metric_history(run, "system/cpu_utilization_percentage")
    steps = sorted(point.step for point in points)
    assert len(steps) >= 3
    assert steps == sorted(set(steps)), "each second once"
    assert steps[0] <= 2 < steps[-1] + 1 < 30
    names = set(tracker.client.get_run(run).data.metrics)
    assert {"system/process_memory_megabytes", "system/system_memory_usage_percentage"} <= names


def test_each_node_of_a_training_has_its_own_curves(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "FIRST_SECONDS", 0.0)
    run = str(tracker.open_stage("system", "avatar:B", None, None, {}))
    factory = pickle.loads(pickle.dumps(tracker.sink_factory(run)))
    monkeypatch.setattr(machine, "describe", lambda: {"host": "this one"})
    first, other = factory("node0"), factory.beside("node1")
    first.log_metrics(1, {"avatar/total": 0.5})
    for sink in (other, first):
        sink.flush()
        sink.close()
    data = tracker.client.get_run(run).data
    for node in ("node0", "node1"):
        assert 0 < data.metrics[f"system/{node}/system_memory_usage_percentage"] < 100
    assert "system/cpu_utilization_percentage" not in data.metrics
    assert data.metrics["avatar/total"] == 0.5
    assert data.tags["lavatar.machine.host"] == data.tags["lavatar.machine.node1.host"] == "this one"
    assert "lavatar.machine.node0.host" not in data.tags
    assert measures_time("system/node1/cpu_utilization_percentage"), "no figure of the training"


def test_a_run_without_its_process_is_ended_before_somebody_looks(world: World, tracker: Tracker) -> None:
    run = str(tracker.open_job("orphan", "made by a process that died at once", None, {}))
    mark = tracker.client.get_run(run).data.tags["lavatar.owner"]
    said: list[str] = []
    end_abandoned(world[0], said.append)
    assert tracker.client.get_run(run).info.status == "RUNNING", "its process lives"
    tracker.client.set_tag(run, "lavatar.owner", f"{mark.split('|')[0]}|999999|1.0")
    end_abandoned(world[0], said.append)
    assert tracker.client.get_run(run).info.status == "KILLED"
    assert any(run[:8] in line for line in said)


def test_a_run_of_another_machines_job_is_ended_once_its_lease_has_run_out(world: World, tracker: Tracker) -> None:
    home, registry, _ = world
    plan = make_plan(home, "Y", "Z")
    ledger.store_plan(registry, home, plan, "elsewhere")
    ledger.claim_job(registry, plan.job_id, Owner("far", "another machine", 1, 1.0))
    run = str(tracker.open_job("elsewhere", plan.job_id, None, {}))
    ledger.set_run(registry, lookup.get_job(registry, plan.job_id), run, open_=True)
    end_abandoned(home, lambda text: None)
    assert tracker.client.get_run(run).info.status == "RUNNING", "its lease holds"
    with registry.write() as session:
        session.execute(ledger.update(Job).where(Job.id == plan.job_id).values(lease_until=1.0))
    end_abandoned(home, lambda text: None)
    assert tracker.client.get_run(run).info.status == "KILLED"
    ledger.release_dead(registry)

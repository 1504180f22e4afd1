"""A finished job or stage done again and compared, by the command; the stages are small functions in threads."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lavatar.cluster.stages
from lavatar.contracts import StageKind, StageResult, StageSpec
from lavatar.errors import TrainingError
from lavatar.platform import lookup, reproduction, sweeps
from lavatar.platform.home import Home
from lavatar.platform.jobs import run_job
from lavatar.platform.planned import make_plan, person
from lavatar.platform.planning import Plan
from lavatar.platform.preparing import prepare
from lavatar.platform.provenance import COMMAND_TAG, Code
from lavatar.platform.registry import Registry
from lavatar.platform.reproduction import compare_files
from lavatar.platform.runs import unreferenced
from lavatar.platform.states import State
from lavatar.platform.subjects import add_subject, describe_synthetic, get_subject
from lavatar.platform.sweeps import Sweep
from lavatar.platform.tables import Stage
from lavatar.platform.tracking import Tracker, connect, quiet

sys.path.insert(0, str(Path(__file__).parent))
from platform_fakes import FakeRunner, finish, fresh, office, tiny, use_plain_digest

Bodies = dict[StageKind, Callable[[StageSpec, Any], StageResult]]
seen: list[StageSpec] = []


def done_again(spec: StageSpec, context: Any) -> StageResult:
    """What the job's own runner came to, in the place of the reproduction."""
    assert "LAVATAR_STORE" not in os.environ
    seen.append(spec)
    fake: Any = SimpleNamespace(spec=spec, emit=context.events.emit)
    return finish(fake)


def otherwise(spec: StageSpec, context: Any) -> StageResult:
    return StageResult(done_again(spec, context).artefacts, {"loss": 0.505, "seconds": 9.0})


def broken(spec: StageSpec, context: Any) -> StageResult:
    raise TrainingError("the loss is not finite")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished job of two drawn people; its figures are those of `finish`."""
    quiet()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "LAVATAR_STORE", "LAVATAR_REGISTRY"):
            patch.delenv(name, raising=False)
        patch.setattr("lavatar.platform.registering.register", lambda *a: None)
        patch.setattr("lavatar.platform.execution.POLL_SECONDS", 0.01)
        patch.setattr("lavatar.platform.onestage.POLL_SECONDS", 0.01)
        use_plain_digest(patch)
        home, registry = fresh(tmp_path_factory.mktemp("reproduction"))
        patch.setenv("LAVATAR_HOME", str(home.root))
        ann, bob = (add_subject(registry, describe_synthetic(n, i))[0] for i, n in enumerate(("ann", "bob")))
        plan = make_plan(home, registry, [(ann, bob)], tiny("resources.backend=inline"), False)
        run_job(office(home, registry, FakeRunner()), plan)
        yield home, registry, plan
        registry.close()


World = tuple[Home, Registry, Plan]


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[StageKind, Any]], None]:
    """What stages do when they are done again."""
    seen.clear()

    def use(bodies: Mapping[StageKind, Any]) -> None:
        runner = partial(real, bodies={**dict.fromkeys(StageKind, done_again), **bodies})
        monkeypatch.setattr(lavatar.cluster.stages, "StageRunner", runner)

    real = lavatar.cluster.stages.StageRunner
    use({})
    return use


def files_of(home: Home) -> dict[str, tuple[int, int]]:
    """Everything that a job left, with size and time."""
    folders = [home.root / name for name in ("shards", "checkpoints", "outputs")]
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def left(home: Home) -> list[str]:
    return sorted(path.name for path in (home.root / "reproductions").glob("*"))


@pytest.mark.usefixtures("stages")
def test_a_job_done_again_is_the_same_and_leaves_the_first_alone(world: World, lavatar: Any) -> None:
    home, registry, plan = world
    before, rows = files_of(home), lookup.job_stages(registry, plan.job_id)
    code, out, err = lavatar("reproduce", plan.job_id, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["same"], found["folder"]) == (True, None)
    assert [stage["stage"] for stage in found["stages"]] == [stage.name for stage in plan.stages]
    assert all(stage["differ"] == {} for stage in found["stages"])
    assert {spec.home for spec in seen} != {home.root}
    for spec in seen:
        assert not spec.out_dir.is_relative_to(home.root / "shards")
        assert all(path.is_relative_to(spec.home) for path in spec.inputs.values()), "each from those made before it"
    assert files_of(home) == before
    assert [vars(v.stage) | {"_sa_instance_state": 0} for v in lookup.job_stages(registry, plan.job_id)] == [
        vars(v.stage) | {"_sa_instance_state": 0} for v in rows
    ]
    assert left(home) == []


@pytest.mark.usefixtures("stages")
def test_of_one_stage_the_inputs_are_the_recorded_ones(world: World, lavatar: Any) -> None:
    home, registry, plan = world
    pair = plan.stage(StageKind.PAIR)
    code, _, err = lavatar("reproduce", f"{plan.job_id}/{pair.name}")
    assert code == 0, err
    (spec,) = seen
    assert dict(spec.inputs) == dict(pair.spec.inputs)
    client = connect(home)
    experiment = client.get_experiment_by_name(reproduction.EXPERIMENT)
    row = lookup.get_stage(registry, pair.key)
    assert row is not None
    wanted = f"tags.`{reproduction.REPRODUCES_TAG}` = '{row.mlflow_run_id}'"
    runs = client.search_runs([experiment.experiment_id], wanted)
    assert {run.info.run_name for run in runs} >= {pair.name}
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert not [run for run in unreferenced(home, registry) if run.info.experiment_id == experiment.experiment_id]


def test_figures_that_differ_are_told_and_are_the_exit_code(world: World, lavatar: Any, stages: Any) -> None:
    home, _, plan = world
    stages({StageKind.AVATAR: otherwise})
    code, out, _ = lavatar("reproduce", f"{plan.job_id}/avatar:ann", "--json")
    found = json.loads(out)
    assert code == 1
    (stage,) = found["stages"]
    assert (stage["figures"], stage["differ"]) == (1, {"loss": [0.5, 0.505]}), "seconds are no figure"
    kept = Path(found["folder"])
    assert kept.parent == home.root / "reproductions"
    assert json.loads((kept / reproduction.COMPARISON).read_text())["stages"][0]["differ"] == stage["differ"]
    assert lavatar("reproduce", f"{plan.job_id}/avatar:ann", "--tolerance", "0.02")[0] == 0
    assert left(home) == [kept.name]


def test_what_is_different_today_is_said_first(
    world: World, lavatar: Any, stages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    stages({StageKind.AVATAR: broken})
    code, _, err = lavatar("reproduce", f"{world[2].job_id}/avatar:ann")
    assert code == 1
    assert "the loss is not finite" in err
    lines = err.splitlines()
    told = next(i for i, line in enumerate(lines) if "OMP_NUM_THREADS" in line and "77" in line)
    assert told < next(i for i, line in enumerate(lines) if "avatar:ann: running" in line)
    client = connect(world[0])
    experiment = client.get_experiment_by_name(reproduction.EXPERIMENT)
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"], max_results=2)
    assert [run.info.status for run in runs] == ["FAILED", "FAILED"]
    assert not [name for name in left(world[0]) if name.endswith(".part")]


@pytest.mark.usefixtures("stages")
def test_what_cannot_be_done_again_says_why(world: World, lavatar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    home, registry, plan = world
    monkeypatch.setattr("lavatar.platform.planning.METHOD_VERSION", dict.fromkeys(StageKind, 99))
    code, _, err = lavatar("reproduce", plan.job_id)
    assert code == 1
    assert "cannot be reproduced" in err
    assert "made by another lavatar" in err
    monkeypatch.undo()
    monkeypatch.setenv("LAVATAR_HOME", str(home.root))
    with registry.write() as session:
        session.get_one(Stage, plan.stage(StageKind.AVATAR).key).state = "failed"
    try:
        code, _, err = lavatar("reproduce", f"{plan.job_id}/avatar:ann")
    finally:
        with registry.write() as session:
            session.get_one(Stage, plan.stage(StageKind.AVATAR).key).state = "finished"
    assert code == 1
    assert f"lavatar jobs resume {plan.job_id}" in err


@pytest.mark.usefixtures("stages")
def test_what_a_sweep_needed_is_done_again(world: World, lavatar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    home, registry, _ = world
    people = [person(get_subject(registry, name)) for name in ("ann", "bob")]
    sweep = Sweep(
        "ann", "bob", tuple(each.digest for each in people), "tiny", ("resources.backend=inline", "avatar.samples=5"),
        {}, (), 2, "none", "random", "psnr", "max", 20, 10,
    )  # fmt: skip
    plan = prepare(home, sweep.id, people[0], people[1], sweep.base())
    run_job(office(home, registry, FakeRunner()), plan)
    code, _, err = lavatar("reproduce", plan.job_id)
    assert code == 1
    assert f"job {plan.job_id} is what the trials of a sweep needed, and that sweep is gone" in err
    folder = sweeps.store(home, sweep)
    code, out, err = lavatar("reproduce", plan.job_id, "--json")
    assert code == 0, err
    assert [stage["stage"] for stage in json.loads(out)["stages"]] == [stage.name for stage in plan.stages]
    monkeypatch.setattr("lavatar.platform.sweeps.METHOD_VERSION", dict.fromkeys(StageKind, 99))
    code, _, err = lavatar("reproduce", plan.job_id)
    assert code == 1
    assert "was made by another lavatar" in err
    assert "check that out" not in err, "this is the commit"
    monkeypatch.setattr("lavatar.platform.provenance.find_code", lambda: Code("0", "1" * 40))
    assert "check that out and try again" in lavatar("reproduce", plan.job_id)[2]
    (folder / sweeps.DEFINITION).write_text("{")
    assert "cannot be read" in lavatar("reproduce", plan.job_id)[2]


def test_of_a_run_that_is_no_job_it_says_what_made_it(world: World, lavatar: Any) -> None:
    home = world[0]
    tracker = Tracker(home, print)
    made = tracker.open_job("lavatar/benchmark", "a row", None, {})
    again = tracker.open_stage(reproduction.EXPERIMENT, "again", None, None, {})
    assert made
    assert again
    assert "Name a job, or JOB/STAGE" in lavatar("reproduce", made)[2]
    tracker.tag(made, {COMMAND_TAG: "lavatar benchmark method --pair ann:bob --steps 5"})
    assert (
        "`lavatar benchmark method --pair ann:bob --steps 5`: repeat that in another home"
        in lavatar("reproduce", made)[2]
    )
    tracker.tag(again, {reproduction.REPRODUCES_TAG: "0123"})
    assert "lavatar reproduce 0123" in lavatar("reproduce", again)[2]
    for run_id in (made, again):
        tracker.end(run_id, State.FINISHED)


@pytest.mark.usefixtures("stages")
def test_a_store_is_not_asked(world: World, lavatar: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAVATAR_STORE", f"file://{tmp_path / 'store'}")
    code, _, err = lavatar("reproduce", f"{world[2].job_id}/avatar:ann")
    assert len(seen) == 1, err
    assert code == 0
    assert os.environ["LAVATAR_STORE"]


def test_figures_are_near_as_a_part_of_them() -> None:
    assert reproduction.near(1.0, 1.01, 0.01)
    assert not reproduction.near(1.0, 1.02, 0.01)
    assert not reproduction.near(1.0, None, 1.0)
    assert reproduction.near(None, None, 0.0)


def test_a_file_that_is_missing_on_either_side_differs(tmp_path: Path) -> None:
    then, now = tmp_path / "then" / "release", tmp_path / "now" / "release"
    for folder, names in ((then, "ab"), (now, "bc")):
        folder.mkdir(parents=True)
        for name in names:
            (folder / f"{name}.safetensors").write_text(name)
    count, differ = compare_files(then.parent, now.parent, StageKind.AVATAR)
    assert (count, differ) == (3, ["release/a.safetensors", "release/c.safetensors"])

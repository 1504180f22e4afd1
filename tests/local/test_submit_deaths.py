"""What `lavatar submit` survives, nothing replaced: Ray, DeepSpeed, MLflow, SQLite, synthetic subjects, toy sizes.

One job is submitted, its training worker is killed, then its driver, then it is interrupted, then cancelled from
another process, and then it finishes: what a user sees at each turn, and that each step of the curve is there once, in
one MLflow run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from submit_files import LIMIT, TOY, Lavatar, descendants, stopped, training_worker

from lavatar.platform.home import Home

STEPS = 800
pytestmark = pytest.mark.slow  # a whole job through three kinds of death: minutes


@pytest.fixture(scope="module")
def lavatar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lavatar]:
    tool = Lavatar(tmp_path_factory.mktemp("submit") / "home")
    yield tool
    tool.kill_what_runs()


def job(lavatar: Lavatar, actor: str, *extra: str) -> tuple[str, ...]:
    return lavatar.submit("ann", actor, *extra, avatar_training__steps=STEPS)


@pytest.fixture(scope="module")
def result(lavatar: Lavatar) -> dict[str, Any]:
    """The job's report after all that was done to it."""
    for seed, name in ((1, "ann"), (2, "bob"), (3, "cyd")):
        assert lavatar("subjects", "add", "--synthetic", str(seed), name)[0] == 0
    first = lavatar.start(*job(lavatar, "bob", "--json"))
    row = lavatar.wait_for(first, "avatar:ann", 40)
    run_id = row.mlflow_run_id
    assert run_id
    killed = training_worker(first.pid)
    with stopped(killed), stopped(psutil.Process(first.pid)):  # a sleeping owner is an owner
        assert lavatar(*job(lavatar, "bob"))[0] == 1
        assert f"job {row.job_id} (ann <- bob) is being run by process {first.pid}" in lavatar.errors()
    killed.kill()
    row = lavatar.wait_for(first, "avatar:ann", (row.done or 0) + 40)
    family, trainer = descendants(first.pid), training_worker(first.pid)
    assert trainer.pid != killed.pid
    first.kill()
    first.communicate()
    assert trainer.wait(60) is None, "two would train at once"
    _, alive = psutil.wait_procs(family, timeout=240)  # Ray's agents look for their parent once in a while
    assert alive == [], "a killed driver leaves processes behind"

    second = lavatar.start(*job(lavatar, "bob", "--json"))
    row = lavatar.wait_for(second, "avatar:ann", (row.done or 0) + 30)
    assert row.mlflow_run_id == run_id
    assert row.attempts == 2
    family = descendants(second.pid)
    os.killpg(second.pid, signal.SIGINT)  # as a terminal does: Ray's processes get it too
    out, _ = second.communicate(timeout=LIMIT)
    assert second.returncode == 130
    assert json.loads(out)["state"] == "interrupted"
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == [], "an interrupted driver leaves processes behind"

    third = lavatar.start("jobs", "resume", row.job_id or "", "--json")
    row = lavatar.wait_for(third, "avatar:ann", (row.done or 0) + 20)
    family = descendants(third.pid)
    for _ in range(2):
        code, out = lavatar("jobs", "cancel", row.job_id or "", "--json")
        assert (code, json.loads(out)["cancel_asked"]) == (0, True)
    out, _ = third.communicate(timeout=LIMIT)
    assert third.returncode == 130
    assert json.loads(out)["state"] == "cancelled"
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == [], "a cancelled driver leaves processes behind"

    code, out = lavatar("jobs", "retry", row.job_id or "", "--json")
    assert code == 0, lavatar.errors()
    report: dict[str, Any] = json.loads(out)
    return report


def test_the_curve_goes_on_in_the_same_run_with_each_step_once(lavatar: Lavatar, result: dict[str, Any]) -> None:
    from lavatar.platform.tracking import connect

    client = connect(Home(lavatar.home))
    row = lavatar.stage("avatar:ann")
    assert row is not None
    assert row.attempts == 4
    run = client.get_run(row.mlflow_run_id)
    assert run.info.status == "FINISHED"
    steps = [m.step for m in client.get_metric_history(row.mlflow_run_id, "avatar/total")]
    assert len(steps) == len(set(steps))
    missing = set(range(TOY["avatar_training.log_every"], STEPS, TOY["avatar_training.log_every"])) - set(steps)  # type: ignore[call-overload]
    assert not missing, f"steps {sorted(missing)[:9]} … were lost"
    runs = client.search_runs([run.info.experiment_id])
    assert client.get_experiment(run.info.experiment_id).name == "lavatar/ann<-bob"
    assert {r.info.status for r in runs} == {"FINISHED"}
    assert len(runs) == 6
    assert [f for f in client.list_artifacts(row.mlflow_run_id, "images") if f.path.endswith(".png")]


def test_another_actor_reuses_the_avatar(lavatar: Lavatar, result: dict[str, Any]) -> None:
    code, out = lavatar(*job(lavatar, "cyd", "--json", "--set", "resources.backend=inline"))
    assert code == 0, lavatar.errors()
    report = json.loads(out)
    assert [s["name"] for s in report["stages"] if s["cached"]] == ["preprocess:ann", "avatar:ann"]
    assert report["models"][-1] == {"name": "lavatar-pair-ann-cyd", "version": 1}


def test_evaluate_measures_the_same(lavatar: Lavatar, result: dict[str, Any]) -> None:
    code, out = lavatar("evaluate", "--avatar", "ann", "--actor", "bob", "--json")
    assert code == 0
    metrics = json.loads(out)["metrics"]
    for name in ("mse", "psnr", "ssim"):
        assert metrics["self"][name] == pytest.approx(result["metrics"]["self"][name], rel=1e-3)

"""`lavatar sweep` from end to end, nothing replaced: Ray Tune, MLflow, SQLite, a synthetic subject, toy sizes."""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fault_files import nothing_left, processes_of, until
from sessions import AGENTS_LINGER
from submit_files import TOY, Lavatar, descendants

from lavatar.cluster.schedulers import REDUCTION
from lavatar.configs.recipe import load_recipe
from lavatar.configs.space import load_space
from lavatar.contracts import StageKind
from lavatar.platform import sweeps
from lavatar.platform.home import Home
from lavatar.platform.planning import SECTIONS

GOOD = 1e-3
"""A learning rate. The bad ones are a hundred times too high and more: they spoil what a training begins at."""
STEPS, EVERY = 40, 10
Result = dict[str, Any]


@pytest.fixture(autouse=True)
def of_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are looked up in the home's MLflow: one that was used in this process before stays in its environment."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def lavatar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lavatar]:
    """A home with two people and, after the first sweep, with the data of one."""
    tool = Lavatar(tmp_path_factory.mktemp("sweep") / "home", environment={"OMP_NUM_THREADS": "1"})
    for seed, name in ((1, "ann"), (2, "bob")):
        assert tool("subjects", "add", "--synthetic", str(seed), name)[0] == 0
    yield tool
    tool.kill_what_runs()


def command(lavatar: Lavatar, space: str, *extra: str, cpus: int = 2, **changes: Any) -> tuple[str, ...]:
    """A sweep of ann's avatar with this space; psnr is compared, and everything but the learning rate is good."""
    path = lavatar.home.parent / "space.yaml"
    path.write_text(space)
    toy = {**TOY, "resources.avatar.cpus": cpus, **{key.replace("__", "."): value for key, value in changes.items()}}
    settings = [part for key, value in toy.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    length = ("--steps", str(STEPS), "--every", str(EVERY), "--metric", "psnr")
    return ("sweep", "--avatar", "ann", "--space", str(path), *length, *settings, *extra, "--json")


def rates(*values: float) -> str:
    return f"avatar_training.learning_rate: {{choice: {json.dumps(list(values))}}}\n"


def in_order(lavatar: Lavatar, space: str) -> list[Any]:
    """The values of the trials as a random search draws them."""
    path = lavatar.home.parent / "order.yaml"
    path.write_text(space)
    found = load_space(str(path), load_recipe("tiny"), StageKind.AVATAR, SECTIONS[StageKind.AVATAR])
    return [next(iter(point.values())) for point in found.random(int(found.size()))]


def by_rate(result: Result) -> dict[float, Result]:
    return {row["params"]["avatar_training.learning_rate"]: row for row in result["trials"]}


def running_sweep(lavatar: Lavatar) -> tuple[Path, dict[str, Any]]:
    """The newest sweep's folder, and its trials."""
    found = sweeps.folders(Home(lavatar.home))
    return found[0], sweeps.read_trials(found[0])["trials"]


def started(lavatar: Lavatar, line: tuple[str, ...], condition: Callable[[list[Result]], Any]) -> Any:
    """The process of a new sweep, once the rows of its trials are so."""
    before = sweeps.folders(Home(lavatar.home))
    process = lavatar.start(*line)

    def met() -> bool:
        assert process.poll() is None, lavatar.errors()
        new = [folder for folder in sweeps.folders(Home(lavatar.home)) if folder not in before]
        return bool(new and condition(list(sweeps.read_trials(new[0])["trials"].values())))

    until(met, lavatar)
    return process


def actor_of_a_trial(pid: int) -> psutil.Process:
    """The process that trains, below the driver."""
    found = [p for p in descendants(pid) if any("ImplicitFunc" in part for part in p.cmdline())]
    assert len(found) == 1, [p.cmdline()[:2] for p in descendants(pid)]
    return found[0]


def test_asha_stops_the_bad_ones_and_a_failed_trial_ends_no_other(lavatar: Lavatar) -> None:
    from lavatar.platform.tracking import PARENT_TAG, connect

    values = (0.2, 0.3, 1e30, 0.4, GOOD)
    space = rates(*values)
    order = in_order(lavatar, space)
    line = command(lavatar, space, "--trials", str(len(values)), resources__max_failures=0)
    code, out = lavatar(*line)
    assert code == 0, lavatar.errors()
    result = json.loads(out)
    rows = by_rate(result)
    assert (result["state"], result["best"]["params"]) == ("finished", {"avatar_training.learning_rate": GOOD})
    assert (rows[GOOD]["state"], rows[GOOD]["step"]) == ("finished", STEPS)
    assert rows[1e30]["state"] == "failed"
    assert "total = nan" in rows[1e30]["message"]
    late = [rate for rate in order[order.index(GOOD) + 1 :] if rate != 1e30]
    assert late, "another order is drawn: put the good value further to the front"
    for rate in late:
        assert (rows[rate]["state"], rows[rate]["step"]) == ("stopped", EVERY), "it got no further than the first rung"
    client = connect(Home(lavatar.home))
    parent = client.get_run(result["mlflow_run"])
    runs = client.search_runs([parent.info.experiment_id])
    nested = {run.data.params["avatar_training.learning_rate"]: run for run in runs if run.data.tags.get(PARENT_TAG)}
    assert len(nested) == len(values)
    assert {run.data.tags[PARENT_TAG] for run in nested.values()} == {parent.info.run_id}
    data = lavatar.stage("preprocess:ann")
    assert data is not None
    for run in (parent, *nested.values()):
        (read,) = run.inputs.dataset_inputs
        assert (read.dataset.name, json.loads(read.dataset.profile)["digest"]) == ("ann", data.key)
        assert run.data.tags["lavatar.command"].startswith("lavatar sweep --avatar ann")
    assert parent.data.params["inputs.dataset"] == data.key
    history = client.get_metric_history(nested[str(GOOD)].info.run_id, "psnr")
    assert [point.step for point in history] == [10, 20, 30, 40]
    assert len(client.get_metric_history(nested[str(late[0])].info.run_id, "psnr")) == 1
    good = nested[str(GOOD)]
    assert {"ssim", "mse", "face/psnr", "loss/avatar/total"} <= set(good.data.metrics)
    assert {"avatar/timing/samples_per_second", "avatar/timing/data_wait_share"} <= set(good.data.metrics)
    (rate, *_) = [name for name in good.data.metrics if name.startswith("avatar/rate/")]
    assert {10, 20, 30, 40} <= {point.step for point in client.get_metric_history(good.info.run_id, rate)}
    assert good.data.tags["lavatar.machine.host"] == platform.node()
    assert nested["1e+30"].info.status == "FAILED"
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {
        "plot.svg",
        "trials.json",
        "progress.json",
        "progress.txt",
        "provenance",
    }
    assert data.state == "finished"
    nothing_left(lavatar.home)


@pytest.mark.slow
def test_population_based_training_copies_the_better_trial(lavatar: Lavatar) -> None:
    """There is room for one of the two at a time: they take turns, so that each finds the other's state to copy."""
    from lavatar.platform.tracking import connect

    turns = ("--scheduler", "pbt", "--concurrent", "1")
    code, out = lavatar(*command(lavatar, rates(0.3, GOOD), "--trials", "2", *turns))
    assert code == 0, lavatar.errors()
    folder, trials = running_sweep(lavatar)
    assert json.loads(out)["state"] == "finished"
    log = (lavatar.home / "logs" / f"sweep-{folder.name}.log").read_text()
    first = {name: next(line for line in log.splitlines() if f"trial {name}: begins" in line) for name in trials}
    bad = next(name for name in trials if "0.3}" in first[name])
    good = next(name for name in trials if name != bad)
    begun = [line for line in log.splitlines() if f"trial {bad}: begins" in line]
    assert len(begun) > 1
    copies, donor = trials[bad]["copies"], trials[good]["number"]
    assert copies, "Tune gave it the other's state"
    assert {copy["trial"] for copy in copies} == {donor}
    assert "copies" not in trials[good]
    for copy in copies:
        assert any(f"from the state of trial {good} at avatar/step-{copy['step']:08d}" in line for line in begun[1:])
    tags = connect(Home(lavatar.home)).get_run(trials[bad]["run_id"]).data.tags
    assert json.loads(tags["lavatar.copies"]) == copies
    curve = {report["step"]: report["psnr"] for report in trials[bad]["reports"]}
    theirs = {report["step"]: report["psnr"] for report in trials[good]["reports"]}
    best = max(value for step, value in curve.items() if step > EVERY)  # it may draw the bad rate again later
    assert best > (curve[EVERY] + theirs[EVERY]) / 2, (curve, theirs)
    assert all(row["state"] == "finished" for row in trials.values())


@pytest.mark.slow
def test_a_sweep_whose_driver_was_killed_goes_on_with_what_asha_knew(lavatar: Lavatar) -> None:
    values = (GOOD, 0.1, 0.2, 0.3, 0.4, 0.5)
    line = command(lavatar, rates(*values), "--trials", str(len(values)), avatar__code_dim=32)
    process = started(lavatar, line, lambda rows: len(rows) > 2 and sum(r["state"] in sweeps.ENDED for r in rows) > 1)
    time.sleep(3.0)  # Tune stores what it has every two seconds
    _, before = running_sweep(lavatar)
    process.kill()
    process.wait()
    nothing_running(lavatar.home)
    code, out = lavatar(*line)
    assert code == 0, lavatar.errors()
    folder, after = running_sweep(lavatar)
    assert len(after) == len(values)
    assert set(before) <= set(after), "the same trials"
    for name, row in before.items():
        if row["state"] in sweeps.ENDED:
            assert after[name]["reports"] == row["reports"], "what had ended is not run again"
    result = json.loads(out)
    assert result["state"] == "finished"
    assert result["best"]["params"]["avatar_training.learning_rate"] == GOOD
    rung = [row["reports"][0]["psnr"] for row in after.values()]
    stopped = [(row["state"], row["reports"][-1]["step"]) == ("stopped", EVERY) for row in after.values()]
    worse = [rung[i] < np.percentile(rung[:i], 100 * (1 - 1 / REDUCTION)) for i in range(len(before), len(rung))]
    assert stopped[len(before) :] == worse, "below the best third of all that came to the first rung before"
    assert worse[0], "without the memory the first one would have had nothing to be worse than"
    assert lavatar(*line)[1] == out, "it is done: nothing runs"
    assert not (folder / "tune").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("how", "state", "width"), [("signal", "interrupted", 24), ("cancel", "cancelled", 28)])
def test_a_sweep_that_was_told_to_stop_goes_on_by_its_id(lavatar: Lavatar, how: str, state: str, width: int) -> None:
    line = command(lavatar, rates(GOOD, 2e-3), "--trials", "2", "--scheduler", "none", avatar__code_dim=width)
    process = started(lavatar, line, lambda rows: any(len(row["reports"]) >= 2 for row in rows))
    until(lambda: any("running" in path.read_text() for path in lavatar.home.rglob("progress.txt")), lavatar)
    if how == "signal":
        os.kill(process.pid, signal.SIGTERM)
    else:
        assert lavatar("sweep", "cancel", running_sweep(lavatar)[0].name)[0] == 0
    out, _ = process.communicate(timeout=120)
    result = json.loads(out)
    assert (process.returncode, result["state"]) == (130, state)
    nothing_left(lavatar.home)
    code, out = lavatar("sweep", "resume", result["sweep"], "--json")
    assert code == 0, lavatar.errors()
    _, trials = running_sweep(lavatar)
    assert json.loads(out)["state"] == "finished"
    assert [[r["step"] for r in row["reports"]] for row in trials.values()] == [[10, 20, 30, 40]] * 2
    log = (lavatar.home / "logs" / f"sweep-{result['sweep']}.log").read_text()
    assert log.count(": begins with") > 2


@pytest.mark.slow
def test_a_trial_whose_process_is_killed_goes_on_from_its_state(lavatar: Lavatar) -> None:
    line = command(lavatar, rates(GOOD), "--trials", "1", "--scheduler", "none", avatar__code_dim=20)
    process = started(lavatar, line, lambda rows: any(len(row["reports"]) >= 2 for row in rows))
    actor_of_a_trial(process.pid).kill()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, lavatar.errors()
    _, trials = running_sweep(lavatar)
    (row,) = trials.values()
    assert [r["step"] for r in row["reports"]] == [10, 20, 30, 40]
    assert "copies" not in row, "it went on with its own weights"
    assert json.loads(out)["state"] == "finished"


@pytest.mark.slow
def test_a_trial_that_failed_is_tried_again_without_the_states_of_the_others(lavatar: Lavatar) -> None:
    settings = {"resources__max_failures": 0, "avatar__code_dim": 36}
    line = command(lavatar, rates(1e30, GOOD), "--trials", "2", "--scheduler", "none", **settings)
    code, out = lavatar(*line)
    assert code == 0, lavatar.errors()
    folder, before = running_sweep(lavatar)
    (bad,) = [name for name, row in before.items() if row["state"] == "failed"]
    (good,) = set(before) - {bad}
    assert list((folder / "tune" / good).glob("checkpoint_*")) == []
    code, out = lavatar("sweep", "resume", folder.name, "--json")
    assert code == 0, lavatar.errors()
    assert json.loads(out)["state"] == "finished"
    _, after = running_sweep(lavatar)
    assert after[good] == before[good], "it is not run again"
    log = (lavatar.home / "logs" / f"sweep-{folder.name}.log").read_text()
    begun = [log.count(f"trial {name}: begins") for name in (bad, good)]
    assert begun == [2, 1]
    assert lavatar("sweep", "delete", folder.name)[0] == 0
    _, out = lavatar("gc", "--json")
    freed = {item["what"].split("'")[1] for item in json.loads(out)["freed"] if item["what"].startswith("MLflow run")}
    assert {f"sweep {folder.name}", f"job {folder.name}", "trial 1", "trial 2"} <= freed


@pytest.mark.slow
def test_the_pair_is_swept_and_its_winner_is_promoted(lavatar: Lavatar) -> None:
    space = "ynet_loss.lambda_ssim: {choice: [0.1, 0.5]}\nynet_training.learning_rate: {choice: [0.002]}\n"
    line = list(command(lavatar, space, "--trials", "2", "--actor", "bob", avatar_training__steps=60))
    at = line.index("--steps")
    line[at : at + 6] = ["--steps", "8", "--every", "4"]
    code, out = lavatar(*line)
    assert code == 0, lavatar.errors()
    result = json.loads(out)
    assert result["metric"] == "expression_error"
    assert result["state"] == "finished"
    code, out = lavatar("sweep", "promote", result["sweep"], "--json")
    assert code == 0, lavatar.errors()
    job = json.loads(out)
    assert {model["name"] for model in job["models"]} == {"lavatar-avatar-ann", "lavatar-pair-ann-bob"}
    cached = {stage["name"]: stage["cached"] for stage in job["stages"]}
    assert cached["preprocess:ann"]
    assert cached["avatar:ann"], "the sweep trained it"
    assert not cached["pair:ann<-bob"]


@pytest.mark.slow
def test_optuna_chooses_the_values(lavatar: Lavatar) -> None:
    space = "avatar_training.learning_rate: {loguniform: [1e-9, 1e-2]}\n"
    code, out = lavatar(*command(lavatar, space, "--trials", "3", "--search", "optuna", "--concurrent", "1"))
    assert code == 0, lavatar.errors()
    result = json.loads(out)
    assert (result["state"], len(result["trials"])) == ("finished", 3)
    assert len(by_rate(result)) == 3


def nothing_running(home: Path) -> None:
    """Of a driver that was killed: Ray's processes end by themselves."""
    deadline = time.monotonic() + AGENTS_LINGER + 20
    while processes_of(home):
        assert time.monotonic() < deadline
        time.sleep(0.2)

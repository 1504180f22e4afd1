"""`lavatar sweep` around Tune: bookkeeping, stops and restarts, winner and promotion. Tune itself is played here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, ClassVar

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from platform_fakes import FakeHandle, NoTracker, Recorder, finish
from sweep_files import Tune, command, report, toy_sweep, tracked, tune

from lavatar.configs.recipe import load_recipe
from lavatar.configs.sweep import Donor
from lavatar.errors import FaceError, Interrupted
from lavatar.platform import sweeps
from lavatar.platform.finished import recipe_of
from lavatar.platform.home import Home
from lavatar.platform.inputs import Input
from lavatar.platform.lookup import get_job
from lavatar.platform.registry import open_registry
from lavatar.platform.states import State
from lavatar.platform.tables import Job, Stage
from lavatar.platform.trialboard import TrialBoard
from lavatar.platform.trialtable import table_columns, table_text, trial_rows

__all__ = ["command", "tracked", "tune"]
pytestmark = pytest.mark.usefixtures("home")


def test_a_sweep_ends_with_its_trials_best_first(tune: Tune, command: Any, lavatar: Any) -> None:
    tune.stopped = (4,)
    code, out, err = lavatar(*command, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert (result["state"], result["ended"], result["wanted"], result["mode"]) == ("finished", 4, 4, "min")
    assert [row["params"]["avatar.samples"] for row in result["trials"]] == [10, 8, 6, 4]
    assert [row["state"] for row in result["trials"]] == ["finished"] * 3 + ["stopped"]
    assert [row["step"] for row in result["trials"]] == [20, 20, 20, 5]
    assert result["best"] == result["trials"][0]
    (plan,) = tune.plans
    assert (plan.steps, plan.trials.every, plan.metric, plan.concurrent) == (20, 5, "lpips", 0)
    assert plan.trials.spec.recipe["avatar_training"]["steps"] == 20
    assert plan.trials.spec.inputs["dataset"].is_dir()
    drawn = ElementTree.parse(result["plot"]).getroot()
    lines = [e for e in drawn.iter() if e.tag.endswith("polyline")]
    assert len(lines) == 8, "four trials, over steps and over time"
    assert sum("#d0461e" in (e.get("stroke") or "") for e in lines) == 2, "the best one"
    texts = [e for e in drawn.iter() if e.tag.endswith("text")]
    words = [e.text for e in texts]
    assert {"the best", "came to its end", "stopped early"} <= set(words)
    assert "failed" not in words, "none did"
    number = str(result["best"]["trial"])
    assert [e.text for e in texts if "#d0461e" in e.get("style", "")] == [number] * 2, "at the ends of its lines"
    code, out, _ = lavatar(*command)
    assert (code, len(tune.plans)) == (0, 1), "it is done"
    assert "lavatar sweep promote" in out
    listed = json.loads(lavatar("sweep", "list", "--json")[1])["sweeps"]
    assert [(row["sweep"], row["state"]) for row in listed] == [(result["sweep"], "finished")]
    assert result["sweep"] in lavatar("sweep", "list")[1]
    assert json.loads(lavatar("sweep", "show", result["sweep"][:4], "--json")[1]) == result


def test_what_all_trials_need_is_made_once_by_a_job(tune: Tune, command: Any, lavatar: Any, home: Path) -> None:
    result = json.loads(lavatar(*command, "--json")[1])
    other = json.loads(lavatar(*command, "--json", "--metric", "psnr")[1])
    assert other["sweep"] != result["sweep"]
    assert other["mode"] == "max"
    assert tune.runner.started == ["preprocess:ann"]  # type: ignore[attr-defined]
    with open_registry(Home(home)).read() as session:
        assert {job.id for job in session.query(Job)} == {result["sweep"], other["sweep"]}
        (stage,) = session.query(Stage)
        assert (stage.name, stage.state) == ("preprocess:ann", "finished")
    code, _, err = lavatar("jobs", "retry", result["sweep"])
    shown = json.loads(lavatar("jobs", "show", result["sweep"], "--json")[1])
    assert (shown["state"], [s["name"] for s in shown["stages"]]) == ("finished", ["preprocess:ann"])
    assert code == 0, err


def test_the_job_of_an_avatars_sweep_is_called_after_the_avatar(
    tune: Tune, command: Any, lavatar: Any, home: Path
) -> None:
    job = json.loads(lavatar(*command, "--json")[1])["sweep"]
    registry = open_registry(Home(home))
    assert get_job(registry, job).experiment == "lavatar/ann"
    registry.close()
    (listed,) = json.loads(lavatar("jobs", "list", "--json")[1])["jobs"]
    assert (listed["avatar"], listed["actor"]) == ("ann", None)
    assert json.loads(lavatar("jobs", "show", job, "--json")[1])["actor"] is None
    assert lavatar("jobs", "show", job)[1].startswith(f"job {job} finished: avatar ann\n")
    code, _, err = lavatar("report", job, "-o", home / "page.html")
    assert code == 0, err
    page = (home / "page.html").read_text()
    assert "<h1>avatar ann: what the trials of a sweep need</h1>" in page
    assert "driven by" not in page
    assert lavatar("jobs", "delete", job)[1] == f"deleted job {job} (ann)\n"


def test_a_sweep_of_the_pair_trains_the_avatar_first(
    tune: Tune, command: Any, lavatar: Any, tmp_path: Path, home: Path
) -> None:
    (tmp_path / "space.yaml").write_text("ynet.code_dim: {choice: [16, 32, 64, 128]}")
    tune.by = "ynet.code_dim"
    code, out, err = lavatar(*command, "--actor", "bob", "--json")
    assert code == 0, err
    assert tune.runner.started == ["preprocess:ann", "preprocess:bob", "avatar:ann"]  # type: ignore[attr-defined]
    (plan,) = tune.plans
    recipe = load_recipe("tiny")
    assert plan.trials.spec.recipe["avatar_training"]["steps"] == recipe.avatar_training.steps
    assert plan.trials.spec.recipe["ynet_training"]["steps"] == 20
    assert plan.steps == 40, "the mapping is trained no longer than the network"
    assert set(plan.trials.spec.inputs) == {"avatar_dataset", "actor_dataset", "avatar"}
    result = json.loads(out)
    code, out, err = lavatar("sweep", "promote", result["sweep"], "--json")
    assert code == 0, err
    assert json.loads(out)["actor"] == "bob"
    registry = open_registry(Home(home))
    assert not recipe_of(registry, get_job(registry, json.loads(out)["job"])).pair_learning.warm, "as its trials began"
    registry.close()
    assert lavatar("subjects", "remove", "ann")[0] == 0
    assert lavatar("subjects", "add", "--synthetic", "77", "ann")[0] == 0
    code, _, err = lavatar("sweep", "promote", result["sweep"])
    assert (code, "is another video now" in err) == (1, True), err


def test_a_stopped_sweep_goes_on_by_the_same_command_or_by_its_id(tune: Tune, command: Any, lavatar: Any) -> None:
    first = json.loads(lavatar(*command, "--json")[1])["trials"][-1]["params"]["avatar.samples"]
    tune.left, tune.done = (6,), set()
    other = (*command, "--metric", "psnr")
    code, out, err = lavatar(*other, "--json")
    result = json.loads(out)
    assert (code, result["state"]) == (130, "interrupted")
    assert f"lavatar sweep resume {result['sweep']}" in err
    assert "interrupted" in [row["state"] for row in result["trials"]]
    assert (Path(result["plot"]).parent / "sweep.json").is_file()
    tune.left = ()
    code, out, _ = lavatar("sweep", "resume", result["sweep"][:5], "--json")
    again = json.loads(out)
    assert (code, again["state"], again["sweep"]) == (0, "finished", result["sweep"])
    assert len(again["trials"]) == 4
    assert len(tune.plans) == 3
    assert lavatar(*other)[0] == 0
    assert len(tune.plans) == 3
    assert first in (4, 6, 8, 10)


def test_a_failed_trial_does_not_end_the_sweep_and_is_tried_again(tune: Tune, command: Any, lavatar: Any) -> None:
    tune.failing = (6, 10)
    code, out, err = lavatar(*command, "--json")
    result = json.loads(out)
    assert (code, result["state"]) == (0, "finished")
    assert [row["state"] for row in result["trials"]].count("failed") == 2
    assert result["best"]["params"]["avatar.samples"] == 8
    assert "the others go on" in err
    assert "a loss is not finite" in lavatar("sweep", "show", result["sweep"])[1]
    tune.failing = ()
    code, out, _ = lavatar("sweep", "resume", result["sweep"], "--json")
    assert {row["state"] for row in json.loads(out)["trials"]} == {"finished"}
    assert json.loads(out)["best"]["params"]["avatar.samples"] == 10


def test_a_sweep_whose_trials_all_fail_says_why(tune: Tune, command: Any, lavatar: Any) -> None:
    tune.failing = (4, 6, 8, 10)
    code, out, err = lavatar(*command, "--json")
    result = json.loads(out)
    assert (code, result["best"], result["state"]) == (1, None, "failed")
    assert "a loss is not finite" in result["error"]["message"]
    assert "Lower the rate." in err
    code, _, err = lavatar("sweep", "promote", result["sweep"], "--actor", "bob")
    assert code == 1
    assert "has no winner" in err


def test_a_sweep_that_is_stopped_before_its_trials_says_how_it_goes_on(tune: Tune, command: Any, lavatar: Any) -> None:
    def stop(handle: FakeHandle) -> Any:
        raise Interrupted("stopped as asked", "lavatar jobs resume X")

    tune.runner.bodies["preprocess"] = stop  # type: ignore[attr-defined]
    code, _, err = lavatar(*command)
    assert code == 130
    assert "lavatar sweep resume" in err
    assert "jobs resume" not in err


def test_trials_do_not_begin_where_the_data_cannot_be_made(tune: Tune, command: Any, lavatar: Any) -> None:
    def fail(handle: FakeHandle) -> Any:
        raise FaceError("no face was found", "Use another video.")

    tune.runner.bodies["preprocess"] = fail  # type: ignore[attr-defined]
    code, out, err = lavatar(*command, "--json")
    assert (code, tune.plans) == (1, [])
    assert "no face was found" in err
    assert json.loads(out)["error"]["hint"] == "Use another video."
    tune.runner.bodies["preprocess"] = finish  # type: ignore[attr-defined]
    assert lavatar(*command)[0] == 0


def test_the_winner_is_trained_in_full(tune: Tune, command: Any, lavatar: Any, home: Path) -> None:
    result = json.loads(lavatar(*command, "--json", "--set", "avatar.code_dim=16")[1])
    code, _, err = lavatar("sweep", "promote", result["sweep"])
    assert code == 2
    assert "--actor" in err
    code, out, err = lavatar("sweep", "promote", result["sweep"], "--actor", "bob", "--json")
    job = json.loads(out)
    assert (code, job["state"]) == (0, "finished")
    assert {model["name"] for model in job["models"]} == {"lavatar-avatar-ann", "lavatar-pair-ann-bob"}
    with open_registry(Home(home)).read() as session:
        row = session.get(Job, job["job"])
        assert row is not None
        recipe = row.recipe
    full = load_recipe("tiny")
    assert recipe["avatar"]["samples"] == 10
    assert recipe["avatar"]["code_dim"] == 16
    assert recipe["avatar_loss"]["lambda_lr"] == 0.5
    assert recipe["avatar_training"]["steps"] == full.avatar_training.steps
    assert recipe["avatar_training"]["engine"] == full.avatar_training.engine
    assert tune.runner.started.count("preprocess:ann") == 1, "the sweep made it"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "--avatar is missing"),
        (["--avatar", "ann"], "--space is missing"),
        (["--avatar", "nobody", "--space", "loss_weights", "--trials", "2"], "there is no subject"),
        (["--avatar", "ann", "--space", "los_weights", "--trials", "2"], "Did you mean 'loss_weights'"),
        (["--avatar", "ann", "--space", "loss_weights"], "--trials is missing"),
        (["--avatar", "ann", "--space", "loss_weights", "--trials", "0"], "--trials"),
        (["--avatar", "ann", "--space", "loss_weights", "--trials", "2", "--search", "grid"], "not a list"),
        (["--avatar", "ann", "--space", "loss_weights", "--trials", "2", "--metric", "lpip"], "Did you mean 'lpips'"),
        (
            ["--avatar", "ann", "--space", "loss_weights", "--trials", "2", "--steps", "5", "--every", "9"],
            "longer than",
        ),
        (["--avatar", "ann", "--actor", "bob", "--space", "loss_weights", "--trials", "2"], "Leave --actor out"),
        (["--avatar", "ann", "--actor", "ann", "--space", "PAIR", "--trials", "2"], "are both 'ann'"),
        (["--avatar", "ann", "--space", "SPACE", "--trials", "2", "--set", "resources.backend=inline"], "Ray Tune"),
        (["show", "abc"], "lavatar sweep list"),
        (["resume", "abc"], "lavatar sweep list"),
        (["promote", "abc"], "lavatar sweep list"),
    ],
)
def test_bad_usage_is_told_before_anything_runs(
    args: list[str], words: str, command: Any, lavatar: Any, tmp_path: Path, home: Path
) -> None:
    (tmp_path / "pair.yaml").write_text("ynet_loss.lambda_ssim: {uniform: [0, 1]}")
    files = {"SPACE": str(tmp_path / "space.yaml"), "PAIR": str(tmp_path / "pair.yaml")}
    code, out, err = lavatar("sweep", *(files.get(arg, arg) for arg in args))
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err
    assert not (home / "sweeps").exists()


def test_help_and_list_stay_light(home: Path) -> None:
    script = (
        "import sys; from lavatar.platform.cli import run; code = run(['sweep', '--help']); run(['sweep', 'list']); "
        "print(sorted({'torch', 'ray', 'mlflow', 'sqlalchemy', 'cv2'} & set(sys.modules)), file=sys.stderr); "
        "sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "no sweeps yet" in result.stderr
    assert "'torch'" not in result.stderr
    assert "'ray'" not in result.stderr
    assert "'mlflow'" not in result.stderr


def test_a_damaged_sweep_says_what_to_do(tune: Tune, command: Any, lavatar: Any, home: Path) -> None:
    name = json.loads(lavatar(*command, "--json")[1])["sweep"]
    folder = home / "sweeps" / name
    whole = (folder / "trials.json").read_text()
    for damaged in ("{", "[]", '{"trials": {"a": 3}}', '{"trials": {"a": {}}}'):
        (folder / "trials.json").write_text(damaged)
        code, _, err = lavatar("sweep", "show", name)
        assert code == 1, damaged
        assert "is damaged" in err
    (folder / "trials.json").write_text(whole)
    definition = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps({**definition, "trials": "many"}))
    code, _, err = lavatar("sweep", "resume", name)
    assert code == 1
    assert "cannot be read" in err
    (folder / "sweep.json").write_text(json.dumps({**definition, "length": 33}))
    assert "made by another lavatar" in lavatar("sweep", "resume", name)[2]


def test_one_process_at_a_time(tune: Tune, command: Any, lavatar: Any, home: Path) -> None:
    name = json.loads(lavatar(*command, "--json")[1])["sweep"]
    with sweeps.alone(sweeps.folder_of(Home(home), name)):
        code, out, err = lavatar(*command, "--json")
        assert code == 1
        assert "another process" in err
        assert json.loads(out)["state"] == "running"


def test_what_a_trial_says_again_after_a_restart_counts_once(tmp_path: Path) -> None:
    board = TrialBoard(tmp_path, toy_sweep(), Recorder(), NoTracker(None, print))  # type: ignore[arg-type]
    board.started("a", {"avatar.samples": 4})
    for step in (5, 10, 15):
        board.reported("a", report(step, 1 / step))
    again = TrialBoard(tmp_path, toy_sweep(), Recorder(), NoTracker(None, print))  # type: ignore[arg-type]
    assert again.data["trials"]["a"]["state"] == "interrupted"
    again.started("a", {"avatar.samples": 4})
    for step in (10, 15, 20):
        again.reported("a", report(step, 1 / step))
    again.ended("a")
    row = sweeps.read_trials(tmp_path)["trials"]["a"]
    assert (row["state"], [r["step"] for r in row["reports"]]) == ("finished", [5, 10, 15, 20])
    again.forget()
    again.started("x", {"avatar.samples": 4})
    assert [row["number"] for row in sweeps.read_trials(tmp_path)["trials"].values()] == [1]


def test_the_curves_of_a_trial_have_each_step_once_whatever_it_says_again(tmp_path: Path) -> None:
    class Curves(NoTracker):
        steps: ClassVar[list[int]] = []

        def log_steps(self, run_id: str | None, curve: Any) -> None:
            self.steps.extend(step for step, _ in curve)

    def board() -> TrialBoard:
        return TrialBoard(tmp_path, toy_sweep(), Recorder(), Curves(None, print))  # type: ignore[arg-type]

    def says(to: TrialBoard, *steps: int) -> None:
        for step in steps:
            to.reported("a", report(step, 1 / step), [(step - 1, {"loss/avatar/total": 1.0})])

    first = board()
    for trial in ("a", "b"):
        first.started(trial, {"avatar.samples": 4})
    says(first, 5, 10, 15)
    again = board()  # Tune stored it at step 5
    again.started("a", {"avatar.samples": 4})
    says(again, 10)
    third = board()  # and once more, in the middle of what is said again
    third.started("a", {"avatar.samples": 4})
    says(third, 5, 10, 15, 20)
    assert Curves.steps == [4, 5, 9, 10, 14, 15, 19, 20]
    for _ in range(2):  # with weights older than its own: the steps between are others now; the driver is killed once
        taken_over = board()
        taken_over.started("a", {"avatar.samples": 9}, Donor("b", 10))
        says(taken_over, 15)
    assert Curves.steps[8:] == [14, 15]
    assert [copy["at"] for copy in taken_over.data["trials"]["a"]["copies"]] == [20], "it was one copy"


def test_the_runs_of_trials_are_nested_below_the_sweeps(tracked: Home) -> None:
    from lavatar.platform.sweep_plot import plot
    from lavatar.platform.tracking import PARENT_TAG, Tracker

    place, sweep = tracked, toy_sweep()
    folder = place.root / "sweeps" / "abc"
    folder.mkdir(parents=True)
    display = Recorder()
    board = TrialBoard(folder, sweep, display, Tracker(place, print))
    data = Input("ann", "d" * 64, "dataset", "local", "{}", json.dumps({"digest": "d" * 64, "frames": 60}))
    board.open({"metric": "lpips"}, [data])
    board.started("a", {"avatar.samples": 4})
    board.started("b", {"avatar.samples": 8})
    for step in (5, 10):
        board.reported("a", report(step, 2 / step), host="one")
        board.reported("b", report(step, 1 / step), [(step - 2, {"loss/avatar/total": 5 / step})], "two")
    for _ in range(2):  # population based training: b's weights, other values; and its process died at once
        board.started("a", {"avatar.samples": 9}, Donor("b", 10))
    board.reported("a", report(15, 0.05), host="three")
    board.reported("a", report(20, 0.04), host="three")
    board.ended("a")
    board.failed("b", "the loss is not finite", "")
    (folder / sweeps.PLOT).write_text(plot(sweep, board.data))
    board.close(State.FINISHED)
    client = Tracker(place, print).client
    experiment = client.get_experiment_by_name(sweeps.EXPERIMENT)
    assert experiment is not None
    parent = client.get_run(board.data["run_id"])
    below = client.search_runs([experiment.experiment_id], f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'")
    runs = {run.info.run_name: run for run in (parent, *below)}
    assert {name: run.info.status for name, run in runs.items()} == {
        "sweep abc": "FINISHED", "trial 1": "FINISHED", "trial 2": "FAILED",
    }  # fmt: skip
    assert {runs[f"trial {i}"].data.tags[PARENT_TAG] for i in (1, 2)} == {parent.info.run_id}
    for run in runs.values():
        (read,) = run.inputs.dataset_inputs
        assert (read.dataset.name, read.dataset.digest, read.tags[0].value) == ("ann", "d" * 36, "dataset")
    assert runs["trial 1"].data.params["avatar.samples"] == "4"
    assert json.loads(runs["trial 1"].data.tags["lavatar.values"]) == {"avatar.samples": 9}
    curve = client.get_metric_history(runs["trial 1"].info.run_id, "lpips")
    assert [(point.step, point.value) for point in curve] == [(5, 0.4), (10, 0.2), (15, 0.05), (20, 0.04)]
    curve = client.get_metric_history(runs["trial 2"].info.run_id, "loss/avatar/total")
    assert [(point.step, point.value) for point in curve] == [(3, 1.0), (8, 0.5)]
    assert [runs[f"trial {i}"].data.tags["lavatar.machine.host"] for i in (1, 2)] == ["three", "two"]
    assert parent.data.metrics["best/lpips"] == 0.04
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files == {"plot.svg", "trials.json", "progress.json", "progress.txt"}
    copy = {"trial": 2, "step": 10, "at": 10, "params": {"avatar.samples": 9}}
    assert json.loads(runs["trial 1"].data.tags["lavatar.copies"]) == [copy]
    assert "lavatar.copies" not in runs["trial 2"].data.tags
    said = "info: trial 1, at step 10, goes on with the weights of trial 2 at step 10 and avatar.samples=9"
    assert [text for text in display.messages if "weights" in text] == [said]
    (row, other) = trial_rows(sweep, board.data)
    assert (row["copies"], other["copies"]) == ([copy], [])
    assert table_columns(sweep, board.data)["weights of"] == ["trial 2 at 10", "own"]
    lines = table_text(sweep, board.data).splitlines()
    assert ["WEIGHTS OF" in lines[0], "trial 2 at 10" in lines[1], "own" in lines[2]] == [True] * 3
    drawn = [p.split() for p in re.findall('polyline points="([^"]*)"', (folder / sweeps.PLOT).read_text())]
    assert [len(points) for points in drawn] == [2, 2, 3] * 2, "b, and a in two pieces, in both panels"
    for b, before, after in (drawn[:3], drawn[3:]):
        assert after[0] == b[-1] != before[-1], "a goes on where b was"

    from lavatar.platform import runs as all_runs

    assert all_runs.unreferenced(place, open_registry(place)) == [], "gc leaves the user's sweeps alone"


def test_while_a_sweep_runs_mlflow_has_its_table(tracked: Home, tmp_path: Path, monkeypatch: Any) -> None:
    from lavatar.platform.tracking import Tracker

    place = tracked
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place.tracking_uri)
    sweep = toy_sweep(metric="psnr", mode="max", space={"avatar.samples": {"choice": [4, 8]}})
    folder = place.root / "sweeps" / "def"
    folder.mkdir(parents=True)
    now = [100.0]
    tracker = Tracker(place, print)
    board = TrialBoard(folder, sweep, Recorder(), tracker, lambda: now[0])
    board.open({})
    run_id = board.data["run_id"]

    def text() -> str:
        return Path(tracker.client.download_artifacts(run_id, "progress.txt", str(tmp_path))).read_text()

    def shown() -> Any:
        return tracker.client.load_table(tracker.client.get_run(run_id).info.experiment_id, "progress.json", [run_id])

    def states() -> list[tuple[str, int, float | None]]:
        rows = shown()[["state", "step", "psnr"]].itertuples(index=False, name=None)
        return [(state, step, psnr if psnr == psnr else None) for state, step, psnr in rows]

    board.started("a", {"avatar.samples": 4})
    board.started("b", {"avatar.samples": 8})
    board.tick()
    assert states() == [("running", 0, None)] * 2
    board.reported("b", {**report(5, 0.4), "psnr": 21.0})
    now[0] += 9.0
    board.tick()
    assert "21" not in text(), "not all the time"
    now[0] += 2.0
    board.tick()
    assert states() == [("running", 5, 21.0), ("running", 0, None)], "best first"
    assert "avatar.samples=8" in text().splitlines()[1]
    assert list(shown().columns) == ["trial", "state", "step", "psnr", "seconds", "avatar.samples", "message"]
    board.failed("a", "the loss is not finite", "")
    board.ended("b")
    board.close(State.FINISHED)
    assert [row[0] for row in states()] == ["stopped", "failed"]
    assert "the loss is not finite" in text()


def test_a_slow_mlflow_gets_the_table_less_often(tmp_path: Path) -> None:
    now, written = [0.0], []

    class Slow(NoTracker):
        def log_table(self, run_id: str | None, name: str, columns: object, text: str) -> None:
            now[0] += 6.0
            written.append(now[0])

    board = TrialBoard(tmp_path, toy_sweep(), Recorder(), Slow(None, print), lambda: now[0])  # type: ignore[arg-type]
    board.started("a", {"avatar.samples": 4})
    for step in range(1, 40):
        board.reported("a", report(step, 1 / step))
        board.tick()
        now[0] += 10.0
    assert written == [6.0, 132.0, 258.0, 384.0], "it waits for it less than a twentieth of the time"

"""Sweeps that are cancelled, deleted, or whose process died: what is left of them, and what is freed."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from platform_fakes import FORK, FakeHandle, Recorder
from repair_files import doctor, solid
from sweep_files import Tune, command, report, toy_sweep, tracked, tune

from lavatar.errors import StageBusyError
from lavatar.platform import runs, sweeps
from lavatar.platform.garbage import freed, garbage
from lavatar.platform.home import Home
from lavatar.platform.registry import open_registry
from lavatar.platform.states import State
from lavatar.platform.tables import Job
from lavatar.platform.trialboard import TrialBoard

__all__ = ["command", "tracked", "tune"]
pytestmark = pytest.mark.usefixtures("home")


def only(home: Path) -> Path:
    (folder,) = sweeps.folders(Home(home))
    return folder


def states_left(folder: Path) -> dict[str, int]:
    """How many states of its trials Tune has kept."""
    return {path.name: len(list(path.iterdir())) for path in sorted((folder / "tune").glob("*"))}


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lavatar.platform.trialboard.LOOK_SECONDS", 0.0)
    monkeypatch.setattr("lavatar.platform.jobs.HEARTBEAT_SECONDS", 0.02)


@pytest.mark.usefixtures("looks_often")
def test_cancel_stops_a_sweep_that_runs_and_resume_goes_on(tune: Tune, command: Any, lavatar: Any, home: Path) -> None:
    said: list[dict[str, Any]] = []
    tune.between = lambda: said.append(json.loads(lavatar("sweep", "cancel", only(home).name[:5], "--json")[1]))
    code, out, err = lavatar(*command, "--json")
    name = only(home).name
    assert said == [{"sweep": name, "state": "running", "cancel_asked": True}]
    assert (code, f"sweep {name} was cancelled" in err) == (130, True), err
    result = json.loads(out)
    assert (result["state"], result["ended"], len(result["trials"])) == ("cancelled", 1, 1)
    assert json.loads(lavatar("sweep", "cancel", name, "--json")[1]) == {
        "sweep": name, "state": "cancelled", "cancel_asked": False,
    }  # fmt: skip
    tune.between = lambda: None
    code, out, _ = lavatar("sweep", "resume", name, "--json")
    assert (code, json.loads(out)["state"]) == (0, "finished")
    assert lavatar("sweep", "cancel", name)[1] == f"sweep {name} is finished\n", "it changes nothing"
    assert json.loads(lavatar("sweep", "show", name, "--json")[1])["state"] == "finished"


@pytest.mark.usefixtures("looks_often")
def test_cancel_stops_what_the_trials_need_too(tune: Tune, command: Any, lavatar: Any, home: Path) -> None:
    def cancelled_meanwhile(handle: FakeHandle) -> Any:
        assert lavatar("sweep", "cancel", only(home).name)[0] == 0
        handle.until_cancelled()

    tune.runner.bodies["preprocess"] = cancelled_meanwhile  # type: ignore[attr-defined]
    code, out, err = lavatar(*command, "--json")
    assert (code, json.loads(out)["state"], tune.plans) == (130, "cancelled", [])
    assert "lavatar sweep resume" in err
    del tune.runner.bodies["preprocess"]  # type: ignore[attr-defined]
    assert json.loads(lavatar(*command, "--json")[1])["state"] == "finished"


def test_who_looks_at_a_sweep_keeps_none_from_starting_and_sees_no_other_who_looks(tmp_path: Path) -> None:
    looks = (tmp_path / sweeps.LOCK).open("a")
    fcntl.flock(looks, fcntl.LOCK_SH)  # as `running` does
    assert not sweeps.running(tmp_path)
    looked = threading.Timer(0.2, looks.close)
    looked.start()
    with sweeps.alone(tmp_path):
        assert looks.closed, "it waited for that"
        assert sweeps.running(tmp_path)
        with pytest.raises(StageBusyError), sweeps.alone(tmp_path):
            pass
    assert not sweeps.running(tmp_path)
    looked.join()


def test_delete_removes_a_sweep_and_its_job(tune: Tune, command: Any, lavatar: Any, home: Path) -> None:
    name = json.loads(lavatar(*command, "--json")[1])["sweep"]
    other = json.loads(lavatar(*command, "--metric", "psnr", "--json")[1])["sweep"]
    log = home / "logs" / f"sweep-{name}.log"
    log.write_text("what its trials printed")
    with sweeps.alone(home / "sweeps" / name):
        code, _, err = lavatar("sweep", "delete", name)
        assert (code, "another process" in err) == (1, True)
    assert log.exists()
    assert json.loads(lavatar("sweep", "delete", name[:6], "--json")[1]) == {
        "deleted": name, "stages_no_job_needs": [],
    }  # fmt: skip
    assert not log.exists()
    assert [path.name for path in (home / "sweeps").iterdir()] == [other]
    with open_registry(Home(home)).read() as session:
        assert [job.id for job in session.query(Job)] == [other]
    (home / "sweeps" / other / "trials.json").write_text("{")
    assert "lavatar sweep delete" in lavatar("sweep", "show", other)[2]
    code, out, err = lavatar("sweep", "list", "--json")
    assert (code, json.loads(out)["sweeps"], f"sweep {other} is left out" in err) == (0, [], True)
    code, out, err = lavatar("sweep", "delete", other)
    assert (code, out, "1 stages that no job needs" in err) == (0, f"deleted sweep {other}\n", True)
    assert lavatar("sweep", "delete", other)[0] == 2, "there is none"


def test_what_failed_trials_would_go_on_from_is_all_that_is_kept(tune: Tune, command: Any, lavatar: Any) -> None:
    tune.failing = (6,)
    folder = Path(json.loads(lavatar(*command, "--json")[1])["plot"]).parent
    (bad,) = [t for t, row in sweeps.read_trials(folder)["trials"].items() if row["state"] == "failed"]
    assert states_left(folder) == {f"t_{i:05d}": 3 if f"t_{i:05d}" == bad else 0 for i in range(4)}
    tune.failing = ()
    assert json.loads(lavatar("sweep", "resume", folder.name, "--json")[1])["state"] == "finished"
    assert not (folder / "tune").exists()


def test_a_population_keeps_what_a_failed_trial_may_be_given(tune: Tune, command: Any, lavatar: Any) -> None:
    tune.failing = (6,)
    folder = Path(json.loads(lavatar(*command, "--scheduler", "pbt", "--json")[1])["plot"]).parent
    assert sorted(states_left(folder).values()) == [1, 1, 1, 3]
    left = {path.name for path in (folder / "tune").glob("*/*") if len(list(path.parent.iterdir())) == 1}
    assert left == {"checkpoint_000002"}, "the newest"


def test_what_a_killed_sweep_leaves_is_found_and_removed(
    tune: Tune, command: Any, lavatar: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lavatar.platform.runs.tracked", lambda home: False)
    tune.runner.bodies["preprocess"] = solid  # type: ignore[attr-defined]
    ready = FORK.Event()

    def drive() -> None:
        def die() -> None:
            work = only(home) / "work" / "t_00001"
            work.mkdir(parents=True)
            (work / "weights").write_bytes(b"x" * 5000)
            (only(home) / f".plot.svg.{os.getpid()}.part").write_text("<svg")
            ready.set()
            signal.pause()

        tune.between = die
        lavatar(*command)

    process = FORK.Process(target=drive, daemon=True)
    process.start()
    assert ready.wait(60)
    assert doctor(Home(home), repair=True) == [], "it lives: nothing is touched"
    process.kill()
    process.join()
    folder = only(home)
    shown = json.loads(lavatar("sweep", "show", folder.name, "--json")[1])
    assert (shown["state"], shown["ended"]) == ("interrupted", 1)
    (home / "sweeps" / "0123456789").mkdir()
    found = {outcome.finding.where: outcome.finding.what for outcome in doctor(Home(home))}
    assert "what trials of a sweep worked in" in found[str(folder / "work")]
    assert "(5.0 kB)" in found[str(folder / "work")]
    assert "never began" in found[str(home / "sweeps" / "0123456789")]
    assert "temporary file" in found[str(folder / f".plot.svg.{process.pid}.part")]
    assert str(folder / "tune") not in found, "it is taken up"
    assert all(outcome.mended for outcome in doctor(Home(home), repair=True))
    assert not (folder / "work").exists()
    assert json.loads(lavatar("sweep", "resume", folder.name, "--json")[1])["state"] == "finished"
    (folder / "tune" / "t_00000").mkdir(parents=True)  # it was killed before it had removed that
    (item,) = json.loads(lavatar("gc", "--json")[1])["freed"]
    assert (item["where"], (folder / "tune").exists()) == (str(folder / "tune"), False)


def test_gc_frees_the_runs_of_a_sweep_that_was_deleted(tracked: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    from lavatar.platform.deletion import delete_sweep
    from lavatar.platform.tracking import Tracker

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    registry, folders = open_registry(tracked), {}
    for name in ("kept", "gone"):
        folder = folders[name] = tracked.root / "sweeps" / name
        folder.mkdir(parents=True)
        (folder / sweeps.DEFINITION).write_text("{}")
        board = TrialBoard(folder, toy_sweep(), Recorder(), Tracker(tracked, print))
        board.open({})
        for trial in ("a", "b"):
            board.started(trial, {"avatar.samples": 4})
            board.reported(trial, report(20, 0.1))
            board.ended(trial)
        board.forget()  # of these trials only the sweep's run is known
        board.close(State.FINISHED)

    def own() -> list[str]:
        return sorted(run.info.run_name for run in runs.runs_of(tracked) if run.info.experiment_id == experiment)

    experiment = next(iter(runs.runs_of(tracked))).info.experiment_id
    before = own()
    assert runs.unreferenced(tracked, registry) == []
    delete_sweep(tracked, registry, folders["gone"])
    assert own() == before
    items = garbage(tracked, registry, print)
    assert sorted(item.what.split("'")[1] for item in items) == ["sweep gone", "trial 1", "trial 2"]
    (folders["kept"] / sweeps.TRIALS).write_text("{")
    assert runs.unreferenced(tracked, registry) == [], "whose they are nobody knows"
    (folders["kept"] / sweeps.TRIALS).unlink()
    assert len(runs.unreferenced(tracked, registry)) == 6
    assert all(freed(item, print) for item in items)
    assert own() == ["sweep kept", "trial 1", "trial 2"]


def test_runs_of_a_sweep_of_another_machine_are_ended_when_nothing_runs_it(
    tracked: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lavatar.platform.tracking import Tracker

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("lavatar.platform.tracking.process_mark", lambda: "far|1|1.0")
    folder = tracked.root / "sweeps" / "far"
    folder.mkdir(parents=True)
    tracker = Tracker(tracked, print)
    board = TrialBoard(folder, toy_sweep(), Recorder(), tracker)
    board.open({})
    board.started("a", {"avatar.samples": 4})
    own = [board.data["run_id"], board.data["trials"]["a"]["run_id"]]

    def states() -> list[str]:
        return [tracker.client.get_run(run_id).info.status for run_id in own]

    with sweeps.alone(folder):  # as its process does on whatever machine
        runs.end_abandoned(tracked, print)
        assert states() == ["RUNNING"] * 2
    runs.end_abandoned(tracked, print)
    assert states() == ["KILLED"] * 2

"""`lavatar doctor --repair`: everything here was really left by a process that died, or really damaged on the disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import update

from lavatar.cluster import environment
from lavatar.cluster.session import temp_of
from lavatar.contracts import Event, NullSink, StageResult
from lavatar.datasets import shards
from lavatar.datasets.preprocess import DIGEST, WORK, kept_segment
from lavatar.platform import jobs, leases, ledger, lookup
from lavatar.platform.detached import HANDED
from lavatar.platform.home import Home, working_in
from lavatar.platform.jobs import run_job
from lavatar.platform.leases import Owner
from lavatar.platform.planning import Plan
from lavatar.platform.registry import Registry, now, open_registry
from lavatar.platform.sink import MlflowSink
from lavatar.platform.tables import Job, Stage
from lavatar.platform.tracking import OWNER_TAG, Tracker, connect
from lavatar.training import checkpoint as checkpoints
from lavatar.training.loop import TrainingConfig

sys.path.insert(0, str(Path(__file__).parent))
from dataset_files import make_meta, make_pictures
from platform_fakes import FORK, FakeHandle, NoTracker, fresh, make_plan, no_models, office, plain_digest
from repair_files import doctor, flip_byte, make_checkpoint, solid_runner, words, write_model
from toy_task import ToyTask
from train_toy import CurveFile, train_toy

__all__ = ["plain_digest"]
pytestmark = pytest.mark.usefixtures("home")
World = tuple[Home, Registry, Plan]


@pytest.fixture
def world(home: Path, plain_digest: None, monkeypatch: pytest.MonkeyPatch) -> World:
    """A finished job of A driven by B, without MLflow."""
    monkeypatch.setattr(jobs, "Tracker", NoTracker)
    no_models(monkeypatch)
    monkeypatch.setattr("lavatar.platform.execution.POLL_SECONDS", 0.01)
    place, registry = fresh(home)
    plan = make_plan(place)
    run_job(office(place, registry, solid_runner()), plan)
    assert doctor(place) == []
    return place, registry, plan


def again(world: World) -> list[str]:
    """The stages that the same submit runs."""
    home, registry, _ = world
    runner = solid_runner()
    run_job(office(home, registry, runner), make_plan(home))
    return runner.started


def folder_of(plan: Plan, name: str) -> Path:
    return next(stage.spec.out_dir for stage in plan.stages if stage.name == name)


def killed(target: Any, *args: Any) -> int:
    """Run `target` in a process that is killed once it says so (sets the event it is given last); its number."""
    ready = FORK.Event()
    process = FORK.Process(target=target, args=(*args, ready))
    process.start()
    assert ready.wait(120)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return int(process.pid or 0)


def _drive(root: Path, ready: Any) -> None:
    """A job in the middle of its training, with MLflow; also a run that the registry does not know yet."""

    def train(handle: FakeHandle) -> StageResult:
        Tracker(Home(root), print).open_job("lavatar/lost", "lost", None, {})
        while any(
            v.name.startswith("preprocess") and _going(v.stage) for v in lookup.job_stages(registry, plan.job_id)
        ):
            time.sleep(0.02)
        ready.set()
        handle.until_cancelled(300)
        raise AssertionError

    home, registry = fresh(root)
    runner = solid_runner()
    runner.bodies["avatar"] = train
    plan = make_plan(home)
    run_job(office(home, registry, runner), plan)


def _going(stage: Stage) -> bool:
    """Whether the driver still has to write down how it ended."""
    return stage.state != "finished" or stage.mlflow_open


def test_what_a_killed_driver_leaves(home: Path, plain_digest: None, lavatar: Any) -> None:
    place = Home(home)
    ready = FORK.Event()
    process = FORK.Process(target=_drive, args=(home, ready))
    process.start()
    assert ready.wait(120)
    assert doctor(place, repair=True) == [], "it lives: nothing of its is touched"
    process.kill()
    process.join()
    code, out, _ = lavatar("doctor", "--json")
    told = [row["what"] for row in json.loads(out)["findings"]]
    plan, registry = make_plan(place), open_registry(place)
    assert (code, len(told)) == (1, 5)
    assert [f"process {process.pid} on" in text for text in told] == [True, True, False, False, False]
    for text in ("stage avatar:A", f"job {plan.job_id}"):
        assert any(line.startswith(text) and "that ran it is gone" in line for line in told)
    for text in ("'avatar:A'", f"'job {plan.job_id}'", "'job lost'"):
        assert any(f"MLflow run {text}" in line and "shown as running" in line for line in told)
    assert lookup.get_job(registry, plan.job_id).state == "running", "looking changes nothing"
    code, out, _ = lavatar("doctor", "--repair")
    assert code == 0
    assert out.count("mended ") == 5
    assert "goes on from its checkpoint" in out
    assert lookup.get_job(registry, plan.job_id).state == "interrupted"
    assert ledger.unended_runs(registry) == []
    client = connect(place)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert sorted((run.info.run_name, run.info.status) for run in runs) == [
        ("avatar:A", "KILLED"), ("job " + plan.job_id, "KILLED"), ("job lost", "KILLED"),
        ("preprocess:A", "FINISHED"), ("preprocess:B", "FINISHED"),
    ]  # fmt: skip
    code, out, _ = lavatar("doctor", "--json")
    assert (code, json.loads(out)["findings"]) == (0, [])


def test_another_homes_run_and_another_hosts_process_are_left(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/shared.db")
    ours, theirs = Home(home / "ours").ensure(), Home(home / "theirs").ensure()
    assert ours.identity() == ours.identity() != theirs.identity()
    dead = f"{environment.this_host()}|{killed(lambda ready: ready.set() or time.sleep(60))}|1.0"
    for place, mark, name in ((theirs, dead, "theirs"), (ours, "elsewhere|1|1.0", "far"), (ours, dead, "gone")):
        monkeypatch.setattr("lavatar.platform.tracking.process_mark", lambda mark=mark: mark)
        Tracker(place, print).open_job("lavatar/x", name, None, {})
    (found,) = doctor(ours, repair=True)
    assert "'job gone'" in found.finding.what
    assert found.mended
    runs = connect(ours).search_runs([connect(ours).get_experiment_by_name("lavatar/x").experiment_id])
    assert {run.info.run_name: run.info.status for run in runs} == {
        "job theirs": "RUNNING", "job far": "RUNNING", "job gone": "KILLED",
    }  # fmt: skip


def test_a_run_is_not_ended_before_the_process_that_finished_its_stage_ends_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine's process has ten minutes for that; one of this machine as long as it lives. By the registry's
    clock: this machine's is an hour ahead."""
    clock = time.time
    monkeypatch.setattr("time.time", lambda: clock() + 3600)
    home, registry, plan = world
    tracker, row = Tracker(home, print), lookup.get_stage(registry, plan.stages[2].key)
    assert row is not None
    run = tracker.open_stage("lavatar/x", row.name, None, None, {})
    ledger.set_run(registry, row, run, open_=True)
    assert doctor(home, repair=True) == []
    tracker.client.set_tag(run, OWNER_TAG, "far|1|1.0")
    assert doctor(home, repair=True) == []
    with registry.write() as session:
        session.execute(update(Stage).values(ended=clock() - 700))
    (found,) = doctor(home, repair=True)
    assert "MLflow run 'avatar:A'" in found.finding.what
    assert tracker.client.get_run(run).info.status == "FINISHED", "as its stage"
    assert doctor(home) == []


def test_values_that_were_never_sent_are_sent_or_removed(home: Path) -> None:
    """Of runs that ended without them, by an MLflow that did not answer then."""
    place, _ = fresh(home)
    client = Tracker(place, print).client
    where = client.create_experiment("lavatar/x", artifact_location=place.mlartifacts.as_uri())
    runs = {name: client.create_run(where, run_name=name).info.run_id for name in ("ended", "gone", "cut", "open")}
    (home / "file").touch()
    sink = MlflowSink(f"sqlite:///{home}/file/nowhere.db", runs["ended"], place.unsent(runs["ended"]), 0.05)
    for step in range(5):
        sink.log_metrics(step, {"total": 1 / (1 + step)})
    sink.close()
    for run in (*runs.values(), "0" * 32):
        place.unsent(run).write_bytes(place.unsent(runs["ended"]).read_bytes())
    for name in ("ended", "gone", "cut"):
        client.set_terminated(runs[name])
    client.log_metric(runs["ended"], "total", 1.0, step=0)  # this one had arrived, its answer had not
    client.delete_run(runs["gone"])
    text = place.unsent(runs["cut"]).read_text()
    place.unsent(runs["cut"]).write_text(text[:-9])
    part = place.root / "logs" / f".{runs['cut']}.unsent.jsonl.part"
    part.write_text(text[:40])
    told = words(doctor(place))
    wanted = (
        f"5 values of the MLflow run 'ended' ({runs['ended'][:8]}) were not sent",
        f"5 values wait for an MLflow run that is gone ({runs['gone'][:8]})",
        "5 values wait for an MLflow run that is gone (00000000)",
        "the values that wait for the MLflow run 'cut' are not readable",
        "temporary file of a process that is gone",
    )
    assert len(told) == len(wanted), told
    assert all(any(text in line for line in told) for text in wanted), told
    with working_in(place):
        assert doctor(place, repair=True) == [], "somebody may be about to send them"
    assert len(list(place.unsent_files())) == 5, "looking changes nothing"
    done = doctor(place, repair=True)
    assert [outcome.mended for outcome in done] == [True] * 5
    assert sorted(outcome.finding.mending for outcome in done) == [
        "it is removed", "they are removed", "they are removed", "they are removed", "they are sent",
    ]  # fmt: skip
    points = client.get_metric_history(runs["ended"], "total")
    assert sorted((point.step, point.value) for point in points) == [(step, 1 / (1 + step)) for step in range(5)]
    assert client.get_run(runs["ended"]).info.status == "FINISHED"
    assert list(place.unsent_files()) == [runs["open"]], "who ends it sends them"
    assert not part.exists()
    assert doctor(place) == []


def test_values_wait_while_mlflow_does_not_answer(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, _ = fresh(home)
    place.unsent("0" * 32).write_text('["total", 0.5, 1, 1]\n')
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    found = doctor(place, repair=True)
    assert [outcome.mended for outcome in found] == [False, False], "the runs cannot be looked through either"
    assert "values wait for MLflow, which does not answer" in words(found)
    assert place.unsent("0" * 32).exists()


def test_a_job_whose_cluster_is_gone_before_it_began_is_interrupted(home: Path) -> None:
    place, registry = fresh(home)
    with registry.write() as session:
        for name in ("lost", "new"):
            session.add(Job(id=name, avatar="a", actor="b", recipe_name="tiny", recipe={}, created=now()))
    ledger.record(registry, "lost", f"{HANDED} at 127.0.0.1:1 as lost")
    (found,) = doctor(place)
    assert "job lost (a <- b) is pending, and the cluster that it was handed to is gone" in found.finding.what
    (found,) = doctor(place, repair=True)
    assert found.mended
    lost = lookup.get_job(registry, "lost")
    assert (lost.state, lost.hint) == ("interrupted", "Take it up: lavatar jobs resume lost")
    assert lookup.get_job(registry, "new").state == "pending"
    assert doctor(place) == []


def test_a_lease_of_another_machine_ends_when_it_has_run_out(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, registry = fresh(home)
    with registry.write() as session:
        session.add(Stage(key="k" * 64, kind="avatar", name="avatar:A", out_dir="x", created=now()))
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.5)
    ledger.claim_stage(registry, "k" * 64, Owner("other", "far pid:[1]", 1, 1.0), "j")
    assert doctor(place) == [], "process 1 of this machine says nothing about that one"
    time.sleep(0.6)
    (found,) = doctor(place, repair=True)
    assert "process 1 on far that ran it gives no sign of life" in found.finding.what
    row = lookup.get_stage(registry, "k" * 64)
    assert row is not None
    assert row.state == "interrupted"
    assert doctor(place) == []


def _write_shards(folder: Path, ready: Any) -> None:
    """Two whole segments, and half of a third."""
    work = folder / WORK
    work.mkdir(parents=True)
    (work / DIGEST).write_text(folder.name)
    for number in range(3):
        with shards.ShardWriter(work / f"{number:05d}.tar") as writer:
            for i in range(4):
                writer.write(make_meta(4 * number + i), *make_pictures(i))
                if number == 2:
                    ready.set()
                    time.sleep(60)
        (work / f"{number:05d}.json").write_text(json.dumps(writer.entry))


def test_of_a_half_written_dataset_the_whole_segments_are_kept(home: Path) -> None:
    place = Home(home).ensure()
    folder = home / "shards" / ("a" * 64)
    killed(_write_shards, folder)
    flip_byte(folder / WORK / "00001.tar")
    (found,) = doctor(place)
    assert found.finding.what == "dataset aaaaaaaa is half-written: 3 unfinished files"
    assert found.finding.where == str(folder)
    assert "1 whole segments are kept" in found.finding.mending
    assert doctor(place, repair=True)[0].mended
    assert sorted(path.name for path in (folder / WORK).iterdir()) == ["00000.json", "00000.tar", DIGEST]
    assert kept_segment(folder / WORK, "00000")
    assert doctor(place) == []


DRAW = """
import sys, time
from pathlib import Path
from lavatar.configs.preprocess import PreprocessConfig
from lavatar.contracts import NullSink, VideoSource
from lavatar.datasets.preprocess import preprocess, serial

class Stop(NullSink):
    def emit(self, event):
        print("drawn", flush=True)
        time.sleep(60)

config = PreprocessConfig(portrait_size=64, face_size=32, segment_frames=10, synthetic_frames=24, min_frames=8)
source = VideoSource("s", synthetic_seed=1)
preprocess(source, config, Path(sys.argv[1]), parallel=serial, events=Stop(), stage="s")
"""


def test_a_half_drawn_subject_is_removed(home: Path) -> None:
    place = Home(home).ensure()
    folder = home / "shards" / ("b" * 64)
    with subprocess.Popen([sys.executable, "-c", DRAW, folder], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"drawn\n"
        process.kill()
    assert (folder / "00000.tar").exists()
    (found,) = doctor(place, repair=True)
    assert "half-written" in found.finding.what
    assert list((home / "shards").iterdir()) == []
    assert doctor(place) == []


def test_a_flipped_byte_in_a_tar_is_named_and_its_dataset_made_again(world: World) -> None:
    home, registry, plan = world
    folder = folder_of(plan, "preprocess:B")
    flip_byte(folder / "shard-00001.tar")
    (found,) = doctor(home)
    assert f"dataset of stage preprocess:B ({folder.name[:8]}): shard-00001.tar has SHA-256" in found.finding.what
    assert again(world) == [], "nobody has looked yet"
    (found,) = doctor(home, repair=True)
    assert found.mended
    assert sorted(path.name for path in (folder / WORK).glob("*.tar")) == ["shard-00000.tar", "shard-00002.tar"]
    row = lookup.get_stage(registry, folder.name)
    assert row is not None
    assert row.state == "pending"
    assert doctor(home) == []
    assert again(world) == ["preprocess:B"], "what was made from it is as it was"
    shards.verify(folder)


def test_a_damaged_drawn_subject_is_removed(world: World) -> None:
    home, _, plan = world
    folder = folder_of(plan, "preprocess:A")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "kind": "synthetic"}))
    (folder / "result.json").write_text("{}")
    flip_byte(folder / "shard-00000.tar")
    assert [outcome.mended for outcome in doctor(home, repair=True)] == [True]
    assert not folder.exists()
    assert doctor(home) == []
    assert again(world) == ["preprocess:A"]


def test_a_damaged_manifest_and_missing_files_are_made_again(world: World) -> None:
    home, _, plan = world
    (folder_of(plan, "preprocess:A") / "manifest.json").write_text('{"schema": 2, "tars"')
    (folder_of(plan, "preview:A<-B") / "preview.mp4").unlink()
    told = words(doctor(home, repair=True))
    assert "manifest.json is damaged" in told[0]
    assert "stage preview:A<-B" in told[1]
    assert "files of it are gone" in told[1]
    assert doctor(home) == []
    assert sorted(again(world)) == ["preprocess:A", "preview:A<-B"]


def test_a_dataset_of_another_lavatar_is_no_damage(world: World) -> None:
    home, _, plan = world
    path = folder_of(plan, "preprocess:A") / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": shards.SCHEMA + 1}))
    assert doctor(home, repair=True) == []
    assert path.exists()


def test_a_damaged_model_is_made_again(world: World) -> None:
    home, _, plan = world
    flip_byte(folder_of(plan, "pair:A<-B") / "release" / "model.safetensors")
    (found,) = doctor(home, repair=True)
    assert "model of stage pair:A<-B" in found.finding.what
    assert "release do not have their checksum" in found.finding.what
    assert doctor(home) == []
    assert again(world) == ["pair:A<-B"]


def test_one_damaged_model_of_a_shared_network_is_found(home: Path) -> None:
    folder = home / "checkpoints" / ("c" * 64) / "release"
    for pair in ("a/b", "b/a"):
        write_model(folder / pair)
    flip_byte(folder / "b" / "a" / "model.safetensors")
    (found,) = doctor(Home(home), repair=True)
    assert "the weights in release/b/a do not" in found.finding.what
    assert doctor(Home(home)) == []


@pytest.mark.parametrize("damage", ["truncated", "unfinished"])
def test_a_damaged_checkpoint_is_removed_and_the_older_one_used(home: Path, damage: str) -> None:
    """The training then ends as one that was never disturbed."""
    config = TrainingConfig(steps=20, batch_size=4, log_every=1, checkpoint_every=5, picture_every=3, seed=5)
    home.mkdir()
    whole = train_toy(home / "whole", config, CurveFile(home / "whole.jsonl"))
    run = home / "checkpoints" / ("d" * 64) / "avatar"
    train_toy(run, config.model_copy(update={"steps": 10}), CurveFile(home / "half.jsonl"))
    newest = run / "step-00000010"
    if damage == "truncated":
        os.truncate(newest / "modules.safetensors", 100)
    else:
        (newest / "COMPLETE.json").unlink()
    (found,) = doctor(Home(home))
    assert f"checkpoint avatar/step-00000010 of stage {'d' * 8}: " in found.finding.what
    assert ("has 100 bytes, not" if damage == "truncated" else "unfinished") in found.finding.what
    assert "training goes on from step-00000005" in found.finding.mending
    assert doctor(Home(home), repair=True)[0].mended
    assert doctor(Home(home)) == []
    assert [path.name for path in run.iterdir()] == ["step-00000005"]
    sink = CurveFile(home / "resumed.jsonl")
    task: ToyTask = train_toy(run, config, sink)
    assert min(sink.curve()) == 6
    after, wanted = task.module.state_dict(), whole.module.state_dict()
    assert all(torch.equal(after[name], wanted[name]) for name in wanted)


def _write_release(folder: Path, ready: Any) -> None:
    from lavatar.cluster.plans import release

    def write(partial: Path) -> None:
        write_model(partial)
        ready.set()
        time.sleep(60)

    release(folder, write)


@pytest.fixture
def short() -> Iterator[Path]:
    """A home whose path is short enough for Ray's files to lie in it."""
    folder = Path(tempfile.mkdtemp(prefix="lv"))
    yield folder
    shutil.rmtree(folder)


def test_temporary_files_and_rays_folders_of_the_dead_are_removed(short: Path) -> None:
    home, place = short, Home(short).ensure()
    model = home / "checkpoints" / ("e" * 64)
    dead = killed(_write_release, model)
    left = [
        model / f".release.{dead}.part",
        home / "outputs" / f".{'f' * 64}.{dead}.part",
        home / "release-abc",
        temp_of(home / "ray") / f"session_2026-01-01_00-00-00_000000_{dead}",
        temp_of(home / "ray") / f"session-{dead}.json",
        home / "handed" / f"{environment.host_mark()}-{dead}.json",
        home / "ray" / "train" / "eeeeeeeeeeeeeeee-1234",
        home / "videos" / f".{'d' * 64}.fetch.part",
    ]
    latest = temp_of(home / "ray") / "session_latest"
    stays = temp_of(home / "ray") / f"session_2026-01-01_00-00-00_000000_{os.getpid()}"
    for folder in (*left[1:4], *left[6:], stays):
        folder.mkdir(parents=True)
        (folder / "file").write_text("x" * 1000)
    left[5].parent.mkdir()
    for file in left[4:6]:
        file.write_text("{}")
    latest.symlink_to(left[3])
    left.append(latest)
    with working_in(place):
        assert doctor(place, repair=True) == [], "somebody works here: it may be theirs"
    found = doctor(place)
    assert {outcome.finding.where for outcome in found} == {str(path) for path in left}
    assert any("Ray whose process is gone (1.0 kB)" in text for text in words(found))
    assert all(outcome.mended for outcome in doctor(place, repair=True))
    assert not [path for path in left if path.exists() or path.is_symlink()]
    assert stays.exists()
    assert doctor(place) == []


def test_what_a_living_process_uses_is_told_and_left_alone(world: World) -> None:
    home, registry, plan = world
    folder = folder_of(plan, "avatar:A") / "phase" / "step-00000010"
    flip_byte(folder / "modules.safetensors")
    owner = Owner.current()
    other = make_plan(home, "A", "C")
    ledger.store_plan(registry, home, other, "x")
    ledger.claim_job(registry, other.job_id, owner)
    (found,) = doctor(home, repair=True)
    assert not found.mended
    assert f"job {other.job_id} uses it" in found.finding.mending
    assert folder.exists()
    ledger.end_job(registry, other.job_id, owner, ledger.State.INTERRUPTED)
    with working_in(home):
        assert "another command of this home uses it" in doctor(home, repair=True)[0].finding.mending
    assert doctor(home, repair=True)[0].mended
    assert not folder.exists()


def test_a_job_that_began_since_it_was_found_is_not_disturbed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    home, registry, plan = world
    flip_byte(folder_of(plan, "preprocess:A") / "shard-00000.tar")
    from lavatar.platform import repair

    found = repair.damaged

    def then_claim(*args: Any) -> Any:
        yield from found(*args)
        ledger.claim_job(registry, plan.job_id, Owner.current())

    monkeypatch.setattr(repair, "damaged", then_claim)
    outcome = doctor(home, repair=True)[0]
    assert (outcome.mended, outcome.reason) == (False, f"job {plan.job_id} uses it")
    assert (folder_of(plan, "preprocess:A") / "manifest.json").exists()


def test_progress_is_told_while_files_are_read(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from lavatar.platform.repair import inspect

    home, _, plan = world
    for step in (15, 20):
        big = make_checkpoint(step)
        checkpoints.save(
            folder_of(plan, "avatar:A") / "phase",
            checkpoints.Checkpoint(step, {"w": torch.zeros(1_000_000)}, big.optimizer),
        )
    events: list[Event] = []

    class Sink(NullSink):
        def emit(self, event: Event) -> None:
            events.append(event)

    assert list(inspect(home, Sink(), repair=False)) == []
    done = [event.done or 0 for event in events]
    assert done == sorted(done)
    assert (done[-1], events[-1].total, events[-1].unit) == (8, 8, "MB")
    assert 4 in done

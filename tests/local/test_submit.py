"""`lavatar submit` from end to end, nothing replaced: Ray, DeepSpeed, MLflow, SQLite, synthetic subjects, toy sizes.

One job is submitted, its training worker is killed, then its driver, then it is interrupted, and then it finishes: what
a user sees at each turn, and that each step of the curve is there once, in one MLflow run.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest

from lavatar.platform.home import Home
from lavatar.platform.registry import open_registry
from lavatar.platform.tables import Stage

STEPS = 600
TOY = {
    "preprocess.portrait_size": 128,
    "preprocess.face_size": 64,
    "preprocess.synthetic_frames": 60,
    "avatar.image_size": 64,
    "avatar.ray_size": 16,
    "avatar.samples": 6,
    "avatar.face_size": 64,
    "avatar.triplane_size": 16,
    "avatar.triplane_channels": 8,
    "avatar.encoder_widths": [8, 16, 16],
    "avatar_training.steps": STEPS,
    "avatar_training.batch_size": 2,
    "avatar_training.checkpoint_every": 20,
    "avatar_training.picture_every": 100,
    "avatar_training.log_every": 5,
    "ynet.face_size": 32,
    "ynet.encoder_widths": [8, 16],
    "ynet.decoder_widths": [16, 8],
    "ynet.neck_width": 16,
    "ynet_training.steps": 12,
    "ynet_training.batch_size": 4,
    "ynet_training.checkpoint_every": 6,
    "ynet_training.log_every": 2,
    "mapping_training.steps": 12,
    "mapping_training.batch_size": 4,
    "mapping_training.checkpoint_every": 6,
    "mapping_training.log_every": 2,
    "evaluation.panel_size": 64,
    "evaluation.max_frames": 4,
}
pytestmark = pytest.mark.slow  # a whole job through three kinds of death: minutes

LIMIT = 900.0


@dataclass
class Lavatar:
    """The command line, in processes of its own, with one home."""

    home: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *args: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "LAVATAR_HOME": str(self.home)}
        for name in ("LAVATAR_REGISTRY", "MLFLOW_TRACKING_URI"):
            environment.pop(name, None)
        command = [sys.executable, "-m", "lavatar.platform.cli", *args]
        error = (self.home.parent / "stderr.txt").open("a")
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=error, text=True, start_new_session=True
        )
        self.started.append(process)
        return process

    def __call__(self, *args: str) -> tuple[int, str]:
        process = self.start(*args)
        out, _ = process.communicate(timeout=LIMIT)
        return process.returncode, out

    def errors(self) -> str:
        """What standard error got lately, of all commands."""
        return (self.home.parent / "stderr.txt").read_text()[-3000:]

    def submit(self, avatar: str, actor: str, *extra: str) -> tuple[str, ...]:
        settings = [part for key, value in TOY.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        return ("submit", "--avatar", avatar, "--actor", actor, *settings, *extra)

    def stage(self, name: str) -> Stage | None:
        registry = open_registry(Home(self.home))
        with registry.read() as session:
            rows = [row for row in session.query(Stage) if row.name == name]
        registry.close()
        return rows[0] if rows else None

    def wait_for(self, process: subprocess.Popen[str], name: str, done: int) -> Stage:
        """Until the stage has come so far."""
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            row = self.stage(name)
            if row and row.state == "running" and row.owner_pid == process.pid and (row.done or 0) >= done:
                return row
            assert process.poll() is None, self.errors()
            time.sleep(0.3)
        raise AssertionError(f"{name} did not come to {done}")


@pytest.fixture(scope="module")
def lavatar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lavatar]:
    tool = Lavatar(tmp_path_factory.mktemp("submit") / "home")
    yield tool
    for process in tool.started:
        if process.poll() is None:
            process.kill()
            process.wait()


@contextlib.contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    process.suspend()
    yield
    process.resume()


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def training_worker(pid: int) -> psutil.Process:
    """The process that trains, below the driver `pid`."""
    found = [p for p in descendants(pid) if any("RayTrainWorker" in part for part in p.cmdline())]
    assert len(found) == 1, [p.cmdline() for p in descendants(pid)]
    return found[0]


@pytest.fixture(scope="module")
def result(lavatar: Lavatar) -> dict[str, Any]:
    """The job's report after all that was done to it."""
    for seed, name in ((1, "ann"), (2, "bob"), (3, "cyd")):
        assert lavatar("subjects", "add", "--synthetic", str(seed), name)[0] == 0
    first = lavatar.start(*lavatar.submit("ann", "bob", "--json"))
    row = lavatar.wait_for(first, "avatar:ann", 40)
    run_id = row.mlflow_run_id
    assert run_id
    killed = training_worker(first.pid)
    with stopped(killed), stopped(psutil.Process(first.pid)):  # a sleeping owner is an owner
        assert lavatar(*lavatar.submit("ann", "bob"))[0] == 1
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

    second = lavatar.start(*lavatar.submit("ann", "bob", "--json"))
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

    code, out = lavatar(*lavatar.submit("ann", "bob", "--json"))
    assert code == 0, lavatar.errors()
    report: dict[str, Any] = json.loads(out)
    return report


def test_the_report_is_complete(result: dict[str, Any]) -> None:
    assert result["state"] == "finished"
    assert [s["state"] for s in result["stages"]] == ["finished"] * 5
    assert [s["cached"] for s in result["stages"]] == [True, True, False, False, False]
    assert result["models"] == [
        {"name": "lavatar-avatar-ann", "version": 1},
        {"name": "lavatar-pair-ann-bob", "version": 1},
    ]
    for row in ("self", "mean_frame", "nearest_frame"):
        assert {"mse", "psnr", "ssim", "lpips"} <= set(result["metrics"][row])
    assert result["metrics"]["self"]["psnr"] > 10
    for row in ("self", "cross"):
        assert {"jaw", "blink", "smile", "pucker", "brows"} <= set(result["metrics"][row]["expression"])
    assert Path(result["still"]).is_file()


def test_the_video_plays(result: dict[str, Any]) -> None:
    with av.open(result["video"]) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.height == TOY["evaluation.panel_size"]
        assert stream.width >= 2 * stream.height
        frames = sum(1 for _ in container.decode(stream))
    assert frames >= 4


def test_the_curve_goes_on_in_the_same_run_with_each_step_once(lavatar: Lavatar, result: dict[str, Any]) -> None:
    from lavatar.platform.tracking import connect

    client = connect(Home(lavatar.home))
    row = lavatar.stage("avatar:ann")
    assert row is not None
    assert row.attempts == 3
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


def test_a_second_submit_runs_no_stage(lavatar: Lavatar, result: dict[str, Any]) -> None:
    code, out = lavatar(*lavatar.submit("ann", "bob", "--json"))
    again = json.loads(out)
    assert code == 0
    assert {s["cached"] for s in again["stages"]} == {True}
    for key in ("job", "video", "still", "metrics", "models"):
        assert again[key] == result[key]


def test_another_actor_reuses_the_avatar(lavatar: Lavatar, result: dict[str, Any]) -> None:
    code, out = lavatar(*lavatar.submit("ann", "cyd", "--json", "--set", "resources.backend=inline"))
    assert code == 0, lavatar.errors()
    report = json.loads(out)
    assert [s["name"] for s in report["stages"] if s["cached"]] == ["preprocess:ann", "avatar:ann"]
    assert report["models"][-1] == {"name": "lavatar-pair-ann-cyd", "version": 1}


def test_the_models_draw(lavatar: Lavatar, result: dict[str, Any]) -> None:
    import mlflow.pyfunc

    mlflow.set_tracking_uri(Home(lavatar.home).tracking_uri)
    mlflow.set_registry_uri(Home(lavatar.home).tracking_uri)
    faces = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
    for name in ("lavatar-avatar-ann", "lavatar-pair-ann-bob"):
        portraits = mlflow.pyfunc.load_model(f"models:/{name}@champion").predict(faces)
        assert (portraits.shape, portraits.dtype) == ((3, 64, 64, 3), np.uint8)
        assert portraits.std() > 1


def test_evaluate_measures_the_same(lavatar: Lavatar, result: dict[str, Any]) -> None:
    code, out = lavatar("evaluate", "--avatar", "ann", "--actor", "bob", "--json")
    assert code == 0
    metrics = json.loads(out)["metrics"]
    for name in ("mse", "psnr", "ssim"):
        assert metrics["self"][name] == pytest.approx(result["metrics"]["self"][name], rel=1e-3)

"""MLflow goes away in the middle of a training: the training goes on, and each value arrives once when it is back."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from mlflow_files import MlflowServer

from lavatar.platform import sink as sinks
from lavatar.platform.home import Home
from lavatar.platform.sink import MlflowSinkFactory
from lavatar.platform.states import State
from lavatar.platform.tracking import Tracker

fork = multiprocessing.get_context("fork")
pytestmark = pytest.mark.slow  # MLflow's server takes ten seconds to start, three times


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    own = MlflowServer(Home(tmp_path_factory.mktemp("server") / "home"))
    own.start()
    yield own
    own.stop()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def tracker(server: MlflowServer, said: list[str], monkeypatch: pytest.MonkeyPatch) -> Tracker:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    return Tracker(server.home, said.append)


def curve(tracker: Tracker, run: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in tracker.client.get_metric_history(run, "total"))


def log(sink: sinks.MlflowSink, steps: range) -> None:
    for step in steps:
        sink.log_metrics(step, {"total": 1 / (1 + step)})


def whole(steps: int) -> list[tuple[int, float]]:
    return [(step, 1 / (1 + step)) for step in range(steps)]


def _train_and_die(factory: MlflowSinkFactory, away: object, gone: object) -> None:
    """A worker: a checkpoint at 20 while the server is there, at 40 and 60 while it is not; dies at 70."""
    sink = factory()
    log(sink, range(20))
    sink.flush()
    away.set()
    gone.wait()
    began = time.monotonic()
    for start in (20, 40):
        log(sink, range(start, start + 20))
        sink.flush()
    log(sink, range(60, 70))
    os._exit(0 if time.monotonic() - began < sinks.CHECKPOINT_SECONDS + 1 else 1)


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_what_is_logged_while_the_server_is_away_arrives_once(
    server: MlflowServer, tracker: Tracker, said: list[str], how: str
) -> None:
    run = tracker.open_stage("lavatar/away", how, None, None, {})
    assert run
    factory = tracker.sink_factory(run)
    away, gone = fork.Event(), fork.Event()
    worker = fork.Process(target=_train_and_die, args=(factory, away, gone))
    worker.start()
    assert away.wait(60)
    server.kill() if how == "killed" else server.freeze()
    gone.set()
    worker.join(60)
    assert worker.exitcode == 0, "a training waited for MLflow"
    unsent = server.home.unsent(run)
    steps = [json.loads(line)[3] for line in unsent.read_text().splitlines()]
    assert steps[-1] == 59, "up to the last checkpoint"
    server.start() if how == "killed" else server.freeze(signal.SIGCONT)
    assert factory
    sink = factory()  # the worker that takes its place, from the checkpoint at 60
    log(sink, range(60, 90))
    sink.close()
    assert curve(tracker, run) == whole(90)
    assert not unsent.exists()
    assert tracker.end(run, State.FINISHED)
    assert said == []


def test_what_is_unsent_when_a_stage_ends_is_sent_by_who_ends_its_run(
    server: MlflowServer, tracker: Tracker, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "CLOSE_SECONDS", 1.0)
    run = tracker.open_stage("lavatar/away", "ends", None, None, {})
    assert run
    factory = tracker.sink_factory(run)
    assert factory
    sink = factory()
    log(sink, range(10))
    sink.flush()
    server.kill()
    log(sink, range(10, 30))
    sink.close()
    unsent = server.home.unsent(run)
    assert unsent.exists()

    with monkeypatch.context() as patch:
        patch.setattr("lavatar.platform.tracking.PATIENCE_SECONDS", 8.0)
        assert not tracker.end(run, State.FINISHED)
        began = time.monotonic()
        assert tracker.open_stage("lavatar/away", "ends", run, None, {}) == run, "it is still the stage's run"
        assert time.monotonic() - began < 20, "it is waited for in vain once only"
    assert len(said) == 3
    assert "waited for" in said[0]
    assert unsent.exists()

    tracker._gone = False  # it had been back
    back = threading.Timer(1.0, server.start)
    back.start()
    assert tracker.end(run, State.FINISHED)
    second = tracker.open_stage("lavatar/away", "second", None, None, {"a": 1})
    back.join()
    assert len(said) == 4
    assert curve(tracker, run) == whole(30)
    assert tracker.client.get_run(run).info.status == "FINISHED"
    assert not unsent.exists()
    assert second not in (None, run)

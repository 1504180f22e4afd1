"""Rows overhead and cli: what is paid for starting processes, importing, Ray, MLflow and bookkeeping."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from lavatar.cluster.bodies import BODIES, Context
from lavatar.cluster.plans import PlanFactory, Worker, run_plan
from lavatar.configs.recipe import Recipe, load_recipe
from lavatar.contracts import NullSink, StageKind, StageSpec, VideoSource
from lavatar.datasets.preprocess import serial
from lavatar.errors import StageFailedError
from lavatar.platform.home import HOME_VARIABLE, REGISTRY_VARIABLE, TRACKING_VARIABLE
from lavatar.platform.speed.measure import Row, Session, Times

SMALL = {
    "preprocess.portrait_size": 128, "preprocess.face_size": 64, "preprocess.synthetic_frames": 40,
    "avatar.image_size": 64, "avatar.ray_size": 16, "avatar.samples": 6, "avatar.face_size": 64,
    "avatar.triplane_size": 16, "avatar.triplane_channels": 8, "avatar.encoder_widths": [8, 16, 16],
    "avatar_training.steps": 10, "avatar_training.batch_size": 2, "avatar_training.warmup_steps": 2,
    "ynet.face_size": 32, "ynet.encoder_widths": [8, 16], "ynet.decoder_widths": [16, 8], "ynet.neck_width": 16,
    "ynet_training.steps": 10, "ynet_training.batch_size": 4, "ynet_training.warmup_steps": 2,
    "mapping_training.steps": 10, "mapping_training.batch_size": 4, "evaluation.panel_size": 64,
    "evaluation.max_frames": 4,
}  # fmt: skip
"""A job whose work is a few seconds."""
STAGES = 5
JOBS = 2
LIMIT = 600.0
STARTS = 9


def overhead(session: Session) -> list[Row]:
    """Jobs of two drawn subjects each by `lavatar submit`, less what their stages take here, warm and one by one."""
    settings = [f"{key}={json.dumps(value)}" for key, value in SMALL.items()]
    times, home = Times([], [], []), session.material.folder / "home"
    add_people(home)
    work_in(session.material.folder / "work", load_recipe("tiny", settings), 0)  # imports and first calls
    for job in range(JOBS):
        session.say("overhead", f"job {job + 1} of {JOBS}")
        names = [f"drawn{2 * job + i}" for i in range(2)]
        flags = [part for setting in settings for part in ("--set", setting)]
        seconds, peak = started(home, "submit", "--avatar", names[0], "--actor", names[1], *flags)
        worked = work_in(session.material.folder / f"work{job}", load_recipe("tiny", settings), 2 * job)
        times.own.append(seconds - worked)
        times.peaks_mb.append(peak)
    return [
        session.filled(Row("overhead", f"a job of {STAGES} stages by `submit`, less its work"), times, 1),
        session.filled(Row("overhead a stage", "the same, divided by the stages"), times, STAGES),
    ]


def add_people(home: Path) -> None:
    """The subjects of all jobs; the registry is made on the way."""
    for seed in range(2 * JOBS):
        started(home, "subjects", "add", "--synthetic", str(seed), f"drawn{seed}")


def cli(session: Session) -> list[Row]:
    """From the start of the process to its end."""
    home = session.material.folder / "home"
    _, peak = started(home, "--help", pause=0.02)  # looking at its memory takes time, so it does not count
    times = Times([started(home, "--help")[0] for _ in range(STARTS)], [], [peak])
    return [session.filled(Row("cli", "lavatar --help"), times, 1)]


def started(home: Path, *args: str, pause: float = 0.5) -> tuple[float, float]:
    """Runs a command of lavatar in a process of its own: seconds, and the most memory (MB) of it and those below it.

    Raises StageFailedError where it fails.
    """
    theirs = {k: v for k, v in os.environ.items() if k not in (REGISTRY_VARIABLE, TRACKING_VARIABLE)}
    command = [sys.executable, "-c", "from lavatar.platform.cli import main; main()", *args]
    errors = home.parent / "stderr.txt"
    with errors.open("w") as file:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, env={**theirs, HOME_VARIABLE: str(home)}, stdout=subprocess.DEVNULL, stderr=file
        )
        watch = Watch(process.pid, pause)
        try:
            code = process.wait(LIMIT)
        finally:
            seconds = time.perf_counter() - began
            process.kill()
            peak = watch.ended()
    if code:
        raise StageFailedError(f"`lavatar {' '.join(args[:1])}` ended with {code}", errors.read_text().strip()[-500:])
    return seconds, peak


class Watch:
    """Adds up the memory (proportional: shared pages count once) of a process and those below it, now and then."""

    def __init__(self, pid: int, pause: float) -> None:
        self._pid, self._pause, self._most = pid, pause, 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def ended(self) -> float:
        """The most seen, in MB."""
        self._over.set()
        self._thread.join()
        return self._most

    def _look(self) -> None:
        while not self._over.wait(self._pause):
            total = 0
            try:
                everyone = [psutil.Process(self._pid), *psutil.Process(self._pid).children(recursive=True)]
            except psutil.Error:
                continue
            for process in everyone:
                try:
                    total += process.memory_full_info().pss
                except (psutil.Error, OSError):
                    continue
            self._most = max(self._most, total / 1e6)


def work_in(folder: Path, recipe: Recipe, seed: int) -> float:
    """Seconds of the stages of a job in this process: no Ray, no MLflow, no registry, plain torch as the engine."""
    data = recipe.model_dump(mode="json")
    for phase in ("avatar", "ynet", "mapping"):
        data[f"{phase}_training"]["engine"] = "torch"
    sources = {role: VideoSource(role, synthetic_seed=seed + i) for i, role in enumerate(("avatar", "actor"))}
    shards = {f"{role}_dataset": folder / f"{role}_data" for role in sources}
    began = time.perf_counter()
    for role, source in sources.items():
        _run(StageKind.PREPROCESS, folder, shards[f"{role}_dataset"], {}, data, {role: source})
    heads = {"dataset": shards["avatar_dataset"]}
    _run(StageKind.AVATAR, folder, folder / "avatar", heads, data, {})
    inputs = {**shards, "avatar": folder / "avatar" / "release"}
    _run(StageKind.PAIR, folder, folder / "pair", inputs, data, {})
    inputs["pair"] = folder / "pair" / "release"
    _run(StageKind.PREVIEW, folder, folder / "preview", inputs, data, sources)
    return time.perf_counter() - began


def _run(
    kind: StageKind, home: Path, out: Path, inputs: dict[str, Path], recipe: dict[str, Any],
    sources: dict[str, VideoSource],
) -> None:  # fmt: skip
    spec = StageSpec(kind, kind.value, "0" * 64, home, out, inputs, recipe, sources)

    def train(plan: PlanFactory) -> dict[str, Any]:
        return run_plan(plan(spec, NullSink()), spec, Worker(), NullSink(), NullSink(), _never)

    BODIES[kind](spec, Context(NullSink(), _never, None, serial, train))


_never: Callable[[], bool] = lambda: False  # noqa: E731

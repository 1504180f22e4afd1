"""Runs a task from its last checkpoint to the last step; the same loop in a Ray worker and in this process.

A step is a function of (state, step): batch, losses, backward, the active groups' Adam step. What a checkpoint holds
is enough for the steps after it to be those of an uninterrupted run, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lavatar.configs.training import TrainingConfig
from lavatar.contracts import Event, EventSink, MetricSink, NullSink
from lavatar.errors import ConfigError, Interrupted, TrainingError
from lavatar.models.parts import part_of_batch
from lavatar.training import checkpoint as checkpoints
from lavatar.training.batch import sample_keys, split
from lavatar.training.checkpoint import Checkpoint
from lavatar.training.engine import Engine, EngineState
from lavatar.training.pace import Pace
from lavatar.training.prefetch import Prefetch
from lavatar.training.rng import rng_state, seed_all, set_rng_state, untouched_rng
from lavatar.training.schedule import rate_factor
from lavatar.training.tasks import MeasuredTask, TrainingTask

EVENT_SECONDS = 0.5


@dataclass(frozen=True)
class Span:
    """Where this training stands in its stage's progress: `offset` steps were done before, `total` in all (0: own)."""

    label: str = ""  # prefix of curves and messages: "ynet" gives "ynet/total"
    offset: int = 0
    total: int = 0


@dataclass
class TrainingOutcome:
    """How a training ended. `losses` is the mean of each term at the last step of this process."""

    steps: int
    first_step: int = 0  # where this process took up
    losses: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def train(
    task: TrainingTask,
    config: TrainingConfig,
    engine: Engine,
    out_dir: Path,
    metrics: MetricSink | None = None,
    events: EventSink | None = None,
    stage: str = "training",
    *,
    span: Span | None = None,
    stop: Callable[[], bool] = lambda: False,
    saved: Callable[[Path], None] = lambda checkpoint: None,
) -> TrainingOutcome:
    """Trains `task` up to `config.steps`, resuming from the newest whole checkpoint in `out_dir`.

    `saved` is told the folder of each checkpoint that the first worker has written.
    SIGTERM (in a main thread) or `stop()` makes a checkpoint and raises Interrupted. A term that is not finite raises
    TrainingError naming term, step and samples.
    """
    with _sigterm() as terminated:
        sinks = (metrics or NullSink(), events or NullSink())
        run = _Run(task, config, engine, out_dir, *sinks, stage, span or Span(), saved)
        with contextlib.closing(run.batches):
            return run.to_the_end(lambda: terminated.is_set() or stop())


class _Run:
    """One call of `train`."""

    def __init__(
        self,
        task: TrainingTask,
        config: TrainingConfig,
        engine: Engine,
        out_dir: Path,
        metrics: MetricSink,
        events: EventSink,
        stage: str,
        span: Span,
        on_saved: Callable[[Path], None],
    ) -> None:
        self.task, self.config, self.engine, self.out_dir = task, config, engine, out_dir
        self.metrics, self.events, self.stage, self.span = metrics, events, stage, span
        self.curve = f"{span.label}/" if span.label else ""
        self.on_saved, self.saved = on_saved, -1
        self.losses: dict[str, float] = {}  # of the last step that was logged
        self.shown = 0.0
        self.batches, self.pace = Prefetch(task.batches, engine.device, config.steps), Pace(config.batch_size)
        check_batch(config, engine.world)

    def to_the_end(self, stop: Callable[[], bool]) -> TrainingOutcome:
        start = self._resume()
        outcome = TrainingOutcome(start, start, self.losses)
        began = time.monotonic()
        if start == 0:
            self._measure(0)
        self.engine.module.train()
        for step in range(start, self.config.steps):
            terms = self._step(step)
            done = step + 1
            last = done == self.config.steps
            if done % self.config.log_every == 0 or last or step == start:
                outcome.losses = self.losses = {name: float(value) for name, value in terms.items()}
                pace = self.pace.look()
                self._log(done, {**self.losses, **(pace if step > start else {})})  # the first step warms up
            self._show(done, start, began, terms)
            self._measure(done)
            if done % self.config.picture_every == 0 or last:
                self._pictures(done)
            if done % self.config.checkpoint_every == 0 or last:
                self._save(done)
            outcome.steps, outcome.seconds = done, time.monotonic() - began
            if not last and self.engine.any(stop()):
                self._interrupt(done)
        return outcome

    def _step(self, step: int) -> dict[str, Tensor]:
        """One optimizer step; the mean of each term."""
        parts = split(self.pace.step(self.batches.batch, step), self.config.accumulation)
        begun = rng_state(self.engine.device) if len(parts) > 1 else {}

        def losses(part: int) -> dict[str, Tensor]:
            if part:
                set_rng_state(begun, self.engine.device)
            with part_of_batch(part, len(parts)):
                terms = self.task.losses(parts[part], step)
            check_finite(terms, f"{self.stage} {self.span.label}".strip(), step, parts[part])
            return terms

        optimizer = self.engine.optimizer
        optimizer.activate(self.task.active_groups(step))
        optimizer.scale_rate(rate_factor(step, self.config))
        terms = self.engine.step(losses)
        self.task.after_step(step)
        return terms

    def _resume(self) -> int:
        """Takes up the newest whole checkpoint, or seeds a fresh start. Returns the steps done."""
        found, damaged = checkpoints.latest(self.out_dir)
        for bad in damaged if self.engine.rank == 0 else []:
            text = f"checkpoint {bad.folder} is damaged and was skipped ({bad.reason})"
            self.events.emit(Event(self.stage, text, level="warning"))
        if found is None:
            seed_all(self.config.seed, 0, self.engine.rank)
            return 0
        state = checkpoints.load(found)
        self.engine.import_state(EngineState(dict(state.modules), dict(state.optimizer)))
        self.task.load_state(state.task)
        self._restore_rng(state)
        self.saved = state.step
        self.losses = dict(state.info.get("losses", {}))
        self.events.emit(Event(self.stage, f"{self._name()}resumed at step {state.step} from {found.name}"))
        return state.step

    def _restore_rng(self, state: Checkpoint) -> None:
        """Each worker's own generators; another number of workers starts new streams from (seed, step, rank)."""
        if state.info.get("world") == self.engine.world:
            ending = f"/{self.engine.rank}"
            own = {name.removesuffix(ending): value for name, value in state.rng.items() if name.endswith(ending)}
            set_rng_state(own, self.engine.device)
        else:
            seed_all(self.config.seed, state.step, self.engine.rank)

    def _save(self, step: int) -> None:
        """Every worker takes part in collecting the state; the first one writes."""
        if step == self.saved:
            return
        self.metrics.flush()
        engine_state = self.engine.export_state()
        own = rng_state(self.engine.device)
        everyone = {name: self.engine.gather(value) for name, value in own.items()}
        failure: BaseException | None = None
        if self.engine.rank == 0:
            try:
                self._write(step, engine_state, everyone)
            except Exception as error:  # told to the other workers below, so that none waits for ever
                failure = error
        if self.engine.any(failure is not None):
            raise failure or TrainingError("the first worker could not write the checkpoint", "See its message.")
        self.saved = step

    def _write(self, step: int, state: EngineState, rng: dict[str, list[Tensor]]) -> None:
        for name, tensor in state.modules.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise TrainingError(f"{self.stage}: {name} is not finite after step {step}", RATE_HINT)
        info = {
            "world": self.engine.world,
            "sampler": {"step": step, "seed": self.config.seed},
            "config": self.config.model_dump(mode="json"),
        }
        if step == self.config.steps:  # whoever finds this checkpoint has no step left to get them from
            info["losses"] = self.losses
        streams = {f"{name}/{rank}": value for name, values in rng.items() for rank, value in enumerate(values)}
        extra = {name: value.detach().cpu().contiguous() for name, value in self.task.state().items()}
        checkpoint = Checkpoint(step, state.modules, state.moments, streams, extra, info)
        self.on_saved(checkpoints.save(self.out_dir, checkpoint))

    def _interrupt(self, step: int) -> None:
        self._save(step)
        raise Interrupted(
            f"{self.stage} stopped at step {step} of {self.config.steps}; a checkpoint was written",
            "Repeat the command to go on from there.",
        )

    def _log(self, step: int, values: dict[str, float]) -> None:
        if self.engine.rank == 0:
            rates = {f"rate/{g['name']}": float(g["lr"]) for g in self.engine.optimizer.param_groups}
            self.metrics.log_metrics(step, {f"{self.curve}{k}": v for k, v in {**values, **rates}.items()})

    def _show(self, done: int, start: int, began: float, terms: dict[str, Tensor]) -> None:
        now = time.monotonic()
        if self.engine.rank or (now - self.shown < EVENT_SECONDS and done != self.config.steps):
            return
        self.shown = now
        rate = (done - start) / max(now - began, 1e-9)
        text = f"{self._name()}loss {float(terms['total']):.4g}, {rate:.2f} steps/s, {left(done, self.config, rate)}"
        total = self.span.total or self.config.steps
        self.events.emit(Event(self.stage, text, self.span.offset + done, total, "steps"))

    def _pictures(self, step: int) -> None:
        if self.engine.rank == 0:
            with untouched_rng(self.engine.device), torch.no_grad():
                pictures = self.task.pictures(step)
            self.engine.module.train()
            for name, image in pictures.items():
                self.metrics.log_picture(step, f"{self.curve}{name}", image)

    def _measure(self, step: int) -> None:
        """Figures of a task that has some, on the first worker."""
        if self.engine.rank == 0 and isinstance(self.task, MeasuredTask):
            with untouched_rng(self.engine.device), torch.no_grad():
                figures = self.task.measure(step)
            if figures:
                self.engine.module.train()
                self.metrics.log_metrics(step, {f"{self.curve}{name}": value for name, value in figures.items()})

    def _name(self) -> str:
        return f"{self.span.label}: " if self.span.label else ""


RATE_HINT = "Lower the learning rate (--set SECTION.learning_rate=...) or set SECTION.gradient_clip, then repeat."


def check_finite(terms: dict[str, Tensor], stage: str, step: int, batch: object) -> None:
    """Raises TrainingError for the first term that is not finite. One look at the device for all terms."""
    values = torch.stack([value.detach().float() for value in terms.values()])
    if bool(torch.isfinite(values).all()):
        return
    bad = [f"{name} = {float(value)}" for name, value in zip(terms, values, strict=True) if not torch.isfinite(value)]
    keys = ", ".join(sample_keys(batch)) or "unnamed"
    raise TrainingError(f"{stage}: {', '.join(bad)} at step {step} (samples: {keys})", RATE_HINT)


def check_batch(config: TrainingConfig, world: int) -> None:
    """The global batch splits evenly over workers and accumulation."""
    shares = world * config.accumulation
    if config.batch_size % shares:
        raise ConfigError(
            f"batch_size {config.batch_size} is not a multiple of workers × accumulation = {world} × "
            f"{config.accumulation}",
            f"Choose a multiple of {shares}, or other numbers of workers and accumulation.",
        )


def left(done: int, config: TrainingConfig, rate: float) -> str:
    """Time left as m:ss."""
    seconds = int((config.steps - done) / max(rate, 1e-9))
    return f"{seconds // 60}:{seconds % 60:02d} left"


@contextlib.contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, where this is a main thread (elsewhere nobody can listen)."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    owner = os.getpid()

    def terminate(number: int, frame: object) -> None:
        if os.getpid() == owner:
            flag.set()

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, previous)

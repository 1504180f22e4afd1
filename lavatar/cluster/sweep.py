"""A sweep on Ray Tune: trials side by side, each in an actor with its share of CPUs and GPUs.

Tune schedules, stops, copies and restores; what the trials report goes to a `TrialWatch` of whoever started the sweep.
Everything is in FOLDER/tune, so that a sweep whose driver was killed goes on there.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.search.basic_variant import BasicVariantGenerator

from lavatar.cluster.logs import log_path, note, redirected
from lavatar.cluster.memory import batch_too_large, out_of_memory
from lavatar.cluster.parallel import limit_threads
from lavatar.cluster.resources import Machine, Share, ray_machine, ray_options, share_of
from lavatar.cluster.schedulers import build_scheduler, packed, tune_domain, unpacked
from lavatar.cluster.trial import STEP, Trials, goes_on_from, run_trial
from lavatar.configs.recipe import Recipe
from lavatar.configs.space import Point, Space
from lavatar.configs.sweep import Curve, Donor, Mode, Scheduler, Search
from lavatar.errors import JobError, LavatarError, TrainingError
from lavatar.training.files import write_json

FIGURES, LOSSES, HOST = "figures", "losses", "machine"
"""What a trial reports once more by itself, for Tune adds figures of its own; its curves since; and its machine."""
LOG_HINT = "What its processes printed is in logs/sweep-SWEEP.log in the home."
FAILED = "failed"
"""Folder of the trials' own errors, which would come back however often Tune tries."""
KEPT_CHECKPOINTS = 4
"""Of each trial: population based training takes up what another trial stored a while ago."""
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # files for a page that nobody looks at: the reports go to the watch
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # an expression that stands still has no error for once
    "TUNE_GLOBAL_CHECKPOINT_S": "2",  # so little is lost with a driver that is killed
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def spare(folder: Path, ended: Collection[str], *, newest: bool) -> None:
    """Of a sweep that may be taken up: removes the states of these trials, which are done, but for the newest where
    another trial may go on from it."""
    for trial in ended:
        states = sorted((folder / "tune" / trial).glob("checkpoint_*"))
        for path in states[:-1] if newest else states:
            shutil.rmtree(path, ignore_errors=True)


class TrialWatch(Protocol):
    """Is told of the trials as they go. Called in the driver's process, one call at a time."""

    def said(self, text: str) -> None:
        """A note for the eyes."""
        ...

    def forget(self) -> None:
        """The sweep begins at its beginning: of earlier trials nothing was stored."""
        ...

    def started(self, trial: str, point: Point, donor: Donor | None) -> None:
        """A trial begins, or goes on: after a restart, or with the weights of another, `donor`, and other values."""
        ...

    def reported(self, trial: str, figures: Mapping[str, float], curve: Curve, host: str) -> None:
        """What was measured, on which machine, and the curves of the steps since it was last."""
        ...

    def ended(self, trial: str) -> None:
        """It came to its end, or the scheduler stopped it."""
        ...

    def failed(self, trial: str, message: str, hint: str) -> None: ...

    def tick(self) -> bool:
        """A tenth of a second has passed, at most. Whether the sweep is to stop."""
        ...


@dataclass(frozen=True)
class SweepPlan:
    """What Tune is to do. `points` are the trials' values; none: `search` asks for `trials` of them as it goes."""

    trials: Trials
    space: Space
    points: Sequence[Point]
    count: int
    scheduler: Scheduler
    search: Search
    metric: str
    mode: Mode
    steps: int
    concurrent: int  # 0: as many as there is room for
    folder: Path
    reports: Path
    nodes: tuple[str, ...] | None = None  # ids of the nodes that have the home; None: all


def run_tune(plan: SweepPlan, watch: TrialWatch) -> None:
    """Runs or takes up the sweep. After Ctrl-C or SIGTERM it returns early: the watch knows which trials ended."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what fails is told by the watch
    recipe = Recipe.model_validate(plan.trials.spec.recipe)
    share = _share(plan, recipe)
    for note_ in share.notes:
        watch.said(note_)
    shutil.rmtree(plan.trials.folder / FAILED, ignore_errors=True)  # a sweep that is taken up tries them again
    _Relay.watch, _Relay.failed, _Relay.space = watch, plan.trials.folder / FAILED, plan.space
    _Relay.stopping = False
    try:
        trainable = tune.with_resources(_trainable(plan, share), _request(plan, share))
        tuner = _restored(plan, trainable)
        if tuner is None:
            watch.forget()
            tuner = _fresh(plan, trainable, recipe.resources.max_failures)
        with _signals_as_one():
            tuner.fit()
    except (ray.exceptions.RayError, tune.TuneError) as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise JobError(f"Ray Tune ended: {text}", "Repeat the command: the sweep goes on.") from error
    finally:
        _Relay.watch = None


class _Relay(tune.Callback):
    """Tune's callback. Tune stores it with the sweep, so it holds nothing: whom it tells is this process's."""

    watch: ClassVar[TrialWatch | None] = None
    failed: ClassVar[Path] = Path()
    space: ClassVar[Space] = Space({})
    stopping: ClassVar[bool] = False

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        if self.watch:
            self.watch.started(trial.trial_id, unpacked(self.space, trial.config), _donor(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        if self.watch:
            self.watch.reported(trial.trial_id, result[FIGURES], result[LOSSES], result[HOST])

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        if self.watch:
            self.watch.ended(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        if self.watch:
            self.watch.failed(trial.trial_id, *_failure(self.failed, trial))

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if self.watch and self.watch.tick() and not self.stopping:
            _Relay.stopping = True
            signal.raise_signal(signal.SIGINT)  # it is the way to end Tune so that it can be taken up


def _donor(trial: Trial) -> Donor | None:
    """Of a trial that goes on from another's state: the one whose folder that state lies in."""
    newest = trial.latest_checkpoint_result
    if newest is None or newest.checkpoint is None:
        return None
    other = Path(newest.checkpoint.path).parent.name
    return None if other == trial.trial_id else Donor(other, int((newest.metrics or {}).get(STEP, 0)))


def _failure(folder: Path, trial: Trial) -> tuple[str, str]:
    """Message and hint."""
    path = folder / f"{trial.trial_id}.json"
    if path.exists():
        kept = json.loads(path.read_text())
        return str(kept["message"]), str(kept["hint"])
    error = trial.get_error()
    text = (str(error).strip().splitlines() or ["no message"])[-1] if error else "no message"
    return f"its process died: {text}", LOG_HINT


@contextmanager
def _signals_as_one() -> Iterator[None]:
    """SIGTERM and SIGHUP stop Tune as Ctrl-C does: what is reported is stored, and it returns."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        signal.raise_signal(signal.SIGINT)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _share(plan: SweepPlan, recipe: Recipe) -> Share:
    """What each trial gets: one worker's part. Raises PlacementError."""
    section, machine = plan.trials.spec.kind.value, ray_machine(plan.nodes)
    share = share_of(getattr(recipe.resources, section).model_copy(update={"workers": 1}), machine, section)
    return _crowded(share, plan, machine)


def _crowded(share: Share, plan: SweepPlan, machine: Machine) -> Share:
    """Population based training needs all trials at once: the number of those that run is held by what each takes."""
    if plan.scheduler != "pbt" or not plan.concurrent:
        return share
    cpus = min(machine.cpus, machine.total.cpus / plan.concurrent)
    return replace(share, cpus=max(share.cpus, cpus))


def _request(plan: SweepPlan, share: Share) -> tune.PlacementGroupFactory:
    """The same in Tune's words, on the nodes that may have trials."""
    where = [{"ray.io/node-id": f"in({','.join(plan.nodes)})"}] if plan.nodes is not None else None
    return tune.PlacementGroupFactory([ray_options(share)], bundle_label_selector=where)


def _fresh(plan: SweepPlan, trainable: Any, max_failures: int) -> tune.Tuner:
    shutil.rmtree(plan.folder / "tune", ignore_errors=True)  # of a driver that died before anything was stored
    own = bool(plan.points)
    values = {key: [packed(point[key]) for point in plan.points] for key in plan.space.domains} if own else {}
    space = {key: tune.choice(values[key]) if own else tune_domain(d) for key, d in plan.space.domains.items()}
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=plan.metric,
            mode=plan.mode,
            num_samples=plan.count,
            search_alg=_searcher(plan),
            scheduler=build_scheduler(plan.scheduler, plan.space, plan.trials.every, plan.steps, plan.reports),
            max_concurrent_trials=None if own else plan.concurrent or None,
            reuse_actors=True,
            trial_dirname_creator=_dirname,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(plan.folder),
            callbacks=[_Relay()],
            failure_config=tune.FailureConfig(max_failures=max_failures),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
            verbose=0,
        ),
    )


def _dirname(trial: Trial) -> str:
    return str(trial.trial_id)


def _restored(plan: SweepPlan, trainable: Any) -> tune.Tuner | None:
    """The sweep as it was left; None where there is nothing to take up."""
    path = plan.folder / "tune"
    for state in path.glob("experiment_state-*.json"):
        try:
            json.loads(state.read_text())
        except ValueError:  # cut short with its driver; Tune would begin anew without a word
            state.unlink()
    if not tune.Tuner.can_restore(str(path)) or not any(path.glob("experiment_state-*.json")):
        return None
    return tune.Tuner.restore(str(path), trainable=trainable, resume_unfinished=True, resume_errored=True)


def _searcher(plan: SweepPlan) -> Any:
    if plan.points:
        points = [{key: packed(value) for key, value in point.items()} for point in plan.points]
        limit = 0 if plan.scheduler == "pbt" else plan.concurrent
        return BasicVariantGenerator(points_to_evaluate=points, max_concurrent=limit)
    from ray.tune.search.optuna import OptunaSearch

    return OptunaSearch(seed=0)


def _trainable(plan: SweepPlan, share: Share) -> Callable[[Point], None]:
    """What runs in a trial's actor."""
    trials, space = plan.trials, plan.space

    def trial(config: Point) -> None:
        _in_actor(trials, share, unpacked(space, config))

    return trial


def _in_actor(trials: Trials, share: Share, point: Point) -> None:
    """One trial, or the rest of one, in its actor's thread."""
    name = tune.get_context().get_trial_id()
    log, failure = log_path(trials.spec), trials.folder / FAILED / f"{name}.json"
    if failure.exists():  # tried again by Tune, which cannot tell an error that comes back from a process that died
        raise TrainingError(**json.loads(failure.read_text()))
    limit_threads(share.cpus)
    import torch

    torch.set_num_threads(max(1, int(share.cpus)))
    device = "cuda" if share.gpus and torch.cuda.is_available() else "cpu"

    def report(figures: dict[str, float], state: Path, curve: Curve) -> None:
        checkpoint = tune.Checkpoint.from_directory(str(state))
        tune.report({**figures, FIGURES: figures, LOSSES: curve, HOST: platform.node()}, checkpoint=checkpoint)

    with redirected(log):
        where = f"{_place(share, device)} (process {os.getpid()})"
        try:
            with _stored() as state:
                text = goes_on_from(state) if state else ""
                note(log, f"trial {name}: begins with {point}{text} on {where}")
                run_trial(trials, name, point, report, state, device)
        except SystemExit:
            note(log, f"trial {name}: stopped or paused")
            raise
        except Exception as error:
            note(log, f"trial {name}: failed\n{traceback.format_exc()}")
            failure.parent.mkdir(parents=True, exist_ok=True)
            write_json(failure, _said(error))
            raise


@contextmanager
def _stored() -> Iterator[Path | None]:
    """The state that Tune gives the trial to go on from; None: it begins at nothing."""
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as state:
        yield Path(state)


def _place(share: Share, device: str) -> str:
    """Where a trial computes: "cuda of node 3f2a91c0, GPU 1"."""
    gpus = f", GPU {os.environ.get('CUDA_VISIBLE_DEVICES') or '-'}" if share.gpus else ""
    return f"{device} of node {ray.get_runtime_context().get_node_id()[:8]}{gpus}"


def _said(error: Exception) -> dict[str, str]:
    """Message and hint of an error of a trial."""
    if out_of_memory(error):
        error = batch_too_large(error)
    if isinstance(error, LavatarError):
        return {"message": error.message, "hint": error.hint}
    text = (str(error).strip().splitlines() or ["no message"])[0]
    return {"message": f"{type(error).__name__}: {text}", "hint": LOG_HINT}

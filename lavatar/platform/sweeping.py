"""The driver of a sweep: what all trials share is made by an ordinary job, then Tune runs the trials."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lavatar.configs.recipe import Recipe, with_values
from lavatar.contracts import StageKind
from lavatar.errors import ConfigError, Interrupted, JobError
from lavatar.platform import sweeps
from lavatar.platform.execution import Office
from lavatar.platform.home import Home
from lavatar.platform.inputs import inputs_of, keys_of
from lavatar.platform.jobs import run_job
from lavatar.platform.leases import Owner
from lavatar.platform.planning import Person, require_weights
from lavatar.platform.preparing import Preparation, prepare
from lavatar.platform.progress import Display
from lavatar.platform.registry import Registry
from lavatar.platform.signals import terminate_as_interrupt
from lavatar.platform.states import State
from lavatar.platform.sweep_plot import plot
from lavatar.platform.sweeps import Sweep
from lavatar.platform.tracking import Tracker
from lavatar.platform.trialboard import TrialBoard

VGG = "avatar_loss.lambda_vgg"


def run_sweep(
    home: Home,
    registry: Registry,
    sweep: Sweep,
    avatar: Person,
    actor: Person | None,
    display: Display,
    concurrent: int,
) -> Path:
    """Runs the sweep, or takes it up, to its end; its folder. A sweep that is done is not run again.

    Raises what `run_job` raises for what the trials share, StageBusyError, Interrupted.
    """
    recipe = sweep.base()
    if recipe.resources.backend != "ray":
        raise ConfigError("a sweep runs on Ray Tune", "Leave resources.backend at ray.")
    plan = prepare(home, sweep.id, avatar, actor, recipe)
    require_for_trials(home, sweep, plan)
    folder = sweeps.store(home, sweep)
    with sweeps.alone(folder), terminate_as_interrupt():
        sweeps.begin(folder)
        if not sweeps.left(sweep, sweeps.read_trials(folder)):
            display.message(f"sweep {folder.name} is done")
            return folder
        display.message(
            f"sweep {folder.name}: {sweep.trials} trials of the {sweep.kind.value}, {sweep.steps} steps each"
        )
        if getattr(recipe.resources, sweep.kind.value).workers > 1:
            display.message("each trial has one worker; those of the recipe train what is promoted", "warning")
        with _ray(home, recipe, display):
            nodes = _nodes(folder, display)
            try:
                run_job(Office(home, registry, display, lambda: _runner(home), Owner.current()), plan)
            except Interrupted as error:
                raise Interrupted(
                    error.message, f"Repeat the command, or: lavatar sweep resume {folder.name}"
                ) from error
            home.fetch(*plan.swept.spec.inputs.values())
            board = _open_board(home, registry, folder, sweep, plan, display)
            _run_trials(folder, sweep, plan, board, concurrent, nodes)
    return folder


def require_for_trials(home: Home, sweep: Sweep, plan: Preparation) -> None:
    """Raises WeightsError for pretrained files that a trial, or its metric, needs."""
    from lavatar.datasets.weights import find

    if sweep.kind is StageKind.AVATAR and VGG in sweep.space:
        recipe = with_values(plan.recipe, {VGG: 1.0})
        plan = prepare(home, plan.job_id, plan.owner, plan.driver, recipe)
    require_weights([plan.swept])
    if sweep.metric.rpartition("/")[2] == "lpips":
        find("lpips_alexnet")
    elif sweep.metric.startswith(("expression", "landmark")) and not all(p.synthetic for p in plan.people.values()):
        find("face_landmarker")


@contextmanager
def _ray(home: Home, recipe: Recipe, display: Display) -> Iterator[None]:
    """One Ray for the job and the trials: the cluster that is up, else one of this process."""
    from lavatar.cluster import session
    from lavatar.cluster.head import address_for

    display.message("starting Ray Tune")
    address = address_for(home.root)
    found = (
        session.attach(home.root, address)
        if address
        else session.start(home.root, dashboard=recipe.resources.dashboard)
    )
    try:
        yield
    finally:
        found.stop()


def _runner(home: Home) -> Any:
    """Of the job: it joins the Ray that this process has."""
    from lavatar.cluster.head import address_for
    from lavatar.cluster.stages import StageRunner

    return StageRunner(home.root, address_for(home.root))


def _nodes(folder: Path, display: Display) -> tuple[str, ...] | None:
    """Those that trials can run on; None: all. Raises PlacementError."""
    from lavatar.cluster.homes import sharing

    found = sharing(folder)
    if found.without:
        display.message(
            f"trials run on {len(found.nodes)} of {len(found.nodes) + len(found.without)} nodes: "
            f"{', '.join(found.without)} cannot see {folder}, where they read and write",
            "warning",
        )
    return found.only


def _open_board(
    home: Home, registry: Registry, folder: Path, sweep: Sweep, plan: Preparation, display: Display
) -> TrialBoard:
    """With the sweep's run in MLflow: what it is, what its trials read, where its figures come from."""
    spec = plan.swept.spec
    board = TrialBoard(folder, sweep, display, Tracker(home, lambda text: display.message(text, "warning")))
    about = {"sweep": folder.name, "avatar": sweep.avatar, "actor": sweep.actor or "", **_params(sweep)}
    board.open({**about, "inputs": keys_of(spec.inputs)}, inputs_of(registry, plan, spec))
    board.log_origin(plan.recipe.model_dump(mode="json"))
    return board


def _run_trials(
    folder: Path, sweep: Sweep, plan: Preparation, board: TrialBoard, concurrent: int, nodes: tuple[str, ...] | None
) -> None:
    """The trials on Tune, shown and tracked."""
    from lavatar.cluster.sweep import SweepPlan, run_tune, spare
    from lavatar.cluster.trial import Trials

    spec = replace(plan.swept.spec, key=f"sweep-{folder.name}")  # of its log
    trials = Trials(spec, sweep.every, folder / sweeps.WORK)
    state = State.FAILED
    try:
        run_tune(
            SweepPlan(
                trials, sweep.domains(), sweep.points, sweep.trials, sweep.scheduler, sweep.search, sweep.metric,
                sweep.mode, sweep.steps, concurrent, folder, folder / sweeps.TRIALS, nodes,
            ),
            board,
        )  # fmt: skip
        state = State.FINISHED if board.done() else State.INTERRUPTED
    except KeyboardInterrupt:
        state = State.INTERRUPTED
        raise
    finally:
        part = folder / f".{sweeps.PLOT}.{os.getpid()}.part"
        part.write_text(plot(sweep, board.data))
        part.replace(folder / sweeps.PLOT)
        board.close(state)
        shutil.rmtree(trials.folder, ignore_errors=True)
    if state is State.INTERRUPTED:
        how = "cancelled" if sweeps.asked_to_stop(folder) else "stopped"
        raise Interrupted(
            f"sweep {folder.name} was {how}; what is measured is kept",
            f"Repeat the command, or: lavatar sweep resume {folder.name}",
        )
    if sweeps.left(sweep, board.data):  # those that failed may be tried again
        ended = [name for name, row in board.data["trials"].items() if row["state"] != "failed"]
        spare(folder, ended, newest=sweep.scheduler == "pbt")
    else:
        shutil.rmtree(folder / sweeps.TUNE, ignore_errors=True)
    if sweeps.best(sweep, board.data) is None:
        first = next((row for row in board.data["trials"].values() if row.get("message")), None)
        reason = f": {first['message']}" if first else ""
        raise JobError(
            f"no trial of sweep {folder.name} was measured{reason}",
            (first or {}).get("hint") or f"See: lavatar sweep show {folder.name}",
        )


def _params(sweep: Sweep) -> dict[str, Any]:
    """What the sweep's run says of it."""
    names = ("recipe", "scheduler", "search", "metric", "mode", "trials", "length", "every")
    digests = dict(zip(("avatar", "actor"), sweep.digests, strict=False))
    overrides = " ".join(sweep.overrides)
    return {**{name: getattr(sweep, name) for name in names}, "space": sweep.space, "set": overrides, "digest": digests}

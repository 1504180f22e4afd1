"""The training curves of a job's stages, from MLflow's metric history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lavatar.contracts import StageKind, measures_time
from lavatar.errors import JobError
from lavatar.inference.chart import Curve
from lavatar.platform.home import Home
from lavatar.platform.lookup import StageView
from lavatar.platform.runs import tracked
from lavatar.platform.states import State
from lavatar.platform.tracking import connect, first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

TRAINED = (StageKind.AVATAR, StageKind.PAIR, StageKind.SHARED)
TOTAL, RATE = "total", "rate/"


@dataclass(frozen=True)
class PhaseCurves:
    """A training of a stage (avatar, ynet, mapping): every term of its loss and its learning rates, over its steps."""

    stage: str
    phase: str
    terms: tuple[Curve, ...]
    rates: tuple[Curve, ...]


def training_curves(home: Home, views: Sequence[StageView]) -> tuple[list[PhaseCurves], list[str]]:
    """Those of the stages that train, and a sentence for each reason why some are missing. MLflow may be away."""
    trained = trained_here(views)
    if not trained:
        elsewhere = any(view.stage.kind in TRAINED and view.stage.state == State.FINISHED for view in views)
        return [], [
            "It was trained elsewhere: its curves are there."
            if elsewhere
            else "No stage of this job has begun to train."
        ]
    if not tracked(home):
        return [], [f"MLflow has no database at {home.tracking_uri}: there are no curves."]
    try:
        client = connect(home)
    except JobError as error:
        return [], [f"{error.message}. The curves are left out."]
    found: list[PhaseCurves] = []
    notes = []
    for view in trained:
        try:
            found += _phases(client, view)
        except Exception as error:  # MLflow, SQLAlchemy, requests: no common root
            notes.append(f"MLflow did not give the curves of {view.name}: {first_line(error)}")
    return found, notes


def trained_here(views: Sequence[StageView]) -> list[StageView]:
    """The stages that train and have begun to."""
    return [view for view in views if view.stage.kind in TRAINED and view.stage.mlflow_run_id]


def _phases(client: MlflowClient, view: StageView) -> list[PhaseCurves]:
    """Of one stage's run; the names of its curves are PHASE/TERM and PHASE/rate/GROUP."""
    run_id = str(view.stage.mlflow_run_id)
    phases: dict[str, dict[str, Curve]] = {}
    for name in client.get_run(run_id).data.metrics:
        phase, slash, term = name.partition("/")
        if slash and not measures_time(name):  # how fast it went is no loss; MLflow shows it
            points = {point.step: point.value for point in client.get_metric_history(run_id, name)}
            phases.setdefault(phase, {})[term] = Curve(term, tuple(sorted(points.items())))
    return [_phase(view.name, phase, curves) for phase, curves in phases.items()]


def _phase(stage: str, phase: str, curves: dict[str, Curve]) -> PhaseCurves:
    """The total first."""
    terms = sorted((c for c in curves.values() if not c.name.startswith(RATE)), key=lambda c: (c.name != TOTAL, c.name))
    rates = [Curve(c.name.removeprefix(RATE), c.points) for c in curves.values() if c.name.startswith(RATE)]
    return PhaseCurves(stage, phase, tuple(terms), tuple(rates))

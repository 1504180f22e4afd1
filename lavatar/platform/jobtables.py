"""Tables of a job: what each stage cost, and what came of its datasets and trainings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lavatar.contracts import StageKind
from lavatar.inference.tables import NONE, Table
from lavatar.platform.curves import TOTAL, TRAINED
from lavatar.platform.jobfacts import JobFacts
from lavatar.platform.progress import duration
from lavatar.platform.report import resources_text
from lavatar.platform.states import State
from lavatar.platform.tables import IMPORTED

DATASET = {
    "frames": "frames", "train": "trained on", "eval": "held out", "dropped": "dropped",
    "reprojection_px": "reprojection",
}  # fmt: skip
"""Of the figures of a preprocessing: what the page calls them."""


def costs(facts: JobFacts) -> Table:
    """A row a stage: how it came about, its time, its attempts, what it asked for."""
    asked = facts.job.recipe.get("resources") or {}
    rows = []
    for view in facts.views:
        stage = view.stage
        state = "cached" if view.cached else IMPORTED if facts.imported else stage.state
        if stage.state == State.RUNNING and stage.total:
            state = f"{stage.state}, {stage.done}/{stage.total} {stage.unit}"
        own = "–" if view.cached else duration(facts.spent(view))
        host = (stage.owner_host or "–").split(" ")[0]
        needs = resources_text(asked.get(stage.kind) or {})
        rows.append((view.name, state, own, duration(stage.seconds), str(stage.attempts), needs, host))
    ever = duration(sum(view.stage.seconds for view in facts.views))
    rows.append(("all stages", "", duration(facts.seconds), ever, "", "", ""))
    legend = (
        "time: spent by the job's latest submit; ever: over all attempts of all jobs that share the stage; cached: it "
        "was there already; asked for: by each of the stage's workers; host: of the process that drove the last attempt"
    )
    return Table("cost", ("stage", "state", "time", "ever", "attempts", "asked for", "host"), tuple(rows), legend)


def made(facts: JobFacts) -> list[Table]:
    """A row for every dataset, and for every training: what came of it."""
    data, trained = [], []
    for view in facts.views:
        figures = view.stage.metrics
        if view.stage.kind == StageKind.PREPROCESS and figures:
            data.append((view.name, *(_plain(figures.get(name)) for name in DATASET)))
        for phase, of in figures.items() if view.stage.kind in TRAINED else ():
            if isinstance(of, Mapping) and isinstance(losses := of.get("losses"), Mapping):
                numbers = (of.get("steps"), of.get("seconds"), losses.get(TOTAL))
                trained.append((f"{view.name}, {phase}", *map(_plain, numbers)))
    found = (
        Table(
            "dataset", ("dataset", *DATASET.values()), tuple(data),
            "frames: of the video, less the dropped ones; reprojection: error of the head pose, pixels of the portrait",
        ),
        Table(
            "training", ("training", "steps", "seconds", "loss"), tuple(trained),
            "seconds: of the last attempt; loss: total, of the last step",
        ),
    )  # fmt: skip
    return [table for table in found if table.rows]


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else NONE if value is None else str(value)

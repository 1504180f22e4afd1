"""What is known of a job, brought together for its page: results, curves, cost, troubles, recipe. Reads alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavatar.configs.recipe import load_recipe
from lavatar.contracts import StageKind
from lavatar.errors import ConfigError, LavatarError
from lavatar.platform import ledger, lookup, sweeps
from lavatar.platform.curves import PhaseCurves, trained_here, training_curves
from lavatar.platform.finished import stage_in
from lavatar.platform.home import Home
from lavatar.platform.imported import imported_figures, is_imported
from lavatar.platform.lookup import StageView
from lavatar.platform.recorded import differences
from lavatar.platform.registry import Registry, now
from lavatar.platform.report import pair_results, preview_of
from lavatar.platform.samples import Sample, newest_samples
from lavatar.platform.states import State
from lavatar.platform.tables import Event, Job, JobPair
from lavatar.platform.titles import title
from lavatar.platform.tracking import flatten

MOST_TROUBLES = 200
IMPORTED_ALONE = "imported: a model file holds no video; lavatar reenact makes one"
"""Why a pair without a preview stage has no video."""
FIRST_ATTEMPT, ATTEMPT, RESUMED, WAITING = "started (attempt 1)", "started (attempt ", "resumed at step", "waiting: "
"""How events read that are no warnings and yet tell of something that went wrong before."""


@dataclass(frozen=True)
class PairFacts:
    """A pair, what its preview left and, in `missing`, why something of that is not there."""

    avatar: str
    actor: str
    state: str
    metrics: Mapping[str, Any]
    files: Mapping[str, Path]  # video, still, self_still, page: those that are on this disk
    missing: str

    @property
    def name(self) -> str:
        return f"{self.avatar} driven by {self.actor}"


@dataclass(frozen=True)
class Trouble:
    """An event that is no good news, and how often it came."""

    time: float
    stage: str
    level: str
    text: str
    count: int


@dataclass(frozen=True)
class JobFacts:
    """Everything that a page says of a job. Pairs: those with a video first; curves: of the first `detailed` alone, and
    so the samples of trainings, of those that have no still. `sweep`: folder of the sweep whose trials need the job."""

    job: Job
    views: Sequence[StageView]
    pairs: Sequence[PairFacts]
    detailed: int
    curves: Sequence[PhaseCurves]
    curve_notes: Sequence[str]
    troubles: Sequence[Trouble]
    made: float
    samples: Sequence[Sample] = ()
    sweep: Path | None = None

    @property
    def imported(self) -> bool:
        return is_imported(self.job)

    @property
    def name(self) -> str:
        """For people. A job without pairs is what the trials of a sweep need."""
        who = title(self.job.avatar, self.job.actor)
        return who if self.pairs else f"{who}: what the trials of a sweep need"

    @property
    def seconds(self) -> float:
        """Of this job's own stages, those that run until now."""
        return sum(self.spent(view) for view in self.views if not view.cached)

    def spent(self, view: StageView) -> float:
        """On one stage, by this job."""
        stage = view.stage
        runs = stage.state == State.RUNNING and stage.job_id == self.job.id and stage.started is not None
        return view.job_seconds + (max(0.0, self.made - (stage.started or 0)) if runs else 0.0)


def gather(registry: Registry, home: Home, job_id: str, detailed: int) -> JobFacts:
    """The facts of the job whose id begins so, at this moment. Raises UnknownJobError."""
    ledger.release_dead(registry)
    job = lookup.get_job(registry, job_id)
    views, rows = lookup.job_stages(registry, job.id), lookup.job_pairs(registry, job.id)
    results = pair_results(registry, home, rows, views)
    order = sorted(range(len(rows)), key=lambda i: not results[i]["video"])
    if is_imported(job):
        results = [{**result, "metrics": imported_figures(home, registry, views)} for result in results]
    pairs = [_pair(home, job, rows[i], results[i], views, fetch=place < detailed) for place, i in enumerate(order)]
    chosen = _trained(registry, job, [rows[i] for i in order[:detailed]], views)
    curves, notes = training_curves(home, chosen)
    unseen = [rows[i] for place, i in enumerate(order[:detailed]) if "still" not in pairs[place].files]
    shown = _trained(registry, job, unseen, views) if unseen or not rows else []
    samples, more = newest_samples(home, trained_here(shown))
    folder = sweeps.folder_of(home, job.id)
    return JobFacts(
        job,
        views,
        pairs,
        min(detailed, len(pairs)),
        curves,
        [*notes, *more],
        troubles(lookup.events(registry, job.id)),
        now(),
        samples,
        folder if not rows and (folder / sweeps.DEFINITION).exists() else None,
    )


def _pair(
    home: Home, job: Job, pair: JobPair, result: Mapping[str, Any], views: Sequence[StageView], *, fetch: bool
) -> PairFacts:
    """`fetch`: from the store too, where this disk has not got it."""
    preview = preview_of(pair, views)
    state, missing = (preview.state, preview.message) if preview else (job.state, IMPORTED_ALONE)
    if job.state == State.RUNNING and preview and (preview.ended or 0) < (job.started or 0) and missing:
        state, missing = State.PENDING.value, ""  # that was an earlier attempt, and its turn comes again
    if state == State.PENDING and job.state in (State.FAILED, State.INTERRUPTED, State.CANCELLED) and not missing:
        missing = f"not made: the job {'failed' if job.state == State.FAILED else f'was {job.state}'}"
    if preview is not None and state == State.FINISHED and fetch:
        try:
            home.fetch(home.absolute(preview.out_dir))
        except LavatarError as error:
            missing = error.message
    named = {name: Path(result[name]) for name in ("video", "still", "self_still", "page") if result[name]}
    files = {name: path for name, path in named.items() if path.is_file()}
    if not missing and set(named) - set(files):
        missing = f"files of this pair are not on this machine: {', '.join(sorted(set(named) - set(files)))}"
    return PairFacts(pair.avatar, pair.actor, state, result["metrics"], files, missing)


def _trained(registry: Registry, job: Job, pairs: Sequence[JobPair], views: Sequence[StageView]) -> list[StageView]:
    """The stages that trained for these pairs; of a job without any, that of a sweep, all that trained."""
    if not pairs:
        return list(views)
    keys = set()
    for pair in pairs:
        for kind, actor in ((StageKind.AVATAR, None), (StageKind.PAIR, pair.actor)):
            stage = stage_in(registry, job, kind, pair.avatar, actor)
            keys.add(stage.key if stage else "")
    return [view for view in views if view.stage.key in keys or view.stage.kind == StageKind.SHARED]


def troubles(events: Iterable[Event]) -> list[Trouble]:
    """Failures, warnings and retries in order; what came again and again is one."""
    found: dict[tuple[str, str, str], Trouble] = {}
    for event in events:
        level = event.level if event.level != "info" else _level(event.text)
        if not level:
            continue
        key = (event.stage, level, event.text)
        count = found[key].count + 1 if key in found else 1
        found[key] = Trouble(found[key].time if key in found else event.time, *key, count)
    return list(found.values())


def _level(text: str) -> str:
    """Of an event that is no warning; empty: all is well."""
    if RESUMED in text or (text.startswith(ATTEMPT) and not text.startswith(FIRST_ATTEMPT)):
        return "retry"
    return "waiting" if text.startswith(WAITING) else ""


def changed_keys(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Key, value here, value there of everything in which two recipes differ, but for their names: as --set takes it, a
    dash where there is none."""
    flat = [
        {k: json.dumps(v, ensure_ascii=False) for k, v in flatten(r).items() if k != "name"} for r in (first, second)
    ]
    return [(key, here or "–", there or "–") for key, (here, there) in differences(*flat).items()]


def named_recipe(job: Job) -> dict[str, Any] | None:
    """The recipe as it comes with this lavatar; None if it has none of that name."""
    try:
        return load_recipe(job.recipe_name).model_dump(mode="json")
    except ConfigError:
        return None

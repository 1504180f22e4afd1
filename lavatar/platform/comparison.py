"""The page of two jobs beside each other: videos, figures with their difference, curves one over the other, recipes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lavatar.inference.chart import Curve, chart
from lavatar.inference.compared import Compared, compared, compared_measures, rows_of
from lavatar.inference.document import Html, grid, joined, table, tag
from lavatar.inference.figures import rounded
from lavatar.inference.tables import NONE
from lavatar.platform.curves import TOTAL, PhaseCurves
from lavatar.platform.jobfacts import JobFacts, PairFacts, changed_keys
from lavatar.platform.jobparts import (
    Room,
    draw_pair,
    draw_pictures,
    draw_samples,
    draw_troubles,
    head_of,
    page_of,
    play_button,
)
from lavatar.platform.jobtables import costs


@dataclass(frozen=True)
class Both:
    """A pair of either job: the same pair, or the only one of each."""

    first: PairFacts
    second: PairFacts

    @property
    def name(self) -> str:
        same = self.first.name == self.second.name
        return self.first.name if same else f"{self.first.name} / {self.second.name}"


def matched(first: JobFacts, second: JobFacts) -> list[Both]:
    """Pairs of the same two names; where each job has one pair these two, whoever they are."""
    if len(first.pairs) == len(second.pairs) == 1:
        return [Both(first.pairs[0], second.pairs[0])]
    there = {(pair.avatar, pair.actor): pair for pair in second.pairs}
    names = [(pair, (pair.avatar, pair.actor)) for pair in first.pairs]
    return [Both(pair, there[name]) for pair, name in names if name in there]


def comparison_page(first: JobFacts, second: JobFacts) -> tuple[str, Room]:
    """The HTML, and what of the videos is in it."""
    room, pairs = Room(), matched(first, second)
    jobs = (first, second)
    sections = [
        ("Videos", _videos(jobs, pairs, room)),
        ("Figures", _figures(jobs, pairs)),
        ("Recipes", _recipes(jobs)),
        ("Training curves", _curves(jobs)),
        ("Pictures", _beside(*(_pictures(job, [getattr(p, which) for p in pairs]) for job, which in _each(jobs)))),
        ("Cost", _beside(*(_titled(job, table(costs(job))) for job in jobs))),
        ("What went wrong", _beside(*(_titled(job, draw_troubles(job)) for job in jobs))),
    ]
    title = f"{first.job.id} and {second.job.id}"
    return page_of(title, _beside(*(_titled(job, head_of(job), name=True) for job in jobs)), sections, room), room


def _each(jobs: tuple[JobFacts, JobFacts]) -> list[tuple[JobFacts, str]]:
    return [(jobs[0], "first"), (jobs[1], "second")]


def _beside(*parts: Html) -> Html:
    return tag("div", *(tag("div", part) for part in parts), class_="two")


def _titled(job: JobFacts, part: Html, *, name: bool = False) -> Html:
    """Under the job's id, or its people's names."""
    return joined([tag("p" if name else "h3", tag("b", job.name) if name else job.job.id), part])


def _videos(jobs: tuple[JobFacts, JobFacts], pairs: Sequence[Both], room: Room) -> Html:
    """A line a pair: the first job's left, the second's right."""
    if not pairs:
        names = [", ".join(pair.name for pair in job.pairs) or "none" for job in jobs]
        return tag("p", f"The jobs have no pair in common. The first has {names[0]}; the second {names[1]}.")
    lines = []
    for i, both in enumerate(pairs):
        detailed = i < jobs[0].detailed
        drawn = [
            draw_pair(pair, room, detailed=detailed, caption=f"{job.job.id}: {pair.name}")
            for job, pair in zip(jobs, (both.first, both.second), strict=True)
        ]
        lines.append(_beside(*drawn))
    return joined([tag("p", "In each the actor left, the result right."), play_button(room), *lines], "\n")


def _figures(jobs: tuple[JobFacts, JobFacts], pairs: Sequence[Both]) -> Html:
    if not pairs:
        return tag("p", "There are no figures of a pair of both.")
    parts = [
        tag(
            "p",
            f"Difference: {jobs[1].job.id} less {jobs[0].job.id}, and whether that is better. ±: deviation over the "
            "frames; a difference far smaller than that says little.",
        )
    ]
    for i, both in enumerate(pairs):
        drawn = _rows(jobs, both) or tag("p", f"There are no figures of {both.name} yet.")
        parts.append(drawn if len(pairs) == 1 else tag("details", tag("summary", both.name), drawn, open=i == 0))
    return joined(parts, "\n")


def _rows(jobs: tuple[JobFacts, JobFacts], both: Both) -> Html | None:
    """A table for each row of the evaluation; what is the same in both, as trivial predictions are, is named alone."""
    drawn, same = [], []
    for name, first, second in rows_of(both.first.metrics, both.second.metrics):
        main, measures = compared(first, second), compared_measures(first, second)
        if all(each.verdict == "the same" for each in (*main, *measures)):
            same.append(name)
            continue
        more = tag("details", tag("summary", "Each measure"), _comparison(jobs, name, measures)) if measures else None
        drawn.append(tag("div", _comparison(jobs, name, main), more))
    said = tag("p", f"The same in both: {', '.join(same)}.") if same else None
    return joined([tag("div", *drawn, class_="tables"), said]) if drawn or said else None


def _comparison(jobs: tuple[JobFacts, JobFacts], name: str, figures: Sequence[Compared]) -> Html:
    rows = [(each.figure.name, _difference(each), *each.cells) for each in figures]
    return grid((name, "difference", jobs[0].job.id, jobs[1].job.id), rows, label=name)


def _difference(each: Compared) -> Html:
    if each.difference is None:
        return joined([NONE])
    text = f"{each.difference:+.{each.figure.digits}f} "
    return joined([text, tag("span", each.verdict, class_=each.verdict.replace(" ", "-"))])


def _recipes(jobs: tuple[JobFacts, JobFacts]) -> Html:
    names = [f"{job.job.id} ({job.job.recipe_name})" for job in jobs]
    rows = changed_keys(jobs[0].job.recipe, jobs[1].job.recipe)
    shared = {view.stage.key for view in jobs[0].views} & {view.stage.key for view in jobs[1].views}
    common = [view.name for view in jobs[0].views if view.stage.key in shared]
    said = tag("p", f"Stages that both jobs share: {', '.join(common) or 'none'}.")
    if not rows:
        return joined([tag("p", "The recipes are the same."), said])
    return joined([grid(("key", *names), rows, label="differences of the recipes", words=True), said])


def _curves(jobs: tuple[JobFacts, JobFacts]) -> Html:
    """A small chart a term, both jobs in it, for every training that either has."""
    parts = [tag("p", f"{job.job.id}: {note}") for job in jobs for note in job.curve_notes]
    by_place = [{_place(job, phase): phase for phase in job.curves} for job in jobs]
    for place in dict.fromkeys((*by_place[0], *by_place[1])):
        drawn = _overlaid(jobs, [phases.get(place) for phases in by_place])
        if drawn:
            parts += [tag("h3", ", ".join(dict.fromkeys(place))), tag("div", *drawn, class_="charts small")]
    return joined(parts, "\n")


def _place(job: JobFacts, phase: PhaseCurves) -> tuple[str, str]:
    """What a training is compared with: of jobs of one pair that of the same kind."""
    stage = phase.stage if len(job.pairs) > 1 else phase.stage.partition(":")[0]
    return stage, phase.phase


def _overlaid(jobs: tuple[JobFacts, JobFacts], phases: Sequence[PhaseCurves | None]) -> list[Html]:
    named: dict[str, list[Curve]] = {}
    for job, phase in zip(jobs, phases, strict=True):
        for curve in phase.terms if phase else ():
            named.setdefault(curve.name, []).append(Curve(job.job.id, curve.points))
    order = sorted(named, key=lambda name: (name != TOTAL, name))
    look = {job.job.id: i for i, job in enumerate(jobs)}
    last = max((step for curves in named.values() for curve in curves for step, _ in curve.points), default=0)
    return [chart(name, named[name], last=last, look=look) for name in order]


def _pictures(job: JobFacts, pairs: Sequence[PairFacts]) -> Html:
    drawn = [joined([tag("p", tag("b", pair.name)), draw_pictures(pair)]) for pair in pairs[: job.detailed]]
    return _titled(job, joined([*drawn, draw_samples(job.samples)], "\n"))


def comparison_answer(first: JobFacts, second: JobFacts, room: Room) -> dict[str, Any]:
    """The figures and their differences for --json."""
    pairs = [
        {
            "first": [both.first.avatar, both.first.actor],
            "second": [both.second.avatar, both.second.actor],
            "figures": {
                name: {
                    each.figure.name: rounded(
                        {"first": each.first, "second": each.second, "difference": each.difference}
                    )
                    for each in (*compared(one, other), *compared_measures(one, other))
                }
                for name, one, other in rows_of(both.first.metrics, both.second.metrics)
            },
        }
        for both in matched(first, second)
    ]
    changed = changed_keys(first.job.recipe, second.job.recipe)
    return {
        "jobs": [first.job.id, second.job.id],
        "states": [first.job.state, second.job.state],
        "seconds": [round(first.seconds, 2), round(second.seconds, 2)],
        "videos": room.videos,
        "pairs": pairs,
        "recipe": {key: [here, there] for key, here, there in changed},
        "notes": [*room.notes, *first.curve_notes, *second.curve_notes],
    }

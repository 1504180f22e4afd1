"""The page of one job: a file to look at, to keep or to send, that needs neither lavatar nor a network."""

from __future__ import annotations

import json
from typing import Any

from lavatar.inference.chart import chart
from lavatar.inference.document import Html, grid, joined, table, tag
from lavatar.inference.tables import NONE, main_figures, tables
from lavatar.platform.curves import TOTAL, PhaseCurves
from lavatar.platform.jobfacts import JobFacts, PairFacts, changed_keys, named_recipe
from lavatar.platform.jobparts import (
    MOST_STILLS,
    Room,
    draw_pair,
    draw_pictures,
    draw_samples,
    draw_troubles,
    head_of,
    page_of,
    play_button,
)
from lavatar.platform.jobtables import costs, made
from lavatar.platform.jobtrials import draw_trials

MAIN = {
    "psnr": ("PSNR", 2),
    "ssim": ("SSIM", 3),
    "lpips": ("LPIPS", 3),
    "expression_r": ("r", 2),
    "expression_error": ("error", 2),
}
"""Of main_figures: what the table of all pairs calls them, and to how many digits they stand there."""


def job_page(facts: JobFacts) -> tuple[str, Room]:
    """The HTML, and what of the videos is in it."""
    room = Room()
    sections = [
        *([("Videos", _videos(facts, room))] if facts.pairs else []),
        *([("Trials", draw_trials(facts.sweep))] if facts.sweep else []),
        ("Figures", _figures(facts)),
        ("Training curves", _curves(facts)),
        ("Pictures", _pictures(facts)),
        ("Cost", table(costs(facts))),
        ("What went wrong", draw_troubles(facts)),
        ("Recipe", _recipe(facts)),
    ]
    return page_of(facts.name, head_of(facts), sections, room), room


def _videos(facts: JobFacts, room: Room) -> Html:
    shown = max(facts.detailed, MOST_STILLS)
    drawn = [draw_pair(pair, room, detailed=i < facts.detailed) for i, pair in enumerate(facts.pairs[:shown])]
    text = "Cross reenactment of each actor's held-out frames: the actor left, the result right."
    if facts.detailed < len(facts.pairs):
        rest, bare = len(facts.pairs) - facts.detailed, max(0, len(facts.pairs) - shown)
        text += f" Of {rest - bare} more pairs the page has the still and the figures"
        text += f", of {bare} the figures alone" if bare else ""
        text += f"; lavatar report --pairs {len(facts.pairs)} takes in more."
    return joined([tag("p", text), play_button(room), tag("div", *drawn, class_="videos")], "\n")


def _figures(facts: JobFacts) -> Html:
    """Of many pairs first one table of all."""
    parts = []
    if len(facts.pairs) > 1:
        header = ("pair", "state", *(f"{row} {name}" for row in ("self", "cross") for name, _ in MAIN.values()))
        rows = [(pair.name, pair.state, *_main(pair)) for pair in facts.pairs]
        kept = [i for i in range(len(header)) if i < 2 or any(row[i] != NONE for row in rows)]
        parts.append(grid([header[i] for i in kept], [[row[i] for i in kept] for row in rows], label="all pairs"))
    for i, pair in enumerate(facts.pairs):
        drawn = [table(shown) for shown in tables(pair.metrics)]
        if not drawn:
            why = "no figures came with the model" if facts.imported else f"{pair.state}: there are no figures yet"
            drawn = [tag("p", f"{why}.")] if len(facts.pairs) == 1 else []
        if len(facts.pairs) > 1 and drawn:
            drawn = [tag("details", tag("summary", pair.name), *drawn, open=i == 0)]
        parts += drawn
    if facts.imported and any(pair.metrics for pair in facts.pairs):
        parts.append(tag("p", "Measured where the model was trained.", class_="legend"))
    parts += [table(shown) for shown in made(facts)]
    return joined(parts, "\n") if parts else tag("p", "There are no figures yet.")


def _main(pair: PairFacts) -> list[str]:
    found = main_figures(pair.metrics)
    places = [(row, name, digits) for row in ("self", "cross") for name, (_, digits) in MAIN.items()]
    values = [(found.get(row, {}).get(name), digits) for row, name, digits in places]
    return [NONE if value is None else f"{value:.{digits}f}" for value, digits in values]


def _curves(facts: JobFacts) -> Html:
    parts = [tag("p", note) for note in facts.curve_notes]
    for stage in dict.fromkeys(phase.stage for phase in facts.curves):
        drawn = [figure for phase in facts.curves if phase.stage == stage for figure in _phase(phase)]
        parts.append(joined([tag("h3", stage), tag("div", *drawn, class_="charts")]))
    if facts.detailed < len(facts.pairs) and facts.curves:
        parts.append(tag("p", f"Curves of the first {facts.detailed} pairs."))
    return joined(parts, "\n")


def _phase(phase: PhaseCurves) -> list[Html]:
    """Losses, and learning rates, each over the phase's steps."""
    last = max(step for curve in (*phase.terms, *phase.rates) for step, _ in curve.points)
    named = (("terms of the loss", phase.terms), ("learning rates", phase.rates))
    return [chart(f"{phase.phase}: {text}", curves, bold=TOTAL, last=last) for text, curves in named if curves]


def _pictures(facts: JobFacts) -> Html:
    chosen, samples = facts.pairs[: facts.detailed], draw_samples(facts.samples)
    if len(chosen) == 1:
        return joined([draw_pictures(chosen[0]), samples])
    drawn = [tag("details", tag("summary", p.name), draw_pictures(p), open=i == 0) for i, p in enumerate(chosen)]
    return joined([*drawn, samples], "\n") if drawn or samples else tag("p", "There are no pictures.")


def _recipe(facts: JobFacts) -> Html:
    job, named = facts.job, named_recipe(facts.job)
    if named is None:
        first = tag("p", f"This lavatar has no recipe {job.recipe_name} to compare with.")
    else:
        rows = changed_keys(named, job.recipe)
        header = ("key", f"recipe {job.recipe_name}", "this job")
        same = tag("p", f"Recipe {job.recipe_name} as it comes, without a change.")
        first = grid(header, rows, caption="Changed values", words=True) if rows else same
    whole = json.dumps(job.recipe, indent=1, ensure_ascii=False)
    return joined([first, tag("details", tag("summary", "The whole recipe"), tag("pre", whole))])


def job_answer(facts: JobFacts, room: Room) -> dict[str, Any]:
    """The main figures for --json."""
    pairs = [{"avatar": p.avatar, "actor": p.actor, "state": p.state, **main_figures(p.metrics)} for p in facts.pairs]
    return {
        "job": facts.job.id,
        "state": facts.job.state,
        "recipe": facts.job.recipe_name,
        "seconds": round(facts.seconds, 2),
        "videos": room.videos,
        "pairs": pairs,
        "troubles": len(facts.troubles),
        "notes": [*room.notes, *facts.curve_notes],
    }

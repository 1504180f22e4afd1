"""The trials of a sweep, for the page of the job that made what they need: a table, best first, and the plot."""

from __future__ import annotations

from pathlib import Path

from lavatar.errors import DataError
from lavatar.inference.document import Html, data_address, grid, joined, tag
from lavatar.inference.tables import NONE
from lavatar.platform import sweeps
from lavatar.platform.trialtable import copies_text


def draw_trials(folder: Path) -> Html:
    """What is known of them now."""
    try:
        sweep, trials = sweeps.read(folder), sweeps.read_trials(folder)
    except DataError as error:
        return tag("p", error.message)
    state, won = sweeps.state_of(folder, sweep, trials), sweeps.best(sweep, trials)
    said = f"Sweep {folder.name} is {state}: {len(trials['trials'])} of {sweep.trials} trials began, "
    said += f"of {sweep.steps:,} steps each, compared by {sweep.metric} ({sweep.mode})."
    ranked = sweeps.ranked(sweep, trials)
    keys = list(dict.fromkeys(key for row in ranked for key in row["params"]))
    rows = []
    for row in ranked:
        step = row["reports"][-1]["step"] if row["reports"] else 0
        title = tag("b", f"{row['number']}, best") if row is won else str(row["number"])
        numbers = (sweeps.figure(sweep, row), *(row["params"].get(key) for key in keys))
        rows.append((title, row["state"], f"{step:,}", *map(_cell, numbers)))
    table = grid(("trial", "state", "step", sweep.metric, *keys), rows, label="trials") if rows else None
    told = [tag("p", f"Trial {row['number']} failed: {row['message']}") for row in ranked if row.get("message")]
    copied = [(row["number"], copies_text(row["copies"])) for row in ranked if row.get("copies")]
    told += [tag("p", f"Trial {number} went on with the weights of {whose} steps.") for number, whose in copied]
    return joined([tag("p", said), table, *told, _plot(folder)])


def _cell(value: object) -> str:
    return NONE if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _plot(folder: Path) -> Html | None:
    try:
        drawn = (folder / sweeps.PLOT).read_bytes()
    except OSError:
        return None
    picture = tag("img", src=data_address(drawn, "image/svg+xml"), alt="the metric of all trials", class_="still")
    wide = tag("div", picture, class_="scroll", tabindex="0", role="region", aria_label="plot of the trials")
    return tag("figure", wide, tag("figcaption", "the metric of all trials: the best red, the stopped grey"))

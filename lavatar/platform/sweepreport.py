"""What a sweep has come to: the object that `lavatar sweep --json` prints, and its text for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lavatar.platform import sweeps
from lavatar.platform.sweeps import Sweep
from lavatar.platform.trialtable import table_text, trial_rows


def state_now(folder: Path) -> str:
    """As in `sweeps.state_of`. Raises DataError for a damaged sweep."""
    return sweeps.state_of(folder, sweeps.read(folder), sweeps.read_trials(folder))


def result_of(folder: Path) -> dict[str, Any]:
    """What --json prints. Raises DataError for a damaged sweep."""
    defined, trials, state = _read(folder)
    won, rows = sweeps.best(defined, trials), trial_rows(defined, trials)
    names = ("avatar", "actor", "recipe", "scheduler", "search", "metric", "mode", "steps", "every", "space")
    plot = folder / sweeps.PLOT
    return {
        "sweep": folder.name,
        "state": state,
        "created": sweeps.created(folder),
        **{name: getattr(defined, name) for name in names},
        "stage": defined.kind.value,
        "wanted": defined.trials,
        "ended": sum(row["state"] in sweeps.ENDED for row in rows),
        "best": next((row for row in rows if won and row["trial"] == won["number"]), None),
        "trials": rows,
        "plot": str(plot) if plot.exists() else None,
        "mlflow_run": trials["run_id"],
    }


def result_text(folder: Path) -> str:
    """State, table of trials, where the plot is, what to do with the best."""
    defined, trials, state = _read(folder)
    ended = sum(row["state"] in sweeps.ENDED for row in trials["trials"].values())
    lines = [f"sweep {folder.name} {state}: {ended} of {defined.trials} trials ended", table_text(defined, trials)]
    if (folder / sweeps.PLOT).exists():
        lines.append(f"plot    {folder / sweeps.PLOT}")
    won = sweeps.best(defined, trials)
    if won:
        who = "" if defined.actor else " --actor ACTOR"
        lines.append(f"best    trial {won['number']}: lavatar sweep promote {folder.name}{who}")
    return "\n".join(lines)


def _read(folder: Path) -> tuple[Sweep, dict[str, Any], str]:
    """Definition, trials, state. Of a sweep that nobody runs no trial does, whatever its process wrote last."""
    defined, trials = sweeps.read(folder), sweeps.read_trials(folder)
    state = sweeps.state_of(folder, defined, trials)
    for row in trials["trials"].values():
        if state != "running" and row["state"] not in sweeps.ENDED:
            row["state"] = "interrupted"
    return defined, trials, state

"""The trials of a sweep as a table, best first: what `lavatar sweep show` prints, and what MLflow shows of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lavatar.platform import sweeps
from lavatar.platform.output import table
from lavatar.platform.sweeps import Sweep


def trial_rows(sweep: Sweep, trials: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each trial its number, state, last step, metric (None: not measured), seconds of training, values, message;
    and in population based training each time it took another one's weights."""
    return [
        {
            "trial": row["number"],
            "state": row["state"],
            "step": row["reports"][-1]["step"] if row["reports"] else 0,
            "value": sweeps.figure(sweep, row),
            "seconds": row["reports"][-1]["training_seconds"] if row["reports"] else 0.0,
            "params": row["params"],
            "copies": row.get("copies", []),
            "message": row.get("message", ""),
        }
        for row in sweeps.ranked(sweep, trials)
    ]


def table_text(sweep: Sweep, trials: Mapping[str, Any]) -> str:
    """For people."""
    rows = trial_rows(sweep, trials)
    cells = [
        (str(r["trial"]), r["state"], str(r["step"]), "-" if r["value"] is None else f"{r['value']:.4g}",
         f"{r['seconds']:.1f}", *_copies(rows, r), values_text(r["params"]), r["message"])
        for r in rows
    ]  # fmt: skip
    head = ("TRIAL", "STATE", "STEP", sweep.metric.upper(), "SECONDS", *(("WEIGHTS OF",) if _any_copies(rows) else ()))
    return table(cells, (*head, "VALUES", ""))


def _any_copies(rows: Sequence[Mapping[str, Any]]) -> bool:
    return any(row["copies"] for row in rows)


def _copies(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> tuple[str, ...]:
    """Whose weights it took and when, in a sweep where one did."""
    return (copies_text(row["copies"]),) if _any_copies(rows) else ()


def copies_text(copies: Sequence[Mapping[str, Any]]) -> str:
    """ "trial 2 at 40, trial 1 at 60"; "own" where there are none."""
    return ", ".join(f"trial {copy['trial']} at {copy['step']}" for copy in copies) or "own"


def table_columns(sweep: Sweep, trials: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Columns by name, one for each key of the space, as MLflow takes a table."""
    rows = trial_rows(sweep, trials)
    names = {"trial": "trial", "state": "state", "step": "step", "value": sweep.metric, "seconds": "seconds"}
    columns = {shown: [row[name] for row in rows] for name, shown in names.items()}
    columns |= {key: [row["params"].get(key) for row in rows] for key in sweep.space}
    if _any_copies(rows):
        columns["weights of"] = [copies_text(row["copies"]) for row in rows]
    return columns | {"message": [row["message"] for row in rows]}


def values_text(point: Mapping[str, Any]) -> str:
    """ "avatar.samples=8, avatar_loss.lambda_lr=0.213"."""
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in point.items()
    )

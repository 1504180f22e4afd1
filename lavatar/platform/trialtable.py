"""The trials of a sweep as a table, best first: what `lavatar sweep show` prints, and what MLflow shows of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lavatar.platform import sweeps
from lavatar.platform.output import table
from lavatar.platform.sweeps import Sweep


def trial_rows(sweep: Sweep, trials: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each trial its number, state, last step, metric (None: not measured), seconds of training, values, message."""
    return [
        {
            "trial": row["number"],
            "state": row["state"],
            "step": row["reports"][-1]["step"] if row["reports"] else 0,
            "value": sweeps.figure(sweep, row),
            "seconds": row["reports"][-1]["training_seconds"] if row["reports"] else 0.0,
            "params": row["params"],
            "message": row.get("message", ""),
        }
        for row in sweeps.ranked(sweep, trials)
    ]


def table_text(sweep: Sweep, trials: Mapping[str, Any]) -> str:
    """For people."""
    cells = [
        (str(r["trial"]), r["state"], str(r["step"]), "-" if r["value"] is None else f"{r['value']:.4g}",
         f"{r['seconds']:.1f}", values_text(r["params"]), r["message"])
        for r in trial_rows(sweep, trials)
    ]  # fmt: skip
    return table(cells, ("TRIAL", "STATE", "STEP", sweep.metric.upper(), "SECONDS", "VALUES", ""))


def table_columns(sweep: Sweep, trials: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Columns by name, one for each key of the space, as MLflow takes a table."""
    rows = trial_rows(sweep, trials)
    names = {"trial": "trial", "state": "state", "step": "step", "value": sweep.metric, "seconds": "seconds"}
    columns = {shown: [row[name] for row in rows] for name, shown in names.items()}
    columns |= {key: [row["params"].get(key) for row in rows] for key in sweep.space}
    return columns | {"message": [row["message"] for row in rows]}


def values_text(point: Mapping[str, Any]) -> str:
    """ "avatar.samples=8, avatar_loss.lambda_lr=0.213"."""
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in point.items()
    )

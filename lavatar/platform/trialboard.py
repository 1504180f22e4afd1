"""The trials of a sweep as they go: into trials.json, onto the display and into MLflow, a nested run each.

trials.json is the memory of a sweep: results, and what the schedulers are told again after a restart. It is written
whole at every report. In the sweep's own run there is a table of all trials, written anew now and then.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavatar.configs.space import Point
from lavatar.configs.sweep import Curve, Donor
from lavatar.contracts import Event
from lavatar.platform import sweeps
from lavatar.platform.inputs import Input
from lavatar.platform.machine import MACHINE_TAG
from lavatar.platform.progress import Display
from lavatar.platform.states import State
from lavatar.platform.sweeps import Sweep
from lavatar.platform.tracking import Tracker
from lavatar.platform.trialtable import table_columns, table_text, values_text
from lavatar.training.files import write_json

STEP = "step"
_STATES = {"finished": State.FINISHED, "stopped": State.FINISHED, "failed": State.FAILED}
VALUES_TAG = "lavatar.values"  # of a trial that took over another one: its values since
HOST_TAG = f"{MACHINE_TAG}host"  # of a trial: on which machine it was last
COPIES_TAG = "lavatar.copies"  # of such a trial: each time whose weights at which step it took, and at which own step
LOOK_SECONDS = 0.5
"""How often is looked whether somebody asked the sweep to stop."""
TABLE = "progress"
TABLE_SECONDS, TABLE_SHARE = 10.0, 20
"""Least time from one writing of the table to the next, and how many times as long as the writing took."""


class TrialBoard:
    """A `TrialWatch` (lavatar.cluster.sweep)."""

    def __init__(
        self,
        folder: Path,
        sweep: Sweep,
        display: Display,
        tracker: Tracker,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._sweep, self._display, self._tracker = folder, sweep, display, tracker
        self._clock, self._changed, self._asked = clock, False, False
        self._table_due = self._look_due = 0.0
        self._inputs: Sequence[Input] = ()
        self.data = sweeps.read_trials(folder)
        self._rows: dict[str, dict[str, Any]] = self.data["trials"]
        for row in self._rows.values():
            if row["state"] not in sweeps.ENDED:
                row["state"] = "interrupted"  # until Tune takes it up

    def open(self, params: Mapping[str, Any], inputs: Sequence[Input] = ()) -> None:
        """The sweep's own run, above those of the trials. `inputs` is what they all read."""
        title, self._inputs = f"sweep {self._folder.name}", inputs
        self.data["run_id"] = self._tracker.open_stage(sweeps.EXPERIMENT, title, self.data["run_id"], None, params)
        self._tracker.log_inputs(self.data["run_id"], inputs)
        self._write()

    def said(self, text: str) -> None:
        self._display.message(text, "warning")

    def forget(self) -> None:
        for row in self._rows.values():
            self._tracker.end(row["run_id"], State.INTERRUPTED)
        self._rows.clear()

    def started(self, trial: str, point: Point, donor: Donor | None = None) -> None:
        """A trial begins, or goes on; `donor`: with the weights of another one."""
        row = self._rows.get(trial)
        if row is None:
            row = {"number": len(self._rows) + 1, "state": "new", "reports": [], "run_id": None, "params": point}
            self._rows[trial] = row
        goes_on = row["state"] == "running"  # it was paused, or its process died
        row |= {"state": "running", "params": point, "message": "", "hint": ""}
        if not goes_on:
            params = {"trial": row["number"], **point}
            where = (row["run_id"], self.data["run_id"])
            row["run_id"] = self._tracker.open_stage(sweeps.EXPERIMENT, _name(row), *where, params)
            self._tracker.log_inputs(row["run_id"], self._inputs)
            self._display.state(_name(row), "running")
        if donor:
            self._taken_over(row, donor, point)
        self._write()

    def _taken_over(self, row: dict[str, Any], donor: Donor, point: Point) -> None:
        """Writes down whose weights the trial has from here on, and its values; once, however often it restarts."""
        number, own = self._rows[donor.trial]["number"], row["reports"][-1][STEP] if row["reports"] else 0
        copy = {"trial": number, "step": donor.step, "at": own, "params": point}
        if row.setdefault("copies", []) and row["copies"][-1] | {"at": own} == copy:
            return  # what it had reported since was not stored
        row["copies"].append(copy)
        row["logged"] = donor.step  # what it does from there on is new, older than its own last step or not
        what = f"{_name(row)}, at step {own}, goes on with the weights of trial {number} at step {donor.step}"
        self._display.message(f"{what} and {values_text(point)}")
        self._tracker.tag(row["run_id"], {VALUES_TAG: json.dumps(point), COPIES_TAG: json.dumps(row["copies"])})

    def reported(self, trial: str, figures: Mapping[str, float], curve: Curve | None = None, host: str = "") -> None:
        """After a restart a trial says again what was not stored of it: the newer report counts. Its run has that."""
        row, step = self._rows[trial], int(figures[STEP])
        metric, logged = self._sweep.metric, _logged(row)
        row["reports"] = [*(r for r in row["reports"] if r[STEP] < step), dict(figures)]
        row["logged"] = max(step, logged)
        moved = host != row.get("host", "")
        row["host"] = host
        self._write()
        text = f"{metric} {figures[metric]:.4g}" if metric in figures else ""
        self._display.progress(_name(row), Event(_name(row), text, step, self._sweep.steps, "steps"))
        measured = {k: v for k, v in figures.items() if k != STEP}
        fresh = [(at, values) for at, values in (*(curve or ()), (step, measured)) if at > logged]
        if fresh:
            self._tracker.log_steps(row["run_id"], fresh)
        if moved:
            self._tracker.tag(row["run_id"], {HOST_TAG: host})

    def ended(self, trial: str) -> None:
        row = self._rows[trial]
        last = row["reports"][-1][STEP] if row["reports"] else 0
        self._end(row, "finished" if last >= self._sweep.steps else "stopped")

    def failed(self, trial: str, message: str, hint: str) -> None:
        row = self._rows[trial]
        row |= {"message": message, "hint": hint}
        self._end(row, "failed")
        self._display.message(f"{_name(row)} failed: {message}; the others go on", "warning")

    def tick(self) -> bool:
        """Is called all the time: writes the table where something has changed and it is time to. Whether somebody
        asked the sweep to stop."""
        began = self._clock()
        if self._changed and began >= self._table_due:
            self._log_table()
            ended = self._clock()
            self._table_due = ended + max(TABLE_SECONDS, TABLE_SHARE * (ended - began))
        if not self._asked and began >= self._look_due:
            self._look_due, self._asked = began + LOOK_SECONDS, sweeps.asked_to_stop(self._folder)
        return self._asked

    def done(self) -> bool:
        """Whether all trials have ended, in whatever way."""
        return sum(row["state"] in sweeps.ENDED for row in self._rows.values()) >= self._sweep.trials

    def log_origin(self, recipe: Mapping[str, Any]) -> None:
        """Code, packages, machine and command line, for the sweep's run; its trials' runs lead there."""
        self._tracker.log_origin(self.data["run_id"], recipe)

    def close(self, state: State) -> None:
        """End the runs, of trials that were interrupted too; with the plot and the results of the sweep."""
        for row in self._rows.values():
            if row["state"] not in sweeps.ENDED:
                row["state"] = "interrupted"
                self._tracker.end(row["run_id"], State.INTERRUPTED)
        self._write()
        run_id, won = self.data["run_id"], sweeps.best(self._sweep, self.data)
        figures = {f"best/{self._sweep.metric}": sweeps.figure(self._sweep, won)} if won else {}
        files = {name: self._folder / name for name in (sweeps.PLOT, sweeps.TRIALS)}
        self._tracker.log_result(run_id, figures, files)
        self._log_table()
        if won:
            self._tracker.tag(run_id, {VALUES_TAG: json.dumps(won["params"])})
        self._tracker.end(run_id, state)

    def _end(self, row: dict[str, Any], state: str) -> None:
        row["state"] = state
        self._write()
        self._tracker.end(row["run_id"], _STATES[state])
        self._display.state(_name(row), state)

    def _write(self) -> None:
        write_json(self._folder / sweeps.TRIALS, self.data)
        self._changed = True

    def _log_table(self) -> None:
        self._changed = False
        columns, text = table_columns(self._sweep, self.data), table_text(self._sweep, self.data)
        self._tracker.log_table(self.data["run_id"], TABLE, columns, text)


def _logged(row: Mapping[str, Any]) -> int:
    """The step up to which a trial's run has its curves."""
    return int(row.get("logged", row["reports"][-1][STEP] if row["reports"] else 0))


def _name(row: Mapping[str, Any]) -> str:
    return f"trial {row['number']}"

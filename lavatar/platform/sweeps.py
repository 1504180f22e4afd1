"""What sweeps there are: their definition, and what their trials came to. Files in HOME/sweeps/ID, one folder a sweep.

sweep.json    the definition, written once; ID is its digest, so the same arguments mean the same sweep
trials.json   state, values and reports of each trial (trialboard.py)
tune/         Ray Tune's own state while there is something to take up
plot.svg      the metric of all trials over steps and over time
lock          held by the process that runs the sweep
cancelled     somebody asked it to stop; until it is taken up again
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from pydantic import TypeAdapter

from lavatar.configs.recipe import Recipe, load_recipe, with_values
from lavatar.configs.space import Domain, Point, Space
from lavatar.configs.sweep import Mode, Scheduler, Search
from lavatar.contracts import StageKind
from lavatar.errors import UNREADABLE, DataError, StageBusyError, UsageError
from lavatar.platform.benchmark_budget import with_steps
from lavatar.platform.home import Home
from lavatar.platform.ids import by_id
from lavatar.platform.planning import METHOD_VERSION, Person, digest
from lavatar.platform.preparing import kind_of
from lavatar.training.files import write_json

EXPERIMENT = "lavatar/sweeps"
FORMAT = 1
DEFINITION, TRIALS, PLOT, LOCK, CANCELLED = "sweep.json", "trials.json", "plot.svg", "lock", "cancelled"
TUNE, WORK = "tune", "work"
ENDED = ("finished", "stopped", "failed")
"""States of a trial that has nothing left to do: it came to its end, the scheduler stopped it, or an error did."""
MEASUREMENTS = 10
"""How often a trial is measured where --every does not say."""


@dataclass(frozen=True)
class Sweep:
    """The definition of a sweep. `points` are the trials' values; none: the searcher asks for `trials` of them."""

    avatar: str
    actor: str | None
    digests: tuple[str, ...]  # of what the names stood for
    recipe: str
    overrides: tuple[str, ...]
    space: dict[str, Any]
    points: tuple[Point, ...]
    trials: int
    scheduler: Scheduler
    search: Search
    metric: str
    mode: Mode
    length: int  # of a trial: steps of the avatar's training, or of the Y-network's
    every: int

    @property
    def kind(self) -> StageKind:
        return kind_of(self.actor)

    @property
    def id(self) -> str:
        """The digest of what its results depend on."""
        own = {**asdict(self), "recipe": self.base().model_dump(mode="json", exclude={"name", "resources"})}
        own.pop("overrides")
        return digest("sweep", FORMAT, METHOD_VERSION[self.kind], own)[:10]

    def full(self) -> Recipe:
        """The recipe at its own length."""
        return load_recipe(self.recipe, self.overrides)

    def base(self) -> Recipe:
        """The recipe at the trials' length."""
        return with_steps(self.full(), "avatar" if self.kind is StageKind.AVATAR else "ynet", self.length)

    @property
    def steps(self) -> int:
        """Of a trial, over all of its phases."""
        recipe = self.base()
        after = 0 if self.kind is StageKind.AVATAR or recipe.mapping.joint else recipe.mapping_training.steps
        return self.length + after

    def domains(self) -> Space:
        found = {key: next(iter(value.items())) for key, value in self.space.items()}
        return Space({key: Domain(kind, tuple(values)) for key, (kind, values) in found.items()})


def length_of(recipe: Recipe, kind: StageKind, steps: int | None) -> int:
    """A trial's length: as asked for, else the recipe's."""
    training = recipe.avatar_training if kind is StageKind.AVATAR else recipe.ynet_training
    return steps or training.steps


def interval_of(length: int, every: int | None) -> int:
    """Steps between two measurements. Raises UsageError."""
    if every is not None and every > length:
        raise UsageError(f"--every {every} is longer than a trial of {length} steps", "Say a smaller --every.")
    return every or max(1, length // MEASUREMENTS)


def digests_of(avatar: Person, actor: Person | None) -> tuple[str, ...]:
    return tuple(person.digest for person in (avatar, actor) if person)


def folder_of(home: Home, sweep_id: str) -> Path:
    return home.root / "sweeps" / sweep_id


def store(home: Home, sweep: Sweep) -> Path:
    """Write the definition down, unless it is there; the sweep's folder."""
    folder = folder_of(home, sweep.id)
    if not (folder / DEFINITION).exists():
        home.ensure()
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / DEFINITION, {"format": FORMAT, "created": time.time(), **asdict(sweep)})
    return folder


def read(folder: Path) -> Sweep:
    """The sweep in a folder. Raises DataError for a damaged one."""
    path = folder / DEFINITION
    try:
        data = json.loads(path.read_text())
        known = {field.name: data[field.name] for field in fields(Sweep)}
        return TypeAdapter(Sweep).validate_python(known)
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read: {error}", _again(folder)) from None


def _again(folder: Path) -> str:
    return f"lavatar sweep delete {folder.name}, then sweep again."


def find(home: Home, name: str) -> Path:
    """The folder of the sweep of that id, or of the only id that begins so. Raises UnknownJobError."""
    found = [(folder.name, folder) for folder in folders(home)]
    return by_id(name, found, "sweep", "Look them up with: lavatar sweep list")


def folders(home: Home) -> list[Path]:
    """Of all sweeps, newest first."""
    return sorted((path.parent for path in home.root.glob(f"sweeps/*/{DEFINITION}")), key=created, reverse=True)


def created(folder: Path) -> float:
    try:
        return float(json.loads((folder / DEFINITION).read_text())["created"])
    except UNREADABLE:
        return 0.0


def read_trials(folder: Path) -> dict[str, Any]:
    """The contents of trials.json; before the first trial: none. Raises DataError for a damaged file."""
    path = folder / TRIALS
    if not path.exists():
        return {"run_id": None, "trials": {}}
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        for row in data["trials"].values():
            row["number"], row["state"], row["params"], row["reports"]
        return data
    except UNREADABLE as error:
        raise DataError(f"{path} is damaged: {error}", _again(folder)) from None


def run_ids(home: Home) -> dict[str, Path] | None:
    """MLflow's runs of all sweeps and their trials, each with the sweep's folder; None: a sweep is damaged, and nobody
    knows."""
    found: dict[str | None, Path] = {}
    for path in home.root.glob(f"sweeps/[!.]*/{TRIALS}"):
        try:
            trials = read_trials(path.parent)
        except DataError:
            return None
        ids = (trials["run_id"], *(row.get("run_id") for row in trials["trials"].values()))
        found |= dict.fromkeys(ids, path.parent)
    return {run_id: folder for run_id, folder in found.items() if run_id}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While this process runs the sweep. Raises StageBusyError while another one does."""
    with (folder / LOCK).open("a") as file:
        while not _locked(file, fcntl.LOCK_EX):
            if not _locked(file, fcntl.LOCK_SH):
                raise StageBusyError(
                    f"sweep {folder.name} is being run by another process", f"See: lavatar sweep show {folder.name}"
                )
            fcntl.flock(file, fcntl.LOCK_UN)  # somebody only looks
            time.sleep(0.01)
        yield


def running(folder: Path) -> bool:
    """Whether a process runs the sweep. Who looks keeps nobody else from looking."""
    with (folder / LOCK).open("a") as file:
        return not _locked(file, fcntl.LOCK_SH)


def _locked(file: IO[str], how: int) -> bool:
    """Whether the lock was free for that; it is held until the file is closed."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def ask_to_stop(folder: Path) -> None:
    """Whoever runs the sweep, on whatever machine, looks now and then."""
    (folder / CANCELLED).touch()


def asked_to_stop(folder: Path) -> bool:
    return (folder / CANCELLED).exists()


def begin(folder: Path) -> None:
    """It is taken up: whatever was asked before."""
    (folder / CANCELLED).unlink(missing_ok=True)


def left(sweep: Sweep, trials: Mapping[str, Any]) -> bool:
    """Whether there is something to do: trials that did not begin, that were interrupted, or that failed."""
    return sum(row["state"] in ("finished", "stopped") for row in trials["trials"].values()) < sweep.trials


def state_of(folder: Path, sweep: Sweep, trials: Mapping[str, Any]) -> str:
    """running; finished: all trials ended, and one was measured; failed: none was; interrupted or cancelled: some are
    left."""
    if running(folder):
        return "running"
    rows = trials["trials"].values()
    if sum(row["state"] in ENDED for row in rows) < sweep.trials:
        return "cancelled" if asked_to_stop(folder) else "interrupted"
    return "finished" if best(sweep, trials) else "failed"


def figure(sweep: Sweep, row: Mapping[str, Any]) -> float | None:
    """A trial's metric as it was last measured."""
    measured = [report[sweep.metric] for report in row["reports"] if report.get(sweep.metric) is not None]
    return float(measured[-1]) if measured else None


def ranked(sweep: Sweep, trials: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The trials, best first: those that came to their end, then the others, then those without a figure."""
    sign = 1.0 if sweep.mode == "min" else -1.0

    def rank(row: Mapping[str, Any]) -> tuple[bool, bool, float, int]:
        value = figure(sweep, row)
        return value is None, row["state"] != "finished", sign * (value or 0.0), row["number"]

    return sorted(trials["trials"].values(), key=rank)


def best(sweep: Sweep, trials: Mapping[str, Any]) -> dict[str, Any] | None:
    """The winner: None while no trial has been measured."""
    rows = [row for row in ranked(sweep, trials) if figure(sweep, row) is not None and row["state"] != "failed"]
    return rows[0] if rows else None


def winner_recipe(sweep: Sweep, row: Mapping[str, Any]) -> Recipe:
    """The recipe at its own length with the values of a trial."""
    return with_values(sweep.full(), row["params"])

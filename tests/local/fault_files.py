"""What the tests of faults share: a small job, the moment to break something, and what must be true afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import sessions
from submit_files import LIMIT, TOY, Lavatar

from lavatar.cluster import session
from lavatar.cluster.memory import PARTS
from lavatar.contracts import measures_time
from lavatar.platform import lookup
from lavatar.platform.home import Home
from lavatar.platform.registry import Registry, open_registry
from lavatar.platform.tracking import connect

STEPS, INTERVAL = 120, 10
SMALL: dict[str, Any] = {
    "preprocess__synthetic_frames": 40,
    "avatar_training__steps": STEPS,
    "avatar_training__checkpoint_every": INTERVAL,
    "evaluation__video_seconds": 1,
    **{f"resources__{kind}__cpus": 1 for kind in ("preprocess", "avatar", "pair", "preview")},  # a thread each
}
INLINE = ("--set", "resources.backend=inline")
TEMPORARY = ("*.part", "*.partial", ".token-*", "release-*", "session-*.json", "session_*", "work", ".work")
SHARED_STREAMS = ("rng.safetensors", "COMPLETE.json")
"""Python's own random numbers, of which an inline process draws for other things too; and the sums of that file."""
INTERVALS = {
    "avatar": INTERVAL,
    **{name: int(str(TOY[f"{name}_training.checkpoint_every"])) for name in ("ynet", "mapping")},
}
"""Steps between two checkpoints of each training."""
UNTIMED = re.compile(r'"(seconds|first_step)": [\d.]+,?')


@dataclass(frozen=True)
class Moment:
    """Right after something was broken: the newest whole checkpoint's step of the avatar, and the time; and that of
    every training, by KEY/TRAINING."""

    step: int
    time: float
    trainings: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Near:
    """What of a job cannot be the same bit by bit, because a training was taken up in smaller parts of its batches: the
    same numbers are summed in another order, and a rounding of a float32 is what Adam and all that follows begin with.

    Names of `files` and `curves` (STAGE/NAME) begin with one of these; a curve is still the same up to the step beside
    it. Figures and curves are near where they differ by no more than `relative` of the value, or `absolute`; what a
    meter reads on pictures of eight bits, by no more than `measured` of it or absolutely: of a face that hardly moves,
    as one of a few dozen steps does, one pixel's rounding turns the correlation in its third digit. The stage that was
    taken up says beside them in what parts.
    """

    files: tuple[str, ...]
    curves: dict[str, int]
    relative: float
    absolute: float
    measured: float = 0.02

    @property
    def stages(self) -> set[str]:
        """Those of which something is only near."""
        return {name.partition("/")[0] for name in self.files}

    def since(self, name: str) -> int | None:
        """The step up to which a curve is the same; None: to its end."""
        return next((step for prefix, step in self.curves.items() if name.startswith(prefix)), None)

    def same(self, found: Any, wanted: Any) -> bool:
        """Whether figures, a curve, or what is in them, are near."""
        if isinstance(wanted, dict):
            known = isinstance(found, dict) and set(found) - {PARTS} == set(wanted)
            return known and all(self._of(key).same(found[key], value) for key, value in wanted.items())
        if isinstance(wanted, list):
            whole = isinstance(found, list) and len(found) == len(wanted)
            return whole and all(self.same(f, w) for f, w in zip(found, wanted, strict=True))
        if not isinstance(wanted, float) or not isinstance(found, float):
            return bool(found == wanted)
        return abs(found - wanted) <= max(self.relative * abs(wanted), self.absolute)

    def _of(self, name: Any) -> Near:
        """The same for a figure or a curve of this name."""
        read = isinstance(name, str) and "expression" in name
        return replace(self, relative=self.measured, absolute=self.measured) if read else self


@dataclass(frozen=True)
class Story:
    """What a job came to, without times: digests of its files, its stages' figures, every curve by stage and name."""

    files: dict[str, str]
    figures: dict[str, Any]
    curves: dict[str, dict[str, dict[int, float]]]
    models: list[str]


def new_home(folder: Path, *names: str, **environment: str) -> Lavatar:
    """A home with synthetic people; everything in it computes in one thread."""
    lavatar = Lavatar(folder / "home", environment={"OMP_NUM_THREADS": "1", **environment})
    for seed, name in enumerate(names or ("ann", "bob"), 1):
        assert lavatar("subjects", "add", "--synthetic", str(seed), name)[0] == 0
    return lavatar


def small_job(lavatar: Lavatar, *extra: str, **changes: Any) -> tuple[str, ...]:
    """The command of the job that every fault is tried on: ann driven by bob."""
    return lavatar.submit("ann", "bob", "--cold", "--json", *extra, **{**SMALL, **changes})


def small_job_of(lavatar: Lavatar, *pairs: tuple[str, str], **changes: Any) -> tuple[str, ...]:
    """The same for a file of (avatar, actor)."""
    return lavatar.submit_pairs(pairs, "--cold", "--json", **{**SMALL, **changes})


def at_checkpoint(lavatar: Lavatar, number: int) -> Moment:
    """Waits for so many checkpoints of the avatar's training."""
    processes_of(lavatar.home)  # what else is in their sessions is found later, too
    until(lambda: _newest(lavatar) >= number * INTERVAL, lavatar)
    return broken(lavatar)


def broken(lavatar: Lavatar) -> Moment:
    """The moment, to be asked for as soon as what trains is dead."""
    newest = _newest(lavatar)
    found: dict[str, int] = {}
    for path in lavatar.home.glob("checkpoints/*/*/step-*/COMPLETE.json"):
        training = f"{path.parts[-4]}/{path.parts[-3]}"
        found[training] = max(found.get(training, 0), _step(path))
    return Moment(newest, time.time(), found)


def _newest(lavatar: Lavatar) -> int:
    return max(map(_step, lavatar.home.glob("checkpoints/*/avatar/step-*/COMPLETE.json")), default=0)


def _step(marker: Path) -> int:
    return int(marker.parent.name.removeprefix("step-"))


def until(condition: Callable[[], Any], lavatar: Lavatar, seconds: float = LIMIT) -> None:
    """Waits for `condition`, closely."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, lavatar.errors()
        time.sleep(0.02)


def process_of(lavatar: Lavatar, stage: str, begins: str) -> int | None:
    """The newest process that wrote "BEGINS… begins (process N)" into the log of a stage."""
    return next(reversed(processes_that_said(lavatar, stage, begins)), None)


def processes_that_said(lavatar: Lavatar, stage: str, begins: str) -> list[int]:
    """All that did, the oldest first."""
    row = lavatar.stage(stage)
    log = lavatar.home / "logs" / f"{row.key}.log" if row else None
    text = log.read_text() if log and log.exists() else ""
    return [int(pid) for pid in re.findall(rf"{re.escape(begins)}.*: begins \(process (\d+)\)", text)]


def processes_of(home: Path) -> list[psutil.Process]:
    """Everything that runs for a home."""
    return [one.process for one in sessions.of_home(home)]


def story(lavatar: Lavatar) -> Story:
    """What is there of the finished job; fails where it is not whole, or the three do not tell the same."""
    home = Home(lavatar.home)
    registry = open_registry(home)
    (job,) = lookup.list_jobs(registry)
    views = lookup.job_stages(registry, job.id)
    for row in (job, *(view.stage for view in views)):
        assert (row.state, row.owner, row.mlflow_open, row.message) == ("finished", None, False, ""), row
    client = connect(home)
    runs = client.search_runs([client.get_experiment_by_name(job.experiment).experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert sorted(run.info.run_id for run in runs) == sorted(
        [job.mlflow_run_id, *(view.stage.mlflow_run_id for view in views)]
    ), "a run each, and no other"
    curves = {run.info.run_name: {name: _curve(client, run, name) for name in run.data.metrics} for run in runs}
    figures = {view.name: _untimed(view.stage.metrics) for view in views}
    models = [f"{m.name} {m.version}" for m in client.search_model_versions()]
    files = _files(home, registry, [view.stage for view in views])
    registry.close()
    return Story(files, figures, curves, sorted(models))


def _curve(client: Any, run: Any, name: str) -> dict[int, float]:
    points = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
    twice = [step for step, count in Counter(step for step, _ in points).items() if count > 1]
    assert not twice, f"{run.info.run_name}: {name} has steps {twice[:5]} twice"
    return dict(points)


def _files(home: Home, registry: Registry, stages: list[Any]) -> dict[str, str]:
    """Digest of every file by stage and path; of those with times in them, without those."""
    found = {}
    for stage in stages:
        folder = home.absolute(stage.out_dir)
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            data = path.read_bytes()
            if path.suffix == ".json":
                data = UNTIMED.sub("", data.decode()).encode()
            found[f"{stage.name}/{path.relative_to(folder)}"] = hashlib.sha256(data).hexdigest()
    return found


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _untimed(v) for k, v in value.items() if not measures_time(k)}
    return value


def same_as_undisturbed(
    lavatar: Lavatar, undisturbed: Story, fault: Moment | None = None, near: Near | None = None, ahead: float = 0.0
) -> Story:
    """All that must be true of the job after a fault, whatever it was; `near`: but for this, bit by bit. `ahead`: as of
    `little_repeated`."""
    nothing_left(lavatar.home)
    found = story(lavatar)
    assert set(found.files) >= set(undisturbed.files)
    differ = [name for name, digest in undisturbed.files.items() if found.files[name] != digest]
    differ = [name for name in differ if Path(name).name not in SHARED_STREAMS]
    differ = [name for name in differ if near is None or not name.startswith(near.files)]
    assert not differ, f"not what an undisturbed run makes: {differ}"
    more = set(found.files) - set(undisturbed.files)
    own = {name.partition("/")[0] for name in undisturbed.files}
    assert not [name for name in more if name.partition("/")[0] in own], "files that an undisturbed run does not make"
    for name, figures in undisturbed.figures.items():
        if near is not None and name in near.stages:
            assert near.same(found.figures[name], figures), (name, found.figures[name], figures)
        else:
            assert found.figures[name] == figures
    for name, curves in undisturbed.curves.items():
        if not name.startswith("job "):
            same_curves(name, found.curves[name], curves, near)
    assert set(found.models) >= set(undisturbed.models)
    if fault is not None:
        little_repeated(lavatar, fault, ahead)
    return found


def same_curves(
    stage: str, found: dict[str, dict[int, float]], wanted: dict[str, dict[int, float]], near: Near | None
) -> None:
    """Every step of an undisturbed run with its very value; where training was taken up one step more is logged."""
    timeless = {name: curve for name, curve in wanted.items() if not measures_time(name)}
    names = {name for name in found if not measures_time(name)}
    if near is not None and stage in near.stages:
        names = {name for name in names if not name.startswith(f"{PARTS}.")}
    assert names == set(timeless), stage
    for name, curve in timeless.items():
        steps = {step: found[name].get(step) for step in curve}
        since = near.since(f"{stage}/{name}") if near is not None else None
        if near is None or since is None:
            assert steps == curve, f"{stage}: {name}"
            continue
        exact = {step: value for step, value in curve.items() if 0 < step <= since}
        assert {step: steps[step] for step in exact} == exact, f"{stage}: {name} up to step {since}"
        assert near.same({name: steps}, {name: curve}), (stage, name, steps, curve)


def little_repeated(lavatar: Lavatar, fault: Moment, ahead: float = 0.0) -> None:
    """Every training of the job that was taken up began at its newest checkpoint that was whole when it broke, at most
    one interval before the last step that was logged until then. `ahead`: the clock of the machine that broke, which
    made the job and stamped what was logged until then, is so many seconds ahead of that of this process."""
    home = Home(lavatar.home)
    registry = open_registry(home)
    (job,) = lookup.list_jobs(registry)
    lines = [line for line in lookup.events(registry, job.id) if line.time >= fault.time]
    rows = [view.stage for view in lookup.job_stages(registry, job.id)]
    registry.close()
    client, broke, taken = connect(home), fault.time + ahead, 0
    for row in rows:
        found = [RESUMED.search(line.text) for line in lines if line.stage == row.name]
        first = {m[1]: int(m[2]) for m in reversed(found) if m}
        for training, step in first.items():
            taken, whole = taken + 1, fault.trainings.get(f"{row.key}/{training}", 0)
            if row.name == "avatar:ann":
                whole = fault.step
            name, every = f"{row.name}, {training}", INTERVALS[training]
            history = client.get_metric_history(row.mlflow_run_id, f"{training}/total")
            reached = max((p.step for p in history if job.created <= p.timestamp / 1000 <= broke), default=0)
            assert step >= whole, f"{name}: taken up at step {step}: the checkpoint of step {whole} was whole"
            assert reached - step <= every, f"{name}: steps {step} to {reached} were repeated"
            assert reached >= whole - every, f"{name}: had a checkpoint of step {whole} and had logged {reached} steps"
    assert taken, "nothing was taken up: was anything broken?"


RESUMED = re.compile(r"(\w+): resumed at step (\d+)")
"""Which training of a stage was taken up, and from where."""


def nothing_left(home: Path, seconds: float = sessions.AGENTS_LINGER + 20) -> None:
    """No process of the home, no temporary file in it or in Ray's folder."""
    deadline = time.monotonic() + seconds
    while alive := processes_of(home):
        assert time.monotonic() < deadline, [_line(process) for process in alive]
        time.sleep(0.2)
    roots = {home, session.root_of(home)}
    left = [path for root in roots for pattern in TEMPORARY for path in root.rglob(pattern)]
    left += [path for root in roots for path in root.glob("train/*")] + list(home.glob("ray/train/*"))
    left += [path for path in home.rglob("step-*") if not (path / "COMPLETE.json").exists()]
    assert not left


def _line(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()[:4])
    return "ended just now"


def report_of(out: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(out)
    return report

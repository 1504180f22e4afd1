"""What the tests of faults share: a small job, the moment to break something, and what must be true afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from submit_files import LIMIT, Lavatar

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
UNTIMED = re.compile(r'"(seconds|first_step)": [\d.]+,?')


@dataclass(frozen=True)
class Moment:
    """Right after something was broken: the newest whole checkpoint's step, and the time."""

    step: int
    time: float


@dataclass(frozen=True)
class Near:
    """What of a job cannot be the same bit by bit, because a training was taken up in smaller parts of its batches: the
    same numbers are summed in another order, and a rounding of a float32 is what Adam and all that follows begin with.

    Names of `files` and `curves` (STAGE/NAME) begin with one of these; a curve is still the same up to the step beside
    it. Figures and curves are near where they differ by no more than `relative` of the value, or `absolute`. The stage
    that was taken up says beside them in what parts.
    """

    files: tuple[str, ...]
    curves: dict[str, int]
    relative: float
    absolute: float

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
            return known and all(self.same(found[key], value) for key, value in wanted.items())
        if isinstance(wanted, list):
            whole = isinstance(found, list) and len(found) == len(wanted)
            return whole and all(self.same(f, w) for f, w in zip(found, wanted, strict=True))
        if not isinstance(wanted, float) or not isinstance(found, float):
            return bool(found == wanted)
        return abs(found - wanted) <= max(self.relative * abs(wanted), self.absolute)


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
    until(lambda: _newest(lavatar) >= number * INTERVAL, lavatar)
    return broken(lavatar)


def broken(lavatar: Lavatar) -> Moment:
    """The moment, to be asked for as soon as what trains is dead."""
    return Moment(_newest(lavatar), time.time())


def _newest(lavatar: Lavatar) -> int:
    found = lavatar.home.glob("checkpoints/*/avatar/step-*/COMPLETE.json")
    return max((int(path.parent.name.removeprefix("step-")) for path in found), default=0)


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
    """Everything that runs for a home: by its environment or by a path on its command line."""
    marks = (str(home), str(session.root_of(home)))
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        environment, words = process.info["environ"] or {}, process.info["cmdline"] or ()
        named = any(mark in word for mark in marks for word in words)
        if process.pid != os.getpid() and (named or environment.get("LAVATAR_HOME") == str(home)):
            found.append(process)
    return found


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
    lavatar: Lavatar, undisturbed: Story, fault: Moment | None = None, near: Near | None = None
) -> Story:
    """All that must be true of the job after a fault, whatever it was; `near`: but for this, bit by bit."""
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
        little_repeated(lavatar, fault)
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
        assert near.same(steps, curve), (stage, name, steps, curve)


def little_repeated(lavatar: Lavatar, fault: Moment) -> None:
    """What was taken up began at the newest checkpoint that was whole when it broke, at most one interval before the
    last step that was logged until then."""
    registry = open_registry(Home(lavatar.home))
    (job,) = lookup.list_jobs(registry)
    lines = [e for e in lookup.events(registry, job.id) if e.stage == "avatar:ann" and e.time >= fault.time]
    registry.close()
    resumed = [int(m[1]) for e in lines if (m := re.search(r"resumed at step (\d+)", e.text))]
    assert resumed, "nothing was taken up: was anything broken?"
    row = lavatar.stage("avatar:ann")
    assert row is not None
    history = connect(Home(lavatar.home)).get_metric_history(row.mlflow_run_id, "avatar/total")
    reached = max((p.step for p in history if p.timestamp / 1000 <= fault.time), default=0)
    assert resumed[0] >= fault.step, f"taken up at step {resumed[0]}: the checkpoint of step {fault.step} was whole"
    assert reached - resumed[0] <= INTERVAL, f"steps {resumed[0]} to {reached} were repeated"


def nothing_left(home: Path, seconds: float = 60.0) -> None:
    """No process of the home, no temporary file in it or in Ray's folder."""
    deadline = time.monotonic() + seconds
    while alive := [p for p in processes_of(home) if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, [p.cmdline()[:4] for p in alive]
        time.sleep(0.2)
    roots = {home, session.root_of(home)}
    left = [path for root in roots for pattern in TEMPORARY for path in root.rglob(pattern)]
    left += [path for root in roots for path in root.glob("train/*")] + list(home.glob("ray/train/*"))
    left += [path for path in home.rglob("step-*") if not (path / "COMPLETE.json").exists()]
    assert not left


def report_of(out: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(out)
    return report

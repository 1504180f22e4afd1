"""What tracking costs a training: an avatar on a synthetic subject, logged as a job logs it (MLflow with SQLite).

    python benchmarks/logging_cost.py --recipe tiny --steps 400

Two shares of one process, so that a busy machine moves both sides: the time that the training loop spends in the
metric sink and in looking at its pace, of its own time; and the processor time of the sink's thread, which sends, of
the whole process's. The first seconds, in which MLflow is imported and the kernels warm up, are told apart.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from lavatar.cluster.bodies import Context as StageContext
from lavatar.cluster.bodies import avatar_plan, preprocess_body
from lavatar.cluster.plans import Worker, run_plan
from lavatar.configs.recipe import load_recipe
from lavatar.contracts import NullSink, StageKind, StageSpec, VideoSource
from lavatar.platform.home import Home
from lavatar.platform.sink import MlflowSink
from lavatar.platform.tracking import Tracker
from lavatar.training.pace import Pace


class Clock:
    """Adds up the time that a thread spends in some calls."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def watch(self, owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds, self.calls = self.seconds + time.perf_counter() - began, self.calls + 1

        setattr(owner, name, timed)


class Start:
    """Where things stood when the first steps were done."""

    def __init__(self, sink: MlflowSink, clock: Clock) -> None:
        self.wall, self.sent, self.logged = time.perf_counter(), sender_seconds(sink), clock.seconds
        self.process = time.process_time()


def sender_seconds(sink: MlflowSink) -> float:
    """Processor time of the sink's thread."""
    times = {thread.id: thread.user_time + thread.system_time for thread in psutil.Process().threads()}
    return float(times.get(sink._thread.native_id or 0, 0.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--warm-up", type=int, default=100, help="steps that do not count")
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    own = ["preprocess.portrait_size=256", "preprocess.synthetic_frames=60", "avatar_training.engine=torch"]
    own += [f"avatar_training.steps={args.steps}", f"avatar_training.checkpoint_every={args.steps}"]
    recipe = load_recipe(args.recipe, [*own, *args.set]).model_dump(mode="json")
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder)).ensure()
        data = StageSpec(
            StageKind.PREPROCESS, "data", "0" * 64, home.root, home.root / "shards" / "0", {}, recipe,
            {"subject": VideoSource("ada", synthetic_seed=0)},
        )  # fmt: skip
        preprocess_body(data, StageContext(NullSink(), lambda: False, None, map, lambda plan: {}))
        spec = StageSpec(
            StageKind.AVATAR, "avatar", "1" * 64, home.root, home.root / "checkpoints" / "1",
            {"dataset": data.out_dir}, recipe,
        )  # fmt: skip
        tracker = Tracker(home, print)
        run = tracker.open_stage("cost", "avatar:ada", None, None, {})
        factory = tracker.sink_factory(run)
        assert factory is not None
        measure(spec, factory(), args.steps, args.warm_up)


def measure(spec: StageSpec, sink: MlflowSink, steps: int, warm_up: int) -> None:
    """Train, and say what of it was logging."""
    clock, started = Clock(), list[Start]()
    for owner, names in ((sink, ("log_metrics", "log_picture")), (Pace, ("look",))):
        for name in names:
            clock.watch(owner, name)
    counted = Pace.step

    def step(self: Pace, make: Any, number: int) -> Any:
        if number == warm_up:
            started.append(Start(sink, clock))
        return counted(self, make, number)

    Pace.step = step  # type: ignore[method-assign]
    run_plan(avatar_plan(spec, NullSink()), spec, Worker(), sink, NullSink(), lambda: False)
    (start,) = started
    wall, process = time.perf_counter() - start.wall, time.process_time() - start.process
    logged, sent = clock.seconds - start.logged, sender_seconds(sink) - start.sent
    count = steps - warm_up
    readings = time.perf_counter()
    for _ in range(100_000):
        time.perf_counter()
    reading = (time.perf_counter() - readings) / 100_000
    logged += 2 * count * reading  # the two looks at the clock that each step takes
    sink.close()
    print(f"{threading.active_count()} threads, {count} steps of {1000 * wall / count:.1f} ms")
    print(f"in the loop: {1e6 * logged / count:.1f} µs a step, {100 * logged / wall:.3f} % of its time")
    print(
        f"the sender's thread: {1000 * sent / count:.3f} ms a step, {100 * sent / process:.2f} % of all processor time"
    )
    print(f"before, with imports: {start.sent:.1f} s of the sender's thread")


if __name__ == "__main__":
    main()

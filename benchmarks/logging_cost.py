"""What tracking costs a training: an avatar on a synthetic subject, logged as a job logs it (MLflow with SQLite).

    python benchmarks/logging_cost.py --recipe tiny --steps 700

Shares of one process, so that a busy machine moves both sides. Of the training loop's own time: what it spends in the
metric sink, in looking at its pace, in waiting for what is unsent at a checkpoint, and in drawing the sample pictures;
each is told apart. Of the process's processor time: that of the sink's thread, which sends. There are as many
checkpoints and pictures as the recipe wants. The first seconds, in which MLflow is imported, do not count.
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
from lavatar.training import loop
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

    def __init__(self, sink: MlflowSink, clocks: dict[str, Clock]) -> None:
        self.wall, self.sent = time.perf_counter(), sender_seconds(sink)
        self.spent = {name: (clock.seconds, clock.calls) for name, clock in clocks.items()}
        self.process = time.process_time()


def sender_seconds(sink: MlflowSink) -> float:
    """Processor time of the sink's thread."""
    times = {thread.id: thread.user_time + thread.system_time for thread in psutil.Process().threads()}
    return float(times.get(sink._thread.native_id or 0, 0.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--warm-up", type=int, default=100, help="steps that do not count")
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    own = ["preprocess.portrait_size=256", "preprocess.synthetic_frames=60", "avatar_training.engine=torch"]
    own += [f"avatar_training.steps={args.steps}"]
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
    clocks, started = {name: Clock() for name in ("values", "checkpoints", "pictures")}, list[Start]()
    clocks["values"].watch(sink, "log_metrics")
    clocks["values"].watch(Pace, "look")
    clocks["checkpoints"].watch(sink, "flush")
    clocks["pictures"].watch(loop._Run, "_pictures")  # with handing them to the sink
    counted = Pace.step

    def step(self: Pace, make: Any, number: int) -> Any:
        if number == warm_up:
            started.append(Start(sink, clocks))
        return counted(self, make, number)

    Pace.step = step  # type: ignore[method-assign]
    run_plan(avatar_plan(spec, NullSink()), spec, Worker(), sink, NullSink(), lambda: False)
    (start,) = started
    wall, process = time.perf_counter() - start.wall, time.process_time() - start.process
    sent = sender_seconds(sink) - start.sent
    count = steps - warm_up
    readings = time.perf_counter()
    for _ in range(100_000):
        time.perf_counter()
    reading = (time.perf_counter() - readings) / 100_000
    clocks["values"].seconds += 2 * count * reading  # the two looks at the clock that each step takes
    sink.close()
    print(f"{threading.active_count()} threads, {count} steps of {1000 * wall / count:.1f} ms")
    for name, clock in clocks.items():
        seconds, calls = start.spent[name]
        spent, times = clock.seconds - seconds, clock.calls - calls
        print(f"in the loop, {name}: {times} times, {1e6 * spent / count:.1f} µs a step, {100 * spent / wall:.3f} %")
    print(
        f"the sender's thread: {1000 * sent / count:.3f} ms a step, {100 * sent / process:.2f} % of all processor time"
    )
    print(f"before, with imports: {start.sent:.1f} s of the sender's thread")


if __name__ == "__main__":
    main()

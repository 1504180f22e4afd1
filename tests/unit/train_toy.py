"""Run as a script by the tests: trains the toy task in a process of its own that can be killed.

train_toy.py FOLDER STEPS CHECKPOINT_EVERY SIGNAL AT_STEP
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from toy_task import ToyTask

from lavatar.configs.training import TrainingConfig
from lavatar.contracts import NullSink, measures_time
from lavatar.errors import Interrupted
from lavatar.training.engine import TorchEngine
from lavatar.training.loop import train
from lavatar.training.optimizer import build_optimizer


class CurveFile(NullSink):
    """Losses as exact hexadecimal floats, one line a step; sends this process a signal at a step."""

    def __init__(self, path: Path, number: int = 0, at_step: int = -1) -> None:
        self.path, self.number, self.at_step = path, number, at_step

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        timeless = {name: float(value).hex() for name, value in metrics.items() if not measures_time(name)}
        with self.path.open("a") as stream:
            stream.write(json.dumps({"step": step, **timeless}) + "\n")
        if step == self.at_step and self.number:
            os.kill(os.getpid(), self.number)

    def curve(self) -> dict[int, dict[str, str]]:
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        return {line.pop("step"): line for line in lines}


def train_toy(folder: Path, config: TrainingConfig, sink: CurveFile, task: ToyTask | None = None) -> ToyTask:
    task = task or ToyTask(config.seed)
    engine = TorchEngine(task.module, build_optimizer(task.param_groups(), task.module, config), config)
    train(task, config, engine, folder, sink)
    return task


if __name__ == "__main__":
    root, steps, every, number, at = Path(sys.argv[1]), *map(int, sys.argv[2:6])
    toy = TrainingConfig(steps=steps, batch_size=4, log_every=1, checkpoint_every=every, picture_every=3, seed=5)
    try:
        train_toy(root / "run", toy, CurveFile(root / "curve.jsonl", number, at))
    except Interrupted as stopped:
        sys.exit(stopped.exit_code)

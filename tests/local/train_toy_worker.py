"""Run as a script by the tests: one of several DeepSpeed workers that train the toy task over gloo.

train_toy_worker.py FOLDER RANK WORLD PORT ZERO_STAGE STEPS
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

import torch
from toy_task import ToyTask
from train_toy import CurveFile

from lavatar.cluster.engine import DeepSpeedEngine
from lavatar.configs.training import TrainingConfig
from lavatar.training.loop import train
from lavatar.training.optimizer import build_optimizer

if __name__ == "__main__":
    root, rank, world, port, zero, steps = Path(sys.argv[1]), *map(int, sys.argv[2:7])
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    config = TrainingConfig(steps=steps, batch_size=4, log_every=1, checkpoint_every=4, zero_stage=zero, seed=5)
    task = ToyTask(5, rank, world)
    task.noise = 0.0  # each worker draws its own: without it the number of workers must not matter
    engine = DeepSpeedEngine(task.module, build_optimizer(task.param_groups(), task.module, config), config)
    train(task, config, engine, root / "run", CurveFile(root / f"curve-{world}-{rank}.jsonl"))
    engine.close()
    if world > 1:
        torch.distributed.destroy_process_group()

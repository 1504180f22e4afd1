"""What a trial takes over from a better one: weights and moments of equal name and shape, to the bit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from toy_task import ToyTask
from train_toy import CurveFile, train_toy

from lavatar.configs.training import TrainingConfig
from lavatar.training import checkpoint as checkpoints
from lavatar.training.engine import EngineState, TorchEngine
from lavatar.training.optimizer import build_optimizer
from lavatar.training.tasks import TrainingTask
from lavatar.training.transplant import fitted, fitted_tensors, transplant

CONFIG = TrainingConfig(steps=10, batch_size=4, log_every=1, checkpoint_every=5, picture_every=100, seed=5)


def engine_of(task: Any, config: TrainingConfig = CONFIG) -> TorchEngine:
    return TorchEngine(task.module, build_optimizer(task.param_groups(), task.module, config), config)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_a_trial_goes_on_with_the_weights_and_moments_of_another(tmp_path: Path) -> None:
    train_toy(tmp_path / "good", CONFIG.model_copy(update={"steps": 5}), CurveFile(tmp_path / "good.jsonl"))
    donor, _ = checkpoints.latest(tmp_path / "good")
    assert donor is not None
    other = ToyTask(seed=9)
    engine = engine_of(other)
    before = engine.export_state()
    taken = transplant(donor, tmp_path / "bad", cast(TrainingTask, other), engine)
    theirs, own = checkpoints.load(donor), checkpoints.load(taken)
    assert own.step == 5
    assert same(dict(own.modules), dict(theirs.modules))
    assert same(dict(own.optimizer), dict(theirs.optimizer))
    assert not torch.equal(own.modules["encoder.weight"], before.modules["encoder.weight"])
    assert own.task["seen"] == 5
    assert not own.rng
    curve = CurveFile(tmp_path / "bad.jsonl")
    train_toy(tmp_path / "bad", CONFIG.model_copy(update={"learning_rate": 0.5}), curve, ToyTask(seed=9))
    assert min(curve.curve()) == 6, "it goes on at the other one's step"


class Wider(ToyTask):
    """The same task with a decoder of another width."""

    def __init__(self) -> None:
        super().__init__(seed=3)
        self.module["left"] = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 4))


def test_what_has_another_shape_stays_as_it_begins(tmp_path: Path) -> None:
    train_toy(tmp_path / "good", CONFIG.model_copy(update={"steps": 5}), CurveFile(tmp_path / "good.jsonl"))
    donor, _ = checkpoints.latest(tmp_path / "good")
    assert donor is not None
    task = Wider()
    engine = engine_of(task)
    before = engine.export_state()
    own, theirs = (
        checkpoints.load(transplant(donor, tmp_path / "bad", cast(TrainingTask, task), engine)),
        checkpoints.load(donor),
    )
    assert torch.equal(own.modules["encoder.weight"], theirs.modules["encoder.weight"])
    assert torch.equal(own.optimizer["exp_avg/encoder.weight"], theirs.optimizer["exp_avg/encoder.weight"])
    assert torch.equal(own.modules["left.0.weight"], before.modules["left.0.weight"])
    assert not own.optimizer["exp_avg/left.0.weight"].any()
    engine.import_state(EngineState(dict(own.modules), dict(own.optimizer)))  # it fits, strictly


def test_a_parameter_of_another_shape_keeps_its_own_count_of_steps() -> None:
    a = EngineState({"w": torch.ones(2)}, {"exp_avg/w": torch.ones(2), "step/w": torch.tensor(7.0)})
    b = EngineState({"w": torch.zeros(3)}, {"exp_avg/w": torch.zeros(3), "step/w": torch.tensor(0.0)})
    assert fitted(b, a) == b
    assert fitted(EngineState({"w": torch.zeros(2)}, {"step/w": torch.tensor(0.0)}), a).moments["step/w"] == 7
    assert set(fitted_tensors({"x": torch.ones(1)}, {"y": torch.ones(1)})) == {"x"}

"""DeepSpeedEngine against the reference, stage by stage; its checkpoints fit other stages and other world sizes."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from toy_task import ToyTask
from train_toy import CurveFile

from lavatar.cluster.engine import DeepSpeedEngine
from lavatar.configs.training import TrainingConfig
from lavatar.errors import ConfigError
from lavatar.training.batch import split
from lavatar.training.engine import Engine, EngineState, TorchEngine
from lavatar.training.loop import train
from lavatar.training.optimizer import build_optimizer


def _build(kind: type[TorchEngine] | type[DeepSpeedEngine], config: TrainingConfig) -> tuple[ToyTask, Engine]:
    task = ToyTask(3)
    return task, kind(task.module, build_optimizer(task.param_groups(), task.module, config), config)


def _run(task: ToyTask, engine: Engine, config: TrainingConfig, steps: range) -> list[dict[str, float]]:
    curve = []
    for step in steps:
        torch.manual_seed(step)
        engine.optimizer.activate(task.active_groups(step))
        parts = split(task.batches(step), config.accumulation)
        terms = engine.step(lambda part, parts=parts, step=step: task.losses(parts[part], step))
        curve.append({name: float(value) for name, value in terms.items()})
    return curve


def _largest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("changes", [{}, {"accumulation": 2, "gradient_clip": 0.05}, {"precision": "bf16"}])
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_deepspeed_takes_the_steps_of_the_reference(zero: int, changes: dict[str, object]) -> None:
    config = TrainingConfig(batch_size=4, **changes)
    task, engine = _build(TorchEngine, config)
    wanted, state = _run(task, engine, config, range(12)), engine.export_state()
    task, engine = _build(DeepSpeedEngine, config.model_copy(update={"zero_stage": zero}))
    found, ours = _run(task, engine, config, range(12)), engine.export_state()
    engine.close()
    for a, b in zip(found, wanted, strict=True):
        assert a == pytest.approx(b, abs=1e-6)
    assert _largest(ours.modules, state.modules) < 1e-6
    assert _largest(ours.moments, state.moments) < 1e-6
    assert [float(ours.moments[f"step/{name}.bias"]) for name in ("encoder", "left", "right")] == [12, 7, 5]


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_frozen_group_stays_to_the_bit(zero: int) -> None:
    config = TrainingConfig(batch_size=4, zero_stage=zero, gradient_clip=0.1)
    task, engine = _build(DeepSpeedEngine, config)
    _run(task, engine, config, range(8))
    before = engine.export_state()
    _run(task, engine, config, range(9, 10))
    after = engine.export_state()
    engine.close()
    (side,) = task.active_groups(9) - {"encoder"}
    other = {"left": "right", "right": "left"}[side]
    for name, old in {**before.modules, **before.moments}.items():
        new = {**after.modules, **after.moments}[name]
        still = f"{other}." in name or "frozen." in name
        assert torch.equal(old, new) == still, name


@pytest.mark.parametrize(("first", "second"), [(0, 2), (2, 1), (1, 0)])
def test_a_state_goes_from_one_zero_stage_to_another(first: int, second: int) -> None:
    config = TrainingConfig(batch_size=4)
    task, engine = _build(TorchEngine, config)
    wanted = _run(task, engine, config, range(12))
    task, engine = _build(DeepSpeedEngine, config.model_copy(update={"zero_stage": first}))
    _run(task, engine, config, range(6))
    state = engine.export_state()
    engine.close()
    task, engine = _build(DeepSpeedEngine, config.model_copy(update={"zero_stage": second}))
    engine.import_state(state)
    assert _largest(engine.export_state().moments, state.moments) == 0
    found = _run(task, engine, config, range(6, 12))
    odd = EngineState(state.modules, {k: v for k, v in state.moments.items() if k != "step/left.bias"})
    with pytest.raises(ConfigError, match=r"step/left\.bias"):
        engine.import_state(odd)
    engine.close()
    for a, b in zip(found, wanted[6:], strict=True):
        assert a == pytest.approx(b, abs=1e-6)


def _workers(folder: Path, world: int, zero: int, steps: int) -> None:
    """Trains in `world` processes; all must end well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).parent / "train_toy_worker.py"
    arguments = [str(world), str(port), str(zero), str(steps)]
    running = [
        subprocess.Popen([sys.executable, script, folder, str(rank), *arguments], stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    for process in running:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors


def test_a_run_goes_on_with_another_number_of_workers(tmp_path: Path) -> None:
    config = TrainingConfig(steps=12, batch_size=4, log_every=1, checkpoint_every=4, seed=5)
    task = ToyTask(5)
    task.noise = 0.0
    engine = TorchEngine(task.module, build_optimizer(task.param_groups(), task.module, config), config)
    sink = CurveFile(tmp_path / "whole.jsonl")
    train(task, config, engine, tmp_path / "whole", sink)
    wanted = sink.curve()

    _workers(tmp_path, world=2, zero=2, steps=4)
    _workers(tmp_path, world=1, zero=0, steps=12)
    found = {**CurveFile(tmp_path / "curve-2-0.jsonl").curve(), **CurveFile(tmp_path / "curve-1-0.jsonl").curve()}
    assert sorted(found) == list(range(1, 13))
    assert not (tmp_path / "curve-2-1.jsonl").exists(), "only the first worker logs"
    for step, terms in wanted.items():
        exact = {name: float.fromhex(value) for name, value in found[step].items()}
        assert exact == pytest.approx({name: float.fromhex(value) for name, value in terms.items()}, abs=1e-6)

"""The loop: a resumed curve is the uninterrupted one, to the bit; a bad loss is named; a stop keeps what was done."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from toy_task import ToyTask
from train_toy import CurveFile, train_toy

from lavatar.configs.training import TrainingConfig
from lavatar.contracts import Event, NullSink
from lavatar.errors import ConfigError, Interrupted, TrainingError
from lavatar.training import checkpoint as checkpoints
from lavatar.training.engine import TorchEngine
from lavatar.training.loop import Span, train
from lavatar.training.optimizer import build_optimizer
from lavatar.training.pace import Pace
from lavatar.training.schedule import rate_factor

CONFIG = TrainingConfig(steps=20, batch_size=4, log_every=1, checkpoint_every=5, picture_every=3, seed=5)


class Events(NullSink):
    def __init__(self) -> None:
        self.seen: list[Event] = []

    def emit(self, event: Event) -> None:
        self.seen.append(event)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, dict[str, str]], dict[str, torch.Tensor]]:
    """Curve and final parameters of 20 steps in one go."""
    folder = tmp_path_factory.mktemp("whole")
    sink = CurveFile(folder / "curve.jsonl")
    task = train_toy(folder / "run", CONFIG, sink)
    return sink.curve(), {name: value.clone() for name, value in task.module.state_dict().items()}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 130)])
def test_a_run_killed_at_step_7_goes_on_bit_by_bit(
    whole: tuple[dict[int, dict[str, str]], dict[str, torch.Tensor]], tmp_path: Path, number: int, code: int
) -> None:
    script = Path(__file__).parent / "train_toy.py"
    process = subprocess.run([sys.executable, script, tmp_path, "20", "5", str(int(number)), "7"], check=False)
    assert process.returncode == code
    killed = CurveFile(tmp_path / "curve.jsonl").curve()
    assert list(killed) == list(range(1, 8))
    found, _ = checkpoints.latest(tmp_path / "run")
    assert found is not None
    assert found.name == ("step-00000005" if number == signal.SIGKILL else "step-00000007")

    sink = CurveFile(tmp_path / "resumed.jsonl")
    task = train_toy(tmp_path / "run", CONFIG, sink)
    resumed = sink.curve()
    assert min(resumed) == (6 if number == signal.SIGKILL else 8)
    assert {**killed, **resumed} == whole[0]
    assert all(torch.equal(value, whole[1][name]) for name, value in task.module.state_dict().items())
    assert float(task.seen) == 20


def test_the_generators_matter_so_the_test_above_means_something(
    whole: tuple[dict[int, dict[str, str]], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    sink = CurveFile(tmp_path / "curve.jsonl")
    train_toy(tmp_path / "run", CONFIG.model_copy(update={"seed": 6}), sink, ToyTask(5))
    assert sink.curve()[1] != whole[0][1]


def test_a_loss_that_is_not_finite_is_named_with_step_and_samples(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"code = nan, total = nan at step 7 \(samples: s7-0, s7-1, s7-2, s7-3\)"):
        train_toy(tmp_path / "run", CONFIG, CurveFile(tmp_path / "c"), ToyTask(5, bad_step=7))
    found, _ = checkpoints.latest(tmp_path / "run")
    assert found is not None
    assert found.name == "step-00000005"


def _engine(task: ToyTask, config: TrainingConfig) -> TorchEngine:
    return TorchEngine(task.module, build_optimizer(task.param_groups(), task.module, config), config)


def test_a_cancel_makes_a_checkpoint_and_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    task, calls = ToyTask(5), []
    with pytest.raises(Interrupted, match="step 3 of 20"):
        train(task, CONFIG, _engine(task, CONFIG), tmp_path, stop=lambda: calls.append(0) or len(calls) == 3)
    assert checkpoints.latest(tmp_path)[0] == tmp_path / "step-00000003"
    task = ToyTask(5)
    whole = train(task, CONFIG, _engine(task, CONFIG), tmp_path)
    assert whole.first_step == 3
    before = sorted(path.stat().st_mtime_ns for path in tmp_path.glob("*/*"))
    again = train(ToyTask(5), CONFIG, _engine(task := ToyTask(5), CONFIG), tmp_path)
    assert (again.first_step, again.steps) == (20, 20)
    assert again.losses == whole.losses != {}, "a worker may die between its last checkpoint and its release"
    assert before == sorted(path.stat().st_mtime_ns for path in tmp_path.glob("*/*"))


def test_progress_counts_over_the_stage_and_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    task, events = ToyTask(5), Events()
    train(task, CONFIG, _engine(task, CONFIG), tmp_path, None, events, "pair:a+b", span=Span("ynet", 30, 50))
    last = [event for event in events.seen if event.done is not None][-1]
    assert (last.stage, last.done, last.total, last.unit) == ("pair:a+b", 50, 50, "steps")
    assert "ynet: loss 0." in last.text
    assert "steps/s" in last.text
    assert "0:00 left" in last.text

    file = tmp_path / "step-00000020" / "modules.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    task, events = ToyTask(5), Events()
    assert train(task, CONFIG, _engine(task, CONFIG), tmp_path, None, events).first_step == 15
    assert [e for e in events.seen if e.level == "warning" and "step-00000020 is damaged" in e.text]


def test_accumulation_gives_the_same_parameters_as_one_batch(tmp_path: Path) -> None:
    ends = []
    for parts in (1, 2):
        config = CONFIG.model_copy(update={"accumulation": parts, "gradient_clip": 0.05})
        task = ToyTask(5)
        task.noise = 0.0
        train(task, config, _engine(task, config), tmp_path / str(parts))
        ends.append(task.module["encoder"].weight.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-6)
    config = CONFIG.model_copy(update={"accumulation": 3})
    with pytest.raises(ConfigError, match="batch_size 4 is not a multiple"):
        train(task, config, _engine(task, config), tmp_path / "3")


def test_a_checkpoint_of_another_model_is_refused_with_its_name(tmp_path: Path) -> None:
    train(task := ToyTask(5), CONFIG, _engine(task, CONFIG), tmp_path)
    other = ToyTask(5)
    other.module["right"] = torch.nn.Linear(6, 4)
    with pytest.raises(ConfigError, match=r"of another model.*right"):
        train(other, CONFIG, _engine(other, CONFIG), tmp_path)


def test_the_rate_warms_up_and_falls() -> None:
    config = TrainingConfig(steps=110, warmup_steps=10, schedule="cosine", final_rate=0.1)
    factors = [rate_factor(step, config) for step in range(110)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[9] == pytest.approx(10 / 11)
    assert factors[10] == 1.0
    assert factors[60] == pytest.approx(0.55)
    assert factors[109] == pytest.approx(0.1, abs=1e-3)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert rate_factor(99, TrainingConfig()) == 1.0


def test_the_pace_counts_samples_and_what_was_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    pace = Pace(samples=2)

    def late(step: int) -> int:
        now[0] += 0.125
        return step

    for step in range(4):
        assert pace.step(late, step) == step
        now[0] += 0.375
    assert pace.look() == {"timing/samples_per_second": 4.0, "timing/data_wait_share": 0.25}
    assert pace.look() == {}, "no step since"
    now[0] += 5.0
    pace.anew()
    pace.step(late, 4)
    now[0] += 0.875
    assert pace.look() == {"timing/samples_per_second": 2.0, "timing/data_wait_share": 0.125}

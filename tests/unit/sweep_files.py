"""A sweep around Tune for tests: Tune is played, so are Ray, MLflow and the stages."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from platform_fakes import FakeRunner, NoTracker, no_models

from lavatar.platform.home import Home
from lavatar.platform.sweeps import Sweep

SPACE = "avatar.samples: {choice: [4, 6, 8, 10]}\navatar_loss.lambda_lr: {choice: [0.5]}\n"


@dataclass
class Tune:
    """Runs the trials of a plan one after the other: lpips is 1 / samples at the end, and they are stopped, fail or
    are left in the middle as a test says, by their samples. `between` two trials something is done."""

    stopped: tuple[int, ...] = ()
    failing: tuple[int, ...] = ()
    left: tuple[int, ...] = ()
    between: Callable[[], object] = lambda: None
    plans: list[Any] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    by: str = "avatar.samples"

    def __call__(self, plan: Any, watch: Any) -> None:
        self.plans.append(plan)
        for number, point in enumerate(plan.points):
            name, samples = f"t_{number:05d}", point[self.by]
            if name in self.done:
                continue
            watch.started(name, point)
            for which in range(3):
                (plan.folder / "tune" / name / f"checkpoint_{which:06d}").mkdir(parents=True, exist_ok=True)
            watch.reported(name, self._report(plan.trials.every, samples))
            if samples in self.left:
                return
            if samples in self.failing:
                watch.failed(name, "a loss is not finite", "Lower the rate.")
                continue
            if samples not in self.stopped:
                watch.reported(name, self._report(plan.steps, samples))
            watch.ended(name)
            self.done.add(name)
            self.between()
            if watch.tick():
                return

    @staticmethod
    def _report(step: int, samples: int) -> dict[str, float]:
        return {"step": step, "training_seconds": step / 10, **_figures(step, samples)}


def _figures(step: int, samples: int) -> dict[str, float]:
    return {"lpips": 1 / samples + 1 / step, "psnr": 20.0 + samples, "expression_error": 1 / samples}


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> Tune:
    """Everything but Tune, Ray, MLflow and the stages is real."""
    import lavatar.cluster.stages
    import lavatar.cluster.sweep

    played, runner = Tune(), FakeRunner()

    @contextlib.contextmanager
    def opened(*args: object, **kwargs: object) -> Iterator[FakeRunner]:
        yield runner

    monkeypatch.setattr(lavatar.cluster.sweep, "run_tune", played)
    monkeypatch.setattr(lavatar.cluster.stages, "StageRunner", opened)
    monkeypatch.setattr("lavatar.platform.sweeping._ray", lambda *a: contextlib.nullcontext())
    monkeypatch.setattr("lavatar.platform.sweeping._nodes", lambda *a: None)
    monkeypatch.setattr("lavatar.platform.sweeping.require_for_trials", lambda *a: None)
    for name in ("jobs", "sweeping"):
        monkeypatch.setattr(f"lavatar.platform.{name}.Tracker", NoTracker)
    no_models(monkeypatch)
    monkeypatch.setattr("lavatar.platform.home.Home.tracking_uri", "none")
    monkeypatch.setattr("lavatar.platform.execution.POLL_SECONDS", 0.01)
    played.runner = runner  # type: ignore[attr-defined]
    return played


@pytest.fixture
def command(lavatar: Callable[..., Any], tmp_path: Path) -> tuple[str, ...]:
    """A sweep of the avatar of ann; bob is there too."""
    for seed, name in enumerate(("ann", "bob")):
        assert lavatar("subjects", "add", "--synthetic", str(seed), name)[0] == 0
    (tmp_path / "space.yaml").write_text(SPACE)
    space = ("--space", str(tmp_path / "space.yaml"))
    return ("sweep", "--avatar", "ann", *space, "--trials", "4", "--steps", "20", "--every", "5")


def toy_sweep(**changes: Any) -> Sweep:
    values: dict[str, Any] = {
        "avatar": "ann", "actor": None, "digests": ("d",), "recipe": "tiny", "overrides": (), "space": {}, "points": (),
        "trials": 2, "scheduler": "pbt", "search": "random", "metric": "lpips", "mode": "min", "length": 20, "every": 5,
    }  # fmt: skip
    return Sweep(**{**values, **changes})


def report(step: int, lpips: float) -> dict[str, float]:
    return {"step": step, "training_seconds": step * 0.1, "lpips": lpips}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home with an MLflow, which takes seconds to make."""
    from lavatar.platform.tracking import connect

    place = Home(tmp_path_factory.mktemp("tracked") / "home").ensure()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        connect(place)
    return place

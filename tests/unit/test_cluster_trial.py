"""One trial in this process, on toy data: measured while it trains, resumed bit for bit, taken over by another."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from inference_files import RECIPE, make_avatar_release, make_subject

from lavatar.cluster.trial import SECONDS, STEP, Trials, run_trial
from lavatar.configs.recipe import Recipe, with_values
from lavatar.configs.sweep import Curve
from lavatar.contracts import StageKind, StageSpec
from lavatar.errors import ConfigError
from lavatar.training import checkpoint as checkpoints

STEPS, EVERY = 6, 2
TOY = with_values(
    RECIPE,
    {
        "avatar_loss.lambda_vgg": 0.0, "avatar_training.steps": STEPS, "ynet_training.steps": STEPS,
        "mapping_training.steps": EVERY, "ynet_training.batch_size": 2, "mapping_training.batch_size": 2,
        "avatar_training.learning_rate": 1e-3, "avatar_training.log_every": 1, "evaluation.max_frames": 4,
    },
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trials")
    for name, seed in (("ann", 1), ("bob", 2)):
        (folder / name).mkdir()
        make_subject(folder / name, seed)
    make_avatar_release(folder / "release", RECIPE.avatar)
    return folder


def trials(data: Path, tmp_path: Path, kind: StageKind = StageKind.AVATAR, recipe: Recipe = TOY) -> Trials:
    inputs = {
        StageKind.AVATAR: {"dataset": data / "ann"},
        StageKind.PAIR: {"avatar_dataset": data / "ann", "actor_dataset": data / "bob", "avatar": data / "release"},
    }[kind]
    spec = StageSpec(kind, "toy", "k", tmp_path, tmp_path / "none", inputs, recipe.model_dump(mode="json"))
    return Trials(spec, EVERY, tmp_path / "work")


class Reports:
    """Keeps figures and states; stops after so many, as Tune does."""

    def __init__(self, folder: Path, stop_after: int = 1000) -> None:
        self.folder, self.stop_after = folder, stop_after
        self.figures: list[dict[str, float]] = []
        self.curve: Curve = []

    def __call__(self, figures: Mapping[str, float], state: Path, curve: Curve) -> None:
        self.figures.append(dict(figures))
        self.curve += curve
        shutil.copytree(state, self.state)
        if len(self.figures) == self.stop_after:
            raise SystemExit

    @property
    def state(self) -> Path:
        return self.folder / f"state{len(self.figures)}"

    def timeless(self) -> list[dict[str, Any]]:
        return [{name: value for name, value in f.items() if name != SECONDS} for f in self.figures]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """An avatar's trial from beginning to end."""
    folder = tmp_path_factory.mktemp("whole")
    reports = Reports(folder)
    run_trial(trials(data, folder), "a", {"avatar_loss.lambda_lr": 0.5}, reports)
    assert not list((folder / "work").glob("a")), "its workplace is left"
    return reports


def test_an_avatar_is_measured_at_every_interval_by_the_names_of_the_evaluation(whole: Reports) -> None:
    assert [f[STEP] for f in whole.figures] == [2, 4, 6]
    for figures in whole.figures:
        assert {"mse", "psnr", "ssim", "face/psnr", "loss/avatar/total", "frames"} <= set(figures)
        assert figures["frames"] == 4
    losses = [(step, {name for name in values if name.startswith("loss/")}) for step, values in whole.curve]
    assert [step for step, names in losses if names] == [1, 3, 5], "and 2, 4, 6 are in the figures"
    assert all({"loss/avatar/total"} <= names <= set(whole.figures[0]) for _, names in losses if names)
    rates = [[value for name, value in values.items() if "/rate/" in name] for _, values in whole.curve]
    assert [step for step, _ in whole.curve] == [1, 2, 3, 4, 5, 6], "each has its learning rates"
    assert all(rates)
    assert max(max(each) for each in rates) == 1e-3
    for name in ("avatar/timing/samples_per_second", "avatar/timing/data_wait_share"):
        assert [step for step, values in whole.curve if values.get(name, -1) >= 0] == [2, 3, 4, 5, 6]
        assert name not in whole.figures[-1], "no scheduler is told how fast it went"
    seconds = [f[SECONDS] for f in whole.figures]
    assert seconds == sorted(seconds)
    assert whole.figures[0]["mse"] != whole.figures[2]["mse"]


def test_a_trial_that_was_stopped_goes_on_bit_for_bit(data: Path, tmp_path: Path, whole: Reports) -> None:
    first, point = Reports(tmp_path / "first", stop_after=2), {"avatar_loss.lambda_lr": 0.5}
    with pytest.raises(SystemExit):
        run_trial(trials(data, tmp_path), "a", point, first)
    rest = Reports(tmp_path / "rest")
    run_trial(trials(data, tmp_path), "a", point, rest, first.folder / "state2")
    assert [*first.timeless(), *rest.timeless()] == whole.timeless()
    assert rest.figures[0][SECONDS] > first.figures[-1][SECONDS]


def test_a_trial_takes_another_over_with_its_weights_and_its_own_values(
    data: Path, tmp_path: Path, whole: Reports
) -> None:
    donor = whole.folder / "state2"
    point = {"avatar_loss.lambda_lr": 0.1, "avatar_training.learning_rate": 1e-9, "avatar.density_hidden": 4}
    reports = Reports(tmp_path / "b", stop_after=1)
    with pytest.raises(SystemExit):
        run_trial(trials(data, tmp_path), "b", point, reports, donor)
    assert reports.figures[0][STEP] == 6
    theirs, own = (
        checkpoints.load(next(folder.glob("avatar/step-*"))) for folder in (donor, reports.folder / "state1")
    )
    same = [name for name, value in own.modules.items() if value.shape == theirs.modules[name].shape]
    assert "avatar.encoder.convs.0.weight" in same or len(same) > 10
    assert all(torch.allclose(own.modules[name], theirs.modules[name], atol=1e-6) for name in same)
    other = [name for name in own.modules if name not in same]
    assert other, "the density MLP has another width"
    assert all(name.startswith("avatar.radiance") for name in other)


def test_a_pair_is_measured_before_its_mapping_is_trained_and_after(data: Path, tmp_path: Path) -> None:
    reports = Reports(tmp_path / "pair")
    run_trial(trials(data, tmp_path, StageKind.PAIR), "p", {"ynet_loss.lambda_ssim": 0.3}, reports)
    assert [f[STEP] for f in reports.figures] == [2, 4, 6, 8]
    for figures in reports.figures:
        assert {"psnr", "face/ssim", "no_face"} <= set(figures), "two synthetic subjects have a truth"
    assert "loss/mapping/total" in reports.figures[-1]
    again = Reports(tmp_path / "again")
    start = reports.folder / "state3"
    run_trial(trials(data, tmp_path, StageKind.PAIR), "p", {"ynet_loss.lambda_ssim": 0.3}, again, start)
    assert again.timeless()[-1] == reports.timeless()[-1]


def test_measuring_changes_no_training(data: Path, tmp_path: Path, whole: Reports) -> None:
    rarely = replace(trials(data, tmp_path), every=STEPS)
    reports = Reports(tmp_path / "r")
    run_trial(rarely, "a", {"avatar_loss.lambda_lr": 0.5}, reports)
    assert reports.timeless()[-1] == whole.timeless()[-1]


def test_values_that_no_recipe_can_have_are_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="power of two"):
        run_trial(trials(data, tmp_path), "x", {"avatar.ray_size": 24}, Reports(tmp_path))

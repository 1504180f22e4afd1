"""What the benchmark makes of measurements, and of its command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lavatar.cluster.plans import Phase, TrainingPlan, Worker
from lavatar.configs.methods import build_methods
from lavatar.configs.recipe import load_recipe
from lavatar.configs.training import TrainingConfig
from lavatar.contracts import VideoSource
from lavatar.errors import DataError
from lavatar.platform.benchmark import Row, read_row, seeded
from lavatar.platform.benchmark_budget import Budget, affordable, phase_seconds, with_steps
from lavatar.platform.benchmark_table import mean_of, tables
from lavatar.platform.planning import Person
from tests.unit.toy_task import ToyTask


def result(method: str, seed: int, psnr: float, truth: bool = True, kind: str = "steps") -> dict[str, Any]:
    image = {"mse": 10 ** (-psnr / 10), "psnr": psnr, "ssim": 0.9, "lpips": 0.1, "face": {"psnr": psnr - 1}}
    expression = {
        "jaw": {"r": 0.8, "amplitude": 1.0, "error": 0.5},
        "gaze": {"r": None, "amplitude": 0.0, "error": 1.0},
    }
    cross: dict[str, Any] = {"expression": expression}
    if truth:
        cross["truth"] = {"psnr": 20.0, "expression": expression}
    own = {**image, "expression": expression}
    return {
        "method": method, "avatar": "a", "actor": "b", "seed": seed,
        "budget": {"kind": kind, "avatar": 40, "pair": 20},
        "training": {"avatar": {"avatar": {"steps": 40, "seconds": 8.0}}},
        "metrics": {"self": own, "mean_frame": own, "nearest_frame": own, "cross": cross},
    }  # fmt: skip


def test_a_row_has_the_mean_and_the_spread_over_seeds() -> None:
    text = tables([result("x", 0, 20.0), result("x", 1, 22.0), result("y", 0, 25.0)])
    (row,) = [line for line in text.splitlines() if line.startswith("| x ")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == "40"
    assert cells[2] == "200"
    assert cells[3] == "8.15 ± 1.85"
    assert cells[4] == "21.00 ± 1.00"
    (single,) = [line for line in text.splitlines() if line.startswith("| y ")]
    assert "25.00 |" in single
    assert "±" not in single


def test_budgets_and_pairs_have_tables_of_their_own_and_the_paper_s_figures_are_marked() -> None:
    text = tables([result("x", 0, 20.0), result("x", 0, 21.0, kind="minutes")])
    assert "equal steps: 40 steps an avatar" in text
    assert "equal time: 40 minutes an avatar" in text
    assert "IMavatar, paper's figure (needs FLAME" in text
    assert "| 21.79 | 0.871 | 0.209 |" in text
    assert text.count("| nearest frame |") == 2


def test_a_face_that_stands_still_counts_as_no_correlation() -> None:
    expression = {
        "jaw": {"r": 0.8, "amplitude": 1.0},
        "gaze": {"r": None, "amplitude": 0.0},
        "x": {"r": None, "amplitude": None},
    }
    assert mean_of(expression, "r") == pytest.approx(0.4)
    assert mean_of(expression, "error") is None


def test_a_row_s_key_depends_on_what_it_is() -> None:
    (method,) = build_methods(["tiny"], ["latentavatar"])
    people = [Person(name, name * 8, VideoSource(name)) for name in "ab"]
    base = Row(method, people[0], people[1], 0, Budget("steps", 10, 5), 4)
    others = [
        Row(method, people[1], people[0], 0, Budget("steps", 10, 5), 4),
        Row(method, people[0], people[1], 1, Budget("steps", 10, 5), 4),
        Row(method, people[0], people[1], 0, Budget("minutes", 10, 5), 4),
        Row(method, people[0], people[1], 0, Budget("steps", 10, 5), 5),
    ]
    assert len({base.key, *(row.key for row in others)}) == 5
    assert base.key == Row(method, people[0], people[1], 0, Budget("steps", 10, 5), 4).key


def test_steps_and_seeds_reach_every_training() -> None:
    recipe = seeded(load_recipe("tiny"), 3, 7)
    assert {recipe.avatar_training.seed, recipe.ynet_training.seed, recipe.mapping_training.seed} == {3}
    assert recipe.evaluation.max_frames == 7
    short = with_steps(with_steps(recipe, "avatar", 50), "ynet", 20)
    assert (short.avatar_training.steps, short.avatar_training.warmup_steps) == (50, 5)
    assert (short.ynet_training.steps, short.mapping_training.steps) == (20, 20)


def test_time_pays_for_the_mapping_behind_the_y_network_too() -> None:
    assert affordable(60, 0.5) == 120
    assert affordable(60, 0.4, 0.1, also=1000) == 120  # as many of the mapping: 48 s and 12 s
    assert affordable(60, 0.5, 0.1, also=50) == 110  # 55 s, and 5 s for its 50
    assert affordable(0.1, 0.5, 0.1, also=50) == 1


def test_each_phase_is_timed_by_its_own_steps() -> None:
    """The second phase gets the first one's task, and computes a hundred times as much."""
    config = TrainingConfig(steps=100, engine="torch", batch_size=4)

    def slow(tasks: Sequence[Any], worker: Worker) -> Any:
        assert [type(task) for task in tasks] == [ToyTask]
        return ToyTask(batch=400_000)

    phases = (Phase("one", config, lambda tasks, worker: ToyTask()), Phase("two", config, slow))
    one, two = phase_seconds(TrainingPlan(phases, lambda folder, tasks: None), Worker())
    assert 0 < one < two


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{")
    with pytest.raises(DataError, match=r"x\.json is damaged"):
        read_row(path)

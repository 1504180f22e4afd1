"""Space files: what they may say, what a mistake is told, and that no text does anything else."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lavatar.configs.recipe import all_keys, load_recipe, with_values
from lavatar.configs.space import KINDS, Domain, Space, load_space, read_space, ready_spaces
from lavatar.configs.sweep import (
    Scheduler,
    Search,
    checked_metric,
    choices,
    known_metrics,
    require_search,
    trial_points,
    trial_recipe,
)
from lavatar.contracts import StageKind
from lavatar.errors import ConfigError
from lavatar.platform.commands import sweep as command
from lavatar.platform.planning import SECTIONS

sys.path.insert(0, str(Path(__file__).parent))
from outside import TEXTS, only_our_errors

TINY = load_recipe("tiny")
AVATAR, PAIR = StageKind.AVATAR, StageKind.PAIR


def read(text: str, kind: StageKind = AVATAR) -> Space:
    return read_space(text, TINY, kind, SECTIONS[kind])


def test_every_form_is_read_and_drawn_within_its_bounds() -> None:
    space = read("""
        avatar_loss.lambda_lr: {loguniform: [0.05, 2]}
        avatar_loss.lambda_mask: {uniform: [0, 1]}
        avatar_learning.feature_weight: {quniform: [1, 8, 0.5]}
        avatar.samples: {randint: [4, 6]}
        avatar.ray_size: {choice: [16, 32]}
        avatar_learning.balance: {grid: [true, false]}
    """)
    points = space.random(300)
    values = {key: {point[key] for point in points} for key in space.domains}
    assert len({str(point) for point in points}) == 300
    assert all(0.05 <= v <= 2 for v in values["avatar_loss.lambda_lr"])
    low = sum(v < 0.316 for v in values["avatar_loss.lambda_lr"])  # the middle of the logarithms
    assert 110 < low < 190
    assert values["avatar_learning.feature_weight"] <= {1 + 0.5 * i for i in range(15)}
    assert len(values["avatar_learning.feature_weight"]) == 15
    assert values["avatar.samples"] == {4, 5, 6}
    assert values["avatar.ray_size"] == {16, 32}
    assert values["avatar_learning.balance"] == {True, False}
    assert space.random(5) == space.random(5)
    for point in points:
        assert with_values(TINY, point).avatar.samples == point["avatar.samples"]
    again = Space({key: Domain(k, tuple(v)) for key, d in space.to_json().items() for k, v in d.items()})
    assert again == space


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no list of keys"),
        ("- 3", "no list of keys"),
        ("avatar.samples: [1", "no YAML"),
        ("avatar.samples: &a {choice: [4]}\navatar.ray_size: *a", "alias"),
        ("!!python/object/apply:os.system ['true']: 3", "no YAML"),
        ("avatar.samples: {choice: [2020-01-01]}", "more than finite numbers"),
        ("avatar_loss.lambda_lr: {uniform: [0, .inf]}", "more than finite numbers"),
        ("avatar.sampels: {randint: [4, 8]}", "Did you mean 'avatar.samples'"),
        ("avatar: {choice: [1]}", "is a section"),
        ("name: {choice: [a]}", "no key"),
        ("3: {choice: [a]}", "is no key"),
        ("avatar.samples: 8", "wanted one of uniform"),
        ("avatar.samples: {randint: [4, 8], choice: [3]}", "wanted one of uniform"),
        ("avatar.samples: {randin: [4, 8]}", "Did you mean 'randint'"),
        ("avatar.samples: {randint: 4}", "wanted a list"),
        ("avatar.samples: {randint: [4]}", "wanted whole numbers"),
        ("avatar.samples: {randint: [4, 8.5]}", "wanted whole numbers"),
        ("avatar.samples: {randint: [8, 4]}", "low < high"),
        ("avatar.samples: {randint: [1, 8]}", "greater than or equal to 2"),
        ("avatar.samples: {uniform: [4, 8]}", "Write randint for whole numbers"),
        ("avatar.samples: {choice: [4, many]}", "valid integer"),
        ("avatar.samples: {choice: []}", "wants 1 to"),
        ("avatar.samples: {choice: [4, 4]}", "no two alike"),
        ("avatar_loss.lambda_lr: {loguniform: [0, 1]}", "0 < low < high"),
        ("avatar_loss.lambda_lr: {uniform: [true, 1]}", "wanted numbers"),
        ("avatar_loss.lambda_lr: {uniform: [-1, 1]}", "greater than or equal to 0"),
        ("avatar_loss.lambda_lr: {quniform: [0, 1]}", "low, high, step"),
        ("avatar_loss.lambda_lr: {quniform: [0, 1, 0]}", "step of 0"),
        ("avatar_loss.lambda_lr: {quniform: [0, 1, 1.0e-20]}", "step of"),
        ("avatar.generator: {choice: [basis, tree]}", "avatar.generator"),
        ("avatar.ray_size: {choice: [32, 48]}", "power of two"),
        ("avatar_training.batch_size: {choice: [4]}\navatar_training.accumulation: {choice: [3]}", "not a multiple"),
        ("preprocess.portrait_size: {choice: [128]}", "one dataset"),
        ("resources.avatar.cpus: {choice: [1]}", "changes no result"),
        ("evaluation.max_frames: {choice: [1]}", "measured alike"),
        ("ynet.code_dim: {choice: [32]}", "does not change the avatar"),
        ("avatar_training.steps: {choice: [10]}", "--steps"),
        ("avatar_training.checkpoint_every: {choice: [10]}", "--every"),
    ],
)
def test_a_mistake_is_named_with_the_way_out(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert words in str(caught.value)
    assert caught.value.hint


def test_what_no_trial_of_a_pair_would_feel_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pair_learning\.warm_steps is not for a sweep"):
        read("pair_learning.warm_steps: {choice: [0.2, 0.5]}", PAIR)


def test_powers_of_ten_are_numbers_although_yaml_takes_them_for_words() -> None:
    space = read(
        "avatar_training.learning_rate: {loguniform: [1e-4, 1e-2]}\navatar_loss.lambda_lr: {choice: [1e-1, 2]}"
    )
    assert [domain.values for domain in space.domains.values()] == [(1e-4, 1e-2), (0.1, 2)]
    with pytest.raises(ConfigError, match="finite"):
        read("avatar_training.learning_rate: {choice: [1e999]}")


def test_a_sweep_of_the_pair_varies_the_pair_alone() -> None:
    assert set(read("ynet.code_dim: {choice: [32, 64]}", PAIR).domains) == {"ynet.code_dim"}
    with pytest.raises(ConfigError, match="Leave --actor out"):
        read("avatar.samples: {choice: [4]}", PAIR)


def test_the_ready_spaces_fit_every_recipe_that_they_are_for() -> None:
    assert ready_spaces() == ["loss_weights", "size_speed"]
    for name in ready_spaces():
        space = load_space(name, TINY, AVATAR, SECTIONS[AVATAR])
        assert len(space.random(40)) == 40
    for name in ("paper", "fast"):
        assert load_space("loss_weights", load_recipe(name), AVATAR, SECTIONS[AVATAR])


def test_a_file_that_is_not_there_names_the_ready_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'loss_weights'"):
        load_space("loss_weight", TINY, AVATAR, SECTIONS[AVATAR])
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_space(str(tmp_path / "a.yaml"), TINY, AVATAR, SECTIONS[AVATAR])


def test_points_of_each_search() -> None:
    lists = read("avatar.samples: {choice: [4, 8]}\navatar.ray_size: {grid: [16, 32, 64]}")
    assert len(trial_points(lists, "grid", None, "asha")) == 6
    assert trial_points(lists, "grid", 9, "asha")[1] == {"avatar.samples": 4, "avatar.ray_size": 32}
    assert trial_points(lists, "optuna", 4, "asha") == []
    assert len({str(p) for p in trial_points(lists, "random", 6, "asha")}) == 6
    smooth = read("avatar_loss.lambda_lr: {uniform: [0, 1]}")
    wrong: tuple[tuple[Space, Search, int | None, Scheduler, str], ...] = (
        (lists, "grid", 5, "asha", "has 6 combinations"),
        (smooth, "grid", None, "asha", "is uniform, not a list"),
        (lists, "random", None, "asha", "--trials is missing"),
        (lists, "random", 7, "asha", "has 6 points"),
        (smooth, "random", 1, "pbt", "needs a population"),
        (smooth, "optuna", 4, "pbt", "makes its own points"),
    )
    for space, search, trials, scheduler, words in wrong:
        with pytest.raises(ConfigError) as caught:
            trial_points(space, search, trials, scheduler)
        assert words in str(caught.value)


def test_values_that_were_multiplied_come_back_inside() -> None:
    assert Domain("uniform", (0, 1)).inside(1.2) == 1.0
    assert Domain("randint", (4, 16)).inside(16 * 1.2) == 16
    assert Domain("randint", (4, 16)).inside(6.4) == 6
    assert Domain("quniform", (0, 10, 4)).inside(9.9) == 8
    assert Domain("quniform", (0, 1, 0.1)).inside(0.26) == 0.3
    assert Domain("choice", (1, 5)).inside(5) == 5


@given(
    st.sampled_from(["uniform", "loguniform", "quniform", "randint"]),
    st.floats(0.001, 1e6),
    st.floats(0.001, 1e6),
    st.floats(0.01, 1),
    st.floats(-1e9, 1e9),
)
def test_a_drawn_or_moved_value_is_always_inside(
    kind: str, low: float, width: float, share: float, other: float
) -> None:
    whole = kind == "randint"
    ends: tuple[Any, ...] = (int(low), int(low) + 1 + int(width)) if whole else (low, low + width)
    domain = Domain(kind, (*ends, width * share) if kind == "quniform" else ends)
    for value in (domain.draw(random.Random(0)), domain.inside(other), *domain.probes()):
        assert ends[0] <= value <= ends[1] * (1 + 1e-9)
        assert not whole or isinstance(value, int)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates() | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
SPACES = st.dictionaries(
    st.sampled_from(sorted(all_keys())) | st.text(max_size=8),
    st.dictionaries(st.sampled_from(KINDS) | st.text(max_size=6), VALUES, max_size=2) | VALUES,
    max_size=3,
)


@given(TEXTS | SPACES.map(yaml.safe_dump))
def test_any_text_as_a_space_is_one_or_is_refused(text: str) -> None:
    with only_our_errors():
        space = read(text)
        for point in space.random(3):
            trial_recipe(TINY, point, AVATAR, 10)


def test_metrics_are_the_evaluations_and_know_which_is_better() -> None:
    assert checked_metric(None, None, AVATAR, False) == ("lpips", "min")
    assert checked_metric(None, None, PAIR, False) == ("expression_error", "min")
    assert checked_metric("psnr", None, AVATAR, False) == ("psnr", "max")
    assert checked_metric("expression/jaw/r", None, PAIR, False) == ("expression/jaw/r", "max")
    assert checked_metric("face/ssim", "min", AVATAR, True) == ("face/ssim", "min")
    assert "psnr" in known_metrics(PAIR, True)
    with pytest.raises(ConfigError, match="no such figure"):
        checked_metric("psnr", None, PAIR, False)
    with pytest.raises(ConfigError, match="Did you mean 'psnr'"):
        checked_metric("psnrr", None, AVATAR, False)


def test_a_trial_is_measured_where_it_is_stored_and_trains_in_its_own_process() -> None:
    recipe = trial_recipe(TINY, {"avatar.samples": 5}, AVATAR, 7)
    training = recipe.avatar_training
    assert (training.checkpoint_every, training.log_every, training.engine) == (7, 7, "torch")
    logged = [trial_recipe(TINY, {}, AVATAR, every).avatar_training.log_every for every in (30, 25, 10, 11)]
    assert logged == [10, 5, 10, 1], "the tenth step at least, and always the one that is measured"
    assert recipe.avatar.samples == 5
    assert recipe.ynet_training == TINY.ynet_training


def test_the_command_offers_what_there_is() -> None:
    assert choices(Scheduler) == list(command.SCHEDULERS)
    assert choices(Search) == list(command.SEARCHES)


def test_optuna_is_asked_for_by_name_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    require_search("random")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lavatar\[optuna\]'"):
        require_search("optuna")

"""Recipes and --set: what is accepted, and what a mistake is told."""

from __future__ import annotations

import re

import pytest

from lavatar.configs.recipe import all_keys, load_recipe, recipe_names
from lavatar.errors import ConfigError


def test_every_shipped_recipe_loads_under_its_own_name() -> None:
    assert set(recipe_names()) == {"tiny", "paper", "official", "fast"}
    for name in recipe_names():
        assert load_recipe(name).name == name


def test_set_changes_one_value_and_reads_yaml() -> None:
    before = load_recipe("paper")
    after = load_recipe("paper", ["avatar.samples=17", "mapping.hidden=[8, 9]"])
    assert (after.avatar.samples, after.mapping.hidden) == (17, (8, 9))
    same = after.model_copy(update={"avatar": before.avatar, "mapping": before.mapping})
    assert same == before


def test_set_reaches_nested_sections() -> None:
    assert load_recipe("tiny", ["resources.avatar.workers=4"]).resources.avatar.workers == 4


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("avatar.sampels=3", "Did you mean 'avatar.samples'?"),
        ("avatr.samples=3", "Did you mean 'avatar.samples'?"),
        ("avatar=3", "is a section"),
        ("avatar.samples", "has no '='"),
        ("avatar.samples.x=3", "is a value"),
        ("avatar.samples=many", "avatar.samples"),
        ("avatar.samples=[1", "not readable"),
        ("name=other", "there is no key"),
    ],
)
def test_a_wrong_override_is_named_with_the_way_out(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("tiny", [override])
    assert words in str(caught.value)
    assert caught.value.hint


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'official'"):
        load_recipe("oficial")


MISFITS = "avatar.face_size=256 ynet.face_size=256 avatar.image_size=1024 preprocess.focal=900 ynet.landmarks=0"


@pytest.mark.parametrize("override", MISFITS.split())
def test_sections_that_do_not_fit_together_are_named(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        load_recipe("tiny", [override])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("avatar_training.batch_size=3", "avatar_training.accumulation=2"), "avatar_training: batch_size 3 is not a"),
        (("resources.avatar.workers=3",), "avatar_training.batch_size 4 is not a multiple of resources.avatar.workers"),
        (("resources.pair.workers=2", "ynet_training.batch_size=9"), "ynet_training.batch_size 9 is not"),
        (("resources.pair.workers=5", "ynet_training.batch_size=5"), "mapping_training.accumulation = 5 × 1"),
        (("resources.pair.workers=4", "mapping_training.accumulation=16"), "mapping_training.batch_size 32 is not"),
        (("ynet.landmarks=50",), "ynet: landmarks is 50. Set it to 90"),
    ],
)
def test_what_a_stage_would_refuse_is_refused_at_once(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_recipe("tiny", overrides)


def test_what_is_wrong_with_a_section_is_told_in_a_line() -> None:
    """Not with all of its values, of which there are hundreds in a recipe."""
    for override in (*MISFITS.split(), "avatar.box=[[1,0],[0,1],[0,1]]", "avatar.ray_size=48"):
        with pytest.raises(ConfigError) as caught:
            load_recipe("tiny", [override])
        assert "alue error" not in caught.value.message
        assert "{" not in caught.value.message
        assert len(caught.value.message) < 160
    with pytest.raises(ConfigError, match=r"avatar\.samples: .*greater than or equal to 2 \(got 1\)"):
        load_recipe("tiny", ["avatar.samples=1"])


def test_the_landmarks_that_a_recipe_may_ask_for_are_those_of_a_shape() -> None:
    from lavatar.configs.pair import SHAPE_DIM
    from lavatar.training import shape

    assert SHAPE_DIM == shape.SHAPE_DIM


def test_a_recipe_is_frozen() -> None:
    recipe = load_recipe("tiny")
    with pytest.raises(ValueError, match="frozen"):
        recipe.avatar.samples = 3  # type: ignore[misc]


def test_all_keys_names_sections_and_leaves_only() -> None:
    keys = set(all_keys())
    assert "avatar.samples" in keys
    assert "resources.avatar.workers" in keys
    assert "avatar" not in keys
    assert "name" not in keys


@pytest.mark.parametrize("more", [(), ("mapping.reads=code",), ("mapping.align=none",)])
def test_a_joint_mapping_that_would_ignore_its_settings_is_refused(more: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"set mapping\.reads to code and mapping\.align to none"):
        load_recipe("tiny", ["mapping.joint=true", *more])

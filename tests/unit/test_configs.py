"""Recipes and --set: what is accepted, and what a mistake is told."""

from __future__ import annotations

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
    assert load_recipe("tiny", ["resources.avatar.workers=3"]).resources.avatar.workers == 3


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

"""Sec. 5.2: the methods that are compared are what their names say, and differ in nothing else."""

from __future__ import annotations

import pytest

from lavatar.configs.baselines import BASELINES
from lavatar.configs.methods import build_methods
from lavatar.configs.recipe import Recipe, load_recipe
from lavatar.errors import ConfigError, UsageError

LENGTH = ("steps", "warmup_steps", "checkpoint_every", "picture_every")


def differences(a: Recipe, b: Recipe) -> set[str]:
    one, two = a.model_dump(mode="json", exclude={"name"}), b.model_dump(mode="json", exclude={"name"})
    return {f"{s}.{k}" for s in one for k in one[s] if one[s][k] != two[s][k]}


def test_at_full_size_each_baseline_changes_only_what_defines_it() -> None:
    methods = {m.name: m for m in build_methods(["paper"], BASELINES)}
    paper = load_recipe("paper")
    assert differences(methods["latentavatar (paper)"].recipe, paper) == set()
    no_cycle = methods["no-cycle (paper)"]
    assert differences(no_cycle.recipe, paper) == {"ynet_loss.image_cycle", "ynet_loss.lambda_code"}
    assert no_cycle.recipe.ynet_loss.lambda_code == (0, 0)
    coefficients = methods["coeff-triplane (paper)"]
    assert differences(coefficients.recipe, paper) == {"avatar.encoder", "avatar.code_dim"}
    assert [m.paired for m in methods.values()] == [True, True, False, False]
    nerface = methods["nerface"].recipe.avatar
    assert (nerface.field, nerface.field_layers, nerface.field_width) == ("mlp", 6, 256)
    assert (nerface.samples, nerface.fine_samples, nerface.position_frequencies, nerface.view_frequencies) == (
        64,
        64,
        10,
        4,
    )
    assert nerface.ray_size == nerface.image_size == 512


def test_a_cpu_s_size_keeps_the_method() -> None:
    (paper,) = build_methods(["paper"], ["latentavatar"], size="cpu")
    full = load_recipe("paper")
    kinds = ("encoder", "generator", "radiance", "superresolution", "sampling", "compositing", "encoder_normalisation")
    assert all(getattr(paper.recipe.avatar, kind) == getattr(full.avatar, kind) for kind in kinds)
    assert (
        paper.recipe.avatar.image_size / paper.recipe.avatar.ray_size == full.avatar.image_size / full.avatar.ray_size
    )
    assert paper.recipe.ynet_loss == full.ynet_loss
    sizes = {
        "avatar": "image_size ray_size samples triplane_size triplane_channels generator_capacity "
        "generator_max_channels encoder_widths density_hidden color_hidden feature_channels superresolution_capacity",
        "avatar_loss": "lambda_vgg",
        "ynet": "face_size encoder_widths neck_width decoder_widths",
    }
    changed = {f"{section}.{key}" for section, keys in sizes.items() for key in keys.split()}
    found = {d for d in differences(paper.recipe, full) if not d.startswith("resources.")}
    assert changed - {"avatar.color_hidden"} <= found <= changed
    (fast,) = build_methods(["fast"], ["latentavatar"], size="cpu")
    assert differences(fast.recipe, load_recipe("tiny")) == set()


def test_fast_is_the_method_of_tiny_at_other_sizes() -> None:
    sizes = {
        "avatar": "density_hidden encoder_widths feature_channels image_size ray_size samples superresolution_capacity "
        "triplane_channels triplane_size",
        "avatar_loss": "lambda_vgg",
        "avatar_learning": "average perceptual_every",
        "ynet": "decoder_widths encoder_widths face_size neck_width",
        "ynet_training": "learning_rate",
        "pair_learning": "error_every",
    }
    named = {f"{section}.{key}" for section, keys in sizes.items() for key in keys.split()}
    named |= {f"{s}_training.precision" for s in ("avatar", "ynet", "mapping")}  # means nothing on the CPUs of `tiny`
    lengths = {f"{s}_training.{key}" for s in ("avatar", "ynet", "mapping") for key in LENGTH}
    found = {d for d in differences(load_recipe("fast"), load_recipe("tiny")) if not d.startswith("resources.")}
    assert named <= found
    assert found <= named | lengths


def test_the_rate_changes_what_was_made_for_long_runs_only() -> None:
    methods = {m.name: m.recipe for m in build_methods(["paper", "fast"], ["latentavatar", "nerface"], rate=10)}
    assert methods["latentavatar (paper)"].avatar_training.learning_rate == pytest.approx(1e-3)
    assert methods["latentavatar (paper)"].ynet_training.learning_rate == pytest.approx(1e-3)
    assert (
        methods["latentavatar (fast)"].avatar_training.learning_rate
        == load_recipe("fast").avatar_training.learning_rate
    )
    assert methods["nerface"].avatar_training.learning_rate == pytest.approx(5e-4)


def test_variants_are_recipes_with_changes() -> None:
    (row,) = build_methods(["paper"], [], ["no balance=tiny:avatar_learning.balance=false;avatar.samples=4"])
    assert row.name == "no balance"
    assert differences(row.recipe, load_recipe("tiny")) == {"avatar_learning.balance", "avatar.samples"}


def test_a_mistake_is_named() -> None:
    with pytest.raises(UsageError, match="no method 'nerfcae'") as error:
        build_methods(["paper"], ["nerfcae"])
    assert "nerface" in error.value.hint
    with pytest.raises(UsageError, match="names no recipe"):
        build_methods(["paper"], [], ["x"])
    with pytest.raises(ConfigError, match="no recipe 'papre'"):
        build_methods(["papre"], ["latentavatar"])

"""Sec. 5.2: the methods that are compared, each as a recipe and what is changed in it, at full size or at a CPU's.

A method's name is the baseline's with the recipe it is built from: `coeff-triplane (paper)` is the paper's NeRF.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lavatar.configs.baselines import BASELINES, PAIRED
from lavatar.configs.recipe import Recipe, load_recipe, nearest
from lavatar.errors import UsageError

_PAPER_ON_CPU = (
    "avatar.image_size=128", "avatar.ray_size=32", "avatar.samples=24", "avatar.triplane_size=64",
    "avatar.triplane_channels=16", "avatar.generator_capacity=12", "avatar.generator_max_channels=64",
    "avatar.encoder_widths=[16, 32, 64, 96]", "avatar.density_hidden=32", "avatar.color_hidden=32",
    "avatar.feature_channels=16", "avatar.superresolution_capacity=8", "avatar_loss.lambda_vgg=0",
    "ynet.face_size=64", "ynet.encoder_widths=[24, 48, 96]", "ynet.neck_width=64", "ynet.decoder_widths=[32, 16]",
)  # fmt: skip
ON_CPU: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "paper": ("paper", _PAPER_ON_CPU),
    "official": ("official", _PAPER_ON_CPU),
    "fast": ("tiny", ()),
    "tiny": ("tiny", ()),
}
"""Recipe at full size → recipe at a CPU's size and what is made smaller: the paper's ratios, fewer of everything, and
no perceptual term (the steps it costs are worth more at this length: docs/RESULTS.md)."""
NERFACE_ON_CPU = (
    "avatar.ray_size=128", "avatar.samples=16", "avatar.fine_samples=16", "avatar.field_width=96",
    "avatar_learning.ray_batch=512",
)  # fmt: skip


@dataclass(frozen=True)
class Method:
    """One row of the comparison."""

    name: str
    recipe: Recipe
    paired: bool


def build_methods(
    recipes: Sequence[str],
    baselines: Iterable[str],
    variants: Sequence[str] = (),
    size: str = "full",
    rate: float = 1.0,
    overrides: tuple[str, ...] = (),
) -> list[Method]:
    """Each baseline on each recipe (NeRFace once: it shares nothing with them), then each variant.

    `variants` are "NAME=RECIPE" or "NAME=RECIPE:key=value;key=value". `rate` multiplies the learning rates of `paper`
    and `official`, which are made for 200,000 steps. `overrides` change every row. Raises UsageError and ConfigError.
    """
    methods: list[Method] = []
    for baseline in baselines:
        if baseline not in BASELINES:
            known = ", ".join(BASELINES)
            raise UsageError(
                f"there is no method {baseline!r}", f"{nearest(baseline, BASELINES)}The methods are: {known}."
            )
        for recipe in recipes[:1] if baseline == "nerface" else recipes:
            name = baseline if baseline == "nerface" else f"{baseline} ({recipe})"
            methods.append(
                Method(name, _recipe(recipe, BASELINES[baseline], size, rate, overrides), baseline in PAIRED)
            )
    for variant in variants:
        name, equals, rest = variant.partition("=")
        recipe, _, changes = rest.partition(":")
        if not equals or not recipe:
            raise UsageError(
                f"--variant {variant!r} names no recipe", "Write --variant 'NAME=RECIPE:key=value;key=value'."
            )
        sets = tuple(text for text in changes.split(";") if text.strip())
        methods.append(Method(name, _recipe(recipe, sets, size, rate, overrides), True))
    return methods


def _recipe(name: str, changes: tuple[str, ...], size: str, rate: float, overrides: tuple[str, ...]) -> Recipe:
    """The recipe at the size asked for; NeRFace's own sizes come last, for its rays are its pixels."""
    base, smaller = ON_CPU[name] if size == "cpu" and name in ON_CPU else (name, ())
    mlp = "avatar.field=mlp" in changes
    own = (NERFACE_ON_CPU if size == "cpu" else ("avatar.ray_size=512",)) if mlp else ()
    recipe = load_recipe(base, (*smaller, *changes, *own, *overrides))
    if rate == 1.0 or base not in ("paper", "official") or mlp:
        return recipe
    sections = ("avatar_training", "ynet_training", "mapping_training")
    faster = {
        s: getattr(recipe, s).model_copy(update={"learning_rate": getattr(recipe, s).learning_rate * rate})
        for s in sections
    }
    return recipe.model_copy(update=faster)

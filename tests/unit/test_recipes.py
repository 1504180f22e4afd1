"""The recipes `paper` and `official` against Sec. 5.1 and against each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lavatar.configs.avatar import AvatarLearningConfig
from lavatar.configs.pair import PairLearningConfig
from lavatar.configs.preprocess import PreprocessConfig
from lavatar.configs.recipe import Recipe, load_recipe
from lavatar.contracts import NullSink, VideoSource
from lavatar.datasets import shards
from lavatar.datasets.loader import FrameStore
from lavatar.datasets.preprocess import preprocess
from lavatar.datasets.solve import split_of
from lavatar.models.avatar import LatentAvatar
from lavatar.models.losses import eq4
from lavatar.models.radiance import RadianceMLP
from lavatar.models.triplane import StyleGANGenerator

SECTION_5_1: dict[str, Any] = {
    "preprocess.portrait_size": 512,  # "all videos are resized to 512×512"
    "preprocess.face_size": 128,  # "all input images of the encoder and the shared encoder ... 128×128"
    "preprocess.held_out_fraction": 0.1,  # "we trim 10% fragment from the begining or the end"
    "avatar.image_size": 512,
    "avatar.face_size": 128,
    "ynet.face_size": 128,
    "avatar.code_dim": 128,  # "the dimensions of the person-specific and shared latent expression code"
    "ynet.code_dim": 256,
    "avatar.triplane_size": 128,  # "the tri-plane features and the low-resolution feature map ... 128×128"
    "avatar.ray_size": 128,
    "avatar.triplane_channels": 32,  # "while their channel number is set as 32"
    "avatar.feature_channels": 32,
    "avatar_training.learning_rate": 1e-4,  # "1×10^-4 for all learnable parameters"
    "ynet_training.learning_rate": 1e-4,
    "mapping_training.learning_rate": 1e-4,
    "avatar.samples": 64,  # "we sample 64 points along each ray"
    "avatar_training.steps": 200_000,  # "200,000 iterations with a batch size of 2"
    "avatar_training.batch_size": 2,
    "ynet_training.steps": 30_000,  # "30,000 iterations with a batch size of 16"
    "ynet_training.batch_size": 16,
    "mapping_training.steps": 30_000,
    "mapping_training.batch_size": 16,
    "avatar_loss.lambda_vgg": 0.1,
    "avatar_loss.lambda_lr": 0.1,
    "avatar_loss.lambda_mask": 0.1,
    "ynet_loss.lambda_ssim": 0.1,
    "ynet_loss.lambda_code": (1e-4, 1e-4),
}

DIFFERENCES: dict[str, tuple[Any, Any]] = {
    # tri-plane
    "avatar.triplane_size": (128, 256),
    # weights λ_lr / λ_vgg / λ_mask
    "avatar_loss.lambda_lr": (0.1, 1.0),
    # mask loss
    "avatar.compositing": ("finite", "opaque_far"),
    # volume
    "avatar.missed_near_far": (None, (3.5, 4.5)),
    "avatar.density_noise": (0.0, 0.01),
    "avatar.sampling": ("stratified", "regular"),
    # colour MLP
    "avatar.radiance": ("joint", "separate"),
    "avatar.density_activation": ("softplus", "relu"),
    "avatar.density_bias": (-1.0, 0.2),
    # encoder
    "avatar.encoder_normalisation": ("deviation", "variance"),
    "avatar.encoder_mapping": ((), (256, 256, 256)),
    "ynet.encoder_normalisation": ("deviation", "variance"),
    # generator
    "avatar.generator_gain": (2**0.5, 1.0),
    # Y-network step
    "ynet_loss.subjects": ("one", "both"),
    "ynet_loss.lambda_image": ((1.0, 1.0), (0.1, 1.0)),
    "ynet_loss.lambda_ssim": (0.1, 1.0),
    "ynet_loss.lambda_code": ((1e-4, 1e-4), (1e-5, 1e-4)),
    "ynet_loss.image_cycle": (True, False),
    "ynet_loss.cross_gradient": (True, False),
    "ynet.shared_neck": (False, True),
    # mapping MLP
    "mapping.joint": (False, True),
    # face crop
    "preprocess.face_mask": ("none", "hull"),
    # augmentation
    "avatar.input_noise": (0.0, 0.05),
    "ynet.input_noise": (0.0, 0.05),
}
"""Rows of the table "paper's text and released code" that are configuration, as (paper, official).

With the keys of BESIDE, of which the table says nothing. Rows without a key here: "head pose" (one camera and
head-space look-up in both), "generator" and "super-resolution" (the published ones in both) and "length" (unbounded
epochs: the paper's iterations in both). BOTH holds their numbers.
"""

BOTH = {
    # official column where the paper's text is silent: the same in both
    "avatar.focal": 5000.0,
    "avatar.box": ((-1.5, 1.5), (-1.8, 1.8), (-1.9, 1.1)),
    "avatar.samples": 64,
    "avatar.density_hidden": 128,
    "avatar.color_hidden": 128,
    "avatar.view_frequencies": 4,
    "avatar.encoder_widths": (32, 64, 128, 256),
    "avatar.generator_capacity": 48,
    "avatar.generator_max_channels": 256,
    "avatar.superresolution": "unet",
    "avatar.superresolution_capacity": 32,
    "mapping.hidden": (256, 256),
    "mapping.lambda_mapping": 1.0,
    "preprocess.focal": 5000.0,
    "preprocess.distance": 4.0,
    "avatar.triplane_channels": 32,
    "avatar.feature_channels": 32,
    "avatar.color_activation": "none",
    "avatar.density_scale": 10.0,
    "avatar_loss.lambda_vgg": 0.1,
    "avatar_loss.lambda_mask": 0.1,
    "avatar_training.steps": 200_000,
    "avatar_training.batch_size": 2,
    "ynet_training.steps": 30_000,
    "ynet_training.batch_size": 16,
}


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, child in value.items():
        if isinstance(child, dict):
            yield from flatten(child, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", child


def flat(name: str) -> dict[str, Any]:
    return dict(flatten(load_recipe(name).model_dump()))


def test_paper_is_section_5_1() -> None:
    paper = flat("paper")
    assert {key: paper[key] for key in SECTION_5_1} == SECTION_5_1


def test_paper_and_official_differ_exactly_where_the_table_says() -> None:
    paper, official = flat("paper"), flat("official")
    differences = {k: (paper[k], official[k]) for k in paper if paper[k] != official[k] and k != "name"}
    assert differences == DIFFERENCES


@pytest.mark.parametrize("recipe", ["paper", "official"])
def test_numbers_of_the_released_code_that_the_text_leaves_open(recipe: str) -> None:
    values = flat(recipe)
    assert {key: values[key] for key in BOTH} == BOTH


@pytest.mark.parametrize("recipe", ["paper", "official"])
def test_the_published_recipes_use_nothing_of_ours(recipe: str) -> None:
    """The sections of what our short trainings do beyond the paper stand at their defaults, which do nothing."""
    chosen = load_recipe(recipe)
    assert chosen.avatar_learning == AvatarLearningConfig()
    assert chosen.pair_learning == PairLearningConfig()
    assert (chosen.avatar.encoder, chosen.avatar.generator, chosen.ynet.encoder) == ("strided", "stylegan", "strided")
    assert (chosen.mapping.align, chosen.mapping.reads, chosen.ynet.landmarks) == ("none", "code", 0)


@pytest.mark.parametrize(
    ("count", "held_out"), [(1000, 100), (101, 10), (36, 4), (27, 3), (15, 2), (5, 1), (2, 1), (1, 0)]
)
def test_the_last_or_first_tenth_in_time_is_held_out(count: int, held_out: int) -> None:
    """Sec. 5.1: "we trim 10% fragment from the begining or the end"; at least one frame, never all of them."""
    last = [split_of(k, count, PreprocessConfig()) for k in range(count)]
    first = [split_of(k, count, PreprocessConfig(held_out="first")) for k in range(count)]
    assert last == ["train"] * (count - held_out) + ["eval"] * held_out
    assert first == ["eval"] * held_out + ["train"] * (count - held_out)


def test_a_quarter_is_held_out_where_the_configuration_says_so() -> None:
    config = PreprocessConfig(held_out_fraction=0.25)
    assert [split_of(k, 8, config) for k in range(8)] == ["train"] * 6 + ["eval"] * 2


def test_defaults_are_the_papers() -> None:
    """A key left out of a recipe is the paper's, not a third variant."""
    default, paper = dict(flatten(Recipe(name="paper").model_dump())), flat("paper")
    sections = ("avatar", "avatar_loss", "ynet", "ynet_loss", "mapping")
    assert {k: v for k, v in default.items() if k.split(".")[0] in sections} == {
        k: v for k, v in paper.items() if k.split(".")[0] in sections
    }


def test_official_begins_alive_whatever_the_seed() -> None:
    """A ReLU density that is negative everywhere at the start would never get a gradient."""
    config = load_recipe("official").avatar
    dead = []
    for seed in range(200):
        torch.manual_seed(seed)
        density, _ = RadianceMLP(config)(torch.zeros(1, 32, 1), torch.zeros(1, 1, 3))  # tri-planes begin near zero
        if density.item() + config.density_bias <= 0:
            dead.append(seed)
    assert dead == []


STAGES = ("avatar", "ynet", "mapping")


TABLE: dict[str, set[str]] = {
    "tri-plane": {"avatar.triplane_size"},
    "weights λ_lr / λ_vgg / λ_mask": {"avatar_loss.lambda_lr"},
    "mask loss": {"avatar.compositing"},
    "head pose": set(),  # the released camera and the look-up in head space are those of both
    "volume": {"avatar.missed_near_far", "avatar.density_noise"},
    "colour MLP": {"avatar.radiance"},
    "encoder": {"avatar.encoder_normalisation", "avatar.encoder_mapping", "ynet.encoder_normalisation"},
    "generator": set(),  # the released one is that of both, but for its gain
    "super-resolution": set(),  # the released U-net is that of both
    "Y-network step": {
        "ynet_loss.subjects", "ynet_loss.lambda_ssim", "ynet_loss.lambda_code", "ynet_loss.image_cycle",
        "ynet_loss.cross_gradient", "ynet.shared_neck",
    },
    "mapping MLP": {"mapping.joint"},
    "face crop": {"preprocess.face_mask"},
    "augmentation": {"avatar.input_noise", "ynet.input_noise"},
    "length": set(),  # unbounded epochs: the paper's iterations stand in for them
}  # fmt: skip
"""Rows of the table "paper's text and released code" and the keys that each one makes differ."""

BESIDE = {
    "avatar.sampling": "the paper says nothing of it: stratified as in NeRF; released: regular",
    "avatar.density_activation": "nothing: EG3D's softplus; released: ReLU",
    "avatar.density_bias": "goes with the activation; the released 0 can leave the ReLU dead",
    "avatar.generator_gain": "nothing: StyleGAN's; released: none",
    "ynet_loss.lambda_image": "Eq. 7 weighs nothing; released: the avatar's reconstruction by 0.1",
}
"""Differences that the table does not name: the paper is silent, and the released code has something of its own."""


def test_each_difference_belongs_to_one_row_of_the_table_or_is_told_beside_it() -> None:
    keys = [*(key for row in TABLE.values() for key in row), *BESIDE]
    assert len(keys) == len(set(keys))
    assert set(keys) == set(DIFFERENCES)


def test_values_in_rows_that_make_no_difference_are_the_released_ones_in_both() -> None:
    for name in ("paper", "official"):
        values = flat(name)
        assert (values["preprocess.focal"], values["preprocess.distance"]) == (5000.0, 4.0)  # head pose
        assert (values["avatar_loss.lambda_vgg"], values["avatar_loss.lambda_mask"]) == (0.1, 0.1)
        lengths = [(values[f"{s}_training.steps"], values[f"{s}_training.batch_size"]) for s in STAGES]
        assert lengths == [(200_000, 2), (30_000, 16), (30_000, 16)]
        schedule = {values[f"{s}_training.{k}"] for s in STAGES for k in ("schedule", "warmup_steps", "gradient_clip")}
        assert schedule == {"constant", 0}


@pytest.mark.parametrize("name", ["paper", "official"])
def test_the_mask_loss_moves_the_avatar_in_paper_and_nothing_in_official(name: str) -> None:
    recipe = load_recipe(name)
    sizes = {
        "image_size": 32, "ray_size": 8, "samples": 6, "face_size": 32, "code_dim": 8, "encoder_widths": (4, 4),
        "triplane_size": 8, "triplane_channels": 4, "generator_capacity": 4, "superresolution_capacity": 2,
        "encoder_mapping": (8,) if recipe.avatar.encoder_mapping else (),
    }  # fmt: skip
    torch.manual_seed(0)
    avatar = LatentAvatar(recipe.avatar.model_copy(update=sizes))
    pose = (torch.diag(torch.tensor([1.0, -1.0, -1.0]))[None], torch.tensor([[0.0, 0.0, 4.0]]), torch.tensor([0.1]))
    image, mask = torch.rand(1, 3, 32, 32), torch.rand(1, 1, 32, 32).round()

    def gradients(lambda_mask: float) -> list[torch.Tensor]:
        config = recipe.avatar_loss.model_copy(update={"lambda_vgg": 0.0, "lambda_mask": lambda_mask})
        drawn = avatar.render(avatar.encode(torch.full((1, 3, 32, 32), 0.3)), *pose)
        return list(torch.autograd.grad(eq4(drawn, image, mask, config)["total"], list(avatar.radiance.parameters())))

    without, heavy = gradients(0.0), gradients(1000.0)
    same = [torch.allclose(a, b, atol=1e-7, rtol=1e-4) for a, b in zip(without, heavy, strict=True)]
    assert all(same) if name == "official" else not all(same)


def test_official_generator_begins_at_the_code_alone() -> None:
    """ "Constant-free start from the code": of a code of zeros nothing is drawn but the first bias."""
    for name in ("paper", "official"):
        config = load_recipe(name).avatar.model_copy(update={"triplane_size": 8, "generator_capacity": 4})
        generator = StyleGANGenerator(config)
        assert not generator.start(torch.zeros(1, 128, 1, 1)).any()
        assert generator.start.weight.shape[2:] == (4, 4)
        assert {n.split(".")[0] for n, _ in generator.named_parameters()} == {"start", "mix", "blocks"}


@pytest.mark.parametrize("held_out", ["last", "first"])
def test_the_preprocessing_holds_out_a_tenth_of_an_odd_number_of_frames(held_out: str, tmp_path: Path) -> None:
    sizes = {"portrait_size": 64, "face_size": 32, "synthetic_frames": 29, "min_frames": 10}
    given = {**load_recipe("paper").preprocess.model_dump(), **sizes, "held_out": held_out}
    config = PreprocessConfig.model_validate(given)
    source = VideoSource("ada", synthetic_seed=1)
    manifest = preprocess(source, config, tmp_path / "d", parallel=map, events=NullSink(), stage="ada")  # type: ignore[arg-type]
    samples = sorted(shards.iterate(tmp_path / "d"), key=lambda sample: sample.meta.time)
    splits = [str(sample.meta.split) for sample in samples]
    assert splits == (["train"] * 26 + ["eval"] * 3 if held_out == "last" else ["eval"] * 3 + ["train"] * 26)
    assert (manifest.train, manifest.eval) == (26, 3)
    assert [len(FrameStore(tmp_path / "d", 32, split)) for split in ("train", "eval")] == [26, 3]

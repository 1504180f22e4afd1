"""Rows train-avatar, train-pair and render: the models against their plain form (lavatar/models/reference.py).

Weights are those of untrained models: they do not matter to the speed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lavatar.configs.recipe import Recipe, load_recipe
from lavatar.configs.training import TrainingConfig
from lavatar.models import reference
from lavatar.models.avatar import LatentAvatar
from lavatar.models.perceptual import LPIPS
from lavatar.platform.speed.measure import Row, Run, Session, operations
from lavatar.training.avatar import AvatarTask
from lavatar.training.batch import to_device
from lavatar.training.engine import TorchEngine
from lavatar.training.optimizer import GroupAdam, build_optimizer
from lavatar.training.tasks import TrainingTask
from lavatar.training.ynet import YNetTask

_HALF = ("avatar.image_size=256", "avatar.ray_size=64")
HALF: Mapping[str, tuple[str, ...]] = {
    "train-avatar": (*_HALF, "avatar.triplane_size=128"),
    "train-avatar paper": (*_HALF, "avatar.triplane_size=64"),
    "train-pair": ("ynet_training.batch_size=4",),
    "render batch 8": (*_HALF, "avatar.triplane_size=128"),
}
"""What is changed in the recipe of a row unless full shapes are wanted: sides halved, batches quartered."""
RENDERED = 8


def train_avatar(session: Session) -> list[Row]:
    """A step at batch 2: Eq. 4 with its perceptual term, gradients, Adam; batches are ready."""
    return [_train_avatar(session, *each) for each in (("train-avatar", "official"), ("train-avatar paper", "paper"))]


def _train_avatar(session: Session, row_name: str, recipe_name: str) -> Row:
    recipe = shaped(session, row_name, recipe_name)
    row = Row(row_name, f"a step of `{recipe_name}`, batch 2, {sizes(recipe)}{precision(session)}")
    perceptual = vgg(session.device)
    task = AvatarTask(recipe, session.material.store(recipe.avatar.image_size), perceptual=perceptual)
    twin = copy.copy(task)
    twin.module, twin.perceptual = reference.plain(task.module), reference.plain(perceptual)
    return trained(session, row, (task, twin), recipe.avatar_training)


def train_pair(session: Session) -> list[Row]:
    """A step: Eq. 5-7 of both subjects with the joint mapping, gradients, Adam; batches are ready."""
    recipe = shaped(session, "train-pair", "official")
    stores = {subject: session.material.store(64, i) for i, subject in enumerate(("avatar", "actor"))}
    batch = recipe.ynet_training.batch_size
    what = f"a step of `official`, batch {batch}, faces {recipe.ynet.face_size}²{precision(session)}"
    task = YNetTask(recipe, stores, LatentAvatar(recipe.avatar).eval().requires_grad_(False))
    twin = copy.copy(task)
    twin.module = reference.plain(task.module)
    return [trained(session, Row("train-pair", what), (task, twin), recipe.ynet_training)]


def render(session: Session) -> list[Row]:
    """`official`, a portrait alone at 512² and, at half the shapes on a CPU, of a batch of 8."""
    whole, batch = (shaped(session, name, "official") for name in ("render", "render batch 8"))
    alone = Row("render", f"a portrait of `official`, batch 1, {sizes(whole)}{precision(session)}")
    many = Row("render batch 8", f"a portrait of `official`, batch 8, {sizes(batch)}{precision(session)}")
    return [_render(session, alone, whole, 1), _render(session, many, batch, RENDERED)]


def _render(session: Session, row: Row, recipe: Recipe, count: int) -> Row:
    torch.manual_seed(0)
    avatar = LatentAvatar(recipe.avatar).eval().requires_grad_(False).to(session.device)
    theta, pose = torch.randn(count, recipe.avatar.code_dim, device=session.device), frontal(count, session.device)
    own, plain = (drawing(model, theta, pose) for model in (avatar, reference.plain(avatar)))
    return session.row(row, quick(session, own), plain, units=count, work=operations(plain))


def drawing(avatar: LatentAvatar, theta: Tensor, pose: tuple[Tensor, Tensor, Tensor]) -> Run:
    """Draws the portraits of the codes."""

    @torch.inference_mode()
    def draw() -> None:
        avatar.render(theta, *pose)

    return draw


def quick(session: Session, run: Run) -> Run:
    """The run in the precision that lavatar draws in where speed counts: bf16 on a GPU."""
    if session.device.type != "cuda":
        return run

    def with_bf16() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            run()

    return with_bf16


def trained(session: Session, row: Row, tasks: tuple[TrainingTask, TrainingTask], config: TrainingConfig) -> Row:
    """One step of the task against one of its plain twin, each with an optimizer of its own."""
    fast = config.model_copy(update={"precision": "bf16"}) if session.device.type == "cuda" else config
    own = stepping(session, tasks[0], fast, lambda task: build_optimizer(task.param_groups(), task.module, fast))
    plain = stepping(session, tasks[1], config, lambda task: GroupAdam(task.param_groups(), fused=False))
    return session.row(row, own, plain, work=operations(plain))


def stepping(
    session: Session, task: TrainingTask, config: TrainingConfig, optimizer: Callable[[Any], GroupAdam]
) -> Run:
    """Takes the first step of the task again and again."""
    engine = TorchEngine(task.module, optimizer(task), config, session.device)
    engine.module.train()
    batch = to_device(task.batches(0), session.device)

    def step() -> None:
        engine.optimizer.activate(task.active_groups(0))
        engine.step(lambda part: task.losses(batch, 0))

    return step


def shaped(session: Session, row_name: str, recipe_name: str) -> Recipe:
    """The recipe at the shapes of the row."""
    return load_recipe(recipe_name, () if session.full else HALF.get(row_name, ()))


def sizes(recipe: Recipe) -> str:
    """The shapes, for people."""
    avatar = recipe.avatar
    return f"{avatar.image_size}², rays {avatar.ray_size}² × {avatar.samples}, tri-planes {avatar.triplane_size}²"


def precision(session: Session) -> str:
    """What the seconds of a GPU depend on beside the shapes."""
    return ", bf16" if session.device.type == "cuda" else ""


def frontal(count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Poses of heads that look into the camera."""
    rotation = torch.diag(torch.tensor([1.0, -1.0, -1.0], device=device)).expand(count, 3, 3)
    translation = torch.tensor([0.0, 0.0, 4.0], device=device).expand(count, 3)
    return rotation, translation, torch.full((count,), 0.1, device=device)


def vgg(device: torch.device) -> LPIPS:
    """VGG(·) of Eq. 4 with weights drawn at random."""
    layers = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256),
              17: (256, 512), **dict.fromkeys((19, 21, 24, 26, 28), (512, 512))}  # fmt: skip
    generator, state = torch.Generator().manual_seed(0), dict[str, Tensor]()
    for layer, (before, after) in layers.items():
        weight = torch.randn(after, before, 3, 3, generator=generator)
        state[f"features.{layer}.weight"] = weight * (2 / (9 * before)) ** 0.5
        state[f"features.{layer}.bias"] = torch.zeros(after)
    for level, width in enumerate((64, 128, 256, 512, 512)):
        state[f"lin{level}.weight"] = torch.full((1, width, 1, 1), 1 / width)
    network: nn.Module = LPIPS(state, "vgg").to(device)
    assert isinstance(network, LPIPS)
    return network

"""Ten optimizer steps of each model, tiny-sized, in the paper's and the released form, against recorded losses.

They catch a change of an equation, an initialisation or an order of random draws that no closed form notices.
After an intended change: `LAVATAR_GOLDEN=write python -m pytest tests/golden`, look at the difference, commit it.
Recorded on Linux x86-64 on the CPU with one thread; other CPUs agree to the tolerance.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lavatar.configs.avatar import AvatarConfig
from lavatar.configs.recipe import Recipe, load_recipe
from lavatar.models.avatar import LatentAvatar
from lavatar.models.losses import eq4, eq5, eq6, eq7, eq8
from lavatar.models.mapping import MappingMLP
from lavatar.models.ynet import SUBJECTS, Subject, YNetwork

RECORD = Path(__file__).with_name("losses.json")
STEPS, RATE, TOLERANCE = 10, 1e-3, 2e-3

AVATAR = {
    "image_size": 64, "ray_size": 16, "samples": 12, "face_size": 32, "code_dim": 16, "encoder_widths": (8, 16),
    "triplane_size": 16, "triplane_channels": 6, "generator_capacity": 9, "generator_max_channels": 24,
    "density_hidden": 16, "color_hidden": 16, "feature_channels": 8, "superresolution_capacity": 4,
}  # fmt: skip
YNET = {"face_size": 32, "code_dim": 24, "encoder_widths": (8, 16), "neck_width": 16, "decoder_widths": (16, 8)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(recipe: Recipe) -> Recipe:
    """The recipe's variants at sizes that run in a second."""
    mapping = (20, 20) if recipe.avatar.encoder_mapping else ()
    avatar = recipe.avatar.model_copy(update={**AVATAR, "encoder_mapping": mapping})
    sections = {"avatar": avatar, "ynet": recipe.ynet.model_copy(update=YNET)}
    return recipe.model_copy(update=sections)


def steps(parameters: list[nn.Parameter], loss: Callable[[int], Tensor]) -> list[float]:
    optimizer, values = torch.optim.Adam(parameters, lr=RATE), []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = loss(step)
        total.backward()
        optimizer.step()
        values.append(total.item())
    return values


def smooth(*shape: int) -> Tensor:
    return nn.functional.interpolate(torch.rand(shape[0], shape[1], 4, 4), size=shape[2:], mode="bicubic").clamp(0, 1)


def pose(config: AvatarConfig) -> tuple[Tensor, Tensor, Tensor]:
    angle = torch.tensor([-0.2, 0.3])
    turn = torch.zeros(2, 3, 3)
    turn[:, 0, 0] = turn[:, 2, 2] = angle.cos()
    turn[:, 0, 2], turn[:, 2, 0], turn[:, 1, 1] = angle.sin(), -angle.sin(), 1
    return (
        torch.diag(torch.tensor([1.0, -1.0, -1.0])) @ turn,
        torch.tensor([[0.0, 0, 4], [0.02, 0.01, 4.1]]),
        (torch.tensor([0.1, 0.11])),
    )


def avatar_losses(recipe: Recipe) -> list[float]:
    """Eq. 4 without its perceptual term, with the noise of training."""
    avatar, config = LatentAvatar(recipe.avatar), recipe.avatar_loss.model_copy(update={"lambda_vgg": 0.0})
    face, image, mask = smooth(2, 3, 32, 32), smooth(2, 3, 64, 64), smooth(2, 1, 64, 64)
    noise = torch.Generator().manual_seed(1)

    def loss(_step: int) -> Tensor:
        drawn = avatar.render(avatar.encode(face), *pose(recipe.avatar), noise=noise)
        return eq4(drawn, image, mask, config)["total"]

    return steps(list(avatar.parameters()), loss)


def subject_loss(ynet: YNetwork, recipe: Recipe, subject: Subject, face: Tensor) -> Tensor:
    """Eq. 7 of one subject."""
    config, index = recipe.ynet_loss, SUBJECTS.index(subject)
    gamma = ynet.encode(face)
    rec = eq5(ynet.decode(gamma, subject), face, config)
    with torch.set_grad_enabled(config.cross_gradient):
        crossed = ynet.decode(gamma, SUBJECTS[1 - index])
    gamma_star = ynet.encode(crossed)
    cycled = ynet.decode(gamma_star, subject) if config.image_cycle else None
    cycle = eq6(cycled, face, gamma_star, gamma, config, config.lambda_code[index])
    return eq7(rec, cycle, config.lambda_image[index])["total"]


def ynet_losses(recipe: Recipe) -> list[float]:
    """Eq. 5-7: the subjects in turn, or both in one step."""
    ynet, faces = YNetwork(recipe.ynet), {s: smooth(3, 3, 32, 32) for s in SUBJECTS}

    def loss(step: int) -> Tensor:
        chosen = SUBJECTS if recipe.ynet_loss.subjects == "both" else (SUBJECTS[step % 2],)
        return torch.stack([subject_loss(ynet, recipe, s, faces[s]) for s in chosen]).sum()

    return steps(list(ynet.parameters()), loss)


def mapping_losses(recipe: Recipe) -> list[float]:
    """Eq. 8, both encoders frozen."""
    avatar, ynet = LatentAvatar(recipe.avatar), YNetwork(recipe.ynet)
    mapping = MappingMLP(recipe.mapping, recipe.ynet.code_dim, recipe.avatar.code_dim)
    face = smooth(4, 3, 32, 32)
    with torch.no_grad():
        gamma, theta = ynet.encode(face), avatar.encode(face)
    return steps(list(mapping.parameters()), lambda _step: eq8(mapping(gamma), theta)["total"])


@pytest.mark.parametrize("name", ["paper", "official"])
@pytest.mark.parametrize("model", ["avatar", "ynet", "mapping"])
def test_losses_are_as_recorded(name: str, model: str) -> None:
    torch.manual_seed(0)
    run = {"avatar": avatar_losses, "ynet": ynet_losses, "mapping": mapping_losses}[model]
    losses = run(tiny(load_recipe(name)))
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if os.environ.get("LAVATAR_GOLDEN") == "write":
        record[f"{name}.{model}"] = [float(f"{v:.7g}") for v in losses]
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        pytest.skip(f"wrote {RECORD.name}")
    assert losses == pytest.approx(record[f"{name}.{model}"], rel=TOLERANCE)
    assert min(losses[-3:]) < losses[0]

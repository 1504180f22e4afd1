"""The faster ways of computing against the plain reference, whole model by whole model: values and every gradient."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from lavatar.configs.recipe import load_recipe
from lavatar.models import reference
from lavatar.models.avatar import LatentAvatar
from lavatar.models.ssim import ssim

SMALL = {
    "image_size": 32, "ray_size": 16, "samples": 8, "face_size": 32, "code_dim": 12, "encoder_widths": (4, 8),
    "triplane_size": 16, "triplane_channels": 4, "generator_capacity": 6, "generator_max_channels": 16,
    "density_hidden": 12, "color_hidden": 12, "feature_channels": 6, "superresolution_capacity": 4, "basis_count": 5,
}  # fmt: skip


def gradients(module: nn.Module, loss: Tensor) -> Mapping[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def head() -> tuple[Tensor, Tensor, Tensor]:
    """Two head poses, one of them so far to a side that rays miss the box."""
    turned = torch.linalg.matrix_exp(torch.tensor([[0.0, 0.0, 0.3], [0.0, 0.0, 0.1], [-0.3, -0.1, 0.0]]).double())
    rotation = torch.diag(torch.tensor([1.0, -1.0, -1.0])).double().repeat(2, 1, 1)
    rotation[1] = turned @ rotation[1]
    return rotation, torch.tensor([[0.0, 0.0, 4.0], [0.1, 0.02, 4.1]]).double(), torch.tensor([0.1, 0.095]).double()


@pytest.mark.parametrize("recipe", ["paper", "official", "fast"])
def test_the_avatar_equals_its_plain_form(recipe: str) -> None:
    """In double precision, so that what a layer of normalisation cancels is told from a wrong gradient."""
    torch.manual_seed(0)
    deep = {"encoder_mapping": (12, 12)} if recipe == "official" else {}
    avatar = LatentAvatar(load_recipe(recipe).avatar.model_copy(update={**SMALL, **deep})).double()
    for parameter in avatar.parameters():  # the super-resolution of `fast` begins at zero
        parameter.data += 0.02 * torch.randn_like(parameter)
    plain = reference.plain(avatar)
    assert type(plain) is not type(avatar)
    assert not any(type(part) in reference.PLAIN for part in plain.modules())
    face, weights = (torch.rand(2, 3, 32, 32, dtype=torch.float64) for _ in range(2))
    losses, drawn = [], []
    for model in (avatar, plain):
        noise = torch.Generator().manual_seed(1)
        drawn.append(model.render(model.encode(face), *head(), noise=noise))
        losses.append((drawn[-1].I_hr * weights).sum() + drawn[-1].M.sum() + drawn[-1].I_F.sum())
    for ours, theirs in zip(*drawn, strict=True):
        torch.testing.assert_close(ours, theirs)
    found, wanted = gradients(avatar, losses[0]), gradients(plain, losses[1])
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    assert sum(float(gradient.abs().sum()) > 1e-6 for gradient in wanted.values()) > len(wanted) / 2
    with torch.no_grad():
        quick, slow = (model.eval().render(model.encode(face), *head()).I_hr for model in (avatar, plain))
    torch.testing.assert_close(quick, slow)


def test_similarity_by_products_equals_that_by_a_convolution() -> None:
    a, b = torch.rand(2, 3, 40, 33), torch.rand(2, 3, 40, 33)
    torch.testing.assert_close(ssim(a, b), reference.ssim(a, b), atol=1e-5, rtol=1e-4)

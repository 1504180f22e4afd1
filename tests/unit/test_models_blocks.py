"""Volume rendering on a CPU (models/blocks.py, triplane_cpu.py) against its plain form: values and every gradient."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lavatar.configs.avatar import AvatarConfig
from lavatar.configs.recipe import load_recipe
from lavatar.models import blocks, reference
from lavatar.models.avatar import LatentAvatar
from lavatar.models.rendering import Rays, View, camera_rays
from lavatar.models.triplane_cpu import sample_rows

SMALL = {
    "image_size": 32, "ray_size": 8, "samples": 6, "face_size": 32, "code_dim": 8, "encoder_widths": (4, 8),
    "encoder_mapping": (), "triplane_size": 8, "triplane_channels": 5, "generator_capacity": 4,
    "generator_max_channels": 8, "density_hidden": 12, "color_hidden": 10, "feature_channels": 6,
    "superresolution_capacity": 2, "basis_count": 3,
}  # fmt: skip
KINDS = {
    "paper": ("paper", {}),
    "official": ("official", {"density_noise": 0.3}),
    "fast": ("fast", {}),
    "joint over an opaque far sample, regular": ("paper", {"compositing": "opaque_far", "sampling": "regular"}),
    "separate, finite, from no side": ("official", {"compositing": "finite", "view_frequencies": 0}),
    "rays that miss are sampled": ("paper", {"missed_near_far": (3.5, 4.5), "density_noise": 0.2}),
}


def small(kind: str) -> AvatarConfig:
    recipe, changes = KINDS[kind]
    return load_recipe(recipe).avatar.model_copy(update={**SMALL, **changes})


def pair_of(config: AvatarConfig, dtype: torch.dtype = torch.float64) -> tuple[LatentAvatar, LatentAvatar]:
    """An avatar and its plain twin, both with densities neither empty nor opaque."""
    torch.manual_seed(0)
    avatar = LatentAvatar(config).to(dtype)
    for parameter in avatar.radiance.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return avatar, reference.plain(avatar)


def leaves(config: AvatarConfig, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Planes, and ray origins and directions of two heads, one so far to a side that some of its rays miss the box."""
    size, channels = config.triplane_size, config.triplane_channels
    planes = torch.randn(2, 3, channels, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    turned = torch.linalg.matrix_exp(torch.tensor([[0.0, 0.0, 0.3], [0.0, 0.0, 0.1], [-0.3, -0.1, 0.0]]).double())
    rotation = torch.diag(torch.tensor([1.0, -1.0, -1.0])).double().repeat(2, 1, 1)
    rotation[1] = turned @ rotation[1]
    pose = rotation, torch.tensor([[0.0, 0.0, 4.0], [0.1, 0.02, 4.1]]).double(), torch.tensor([0.1, 0.095]).double()
    rays = camera_rays(View(config.ray_size, config.ray_size), config.focal / 512, *pose)
    return planes.to(dtype), rays.origin_B13.to(dtype), rays.direction_BR3.to(dtype)


def drawn(model: LatentAvatar, planes: Tensor, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    return model.volume(planes, Rays(origin, direction), torch.Generator().manual_seed(1))


def loss_of(feature_BOR: Tensor, mask_BR: Tensor) -> Tensor:
    """No two numbers of the result count alike."""
    generator = torch.Generator().manual_seed(3)
    parts = ((x, torch.randn(x.shape, generator=generator, dtype=torch.float64)) for x in (feature_BOR, mask_BR))
    return torch.stack([(x.double() * weight).sum() for x, weight in parts]).sum()


@pytest.fixture
def few_rays_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "POINTS", 5 * SMALL["samples"])  # type: ignore[operator]  # 64 rays: 13 blocks


@pytest.mark.usefixtures("few_rays_a_block")
@pytest.mark.parametrize("posed", [False, True], ids=["", "pose has a gradient"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_all_gradients(kind: str, posed: bool) -> None:
    """Of planes and MLP, and where the pose is trained of origins and directions too."""
    config = small(kind)
    models, results, gradients = pair_of(config), [], []
    for model in models:
        inputs = [leaf.requires_grad_(i == 0 or posed) for i, leaf in enumerate(leaves(config))]
        found = drawn(model, *inputs)
        sought = [*(leaf for leaf in inputs if leaf.requires_grad), *model.radiance.parameters()]
        results.append(found)
        gradients.append(torch.autograd.grad(loss_of(*found), sought))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-10)
    assert all(gradient.abs().max() > 1e-4 for gradient in gradients[1])
    if config.compositing == "finite":
        assert 0.02 < results[1][1].mean().item() < 0.998, "neither empty nor opaque, so that the comparison sees all"


@pytest.mark.usefixtures("few_rays_a_block")
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_gradient_the_picture_is_the_same(kind: str) -> None:
    config = small(kind)
    models = pair_of(config)
    with torch.no_grad():
        results = [drawn(model, *leaves(config)) for model in models]
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-11)
    assert not results[0][0].requires_grad


@pytest.mark.parametrize("kind", ["paper", "official"])
def test_frozen_planes_or_a_frozen_mlp_leave_the_others_gradient(kind: str) -> None:
    config = small(kind)
    for frozen in ("planes", "mlp"):
        gradients = []
        for model in pair_of(config):
            planes, *rays = leaves(config)
            model.radiance.requires_grad_(frozen != "mlp")
            planes.requires_grad_(frozen != "planes")
            loss_of(*drawn(model, planes, *rays)).backward()
            gradients.append([planes.grad, *(p.grad for p in model.radiance.parameters())])
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)
        count = len(list(model.radiance.parameters()))
        assert sum(gradient is None for gradient in gradients[0]) == (1 if frozen == "planes" else count)


def test_a_head_beside_the_picture_is_white_and_has_no_gradient() -> None:
    config = small("paper")
    avatar, _ = pair_of(config)
    planes, origin, direction = leaves(config)
    aside = origin + torch.tensor([40.0, 0.0, 0.0], dtype=origin.dtype)
    feature, mask = drawn(avatar, planes.requires_grad_(), aside, direction)
    assert feature.eq(1).all()
    assert mask.eq(0).all()
    assert not feature.requires_grad


@pytest.mark.parametrize("kind", ["paper", "official"])
def test_in_bf16_it_is_as_near_to_the_plain_form_as_that_is_in_bf16(kind: str) -> None:
    """Weights and gradients stay fp32, and geometry is exact: what differs is the rounding of the products."""
    config = small(kind)
    results, gradients = [], []
    avatar, plain_form = pair_of(config, torch.float32)
    for model, bf16 in ((avatar, True), (plain_form, True), (plain_form, False)):
        planes, *rays = leaves(config, torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            found = drawn(model, planes.requires_grad_(), *rays)
        results.append(torch.cat([part.double().flatten() for part in found]))
        sought = [planes, *model.radiance.parameters()]
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(*found), sought)]))
        assert gradients[-1].dtype == torch.float32
    for ours, plain, exact in (results, gradients):
        assert (ours - exact).norm() < 1.5 * (plain - exact).norm() + 1e-6 * exact.norm()
        assert (ours - exact).norm() > 1e-5 * exact.norm(), "it does compute in bf16"


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("kind", ["official", "fast"])
def test_gradients_are_repeatable_to_the_bit_on_two_threads(kind: str) -> None:
    """Many points fall into one texel: were they added as threads come by, sums would differ from run to run."""
    sizes = {"ray_size": 24, "image_size": 48, "samples": 16, "triplane_channels": 16, "density_hidden": 32}
    config = small(kind).model_copy(update=sizes)
    avatar, _ = pair_of(config, torch.float32)
    runs = []
    for _ in range(3):
        planes, *rays = leaves(config, torch.float32)
        found = drawn(avatar, planes.requires_grad_(), *rays)
        runs.append([*found, *torch.autograd.grad(loss_of(*found), [planes, *avatar.radiance.parameters()])])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_points_on_texels_on_the_border_and_outside() -> None:
    """Each coordinate takes each of these, with each of the others."""
    size = 5
    step = 2 / (size - 1)  # from texel to texel
    inside = [-1.0, -0.5, -0.3, 0.0, 0.99, 1.0]
    outside = [-1 - 1e-9, 1 + 1e-9, -1 - step / 2, 1 + step / 2, -1 - step, 1 + step, 1 + 1.5 * step, -7.0, 1e6, -1e6]
    values = torch.tensor(inside + outside, dtype=torch.float64)
    points = torch.cartesian_prod(values, values, values)
    generator = torch.Generator().manual_seed(0)
    planes = torch.randn(3, 4, size, size, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(len(points), 4, generator=generator, dtype=torch.float64)
    found, wanted = sample_rows(planes, points), reference.sample_triplane(planes[None], points[None])[0].mT
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad((rows * weights).sum(), planes)[0] for rows in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    far = points.abs().min(dim=1).values > 1 + step
    assert found[far].eq(0).all()
    assert int(far.sum()) > 0


def test_rows_of_planes_gradcheck() -> None:
    generator = torch.Generator().manual_seed(1)
    planes = torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    points = torch.rand(9, 3, generator=generator, dtype=torch.float64) * 2.6 - 1.3
    assert torch.autograd.gradcheck(lambda planes: sample_rows(planes, points), (planes,))


class Volume(nn.Module):
    """Planes, MLP and volume rendering as one module with a forward, as DistributedDataParallel wants it."""

    def __init__(self, avatar: LatentAvatar, planes: Tensor) -> None:
        super().__init__()
        self.avatar, self.planes = avatar, nn.Parameter(planes)
        avatar.requires_grad_(False)
        avatar.radiance.requires_grad_(True)

    def forward(self, origin: Tensor, direction: Tensor) -> Tensor:
        return loss_of(*drawn(self.avatar, self.planes, origin, direction))


@pytest.mark.usefixtures("few_rays_a_block")
def test_a_gradient_is_handed_on_once_a_step_whole(tmp_path: Path) -> None:
    """However many blocks there are, what engines hang on a parameter's gradient (DeepSpeed, DDP) runs once, when the
    sum is there; DDP's reducer finds every parameter."""
    config = small("official")
    avatar, plain = pair_of(config)
    planes, *rays = leaves(config)
    own, other = Volume(avatar, planes), Volume(plain, planes.clone())
    other(*rays).backward()
    wanted = {name: p.grad for name, p in other.named_parameters() if p.requires_grad}
    seen: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for name, parameter in own.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: seen[name].append(p.grad.clone())  # type: ignore[misc, union-attr]
            )
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        DistributedDataParallel(own)(*rays).backward()
    finally:
        dist.destroy_process_group()
    assert all(len(gradients) == 1 for gradients in seen.values())
    for name, parameter in own.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(seen[name][0], wanted[name], rtol=1e-9, atol=1e-10)

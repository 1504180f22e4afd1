"""The latent head NeRF as a whole: sizes of the published models, encoder, super-resolution, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lavatar.configs.avatar import AvatarConfig
from lavatar.configs.recipe import load_recipe
from lavatar.models import avatar as avatar_module
from lavatar.models.avatar import LatentAvatar, Rendering
from lavatar.models.encoder import StridedEncoder, normalise_code
from lavatar.models.superresolution import ResidualUpsampler, UNet, enlarge

SMALL = {
    "image_size": 128, "ray_size": 32, "samples": 16, "triplane_size": 64, "triplane_channels": 8,
    "generator_capacity": 12, "generator_max_channels": 32, "superresolution_capacity": 4,
}  # fmt: skip


def pose(batch: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    rotation = torch.diag(torch.tensor([1.0, -1.0, -1.0], device=device)).expand(batch, 3, 3)
    translation = torch.tensor([0.0, 0.0, 4.0], device=device).expand(batch, 3)
    return rotation, translation, torch.full((batch,), 0.1, device=device)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("recipe", ["paper", "official"])
def test_shapes_at_full_size(recipe: str) -> None:
    """Sec. 5.1: face 128², θ 128, I_lr and I_F 128² with 32 channels, I_hr 512². Built and run without memory."""
    config = load_recipe(recipe).avatar
    with torch.device("meta"):
        avatar = LatentAvatar(config)
        theta = avatar.encode(torch.empty(2, 3, 128, 128))
        drawn = avatar.render(theta, *pose(2, "meta"))
    assert theta.shape == (2, 128)
    assert drawn.I_hr.shape == (2, 3, 512, 512)
    assert drawn.I_lr.shape == (2, 3, 128, 128)
    assert drawn.I_F.shape == (2, 32, 128, 128)
    assert drawn.M.shape == (2, 1, 128, 128)
    code = 256 if recipe == "official" else 128
    assert avatar.encoder.code.linear.weight.shape == (code, 256 * 8 * 8)
    hidden = [layer.weight.shape for layer in avatar.encoder.mapping if hasattr(layer, "weight")] if code == 256 else []
    assert hidden == ([(256, 256), (256, 256), (128, 256)] if code == 256 else [])


@pytest.mark.parametrize("recipe", ["paper", "official"])
@pytest.mark.parametrize("superresolution", ["unet", "residual"])
def test_small_sizes_draw_and_learn(recipe: str, superresolution: str) -> None:
    torch.manual_seed(0)
    changes = {**SMALL, "superresolution": superresolution}
    avatar = LatentAvatar(load_recipe(recipe).avatar.model_copy(update=changes))
    drawn = avatar.render(avatar.encode(torch.rand(2, 3, 128, 128)), *pose(2), noise=True)
    assert isinstance(drawn, Rendering)
    assert drawn.I_hr.shape == (2, 3, 128, 128)
    assert torch.equal(drawn.I_lr, drawn.I_F[:, :3])
    (drawn.I_hr.square().mean() + drawn.I_F.square().mean()).backward()
    untouched = [n for n, p in avatar.named_parameters() if p.grad is None]
    assert untouched == []
    for part in (avatar.encoder, avatar.generator, avatar.radiance):
        assert sum(p.grad.abs().sum() for p in part.parameters()) > 0


def test_expression_reaches_the_picture_only_through_the_code() -> None:
    torch.manual_seed(0)
    avatar = LatentAvatar(AvatarConfig(**SMALL)).eval()
    theta = torch.randn(1, 128)
    first, again = (avatar.render(theta, *pose(1)).I_hr for _ in range(2))
    assert torch.equal(first, again)  # no noise unless asked
    assert not torch.allclose(first, avatar.render(-theta, *pose(1)).I_hr)


def test_noise_is_reproducible_from_a_generator() -> None:
    avatar, theta = LatentAvatar(AvatarConfig(**SMALL)), torch.randn(1, 128)
    draws = [avatar.render(theta, *pose(1), noise=torch.Generator().manual_seed(s)).I_F for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_gradient_reaches_the_head_pose() -> None:
    torch.manual_seed(0)
    rotation, translation, scale = (t.clone().requires_grad_() for t in pose(1))
    LatentAvatar(AvatarConfig(**SMALL)).render(torch.randn(1, 128), rotation, translation, scale).I_F.std().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in (rotation, translation, scale))


def test_inference_in_parts_equals_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    avatar, theta = LatentAvatar(AvatarConfig(**SMALL)), torch.randn(2, 128)
    whole = avatar.render(theta, *pose(2))
    monkeypatch.setattr(avatar_module, "POINTS_AT_ONCE", 5000)
    with torch.no_grad():
        parts = avatar.render(theta, *pose(2))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_bf16_keeps_the_geometry_exact() -> None:
    """Autocast rounds features and colours, not rays: an opaque box has the same outline."""
    torch.manual_seed(0)
    avatar = LatentAvatar(AvatarConfig(**SMALL, density_bias=50.0)).eval()
    theta = torch.randn(1, 128)
    full = avatar.render(theta, *pose(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = avatar.render(theta, *pose(1))
    assert half.M.dtype == half.I_lr.dtype == torch.float32
    assert 0.3 < full.M.mean() < 0.9
    torch.testing.assert_close(half.M, full.M, atol=1e-5, rtol=0)
    torch.testing.assert_close(half.I_lr, full.I_lr, atol=0.02, rtol=0.02)


def test_code_is_centred_and_divided_by_its_deviation_or_variance() -> None:
    code = torch.randn(3, 64) * 7 + 2
    by_deviation = normalise_code(code, "deviation")
    torch.testing.assert_close(by_deviation.mean(dim=1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(by_deviation.std(dim=1), torch.ones(3))
    # released: the deviation of the result is the inverse of the deviation of the input
    torch.testing.assert_close(normalise_code(code, "variance").std(dim=1), 1 / code.std(dim=1))
    assert normalise_code(code, "none") is code


def test_strided_encoder_halves_four_times() -> None:
    encoder = StridedEncoder(128, (32, 64, 128, 256), 256, "variance")
    assert encoder.convolutions(torch.rand(1, 3, 128, 128)).shape == (1, 256, 8, 8)
    assert parameters(encoder) == sum(9 * a * b + b for a, b in ((3, 32), (32, 64), (64, 128), (128, 256))) + (
        256 * 64 * 256 + 256
    )


def test_unet_goes_once_down_and_three_times_up() -> None:
    unet = UNet(AvatarConfig(superresolution_capacity=2))
    sides: list[int] = []
    for module in unet.modules():
        if isinstance(module, torch.nn.Sequential):
            module.register_forward_hook(lambda _m, _i, out: sides.append(out.shape[-1]))
    image = unet(torch.randn(1, 32, 16, 16))
    assert sides == [16, 8, 16, 32, 64]
    assert image.shape == (1, 3, 64, 64)
    assert 0 < image.min() <= image.max() < 1


def test_unet_widths_as_published() -> None:
    """Capacity 32: 4, 8, 4, 2, 1 times 32 channels."""
    unet = UNet(AvatarConfig())
    assert [block[3].out_channels for block in (unet.inner, unet.down, unet.up, *unet.more)] == [128, 256, 128, 64, 32]


def test_residual_begins_as_the_enlarged_ray_colour_and_is_clamped_in_evaluation() -> None:
    module, feature = ResidualUpsampler(AvatarConfig(superresolution_capacity=4)), 3 * torch.rand(1, 32, 8, 8) - 1
    expected = enlarge(feature[:, :3], 4)
    torch.testing.assert_close(module(feature), expected)
    torch.testing.assert_close(module.eval()(feature), expected.clamp(0, 1))
    white = module.train()(torch.ones(1, 32, 8, 8))
    torch.testing.assert_close(white, torch.ones(1, 3, 32, 32))


def test_enlarging_keeps_cells_in_place() -> None:
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    torch.testing.assert_close(F.avg_pool2d(enlarge(ramp), 2)[..., 1:-1], ramp[..., 1:-1])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"image_size": 512, "ray_size": 100}, "image_size / ray_size"),
        ({"triplane_size": 96}, "triplane_size"),
        ({"face_size": 100}, "face_size 100"),
        ({"box": ((1, -1), (-1, 1), (-1, 1))}, "box"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        AvatarConfig.model_validate(changes)


def test_published_encoder_sees_grey_as_zero() -> None:
    """Images in [0, 1] are centred: a face of .5 everywhere is nothing but zeros, border included."""
    encoder, seen = StridedEncoder(32, (4, 8), 6, "none"), []
    encoder.convolutions[0].register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    encoder(torch.full((1, 3, 32, 32), 0.5))
    assert torch.equal(seen[0], torch.zeros(1, 3, 32, 32))


def test_unet_keeps_detail_through_its_skip() -> None:
    """Max pooling hides which pixel of a cell is bright; the skip does not."""
    unet = UNet(AvatarConfig(superresolution_capacity=2)).eval()
    a, b = -torch.ones(1, 32, 8, 8), -torch.ones(1, 32, 8, 8)
    a[..., 2, 2], b[..., 3, 3] = 1.0, 1.0
    joined: list[Tensor] = []
    unet.up.register_forward_hook(lambda _m, args, _o: joined.append(args[0]))
    unet(a), unet(b)
    width = unet.inner[3].out_channels
    assert joined[0].shape[1] == 3 * width
    assert not torch.allclose(joined[0][:, :width], joined[1][:, :width])


def test_strided_encoder_equals_its_layers_written_out() -> None:
    """Convolution of stride 2, instance normalisation, LeakyReLU; about grey; normalised per sample."""
    torch.manual_seed(0)
    encoder, face = StridedEncoder(32, (8, 16), 24, "deviation"), torch.rand(3, 3, 32, 32)
    x = face - 0.5
    for conv in (encoder.convolutions[0], encoder.convolutions[3]):
        x = F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1)
        variance, mean = torch.var_mean(x, dim=(2, 3), correction=0, keepdim=True)
        x = (x - mean) / (variance + 1e-5).sqrt()
        x = torch.where(x > 0, x, 0.01 * x)
    code = F.linear(x.flatten(1), encoder.linear.weight, encoder.linear.bias)
    expected = (code - code.mean(1, keepdim=True)) / code.std(1, keepdim=True)
    torch.testing.assert_close(encoder(face), expected, atol=1e-4, rtol=1e-4)


def test_points_of_the_paper_are_64_a_ray_on_128_by_128_rays() -> None:
    """What the renderer evaluates in a step of `paper`, read off the radiance MLP's input and its planes."""
    seen: dict[str, torch.Size] = {}
    with torch.device("meta"):
        avatar = LatentAvatar(load_recipe("paper").avatar)
        avatar.generator.register_forward_hook(lambda _m, _i, planes: seen.update(planes=planes.shape))
        avatar.radiance.register_forward_pre_hook(lambda _m, given: seen.update(points=given[0].shape))
        avatar.render(torch.empty(2, 128), *pose(2, "meta"), noise=True)
    assert seen == {"planes": (2, 3, 32, 128, 128), "points": (2, 32, 128 * 128 * 64)}


def test_i_lr_is_the_colour_and_the_super_resolution_sees_all_of_i_f() -> None:
    torch.manual_seed(0)
    avatar, seen = LatentAvatar(AvatarConfig(**SMALL)), []
    avatar.superresolution.register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
    drawn = avatar.render(torch.randn(1, 128), *pose(1))
    assert torch.equal(seen[0], drawn.I_F)
    (gradient,) = torch.autograd.grad(drawn.I_hr.square().sum(), drawn.I_F)
    assert (gradient.abs().amax((0, 2, 3)) > 0).all(), "a channel of I_F without effect on I_hr"

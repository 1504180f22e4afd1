"""Tri-planes: the look-up against closed forms and finite differences, the generator against an explicit reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lavatar.configs.avatar import AvatarConfig
from lavatar.models import reference
from lavatar.models.basis import BasisGenerator
from lavatar.models.superresolution import enlarge
from lavatar.models.triplane import ModulatedConv, StyleGANGenerator, normalise_points, sample_triplane


def ramps(size: int) -> Tensor:
    """1×3×2×size×size: channel 0 of each plane grows along its columns, channel 1 along its rows, −1 to 1."""
    steps = torch.linspace(-1, 1, size)
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([columns, rows]).expand(1, 3, 2, size, size)


def test_lookup_sums_the_projections_on_xy_yz_xz() -> None:
    """With ramps for planes: channel 0 sums the column axes x + y + x, channel 1 the row axes y + z + z."""
    points = torch.rand(1, 50, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x, y, z = points.unbind(-1)
    read = sample_triplane(ramps(17), points)
    torch.testing.assert_close(read[:, 0], 2 * x + y)
    torch.testing.assert_close(read[:, 1], y + 2 * z)


def test_texels_lie_on_the_faces_of_the_box_and_space_outside_is_empty() -> None:
    planes = torch.zeros(1, 3, 1, 4, 4)
    planes[0, 0, 0, 3, 0] = 5.0  # plane xy, last row, first column: y = 1, x = −1
    points = torch.tensor([[[-1.0, 1.0, 0.3], [-1.0, 1.0, -0.9], [1.0, -1.0, 0.0], [-2.0, 1.0, 0.0]]])
    assert sample_triplane(planes, points).tolist() == [[[5.0, 5.0, 0.0, 0.0]]]


def test_samples_of_a_batch_read_their_own_planes() -> None:
    planes = torch.arange(6.0).view(2, 3, 1, 1, 1).expand(2, 3, 1, 4, 4)
    read = sample_triplane(planes, torch.zeros(2, 1, 3))
    assert read.flatten().tolist() == [0 + 1 + 2, 3 + 4 + 5]


def test_gradient_through_planes_and_coordinates() -> None:
    generator = torch.Generator().manual_seed(1)
    planes = torch.randn(1, 3, 2, 5, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    # away from texel centres (multiples of 0.5), where bilinear interpolation has a kink
    cells = torch.randint(0, 4, (1, 6, 3), generator=generator)
    points = (
        (cells + 0.2 + 0.6 * torch.rand(1, 6, 3, generator=generator, dtype=torch.float64)) / 2 - 1
    ).requires_grad_()
    assert torch.autograd.gradcheck(sample_triplane, (planes, points))


@pytest.mark.parametrize("channels", [24, 32])
def test_kernel_for_gpus_equals_the_reference(channels: int) -> None:
    """Values and both gradients, points outside the box too; on a CPU Triton interprets the kernels."""
    pytest.importorskip("triton", reason="Triton is not installed: it comes with the development extra on Linux")
    from lavatar.models.triplane_gpu import sample_triplane_gpu

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(2)
    planes = torch.randn(2, 3, channels, 8, 8, generator=generator, requires_grad=True)
    points = (torch.rand(2, 70, 3, generator=generator) * 2.4 - 1.2).requires_grad_()
    weights = torch.randn(2, channels, 70, generator=generator)
    expected = reference.sample_triplane(planes, points)
    gradients = torch.autograd.grad((expected * weights).sum(), (planes, points))
    there = [value.detach().to(device).requires_grad_() for value in (planes, points)]
    found = sample_triplane_gpu(*there)
    torch.testing.assert_close(found.cpu(), expected)
    for own, other in zip(torch.autograd.grad((found * weights.to(device)).sum(), there), gradients, strict=True):
        torch.testing.assert_close(own.cpu(), other, rtol=1e-4, atol=1e-4)


def test_box_is_mapped_on_the_cube() -> None:
    box = AvatarConfig().box
    corners = torch.tensor([[[a for a, _ in box], [b for _, b in box], [0.0, 0.0, -0.4]]])
    torch.testing.assert_close(
        normalise_points(corners, box), torch.tensor([[[-1.0] * 3, [1.0] * 3, [0.0] * 3]]), atol=1e-6, rtol=0
    )


def test_modulated_convolution_equals_one_kernel_a_sample() -> None:
    """StyleGAN2: kernels scaled by 1 + style along the input channels, each output channel to unit norm."""
    torch.manual_seed(0)
    conv, x, code = ModulatedConv(5, 7, 4), torch.randn(3, 5, 6, 6), torch.randn(3, 4)
    kernels = conv.weight[None] * (conv.style(code) + 1)[:, None, :, None, None]
    kernels = kernels * torch.rsqrt(kernels.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8)
    torch.testing.assert_close(kernels.square().sum(dim=(2, 3, 4)), torch.ones(3, 7))
    expected = torch.cat([F.conv2d(x[i : i + 1], kernels[i], padding=1) for i in range(3)])
    torch.testing.assert_close(conv(x, code), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reference.plain(conv)(x, code), expected, atol=1e-5, rtol=1e-5)


def test_generator_widths_as_published() -> None:
    """Capacity 48, at most 256 channels, 3×32 at the end: 256 until the last two blocks at 256², as released."""
    for size, widths in ((256, [256, 256, 256, 256, 256, 192, 96]), (128, [256, 256, 256, 256, 192, 96])):
        with torch.device("meta"):
            generator = StyleGANGenerator(AvatarConfig(triplane_size=size))
            planes = generator(torch.empty(2, 128))
        assert [block.second.weight.shape[0] for block in generator.blocks] == widths
        assert planes.shape == (2, 3, 32, size, size)


def test_every_parameter_of_the_generator_learns() -> None:
    config = AvatarConfig(triplane_size=16, triplane_channels=4, generator_capacity=6, code_dim=12)
    generator = StyleGANGenerator(config)
    generator(torch.randn(2, 12)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in generator.parameters())


def test_each_plane_reads_its_own_two_axes_and_the_three_are_summed() -> None:
    """Planes of one bright texel at (column 3, row 1) of 5: bright where the column axis is .5 and the row axis −.5."""
    for plane, (column, row) in enumerate(("xy", "yz", "xz")):
        planes = torch.zeros(1, 3, 1, 5, 5)
        planes[0, plane, 0, 1, 3] = 2.0
        at = {"x": 0.1, "y": 0.1, "z": 0.1, column: 0.5, row: -0.5}
        swapped = {**at, column: -0.5, row: 0.5}
        points = torch.tensor([[[at[a] for a in "xyz"], [swapped[a] for a in "xyz"]]])
        torch.testing.assert_close(sample_triplane(planes, points), torch.tensor([[[2.0, 0.0]]]))


def test_gradient_of_a_ramp_is_its_slope() -> None:
    points = torch.tensor([[[0.3, -0.2, 0.6]]], requires_grad=True)
    read = sample_triplane(ramps(17), points)
    assert torch.autograd.grad(read[:, 0].sum(), points, retain_graph=True)[0].flatten().tolist() == pytest.approx(
        [2.0, 1.0, 0.0], abs=1e-5
    )
    assert torch.autograd.grad(read[:, 1].sum(), points)[0].flatten().tolist() == pytest.approx(
        [0.0, 1.0, 2.0], abs=1e-5
    )


def test_blocks_are_gained_leaky_and_begin_at_the_code() -> None:
    """A block is two times LeakyReLU(0.2, gain · convolution); the first map is made of the code alone."""
    torch.manual_seed(0)
    config = AvatarConfig(triplane_size=8, triplane_channels=4, generator_capacity=6, code_dim=12, generator_gain=1.7)
    generator, theta = StyleGANGenerator(config), torch.randn(2, 12)
    first, second = generator.blocks
    start = F.conv_transpose2d(theta[:, :, None, None], generator.start.weight)
    x = F.conv2d(start, generator.mix.weight, generator.mix.bias, padding=1)
    for block in (first, second):
        x = enlarge(x) if block is second else x
        for conv in (block.first, block.second):
            x = F.leaky_relu(1.7 * conv(x, theta), 0.2)
    torch.testing.assert_close(generator(theta), x.view(2, 3, 4, 8, 8), atol=1e-5, rtol=1e-5)


def test_the_basis_generator_adds_blended_planes_linearly() -> None:
    torch.manual_seed(0)
    generator = BasisGenerator(
        AvatarConfig(generator="basis", code_dim=3, basis_count=5, triplane_channels=2, triplane_size=8)
    )
    with torch.no_grad():
        generator.basis.normal_()
        generator.weights.weight.normal_()
        theta = torch.randn(4, 3)
        planes = generator(theta)
    expected = torch.stack(
        [
            generator.planes
            + sum(weight * plane.view(3, 2, 8, 8) for weight, plane in zip(w, generator.basis, strict=True))
            for w in theta @ generator.weights.weight.T
        ]
    )
    torch.testing.assert_close(planes, expected)
    torch.testing.assert_close(generator(torch.zeros(1, 3))[0], generator.planes)
    middle = generator((theta[:1] + theta[1:2]) / 2)
    torch.testing.assert_close(middle[0], (planes[0] + planes[1]) / 2)

"""Sec. 3.2: three feature planes from θ, and their look-up at 3D positions.

Planes are ordered xy, yz, xz. In the plane "ab" the first axis runs along the columns and the second along the rows,
both growing with the coordinate (rows of xy grow with y, that is upwards in the head).

Shapes: B batch, C channels of one plane, H side of the planes, P points, D code.
"""

from __future__ import annotations

import importlib.util
import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavatar.configs.avatar import AvatarConfig

PLANE_AXES = ((0, 1), (1, 2), (0, 2))
"""Axes of the planes xy, yz, xz: (column axis, row axis)."""


def normalise_points(points_BP3: Tensor, box: tuple[tuple[float, float], ...]) -> Tensor:
    """Head space to [-1, 1] inside the box."""
    low = points_BP3.new_tensor([a for a, _ in box])
    high = points_BP3.new_tensor([b for _, b in box])
    return (points_BP3 - (high + low) / 2) * (2 / (high - low))


def sample_triplane(planes_B3CHH: Tensor, points_BP3: Tensor) -> Tensor:
    """Sec. 3.2: project each point on the planes xy, yz, xz, read them bilinearly and SUM: B×C×P.

    `points_BP3` are in [-1, 1]. align_corners=True: the outermost texels' centres lie on the faces of the box, so that
    interpolation covers all of it; outside, the planes fade to zero over one texel. Differentiable in both arguments.
    """
    if points_BP3.is_cuda and points_BP3.dtype == torch.float32 and _has_triton():
        from lavatar.models.triplane_gpu import sample_triplane_gpu

        return sample_triplane_gpu(planes_B3CHH.float(), points_BP3)
    if points_BP3.is_cpu and not (points_BP3.requires_grad and torch.is_grad_enabled()):
        from lavatar.models.triplane_cpu import sample_rows

        planes_B3CHH = planes_B3CHH.to(points_BP3.dtype)
        return torch.stack([sample_rows(*each) for each in zip(planes_B3CHH, points_BP3, strict=True)]).mT
    B, _, C, H, _ = planes_B3CHH.shape
    x_y_z = points_BP3.unbind(dim=-1)  # slices: an index by a list would be copied back point by point in the gradient
    grid_B3P2 = torch.stack([torch.stack([x_y_z[a], x_y_z[b]], dim=-1) for a, b in PLANE_AXES], dim=1)
    read = F.grid_sample(
        planes_B3CHH.reshape(B * 3, C, H, H).to(points_BP3.dtype),  # positions keep their precision under autocast
        grid_B3P2.reshape(B * 3, 1, -1, 2),  # one "row" of P points an image
        mode="bilinear",
        padding_mode="zeros",
        align_corners=True,
    )
    return read.view(B, 3, C, -1).sum(dim=1)


@lru_cache
def _has_triton() -> bool:
    """It comes with torch where there is a GPU for it."""
    return importlib.util.find_spec("triton") is not None


class ModulatedConv(nn.Module):
    """3×3 convolution whose kernel is scaled per input channel by a style and renormalised (StyleGAN2).

    The scaling is applied to the input and the renormalisation to the output: the same as with one kernel a sample,
    without building B kernels.
    """

    def __init__(self, in_channels: int, out_channels: int, code_dim: int) -> None:
        super().__init__()
        self.style = nn.Linear(code_dim, in_channels)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        nn.init.kaiming_normal_(self.weight, nonlinearity="leaky_relu")

    def forward(self, x_BCHW: Tensor, theta_BD: Tensor, gain: float = 1.0) -> Tensor:
        scale_BC = self.style(theta_BD) + 1
        energy_OC = self.weight.square().sum(dim=(2, 3))
        demodulation_BO = gain * torch.rsqrt(scale_BC.square() @ energy_OC.T + 1e-8)
        y_BOHW = F.conv2d(x_BCHW * scale_BC[:, :, None, None], self.weight, padding=1)
        return y_BOHW * demodulation_BO[:, :, None, None]


class StyleBlock(nn.Module):
    """Two modulated convolutions with LeakyReLU(0.2) and a gain, after doubling the side but in the first block."""

    def __init__(self, in_channels: int, out_channels: int, code_dim: int, gain: float, *, enlarges: bool) -> None:
        super().__init__()
        self.enlarges, self.gain = enlarges, gain
        self.first = ModulatedConv(in_channels, out_channels, code_dim)
        self.second = ModulatedConv(out_channels, out_channels, code_dim)

    def forward(self, x_BCHW: Tensor, theta_BD: Tensor) -> Tensor:
        if self.enlarges:
            x_BCHW = F.interpolate(x_BCHW, scale_factor=2, mode="bilinear", align_corners=False)
        x_BCHW = F.leaky_relu(self.first(x_BCHW, theta_BD, self.gain), 0.2)
        return F.leaky_relu(self.second(x_BCHW, theta_BD, self.gain), 0.2)


class StyleGANGenerator(nn.Module):
    """Sec. 3.2: θ_p → H_xy, H_yz, H_xz (B×3×C×H×H), from a 4×4 map made of the code, not of a constant."""

    def __init__(self, config: AvatarConfig) -> None:
        super().__init__()
        self.channels, self.size = config.triplane_channels, config.triplane_size
        blocks = int(math.log2(config.triplane_size)) - 1
        most, capacity = config.generator_max_channels, config.generator_capacity
        widths = [min(most, capacity * 2 ** (blocks - i)) for i in range(blocks)]
        widths[-1] = 3 * config.triplane_channels
        self.start = nn.ConvTranspose2d(config.code_dim, widths[0], 4, bias=False)
        self.mix = nn.Conv2d(widths[0], widths[0], 3, padding=1)
        before = [widths[0], *widths[:-1]]
        self.blocks = nn.ModuleList(
            StyleBlock(a, b, config.code_dim, config.generator_gain, enlarges=i > 0)
            for i, (a, b) in enumerate(zip(before, widths, strict=True))
        )

    def forward(self, theta_BD: Tensor) -> Tensor:
        x_BCHW = self.mix(self.start(theta_BD[:, :, None, None]))
        for block in self.blocks:
            x_BCHW = block(x_BCHW, theta_BD)
        return x_BCHW.view(-1, 3, self.channels, self.size, self.size)

"""Sec. 3.2: the U-net that turns the rendered I_F into the portrait I_hr, and our residual variant.

Shapes: B batch, O channels of I_F (the first three are I_lr), r side of I_F, s side of I_hr.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavatar.configs.avatar import AvatarConfig


def _double_conv(before: int, middle: int, after: int) -> nn.Sequential:
    """Twice 3×3 convolution, instance normalisation, ReLU."""
    return nn.Sequential(
        nn.Conv2d(before, middle, 3, padding=1, bias=False),
        nn.InstanceNorm2d(middle),
        nn.ReLU(inplace=True),
        nn.Conv2d(middle, after, 3, padding=1, bias=False),
        nn.InstanceNorm2d(after),
        nn.ReLU(inplace=True),
    )


def enlarge(x_BCHW: Tensor, factor: int = 2) -> Tensor:
    """Bilinear, cells kept in place (the rays run through cell centres, hence align_corners=False)."""
    return F.interpolate(x_BCHW, scale_factor=factor, mode="bilinear", align_corners=False)


class UNet(nn.Module):
    """Sec. 3.2, I_F (B×O×r×r) → I_hr (B×3×s×s): one step down, one up with a skip, then up to s; sigmoid.

    At s = 4r it has the three steps up of the released model, with 8, 4, 2, 1 times the capacity in channels.
    """

    def __init__(self, config: AvatarConfig) -> None:
        super().__init__()
        capacity, ups = config.superresolution_capacity, int(math.log2(config.image_size // config.ray_size))
        width = 4 * capacity
        self.inner = _double_conv(config.feature_channels, width, width)
        self.down = _double_conv(width, 2 * width, 2 * width)
        self.up = _double_conv(3 * width, 3 * width // 2, width)
        widths = [max(capacity, width // 2**i) for i in range(ups + 1)]
        self.more = nn.ModuleList(_double_conv(a, max(a // 2, 1), b) for a, b in pairwise(widths))
        self.out = nn.Conv2d(widths[-1], 3, 1)

    def forward(self, feature_BOrr: Tensor) -> Tensor:
        level = self.inner(feature_BOrr)
        x = self.up(torch.cat([level, enlarge(self.down(F.max_pool2d(level, 2)))], dim=1))
        for block in self.more:
            x = block(enlarge(x))
        image: Tensor = self.out(x).sigmoid()
        return image


class ResidualUpsampler(nn.Module):
    """Ours: enlarged I_lr plus a learned residual that begins at zero, so an empty volume is white from the first step.

    No sigmoid and no normalisation: the background needs nothing learned. In training the result is not clamped (a
    clamp has no gradient outside [0, 1]); in evaluation it is.
    """

    def __init__(self, config: AvatarConfig) -> None:
        super().__init__()
        capacity = config.superresolution_capacity
        self.factor = config.image_size // config.ray_size
        self.features = nn.Sequential(
            nn.Conv2d(config.feature_channels, 2 * capacity, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * capacity, capacity * self.factor**2, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.PixelShuffle(self.factor),
        )
        self.out = nn.Conv2d(capacity, 3, 3, padding=1)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, feature_BOrr: Tensor) -> Tensor:
        image = enlarge(feature_BOrr[:, :3], self.factor) + self.out(self.features(feature_BOrr))
        return image if self.training else image.clamp(0, 1)

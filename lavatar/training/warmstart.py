"""Where a short training of the basis generator begins: not at noise but at the best linear guess.

Frames are flattened on a half ellipsoid in head space (no mouth, no nose: a relief would do, but a head is near one).
Their mean colours the static planes, and the linear regression of the colours on the code the basis. Everything after
is Eq. 4.

Shapes: N frames, D code, K basis_count, C triplane_channels, H triplane_size, s image side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lavatar.models.avatar import LatentAvatar
from lavatar.models.basis import BasisGenerator
from lavatar.models.radiance import RadianceMLP

CENTRE, RADII = (0.0, 0.05, -0.35), (0.9, 1.3, 0.9)
"""Of the ellipsoid, in head units: ears, chin and crown; the nose is outside."""
LOGIT = 4.0
"""Density before its activation: this in the middle of the head, minus this where no frame has anything. Further out
it would have no gradient left to grow by."""
DENSITY, RED = 0, 1  # channels of the planes that begin with a meaning; green and blue follow
LEAK = 0.01
DAMPING = 1e-4  # of the regression, in mean variances of the code


class PosedFrames(NamedTuple):
    """Training frames over white, their poses and their codes."""

    image_N3ss: Tensor
    mask_N1ss: Tensor
    rotation_N33: Tensor
    translation_N3: Tensor
    scale_N: Tensor
    theta_ND: Tensor


@torch.no_grad()
def warm_start(avatar: LatentAvatar, frames: PosedFrames) -> None:
    """Set planes, basis and the paths of density and colour through the radiance MLP; the rest stays random."""
    generator, config = avatar.generator, avatar.config
    if not isinstance(generator, BasisGenerator) or config.triplane_channels < 4 or config.radiance != "joint":
        return
    points_HH3 = relief(config.triplane_size, config.box)
    color_N3HH, mask_HH = flatten_frames(frames, points_HH3, config.focal / 512)
    theta_ND = frames.theta_ND - frames.theta_ND.mean(0)
    slope_D3HH = torch.einsum("nd,nchw->dchw", theta_ND, color_N3HH - color_N3HH.mean(0))
    gram_DD = theta_ND.T @ theta_ND
    gram_DD += DAMPING * gram_DD.diagonal().mean() * torch.eye(len(gram_DD))
    slope_D3HH = torch.linalg.solve(gram_DD, slope_D3HH.flatten(1)).view_as(slope_D3HH)
    C, H = config.triplane_channels, config.triplane_size
    xy, color = 0, slice(RED, RED + 3)
    generator.planes[:, : RED + 3] = 0
    generator.planes[:, DENSITY] = density_planes(mask_HH, config.box)
    generator.planes[xy, color] = color_N3HH.mean(0)
    basis = generator.basis.view(-1, 3, C, H, H)
    mixed = torch.einsum("kd,dchw->kchw", torch.linalg.pinv(generator.weights.weight).T, slope_D3HH)
    basis[:, xy, color] = mixed
    _pass_through(avatar.radiance, -config.density_bias)


def _axis(size: int, interval: tuple[float, float]) -> Tensor:
    return torch.linspace(interval[0], interval[1], size)


def density_planes(mask_HH: Tensor, box: tuple[tuple[float, float], ...]) -> Tensor:
    """Planes xy, yz, xz (3×H×H) whose sum is LOGIT·(1 − squared distance from the centre in radii) in the ellipsoid.

    Around it, where the frames' mean mask says that there is something (hair, neck, shoulders), a slab of that depth.
    """
    size = mask_HH.shape[0]
    squares = [((_axis(size, box[i]) - CENTRE[i]) / RADII[i]).square() for i in range(3)]
    xy = torch.maximum(LOGIT * (1 - squares[0][None, :] - squares[1][:, None]), LOGIT * (2 * mask_HH - 1))
    depth = (-0.5 * LOGIT * squares[2][:, None]).expand(size, size)
    return torch.stack([xy, depth, depth])


def relief(size: int, box: tuple[tuple[float, float], ...]) -> Tensor:
    """Points of the ellipsoid's front over the texels of the xy plane, H×H×3; around it, of a plane near its rim."""
    y, x = torch.meshgrid(_axis(size, box[1]), _axis(size, box[0]), indexing="ij")
    rest = 1 - ((x - CENTRE[0]) / RADII[0]).square() - ((y - CENTRE[1]) / RADII[1]).square()
    z = CENTRE[2] + RADII[2] * rest.clamp(min=0.1).sqrt()
    return torch.stack([x, y, z], dim=-1)


def flatten_frames(frames: PosedFrames, points_HH3: Tensor, focal: float) -> tuple[Tensor, Tensor]:
    """Colour of every frame at the projections of the points, N×3×H×H, and the mean mask there, H×H.

    `focal` is in sides of the image.
    """
    turned_NHH3 = torch.einsum("nij,hwj->nhwi", frames.rotation_N33, points_HH3)
    camera_NHH3 = frames.scale_N[:, None, None, None] * turned_NHH3 + frames.translation_N3[:, None, None]
    grid_NHH2 = 2 * focal * camera_NHH3[..., :2] / camera_NHH3[..., 2:]
    both_N4ss = torch.cat([frames.image_N3ss, frames.mask_N1ss], dim=1)
    flat_N4HH = F.grid_sample(both_N4ss, grid_NHH2, mode="bilinear", padding_mode="border", align_corners=False)
    return flat_N4HH[:, :3], flat_N4HH[:, 3].mean(0)


def _pass_through(radiance: RadianceMLP, density_bias: float) -> None:
    """Density and colour of a point begin as the channels named above: two hidden units each, as
    leaky(x) − leaky(−x) = (1 + LEAK)·x. The other units stay random, their share in the outputs small.
    `density_bias` undoes the rendering's, so that the ellipsoid ends at its radii."""
    hidden, density, color = radiance.density_in, radiance.density_out, radiance.color_out
    units = 2 * (RED + 3)
    hidden.weight[:units] = 0
    hidden.bias[:units] = 0
    for channel in range(RED + 3):
        hidden.weight[2 * channel, channel], hidden.weight[2 * channel + 1, channel] = 1.0, -1.0
    for layer, row, channel in ((density, 0, DENSITY), *((color, i, RED + i) for i in range(3))):
        layer.weight[row] *= 0.1
        layer.weight[row, :units] = 0
        layer.bias[row] = density_bias if layer is density else 0.0
        layer.weight[row, 2 * channel], layer.weight[row, 2 * channel + 1] = 1 / (1 + LEAK), -1 / (1 + LEAK)

"""The method as its equations read, in plain eager torch: what every faster way of computing is compared with.

`plain(module)` is the same model with the same parameters, computed in the plain way; the tests compare the two, and
`lavatar bench` times one against the other. What has no plain form here (encoders, super-resolution, decoders of the
Y-network) is plain as it stands: layers of torch one after the other.

Shapes: B batch, H W image sides, C O channels, R rays, S samples a ray, P = R·S points, D code.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavatar.models import rendering
from lavatar.models.avatar import LatentAvatar
from lavatar.models.radiance import RadianceMLP, encode_direction
from lavatar.models.rendering import Noise, Rays
from lavatar.models.ssim import C1, C2, SIGMA, WINDOW
from lavatar.models.triplane import PLANE_AXES, ModulatedConv, normalise_points

M = TypeVar("M", bound=nn.Module)


def plain(module: M) -> M:
    """A copy of the module that computes in the plain way: same parameters by value and name, same interface."""
    twin = copy.deepcopy(module)
    for part in twin.modules():
        part.__class__ = PLAIN.get(type(part), type(part))
    return twin


def sample_triplane(planes_B3CHH: Tensor, points_BP3: Tensor) -> Tensor:
    """Sec. 3.2: H = H_xy + H_yz + H_xz, each read bilinearly at the points (in [-1, 1]): B×C×P."""
    read = [
        F.grid_sample(planes_B3CHH[:, i], points_BP3[:, None, :, list(axes)], mode="bilinear", align_corners=True)
        for i, axes in enumerate(PLANE_AXES)
    ]
    return torch.stack(read).sum(dim=0)[:, :, 0]


def ssim(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Wang et al. 2004: Gaussian moments of every window inside the image by a convolution; B values."""
    C = a_BCHW.shape[1]
    offset = torch.arange(WINDOW, dtype=a_BCHW.dtype, device=a_BCHW.device) - WINDOW // 2
    line = torch.exp(-offset.square() / (2 * SIGMA**2))
    window = (line[:, None] * line / line.sum().square()).expand(C, 1, WINDOW, WINDOW)

    def mean(x_BCHW: Tensor) -> Tensor:
        return F.conv2d(x_BCHW, window, groups=C)

    a, b = mean(a_BCHW), mean(b_BCHW)
    variance_a, variance_b = mean(a_BCHW.square()) - a.square(), mean(b_BCHW.square()) - b.square()
    covariance = mean(a_BCHW * b_BCHW) - a * b
    luminance = (2 * a * b + C1) / (a.square() + b.square() + C1)
    structure = (2 * covariance + C2) / (variance_a + variance_b + C2)
    return (luminance * structure).flatten(1).mean(dim=1)


class PlainModulatedConv(ModulatedConv):
    """StyleGAN2: a kernel for each sample, scaled by 1 + style along its input, each output channel to unit norm."""

    def forward(self, x_BCHW: Tensor, theta_BD: Tensor, gain: float = 1.0) -> Tensor:
        B, C, H, W = x_BCHW.shape
        kernels_BOC33 = self.weight * (self.style(theta_BD) + 1)[:, None, :, None, None]
        norm_BO111 = torch.rsqrt(kernels_BOC33.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8)
        kernels_BOC33 = gain * kernels_BOC33 * norm_BO111
        y_1BOHW = F.conv2d(x_BCHW.reshape(1, B * C, H, W), kernels_BOC33.flatten(0, 1), padding=1, groups=B)
        return y_1BOHW.view(B, -1, H, W)


class PlainRadianceMLP(RadianceMLP):
    """Eq. 3 point by point: linear layers on rows, the view direction beside the feature at each of a ray's points."""

    def forward(self, feature_BCP: Tensor, direction_BR3: Tensor) -> tuple[Tensor, Tensor]:
        R = direction_BR3.shape[1]
        feature_BRSC = feature_BCP.mT.unflatten(1, (R, -1))
        S = feature_BRSC.shape[2]
        hidden_BRSH = F.leaky_relu(_linear(self.density_in, feature_BRSC))
        density_BRS = _linear(self.density_out, hidden_BRSH)[..., 0]
        seen, layer = (feature_BRSC, self.color_in) if self.separate else (hidden_BRSH, self.color_out)
        weight = layer.weight
        if self.view is not None:  # one matrix [feature | direction]
            view_BRSE = encode_direction(direction_BR3, self.frequencies)[:, :, None].expand(-1, -1, S, -1)
            seen, weight = torch.cat([seen, view_BRSE], dim=-1), torch.cat([weight, self.view.weight], dim=1)
        color_BRSO = F.linear(seen, weight, layer.bias)
        if self.separate:
            color_BRSO = _linear(self.color_out, F.leaky_relu(color_BRSO))
        if self.sigmoid:
            color_BRSO = torch.cat([color_BRSO[..., :3].sigmoid(), color_BRSO[..., 3:]], dim=-1)
        return density_BRS, color_BRSO.permute(0, 3, 1, 2)


class PlainAvatar(LatentAvatar):
    """Sec. 3.2: every sample of every ray goes through the tri-plane and the MLP, and is composited."""

    def volume(self, planes_B3CHH: Tensor, rays: Rays, noise: Noise = False) -> tuple[Tensor, Tensor]:
        config = self.config
        near_BR, far_BR = rendering.ray_bounds(rays, config)
        depth_BRS, length_BRS = rendering.sample_depths(near_BR, far_BR, config, noise)
        points_BRS3 = rays.origin_B13[:, :, None] + depth_BRS[..., None] * rays.direction_BR3[:, :, None]
        stretch_BR1 = rays.direction_BR3.norm(dim=-1, keepdim=True)  # head units per unit of depth
        feature_BCP = sample_triplane(planes_B3CHH, normalise_points(points_BRS3.flatten(1, 2), config.box))
        density_BRS, color_BORS = self.radiance(feature_BCP, rays.direction_BR3 / stretch_BR1)
        sigma_BRS = rendering.activate_density(density_BRS, config, noise)
        weights_BRS = rendering.compositing_weights(sigma_BRS, length_BRS * stretch_BR1)
        return rendering.composite(weights_BRS, color_BORS, opaque_far=config.compositing == "opaque_far")


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    ModulatedConv: PlainModulatedConv,
    RadianceMLP: PlainRadianceMLP,
    LatentAvatar: PlainAvatar,
}
"""What is computed in another way than its equation reads, and its plain form."""

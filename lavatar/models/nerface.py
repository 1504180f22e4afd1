"""The baseline NeRFace (Gafni et al. 2021, Sec. 5.2): an MLP radiance field conditioned on expression coefficients.

No tri-plane, no super-resolution: every pixel is a ray, every sample two MLPs. As released: six layers with the
position again at the fourth, a branch of three for the colour, coarse and fine samples, a small learned code a frame.
Shapes: B batch, R rays, S samples a ray, P = R·S points, K coefficients, W field_width, E encoded position.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavatar.configs.avatar import AvatarConfig
from lavatar.models import rendering
from lavatar.models.avatar import Rendering
from lavatar.models.encoder_coefficients import CoefficientEncoder
from lavatar.models.radiance import PointLinear, encode_direction
from lavatar.models.rendering import Noise, Rays, View
from lavatar.models.triplane import normalise_points

COLOR_LAYERS = 3
POINTS_AT_ONCE = 2**16


class Shaded(NamedTuple):
    """Colours of rays by the coarse and the fine field (B×3×R each), and the fine field's M (B×R)."""

    coarse_B3R: Tensor
    fine_B3R: Tensor
    mask_BR: Tensor


class Field(nn.Module):
    """Points, directions and the condition (θ and the frame's code) → density B×R×S and colour B×3×R×S."""

    def __init__(self, config: AvatarConfig) -> None:
        super().__init__()
        W, self.octaves, self.view_octaves = config.field_width, config.position_frequencies, config.view_frequencies
        position, condition = 3 + 6 * self.octaves, config.code_dim + config.frame_code
        self.skip = config.field_layers // 2
        widths = [position, *[W] * (config.field_layers - 1)]
        self.layers = nn.ModuleList(
            PointLinear(width + (position if i == self.skip else 0), W) for i, width in enumerate(widths)
        )
        self.condition = nn.ModuleList(nn.Linear(condition, W, bias=False) for _ in (0, 1))  # first layer and skip
        self.feature, self.density = PointLinear(W, W), PointLinear(W, 1)
        self.view = nn.Linear(3 + 6 * self.view_octaves, W // 2, bias=False)
        self.color = nn.ModuleList(PointLinear(W if i == 0 else W // 2, W // 2) for i in range(COLOR_LAYERS))
        self.out = PointLinear(W // 2, 3)

    def forward(self, points_BP3: Tensor, direction_BR3: Tensor, condition_BK: Tensor) -> tuple[Tensor, Tensor]:
        B, P = points_BP3.shape[:2]
        R = direction_BR3.shape[1]
        position_BEP = encode_direction(points_BP3, self.octaves).mT
        x_BWP = position_BEP
        for i, layer in enumerate(self.layers):
            x_BWP = layer(torch.cat([position_BEP, x_BWP], dim=1) if i == self.skip else x_BWP)
            if i in (0, self.skip):
                x_BWP = x_BWP + self.condition[int(i > 0)](condition_BK)[..., None]
            x_BWP = F.relu(x_BWP)
        x_BWP = self.feature(x_BWP)
        density_BRS = self.density(x_BWP).view(B, R, P // R)
        along_BWR1 = self.view(encode_direction(direction_BR3, self.view_octaves)).mT[..., None]
        for i, layer in enumerate(self.color):
            x_BWP = layer(x_BWP)
            if i == 0:
                x_BWP = (x_BWP.unflatten(2, (R, P // R)) + along_BWR1).flatten(2)
            x_BWP = F.relu(x_BWP)
        return density_BRS, self.out(x_BWP).sigmoid().view(B, 3, R, P // R)


class NeRFace(nn.Module):
    """Same interface as LatentAvatar: `encode` takes coefficients, `render` draws all rays of a view."""

    def __init__(self, config: AvatarConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = CoefficientEncoder(config)
        self.coarse, self.fine = Field(config), Field(config)

    def encode(self, coefficients_BK: Tensor) -> Tensor:
        """Coefficients → θ (B×K)."""
        theta_BK: Tensor = self.encoder(coefficients_BK)
        return theta_BK

    def render(
        self,
        theta_BK: Tensor,
        rotation_B33: Tensor,
        translation_B3: Tensor,
        scale_B: Tensor,
        noise: Noise = False,
        view: View | None = None,
    ) -> Rendering:
        """The portrait of θ under a head pose, some rays at a time. Frames have the mean code."""
        config = self.config
        view = view or View(config.ray_size, config.ray_size)
        rays = rendering.camera_rays(view, config.focal / 512, rotation_B33, translation_B3, scale_B)
        count = max(1, POINTS_AT_ONCE // ((config.samples + config.fine_samples) * len(theta_BK)))
        parts = [
            self.shade(theta_BK, Rays(rays.origin_B13, part), noise) for part in rays.direction_BR3.split(count, dim=1)
        ]
        image_B3rr = torch.cat([p.fine_B3R for p in parts], dim=-1).unflatten(-1, (view.side, view.side))
        mask_B1rr = torch.cat([p.mask_BR for p in parts], dim=-1).view(-1, 1, view.side, view.side)
        return Rendering(image_B3rr, image_B3rr, image_B3rr, mask_B1rr)

    def shade(self, theta_BK: Tensor, rays: Rays, noise: Noise = False, code_BL: Tensor | None = None) -> Shaded:
        """Coarse samples, fine ones where the coarse field has weight, colours on white by both."""
        config = self.config
        if code_BL is None:
            code_BL = theta_BK.new_zeros(len(theta_BK), config.frame_code)
        condition_BK = torch.cat([theta_BK, code_BL], dim=1)
        near_BR, far_BR = rendering.ray_bounds(rays, config)
        depth_BRS, length_BRS = rendering.sample_depths(near_BR, far_BR, config, noise)
        weights_BRS, color_B3RS = self._weigh(self.coarse, rays, depth_BRS, length_BRS, condition_BK, noise)
        coarse_B3R, _ = rendering.composite(weights_BRS, color_B3RS, opaque_far=False)
        more_BRS = rendering.importance_depths(near_BR, far_BR, weights_BRS.detach(), config.fine_samples, noise)
        depth_BRS = torch.cat([depth_BRS, more_BRS], dim=-1).sort(dim=-1).values
        length_BRS = torch.diff(depth_BRS, dim=-1, append=far_BR[..., None]).clamp(min=0)
        weights_BRS, color_B3RS = self._weigh(self.fine, rays, depth_BRS, length_BRS, condition_BK, noise)
        return Shaded(coarse_B3R, *rendering.composite(weights_BRS, color_B3RS, opaque_far=False))

    def _weigh(
        self, field: nn.Module, rays: Rays, depth_BRS: Tensor, length_BRS: Tensor, condition_BK: Tensor, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """Compositing weights B×R×S and colours B×3×R×S of one field at these depths."""
        points_BRS3 = rays.origin_B13[:, :, None] + depth_BRS[..., None] * rays.direction_BR3[:, :, None]
        stretch_BR1 = rays.direction_BR3.norm(dim=-1, keepdim=True)  # head units per unit of depth
        points_BP3 = normalise_points(points_BRS3.flatten(1, 2), self.config.box)
        density_BRS, color_B3RS = field(points_BP3, rays.direction_BR3 / stretch_BR1, condition_BK)
        sigma_BRS = rendering.activate_density(density_BRS, self.config, noise)
        return rendering.compositing_weights(sigma_BRS, length_BRS * stretch_BR1), color_B3RS

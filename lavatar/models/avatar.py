"""The latent head NeRF of Sec. 3, whole: face image → θ_p → tri-planes → volume rendering → portrait.

Shapes: B batch, D code, r ray_size, s image_size, O feature_channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lavatar.configs.avatar import AvatarConfig
from lavatar.models import rendering
from lavatar.models.basis import BasisGenerator
from lavatar.models.blocks import Samples, render_rays
from lavatar.models.encoder import AvatarEncoder
from lavatar.models.encoder_coefficients import CoefficientEncoder
from lavatar.models.encoder_whitened import WhitenedEncoder
from lavatar.models.radiance import RadianceMLP
from lavatar.models.rendering import Noise, Rays, View
from lavatar.models.superresolution import ResidualUpsampler, UNet
from lavatar.models.triplane import StyleGANGenerator, normalise_points, sample_triplane

# Modules by the name that the configuration gives; each is built from the AvatarConfig alone.
# face B×3×H×H (coefficients: B×K) → θ B×D
ENCODERS: Mapping[str, Callable[[AvatarConfig], nn.Module]] = {
    "strided": AvatarEncoder,
    "whitened": WhitenedEncoder,
    "coefficients": CoefficientEncoder,
}
# θ → B×3×C×H×H
GENERATORS: Mapping[str, Callable[[AvatarConfig], nn.Module]] = {"stylegan": StyleGANGenerator, "basis": BasisGenerator}
UPSAMPLERS: Mapping[str, Callable[[AvatarConfig], nn.Module]] = {"unet": UNet, "residual": ResidualUpsampler}

POINTS_AT_ONCE = 2**18
"""Points a pass in inference: about 0.3 GB at the paper's sizes."""


class Rendering(NamedTuple):
    """What is drawn, in the paper's letters: I_hr B×3×s×s, I_lr B×3×r×r, I_F B×O×r×r, M B×1×r×r."""

    I_hr: Tensor
    I_lr: Tensor
    I_F: Tensor
    M: Tensor


class LatentAvatar(nn.Module):
    """Sec. 3: E and Φ. `encode` is Eq. 2; `render` is Eq. 3, volume rendering and super-resolution."""

    def __init__(self, config: AvatarConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ENCODERS[config.encoder](config)
        self.generator = GENERATORS[config.generator](config)
        self.radiance = RadianceMLP(config)
        self.superresolution = UPSAMPLERS[config.superresolution](config)

    def encode(self, face_B3HH: Tensor) -> Tensor:
        """Eq. 2: faces in [0, 1] → θ_p (B×D). With the encoder `coefficients` (Sec. 5.2) B×K coefficients instead."""
        theta_BD: Tensor = self.encoder(face_B3HH)
        return theta_BD

    def render(
        self,
        theta_BD: Tensor,
        rotation_B33: Tensor,
        translation_B3: Tensor,
        scale_B: Tensor,
        noise: Noise = False,
        view: View | None = None,
    ) -> Rendering:
        """Eq. 3 and Sec. 3.2: the portrait of code θ under a head pose (x_cam = scale·R·x_head + t).

        `noise`: the sampling and density noise of training (rendering.Noise); False draws the same picture every time.
        `view`: the part that is drawn, all of it if not given; the sizes of the results are then those of the part.
        """
        config = self.config
        view = view or View(config.ray_size, config.ray_size)
        planes = self.generator(theta_BD)
        rays = rendering.camera_rays(view, config.focal / 512, rotation_B33, translation_B3, scale_B)
        feature_BOR, mask_BR = self._volume_in_parts(planes, rays, noise)
        r = view.side
        I_F = feature_BOR.unflatten(-1, (r, r))
        return Rendering(self.superresolution(I_F), I_F[:, :3], I_F, mask_BR.view(-1, 1, r, r))

    def _volume_in_parts(self, planes_B3CHH: Tensor, rays: Rays, noise: Noise) -> tuple[Tensor, Tensor]:
        """Without a gradient to keep, some rays at a time: the peak of memory no longer grows with the picture."""
        if torch.is_grad_enabled() or self._by_blocks(planes_B3CHH):
            return self.volume(planes_B3CHH, rays, noise)
        count = max(1, POINTS_AT_ONCE // (self.config.samples * planes_B3CHH.shape[0]))
        parts = [
            self.volume(planes_B3CHH, Rays(rays.origin_B13, part), noise)
            for part in rays.direction_BR3.split(count, dim=1)
        ]
        return torch.cat([f for f, _ in parts], dim=-1), torch.cat([m for _, m in parts], dim=-1)

    def _by_blocks(self, planes_B3CHH: Tensor) -> bool:
        """Whether blocks.render_rays draws it, which goes by parts itself."""
        return planes_B3CHH.is_cpu and type(self.radiance) is RadianceMLP and self.radiance.linear_colors

    def volume(self, planes_B3CHH: Tensor, rays: Rays, noise: Noise = False) -> tuple[Tensor, Tensor]:
        """Sec. 3.2, volume rendering of any set of rays: I_F as B×O×R and M as B×R."""
        config = self.config
        near_BR, far_BR = rendering.ray_bounds(rays, config)
        depth_BRS, length_BRS = rendering.sample_depths(near_BR, far_BR, config, noise)
        if self._by_blocks(planes_B3CHH):
            added_BRS = rendering.density_noise(depth_BRS, config, noise)
            return render_rays(self.radiance, planes_B3CHH, Samples(*rays, depth_BRS, length_BRS, added_BRS), config)
        points_BRS3 = rays.origin_B13[:, :, None] + depth_BRS[..., None] * rays.direction_BR3[:, :, None]
        feature_BCP = sample_triplane(planes_B3CHH, normalise_points(points_BRS3.flatten(1, 2), config.box))
        stretch_BR1 = rays.direction_BR3.norm(dim=-1, keepdim=True)  # head units per unit of depth
        density_BRS, color_BORS = self.radiance(feature_BCP, rays.direction_BR3 / stretch_BR1)
        sigma_BRS = rendering.activate_density(density_BRS.to(depth_BRS.dtype), config, noise)
        weights_BRS = rendering.compositing_weights(sigma_BRS, length_BRS * stretch_BR1)
        return rendering.composite(weights_BRS, color_BORS, opaque_far=config.compositing == "opaque_far")

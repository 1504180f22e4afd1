"""Ours, no part of the paper: shoulders behind the head.

The volume of Sec. 3.2 turns with the head; shoulders do not. Without a place of their own they are what the picture's
error mostly consists of, and where a driven head turns further than the video's did they tear. Here they are a flat
picture behind the volume, still in the camera's frame but for an affine map that is linear in the head's pose.

Shapes: B batch, O feature_channels (the first three are the colour), r side of the view, R = r², H ray_size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavatar.configs.avatar import AvatarConfig
from lavatar.models.rendering import View, cell_offsets

LEAST, MOST = 0.02, 0.98  # opacity at the beginning: the sigmoid still has a gradient there


class TorsoLayer(nn.Module):
    """Head poses and a view → what lies behind the volume: I_F behind (B×O×R, over white) and its opacity (B×R)."""

    rotation_33: Tensor
    translation_3: Tensor
    scale: Tensor

    def __init__(self, config: AvatarConfig) -> None:
        super().__init__()
        H, channels = config.ray_size, config.feature_channels
        self.feature = nn.Parameter(torch.ones(channels, H, H))
        self.opacity = nn.Parameter(torch.full((1, H, H), LEAST).logit())
        self.motion = nn.Linear(7, 6, bias=False)
        nn.init.zeros_(self.motion.weight)
        self.register_buffer("rotation_33", torch.eye(3))
        self.register_buffer("translation_3", torch.zeros(3))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def begin_with(
        self, image_N3ss: Tensor, mask_N1ss: Tensor, poses: tuple[Tensor, Tensor, Tensor], chin: float
    ) -> None:
        """Before the first step: the mean frame below the chin (a row, in sides of the image), and the mean pose."""
        rotation_N33, translation_N3, scale_N = poses
        u, _, vt = torch.linalg.svd(rotation_N33.mean(0))
        self.rotation_33.copy_(u @ vt)
        self.translation_3.copy_(translation_N3.mean(0))
        self.scale.copy_(scale_N.log().mean().exp())
        side = (self.feature.shape[-1],) * 2
        color, mask = (F.interpolate(p.mean(0, keepdim=True), side, mode="area")[0] for p in (image_N3ss, mask_N1ss))
        self.feature[3:] = 0
        self.feature[:3] = ((color - (1 - mask)) / mask.clamp(min=LEAST)).clamp(0, 1)
        rows = (torch.arange(side[0]) + 0.5) / side[0]
        below = torch.sigmoid((rows - chin) * 40)[:, None]
        self.opacity.copy_((mask * below).clamp(LEAST, MOST).logit())

    def forward(
        self, view: View, rotation_B33: Tensor, translation_B3: Tensor, scale_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        turn_B33 = self.rotation_33.T @ rotation_B33
        turn_B3 = 0.5 * (turn_B33 - turn_B33.mT)[:, (2, 0, 1), (1, 2, 0)]  # sine of the angle, along the axis
        shift_B3 = (translation_B3 - self.translation_3) / self.scale
        pose_B7 = torch.cat([turn_B3, shift_B3, (scale_B / self.scale).log()[:, None]], dim=1)
        affine_B23 = torch.eye(2, 3, device=pose_B7.device) + self.motion(pose_B7).view(-1, 2, 3)
        offset_B2r = 2 * cell_offsets(view, rotation_B33)
        v_Brr, u_Brr = torch.broadcast_tensors(offset_B2r[:, 0, :, None], offset_B2r[:, 1, None, :])
        point_Brr3 = torch.stack([u_Brr, v_Brr, torch.ones_like(u_Brr)], dim=-1).expand(len(pose_B7), -1, -1, -1)
        grid_Brr2 = torch.einsum("bij,brcj->brci", affine_B23, point_Brr3)
        layer_PHH = torch.cat([self.feature, self.opacity.sigmoid()])
        read = F.grid_sample(
            layer_PHH.expand(len(pose_B7), -1, -1, -1), grid_Brr2, mode="bilinear", padding_mode="border",
            align_corners=False,
        ).flatten(2)  # fmt: skip
        opacity_B1R = read[:, -1:]
        return opacity_B1R * read[:, :-1] + (1 - opacity_B1R), opacity_B1R[:, 0]

"""The encoders E and E_shared as published: strided convolutions and a code normalised per sample (Eq. 2).

Shapes: B batch, H W image sides, C channels, D code.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from lavatar.configs.avatar import AvatarConfig


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers of these widths with LeakyReLU between them, none after the last."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.LeakyReLU()]
    return nn.Sequential(*layers[:-1])


def normalise_code(code_BD: Tensor, by: str) -> Tensor:
    """Centre each sample's code and divide it by its own deviation, by its variance (as released), or leave it.

    Dividing by the variance makes the result's deviation the inverse of the input's: the scale of the last linear
    layer is inverted, not removed.
    """
    if by == "none":
        return code_BD
    variance_B1, mean_B1 = torch.var_mean(code_BD, dim=1, keepdim=True)
    divisor_B1 = variance_B1 if by == "variance" else (variance_B1 + 1e-8).sqrt()
    return (code_BD - mean_B1) / divisor_B1


class StridedEncoder(nn.Module):
    """Eq. 2, γ = E(I_face): B×3×H×H in [0, 1] → B×D. Each width is one convolution of stride 2."""

    def __init__(self, face_size: int, widths: Sequence[int], code_dim: int, normalisation: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise((3, *widths)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.InstanceNorm2d(after), nn.LeakyReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.linear = nn.Linear(widths[-1] * (face_size // 2 ** len(widths)) ** 2, code_dim)
        self.normalisation = normalisation

    def forward(self, face_B3HH: Tensor) -> Tensor:
        map_BCHH = self.convolutions(face_B3HH - 0.5)
        return normalise_code(self.linear(map_BCHH.flatten(1)), self.normalisation)


class AvatarEncoder(nn.Module):
    """Eq. 2, θ_p = E(I_face): B×3×H×H in [0, 1] → B×code_dim.

    `encoder_mapping` empty: the normalised code is θ_p (the paper's text). Else the first width is that of the code
    and the rest are hidden widths of an MLP from the code to θ_p (the released model: 256, 256, 256 → 128).
    """

    def __init__(self, config: AvatarConfig) -> None:
        super().__init__()
        widths = (*config.encoder_mapping, config.code_dim)
        self.code = StridedEncoder(config.face_size, config.encoder_widths, widths[0], config.encoder_normalisation)
        self.mapping = mlp(widths) if len(widths) > 1 else nn.Identity()

    def forward(self, face_B3HH: Tensor) -> Tensor:
        theta_BD: Tensor = self.mapping(self.code(face_B3HH))
        return theta_BD

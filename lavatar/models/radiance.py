"""Eq. 3: density, colour and feature from the tri-plane feature and the view direction.

Shapes: B batch, R rays, S samples a ray, C channels of H, O = feature_channels (the first three are the colour).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavatar.configs.avatar import AvatarConfig


def encode_direction(direction_BR3: Tensor, frequencies: int) -> Tensor:
    """d, sin(2^k d), cos(2^k d) for k < frequencies: B×R×(3 + 6·frequencies)."""
    parts = [direction_BR3]
    for k in range(frequencies):
        parts += [torch.sin(direction_BR3 * 2.0**k), torch.cos(direction_BR3 * 2.0**k)]
    return torch.cat(parts, dim=-1)


class PointLinear(nn.Linear):
    """A linear layer on channel-first points: B×C×P → B×O×P, so that the tri-plane's output needs no transposition.

    In memory a point's channels lie side by side, as they come from the tri-plane: the shapes stay, and it is one
    product of plain rows.
    """

    def forward(self, x_BCP: Tensor) -> Tensor:
        return self.rows(x_BCP.mT).mT

    def rows(self, x: Tensor) -> Tensor:
        """The layer on rows of any shape: …×C → …×O."""
        return F.linear(x, self.weight, self.bias)


class RadianceMLP(nn.Module):
    """Eq. 3, (c, σ) = Φ(x, d, θ_p) with F beside c: H (B×C×R·S), d (B×R×3) → density B×R×S, colour B×O×R×S.

    `joint`: one MLP; the hidden layer gives σ, and with the view direction c and F (the paper's "lightweight MLP").
    `separate`: one MLP for σ and one, which also sees the view direction, for c and F (the released model).
    The density is returned before its activation, which belongs to the rendering.
    """

    def __init__(self, config: AvatarConfig) -> None:
        super().__init__()
        self.frequencies, self.sigmoid = config.view_frequencies, config.color_activation == "sigmoid"
        self.separate = config.radiance == "separate"
        view = 3 + 6 * config.view_frequencies if config.view_frequencies else 0
        self.density_in = PointLinear(config.triplane_channels, config.density_hidden)
        self.density_out = PointLinear(config.density_hidden, 1)
        if self.separate:
            self.color_in = PointLinear(config.triplane_channels, config.color_hidden)
            self.view: nn.Linear | None = nn.Linear(view, config.color_hidden, bias=False) if view else None
            self.color_out = PointLinear(config.color_hidden, config.feature_channels)
        else:
            self.view = nn.Linear(view, config.feature_channels, bias=False) if view else None
            self.color_out = PointLinear(config.density_hidden, config.feature_channels)

    @property
    def linear_colors(self) -> bool:
        """Whether colour and feature leave the last layer as they are: then compositing may come before that layer."""
        return not self.sigmoid

    def forward(self, feature_BCP: Tensor, direction_BR3: Tensor) -> tuple[Tensor, Tensor]:
        B, _, P = feature_BCP.shape
        R = direction_BR3.shape[1]
        hidden_BHP = F.leaky_relu_(self.density_in(feature_BCP))
        density_BRS = self.density_out(hidden_BHP).view(B, R, P // R)
        if self.separate:
            hidden_BHP = F.leaky_relu_(self._add_view(self.color_in(feature_BCP), direction_BR3))
            color_BOP = self.color_out(hidden_BHP)
        else:
            color_BOP = self._add_view(self.color_out(hidden_BHP), direction_BR3)
        if self.sigmoid:
            color_BOP = torch.cat([color_BOP[:, :3].sigmoid(), color_BOP[:, 3:]], dim=1)
        return density_BRS, color_BOP.view(B, -1, R, P // R)

    def _add_view(self, x_BCP: Tensor, direction_BR3: Tensor) -> Tensor:
        """The direction's part of the linear layer, computed once a ray instead of once a point."""
        view_BRC = self.seen_from(direction_BR3)
        if view_BRC is None:
            return x_BCP
        B, C, P = x_BCP.shape
        R = direction_BR3.shape[1]
        view_BCR1 = view_BRC.mT[..., None]
        return (x_BCP.view(B, C, R, P // R) + view_BCR1).reshape(B, C, P)

    def seen_from(self, direction_R3: Tensor) -> Tensor | None:
        """That part: …R×3 → …R×(width of the layer); None where colours do not depend on the direction."""
        return None if self.view is None else self.view(encode_direction(direction_R3, self.frequencies))

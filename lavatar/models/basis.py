"""Our tri-plane generator: static planes plus learned basis planes, blended linearly by the code.

The convolutions of the published generator must first learn to pass the code on at all; here every gradient step moves
planes and blending directly, which is what a training of minutes needs.

Shapes: B batch, D code, K basis_count, C channels of one plane, H side of the planes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lavatar.configs.avatar import AvatarConfig


class BasisGenerator(nn.Module):
    """Sec. 3.2, θ → H_xy, H_yz, H_xz (B×3×C×H×H) = static + Σ_k w_k(θ)·basis_k, with w = Wθ.

    A code of zero mean and unit deviation (`whitened` encoder) makes the static planes the mean expression. θ reaches
    the basis through one linear map without bias, so that blending stays linear in θ: codes between two expressions
    give planes between theirs.
    """

    def __init__(self, config: AvatarConfig) -> None:
        super().__init__()
        C, H = config.triplane_channels, config.triplane_size
        self.planes = nn.Parameter(0.1 * torch.randn(3, C, H, H))
        self.basis = nn.Parameter(torch.zeros(config.basis_count, 3 * C * H * H))
        self.weights = nn.Linear(config.code_dim, config.basis_count, bias=False)
        nn.init.eye_(self.weights.weight)

    def forward(self, theta_BD: Tensor) -> Tensor:
        offset_BP: Tensor = self.weights(theta_BD) @ self.basis
        return self.planes + offset_BP.view(-1, *self.planes.shape)

"""Sec. 5.2, Coeff+Tri-plane and NeRFace: the code is not learned but given, as a template's expression coefficients.

Shapes: B batch, N frames, K coefficients (code_dim).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lavatar.configs.avatar import AvatarConfig

STILL = 1e-3
"""A coefficient that moves less than this in training is left out: its noise would be blown up."""
MOST = 5.0
"""Deviations that a coefficient may be away from its mean: further out the decoder has seen nothing."""


class CoefficientEncoder(nn.Module):
    """B×K coefficients → θ (B×K): the same numbers, of mean 0 and deviation 1 over the training set, within ±MOST."""

    mean: Tensor
    gain: Tensor

    def __init__(self, config: AvatarConfig) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(config.code_dim))
        self.register_buffer("gain", torch.ones(config.code_dim))

    @torch.no_grad()
    def fix(self, coefficients_NK: Tensor) -> None:
        """Take the statistics of the training set."""
        deviation_K, mean_K = torch.std_mean(coefficients_NK, dim=0)
        self.mean.copy_(mean_K)
        self.gain.copy_(
            torch.where(deviation_K < STILL, torch.zeros_like(deviation_K), 1 / deviation_K.clamp(min=STILL))
        )

    def forward(self, coefficients_BK: Tensor) -> Tensor:
        return ((coefficients_BK - self.mean) * self.gain).clamp(-MOST, MOST)

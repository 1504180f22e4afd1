"""LPIPS (Zhang et al. 2018), the VGG(·) of Eq. 4 and the metric of the evaluation, from a state dict of its weights.

Built without torchvision or the lpips package; a test compares with the latter. Images are B×3×H×W in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Trunk = Literal["vgg", "alex"]


class _Conv(NamedTuple):
    """One convolution of a trunk: its number in torchvision's `features`, and what surrounds it."""

    layer: int
    pool: tuple[int, int] | None = None  # max-pooling (kernel, stride) before it
    stride: int = 1
    padding: int = 1
    tap: bool = False  # the activation after it is compared


_TRUNKS: dict[Trunk, tuple[_Conv, ...]] = {
    "vgg": (
        _Conv(0), _Conv(2, tap=True),
        _Conv(5, (2, 2)), _Conv(7, tap=True),
        _Conv(10, (2, 2)), _Conv(12), _Conv(14, tap=True),
        _Conv(17, (2, 2)), _Conv(19), _Conv(21, tap=True),
        _Conv(24, (2, 2)), _Conv(26), _Conv(28, tap=True),
    ),
    "alex": (
        _Conv(0, stride=4, padding=2, tap=True),
        _Conv(3, (3, 2), padding=2, tap=True),
        _Conv(6, (3, 2), tap=True), _Conv(8, tap=True), _Conv(10, tap=True),
    ),
}  # fmt: skip
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of inputs in [-1, 1], part of the published weights


class LPIPS(nn.Module):
    """VGG(a, b) of Eq. 4: B distances. Frozen: the weights are buffers and no part of a state dict.

    `state` holds `features.N.weight`, `features.N.bias` and `linK.weight` (the files lpips_vgg16, lpips_alexnet).
    """

    def __init__(self, state: Mapping[str, Tensor], trunk: Trunk) -> None:
        super().__init__()
        self.convolutions = _TRUNKS[trunk]
        for conv in self.convolutions:
            for part in ("weight", "bias"):
                given = state[f"features.{conv.layer}.{part}"]
                self.register_buffer(f"{part}{conv.layer}", given.clone(), persistent=False)
        for level in range(sum(conv.tap for conv in self.convolutions)):
            self.register_buffer(f"lin{level}", state[f"lin{level}.weight"].clone(), persistent=False)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)

    def forward(self, a_B3HW: Tensor, b_B3HW: Tensor) -> Tensor:
        distance = a_B3HW.new_zeros(a_B3HW.shape[0])
        for level, (a, b) in enumerate(zip(self.features(a_B3HW), self.features(b_B3HW), strict=True)):
            squared = (a - b).square()
            distance = distance + F.conv2d(squared, self.get_buffer(f"lin{level}")).mean(dim=(1, 2, 3))
        return distance

    def features(self, image_B3HW: Tensor) -> list[Tensor]:
        """Activations at the taps, each of unit length over its channels."""
        x = (image_B3HW * 2 - 1 - self.get_buffer("shift")) / self.get_buffer("scale")
        taps = []
        for conv in self.convolutions:
            if conv.pool:
                x = F.max_pool2d(x, *conv.pool)
            weight, bias = self.get_buffer(f"weight{conv.layer}"), self.get_buffer(f"bias{conv.layer}")
            x = F.relu(F.conv2d(x, weight, bias, stride=conv.stride, padding=conv.padding))
            if conv.tap:
                taps.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        return taps

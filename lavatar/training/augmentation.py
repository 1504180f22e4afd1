"""Random changes of the encoder's input, so that the code holds the expression and not the crop or the light.

Everything is drawn from a generator given by the caller: a resumed training sees the same changes.
Shapes: B batch, H side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def generator_for(seed: int, *parts: int) -> Generator:
    """A CPU generator that depends on all the numbers: (seed, step, rank) and what it is for."""
    state = seed
    for part in parts:
        state = (state * 1_000_003 + part + 0x9E3779B9) % (2**63 - 1)
    return Generator().manual_seed(state)


def jitter(face_B3HH: Tensor, amount: float, generator: Generator) -> Tensor:
    """Shift, scale and turn of each face: deviation `amount` in sides of the crop (and in radians)."""
    if amount == 0:
        return face_B3HH
    B = face_B3HH.shape[0]
    normal_B4 = torch.randn(B, 4, generator=generator).clamp(-2.5, 2.5) * amount
    scale, turn = torch.exp(normal_B4[:, 2]), normal_B4[:, 3]
    cos, sin = scale * torch.cos(turn), scale * torch.sin(turn)
    rows = [torch.stack([cos, -sin, 2 * normal_B4[:, 0]], -1), torch.stack([sin, cos, 2 * normal_B4[:, 1]], -1)]
    affine_B23 = torch.stack(rows, dim=1).to(face_B3HH.device)
    return _warp(face_B3HH, F.affine_grid(affine_B23, list(face_B3HH.shape), align_corners=False))


def tint(face_B3HH: Tensor, amount: float, generator: Generator) -> Tensor:
    """Contrast and brightness of each face, and each of its channels, changed by a factor of deviation `amount`."""
    if amount == 0:
        return face_B3HH
    B = face_B3HH.shape[0]
    normal_B7 = torch.randn(B, 8, generator=generator).clamp(-2.5, 2.5).to(face_B3HH.device) * amount
    gain = torch.exp(normal_B7[:, :3] * 0.5 + normal_B7[:, 6:7])[..., None, None]
    offset = (normal_B7[:, 3:6] * 0.25 + 0.5 * normal_B7[:, 7:8])[..., None, None]
    return ((face_B3HH - 0.5) * gain + 0.5 + offset).clamp(0, 1)


def add_noise(face_B3HH: Tensor, amount: float, generator: Generator) -> Tensor:
    """Independent noise of deviation `amount` on every pixel."""
    if amount == 0:
        return face_B3HH
    return face_B3HH + amount * torch.randn(face_B3HH.shape, generator=generator).to(face_B3HH.device)


def _warp(face_B3HH: Tensor, grid_BHH2: Tensor) -> Tensor:
    return F.grid_sample(face_B3HH, grid_BHH2, mode="bilinear", padding_mode="border", align_corners=False)

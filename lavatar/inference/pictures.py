"""Between pictures (uint8 RGB, BHW3) and tensors (float, B3HW, [0, 1])."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_tensor(pictures_BHW3: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (B, H, W, 3) → float (B, 3, H, W) in [0, 1]."""
    pictures = torch.from_numpy(np.ascontiguousarray(pictures_BHW3)).to(device)
    return pictures.permute(0, 3, 1, 2).contiguous().float().div_(255)


def to_pictures(images_B3HW: Tensor) -> np.ndarray:
    """Floats in [0, 1] → uint8 (B, H, W, 3), rounded; what lies outside is clipped."""
    pictures = images_B3HW.clamp(0, 1).mul(255).round().to(torch.uint8)
    return pictures.permute(0, 2, 3, 1).contiguous().cpu().numpy()

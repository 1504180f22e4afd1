"""Image metrics of Sec. 5.2, one value an image. Images are B×3×H×W in [0, 1] on white.

LPIPS (AlexNet) is models.perceptual.LPIPS with the trunk "alex"; SSIM is models.ssim.ssim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lavatar.models.perceptual import LPIPS
from lavatar.models.ssim import ssim

__all__ = ["image_metrics", "mse", "psnr", "ssim"]


def mse(a_B3HW: Tensor, b_B3HW: Tensor) -> Tensor:
    """Mean squared error of each image."""
    return (a_B3HW - b_B3HW).square().flatten(1).mean(dim=1)


def psnr(a_B3HW: Tensor, b_B3HW: Tensor) -> Tensor:
    """−10·log10(MSE) of each image, in dB for the peak 1; infinite for equal images."""
    return -10 * torch.log10(mse(a_B3HW, b_B3HW))


@torch.no_grad()
def image_metrics(a_B3HW: Tensor, b_B3HW: Tensor, lpips: LPIPS | None = None) -> dict[str, Tensor]:
    """mse, psnr, ssim and, where its weights are given, lpips: B values each."""
    a_B3HW, b_B3HW = a_B3HW.clamp(0, 1), b_B3HW.clamp(0, 1)
    values = {"mse": mse(a_B3HW, b_B3HW), "psnr": psnr(a_B3HW, b_B3HW), "ssim": ssim(a_B3HW, b_B3HW)}
    if lpips is not None:
        values["lpips"] = lpips(a_B3HW, b_B3HW)
    return values

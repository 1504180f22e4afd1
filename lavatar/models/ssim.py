"""Structural similarity (Wang et al. 2004): Gaussian window 11, σ 1.5, K 0.01 and 0.03, images in [0, 1].

Only windows that lie inside the image count, as in scikit-image with gaussian_weights=True and population covariance.
"""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def ssim(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Mean similarity of each image over channels and windows: B values in [-1, 1]; 1 for equal images.

    In fp32 also under autocast: a variance is a small difference of large numbers.
    """
    B, _, H, W = a_BCHW.shape
    exact = torch.promote_types(a_BCHW.dtype, torch.float32)
    a_BCHW, b_BCHW = a_BCHW.to(exact), b_BCHW.to(exact)
    moments = torch.stack([a_BCHW, b_BCHW, a_BCHW.square(), b_BCHW.square(), a_BCHW * b_BCHW])
    mean_a, mean_b, mean_aa, mean_bb, mean_ab = _blur(moments.reshape(-1, H, W)).view(5, B, -1)
    variance_a, variance_b = mean_aa - mean_a.square(), mean_bb - mean_b.square()
    covariance = mean_ab - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a.square() + mean_b.square() + C1)
    structure = (2 * covariance + C2) / (variance_a + variance_b + C2)
    return (luminance * structure).mean(dim=1)


def _blur(x_NHW: Tensor) -> Tensor:
    """Gaussian means of all windows inside the image: N×H×W → N×(H − 10)×(W − 10).

    On the CPU rows and columns are each one product with a banded matrix, several times faster than convolutions. A GPU
    may round the factors of both to ten bits (TF32), which leaves nothing of a variance; sums of shifted images it
    does not round.
    """
    H, W = x_NHW.shape[-2:]
    if x_NHW.is_cuda:
        return _shifted_sum(_shifted_sum(x_NHW, -1), -2)
    with torch.autocast(x_NHW.device.type, enabled=False):
        return _band(H, x_NHW).T @ (x_NHW @ _band(W, x_NHW))


def _shifted_sum(x_NHW: Tensor, axis: int) -> Tensor:
    """Gaussian means along one axis, which gets shorter by 10."""
    count = x_NHW.shape[axis] - WINDOW + 1
    parts = [x_NHW.narrow(axis, i, count) * k for i, k in enumerate(_window(x_NHW).tolist())]
    return torch.stack(parts).sum(dim=0)


def _window(like: Tensor) -> Tensor:
    """The Gaussian's values, of sum 1."""
    offset = torch.arange(WINDOW, device=like.device, dtype=like.dtype) - WINDOW // 2
    kernel = torch.exp(-offset.square() / (2 * SIGMA**2))
    return kernel / kernel.sum()


def _band(side: int, like: Tensor) -> Tensor:
    """side×(side − 10): column j holds the Gaussian window that begins at j."""
    kernel = _window(like)
    band = like.new_zeros(side, side - WINDOW + 1)
    start = torch.arange(side - WINDOW + 1, device=like.device)
    for step in range(WINDOW):
        band[start + step, start] = kernel[step]
    return band

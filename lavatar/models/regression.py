"""Linear regression in closed form: what our linear layers begin at. Shapes: N samples, F inputs, D outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def begin_at_regression(
    layer: nn.Linear, input_NF: Tensor, output_ND: Tensor, damping: float, noise_FF: Tensor | None = None
) -> None:
    """Sets a linear layer to the ridge regression of the outputs on the inputs.

    `damping` is added to the diagonal as a fraction of the inputs' mean variance. `noise_FF` is the covariance of what
    the inputs will hold besides later on: the regression then relies on it as little as on noise.
    """
    x, y = input_NF.double(), output_ND.double()
    mean_F, mean_D = x.mean(0), y.mean(0)
    centred_NF = x - mean_F
    gram_FF = centred_NF.T @ centred_NF
    gram_FF += damping * gram_FF.diagonal().mean() * torch.eye(len(gram_FF), dtype=x.dtype, device=x.device)
    if noise_FF is not None:
        gram_FF += len(x) * noise_FF.to(x)
    weight_FD = torch.linalg.solve(gram_FF, centred_NF.T @ (y - mean_D))
    layer.weight.copy_(weight_FD.T)
    layer.bias.copy_(mean_D - mean_F @ weight_FD)


def unseen_covariance(own_NF: Tensor, other_MF: Tensor) -> Tensor:
    """F×F: covariance of the part of `other` in directions in which `own` hardly varies. Both vary about 0.

    The part seen is the best linear guess of `other` from `own`'s distribution, with noise of `own`'s mean variance.
    """
    own, other = own_NF.double(), other_MF.double()
    covariance_FF = own.T @ own / len(own)
    noisy_FF = covariance_FF + covariance_FF.diagonal().mean() * torch.eye(own.shape[1]).to(own)
    unseen_MF = other - other @ torch.linalg.solve(noisy_FF, covariance_FF)
    return unseen_MF.T @ unseen_MF / len(other)

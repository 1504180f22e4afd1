"""Linear regression in closed form: what our linear layers begin at. Shapes: N samples, F inputs, D outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def begin_at_regression(layer: nn.Linear, input_NF: Tensor, output_ND: Tensor, damping: float) -> None:
    """Sets a linear layer to the ridge regression of the outputs on the inputs.

    `damping` is added to the diagonal as a fraction of the inputs' mean variance.
    """
    x, y = input_NF.double(), output_ND.double()
    mean_F, mean_D = x.mean(0), y.mean(0)
    centred_NF = x - mean_F
    gram_FF = centred_NF.T @ centred_NF
    gram_FF += damping * gram_FF.diagonal().mean() * torch.eye(len(gram_FF), dtype=x.dtype, device=x.device)
    weight_FD = torch.linalg.solve(gram_FF, centred_NF.T @ (y - mean_D))
    layer.weight.copy_(weight_FD.T)
    layer.bias.copy_(mean_D - mean_F @ weight_FD)
